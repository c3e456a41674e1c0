"""The calls that change backends: each is tried out, stored, put in force, and seen to the end.

A new version or config is a candidate (deployments.py) until its replicas are ready. The names
and parameters are the wire's; how a call is answered is calls.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import asdict, replace

from headgate import logs
from headgate.core import goals as change
from headgate.core import reconcile
from headgate.core.defaults import resolve
from headgate.core.state import BackendGoal, Facts, Goals
from headgate.errors import HeadgateError

if TYPE_CHECKING:
    from headgate.controller.controller import Controller

log = logs.get("calls")

#: How long a failed reconfigure waits until the old user_config is in force again everywhere.
REVERT_S = 10.0


class Code(Struct):
    """The parameters of create_backend and update_backend."""

    tag: str
    code: bytes
    facts: Facts | None = None
    given: dict[str, Any] = {}
    user_config: bytes | None = None
    env: dict[str, str] | None = None
    resources: dict[str, Any] | None = None


class Config(Struct):
    """The parameters of update_backend_config."""

    tag: str
    given: dict[str, Any] = {}
    user_config: bytes | None = None
    has_user_config: bool = False


class Backends:
    """The public calls about backends of one controller."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    async def do_create_backend(self, call: str, params: Any) -> None:
        new = msgspec.convert(params, Code)
        async with self._controller.deployments.turn(new.tag):
            if self._is_repeat(new.tag, call):
                return await self._settled(new.tag)
            goal = self._goal(new, BackendGoal(new.tag, 0, "", resolve({}, Facts()), Facts()), call)
            change.add_backend(self._controller.goals, goal)
            await self._deploy(goal, new.facts is None, change.add_backend)
        return None

    async def do_update_backend(self, call: str, params: Any) -> None:
        new = msgspec.convert(params, Code)
        async with self._controller.deployments.turn(new.tag):
            if self._is_repeat(new.tag, call):
                return await self._settled(new.tag)
            old = change.find_backend(self._controller.goals, new.tag)
            goal = self._goal(new, old, call)
            await self._deploy(goal, new.facts is None, change.replace_backend)
        return None

    def _goal(self, new: Code, old: BackendGoal, call: str) -> BackendGoal:
        """The goal for new code; what is not given is as it was."""
        controller = self._controller
        # Code that only a replica can load is taken at its word until one has.
        facts = new.facts or Facts(accepts_batch=True)
        given = {**old.given, **new.given}
        settings = resolve(given, facts)
        user_config = old.user_config if new.user_config is None else controller.store.put(new.user_config)
        version = change.next_version(controller.goals, new.tag, controller.fleet.versions(new.tag))
        return BackendGoal(
            new.tag,
            version,
            controller.store.put(new.code),
            settings,
            facts,
            given,
            user_config,
            old.config_version,
            old.env if new.env is None else tuple(sorted(new.env.items())),
            old.resources if new.resources is None else new.resources,
            call,
        )

    async def _deploy(self, goal: BackendGoal, learn: bool, store: Any) -> None:
        """Try `goal` out; with `learn`, what its replicas say of the code is part of what is stored."""

        def commit(goals: Goals, reached: BackendGoal) -> Goals:
            facts = self._controller.fleet.facts(reached) if learn else None
            if facts is not None:
                reached = replace(reached, facts=facts, settings=resolve(reached.given, facts))
            changed: Goals = store(goals, reached)
            return changed

        await self._controller.deploy(goal, commit)

    def _is_repeat(self, tag: str, call: str) -> bool:
        return any(goal.tag == tag and goal.call == call for goal in self._controller.goals.backends)

    async def _settled(self, tag: str) -> None:
        """Wait until a stored change of a backend has had its effect."""
        controller = self._controller
        await controller.until(lambda: self._is_settled(tag))
        await controller.in_force(controller.publisher.snapshot.version)

    def _is_settled(self, tag: str) -> bool:
        """Whether the backend has the replicas that it should have and no others of its version."""
        for goal in self._controller.goals.backends:
            if goal.tag == tag:
                there = self._controller.fleet.of(tag)
                same = [one for one in there if one.version == goal.version]
                return reconcile.reached(goal, there) and len(same) <= goal.settings.num_replicas
        return True

    async def do_update_backend_config(self, call: str, params: Any) -> None:
        new = msgspec.convert(params, Config)
        controller = self._controller
        async with controller.deployments.turn(new.tag):
            if not self._is_repeat(new.tag, call):
                blob: Any = UNSET
                if new.has_user_config:
                    blob = None if new.user_config is None else controller.store.put(new.user_config)
                used = controller.fleet.newest_config(new.tag)
                goals = change.change_config(
                    controller.goals, new.tag, new.given, user_config=blob, used=used, call=call
                )
                await self._try_config(change.find_backend(goals, new.tag))
            await self._settled(new.tag)

    async def _try_config(self, goal: BackendGoal) -> None:
        try:
            await self._controller.deploy(goal, _put)
        except HeadgateError:
            try:
                async with asyncio.timeout(REVERT_S):
                    await self._settled(goal.tag)
            except TimeoutError:
                log.error("backend %s has not gone back to its old user_config", goal.tag)
            raise

    async def do_delete_backend(self, call: str, params: Any) -> None:
        tag, force = params["tag"], params.get("force", False)
        controller = self._controller
        change.remove_backend(controller.goals, tag)
        controller.deployments.cancel(tag, f"backend {tag!r} was deleted while it was being started")
        async with controller.deployments.turn(tag):
            version = controller.commit(lambda goals: change.remove_backend(goals, tag))
            await controller.in_force(version)
            if force:
                controller.stop_now(tag)
            await controller.until(lambda: not controller.fleet.versions(tag))

    async def do_list_backends(self, call: str, params: Any) -> Any:
        return {goal.tag: self._described(goal) for goal in self._controller.goals.backends}

    def _described(self, goal: BackendGoal) -> dict[str, Any]:
        blob = None if goal.user_config is None else self._controller.store.get(goal.user_config)
        return {"given": goal.given, "settings": asdict(goal.settings), "user_config": blob}


def _put(goals: Goals, goal: BackendGoal) -> Goals:
    return replace(goals, backends=tuple(goal if old.tag == goal.tag else old for old in goals.backends))
