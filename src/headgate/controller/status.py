"""What an instance looks like from outside: plain values for `client.status()`, nothing decided here."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

from headgate.core import reconcile
from headgate.core.state import Goals

if TYPE_CHECKING:
    from headgate.controller.controller import Controller


def status(controller: Controller, ready: bool) -> dict[str, Any]:
    """Endpoints, backends, replicas and proxies as they are, and what is waited for."""
    return {
        "ready": ready,
        "snapshot": controller.publisher.snapshot.version,
        "controller": {"pid": os.getpid(), "incarnation": controller.incarnation},
        "endpoints": endpoints(controller.goals),
        "backends": _backends(controller),
        "replicas": _replicas(controller),
        "proxies": _proxies(controller),
        "waiting": list(_waiting(controller)),
    }


def endpoints(goals: Goals) -> list[dict[str, Any]]:
    """Each endpoint, in the order in which they were created."""
    return [
        {
            "name": goal.endpoint.name,
            "route": goal.endpoint.route,
            "methods": list(goal.endpoint.methods),
            "traffic": dict(goal.endpoint.traffic.weights),
            "shadows": dict(goal.endpoint.traffic.shadows),
        }
        for goal in goals.endpoints
    ]


def _backends(controller: Controller) -> list[dict[str, Any]]:
    there = reconcile.by_version(controller.fleet.seen.values())
    failures = controller.fleet.failures
    return [
        {
            "tag": goal.tag,
            "version": goal.version,
            "num_replicas": goal.settings.num_replicas,
            "ready": len(reconcile.serving(goal, there.get((goal.tag, goal.version), ()))),
            "trouble": found.error if (found := failures.get((goal.tag, goal.version))) else "",
            "recycled": controller.fleet.recycled(goal)[0],
            "last_recycled": controller.fleet.recycled(goal)[1],
        }
        for goal in controller.goals.backends
    ]


def _replicas(controller: Controller) -> list[dict[str, Any]]:
    fleet, waits_for = controller.fleet, _waits_for(controller)
    return [
        {
            "id": one.id,
            "backend": one.backend,
            "version": fleet.version(one.id),
            "state": one.phase,
            "pid": one.pid,
            "node": one.node,
            "restarts": fleet.history(one.id)[0],
            "last_error": fleet.history(one.id)[1],
            "waits_for": waits_for.get(one.id, ""),
        }
        for one in fleet.living()
    ]


def _proxies(controller: Controller) -> list[dict[str, Any]]:
    return [
        {
            "id": one.id,
            "pid": one.pid,
            "state": "ready" if one.joined else "starting",
            "address": controller.engine.http_address(one.node),
            "node": one.node,
        }
        for one in controller.proxies.views()
    ]


def _waits_for(controller: Controller) -> dict[str, str]:
    """What the replicas wait for that have no process yet."""
    return {process.id: process.waits_for for process in controller.engine.observe() if process.waits_for}


def _waiting(controller: Controller) -> tuple[str, ...]:
    now = asyncio.get_running_loop().time()
    proxies = controller.proxies.unmet(now)
    if controller.lost is not None:
        return (str(controller.lost), *proxies)
    replicas = reconcile.unmet(
        controller.goals,
        controller.observed(),
        controller.fleet.failures,
        now,
        candidates=controller.deployments.candidates(),
        waits_for=_waits_for(controller),
    )
    return (*proxies, *replicas)
