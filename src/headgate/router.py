"""One request's way to a replica: endpoint, backend, a slot, the link, and back.

A Router lives on one event loop and follows one snapshot. It decides nothing itself: the
backend is chosen by core/traffic.py, the replica and the order of those that wait by
core/assignment.py. What stands here finds a request's backend, gives up on those whose deadline
passed, and follows the snapshot; each backend's line and links are backend_route.py.

There is no task, future or timer per request: whoever waits is a `Caller` whose methods are
called. A request that had not started when its replica died is sent elsewhere, one that had
started never is (unless its backend is idempotent).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from headgate.backend_route import BackendRoute
from headgate.core import framing, traffic
from headgate.core.state import Endpoint, Snapshot
from headgate.errors import EndpointNotFound, RequestTimeout
from headgate.wire.caller import NEVER as _NEVER
from headgate.wire.caller import Caller
from headgate.wire.home import LOCAL

__all__ = ["Caller", "Router"]

SWEEP_S = 0.05
PING_S = 1.0
SILENT_S = 2.5  # looked at once a second: after 3 s at the latest


class Router:
    """Sends requests to replicas as the newest snapshot says.

    token         the instance's, for the handshake with replicas
    name          this process's id, under which a replica may fence it
    node          where this process is: replicas of the same node come first, others are reached by TCP
    arena_fd      shared memory passed to replicas for large bodies
    queue_limit   how many requests may wait per backend where its config does not say
    """

    def __init__(
        self,
        token: bytes,
        name: str,
        *,
        node: str = LOCAL,
        arena_fd: int | None = None,
        on_free: Callable[[int], None] = lambda offset: None,
        queue_limit: int | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.snapshot = Snapshot()
        self.token = token
        self.name = name
        self.node = node
        self.arena_fd = arena_fd
        self.on_free = on_free
        self.queue_limit = queue_limit
        self.chance = chance
        self.loop = asyncio.get_running_loop()
        self.backends: dict[str, BackendRoute] = {}
        self.endpoints: dict[str, Endpoint] = {}
        #: The backend of an endpoint that has this one alone, and no shadow.
        self._sole: dict[str, tuple[Endpoint, BackendRoute]] = {}
        self.timed: set[Caller] = set()  # callers with a deadline, waiting or in flight
        self._stale: list[tuple[int, Caller]] = []  # fenced: wait for a newer snapshot
        self._sweeper: asyncio.TimerHandle | None = None
        self._pinger = self.loop.call_later(PING_S, self._ping)
        self._tasks: set[asyncio.Task[None]] = set()
        self.closed = False

    # --- requests ---

    def submit(self, endpoint: Endpoint, caller: Caller, shard_key: str | None = None) -> None:
        """Send a request. Its answer, or its failure, comes through the caller's methods."""
        caller.gone = caller.answering = caller.ran_twice = False
        caller.tries = 0
        sole = self._sole.get(endpoint.name)
        if sole is not None and sole[0] is endpoint:
            backend = sole[1]
            if backend.timeout_s is None and caller.deadline == _NEVER:
                caller.endpoint = endpoint
                caller.shard_key = shard_key
                backend.submit(caller)
                return
        if endpoint.traffic.shadows:  # first: once the caller is sent, it may be used for another request
            self._shadow(endpoint, caller)
        self._choose(endpoint, caller, shard_key)

    def _choose(self, endpoint: Endpoint, caller: Caller, shard_key: str | None) -> None:
        policy = endpoint.traffic
        weights = policy.weights
        tag = weights[0][0] if len(weights) == 1 else traffic.choose(policy, self.chance(), shard_key)
        backend = self.backends.get(tag)
        if backend is None:
            caller.on_failure(EndpointNotFound(f"endpoint {endpoint.name!r} has no backend {tag!r} any more"))
        else:
            self._send(endpoint, backend, caller, shard_key)

    def _send(self, endpoint: Endpoint, backend: BackendRoute, caller: Caller, shard_key: str | None) -> None:
        caller.endpoint = endpoint
        caller.shard_key = shard_key
        timeout_s = backend.timeout_s
        if timeout_s is not None or caller.deadline != _NEVER:
            self._set_deadline(caller, timeout_s)
            if caller.deadline <= self.loop.time():
                self.expire(caller)
                return
        backend.submit(caller)

    def cancel(self, caller: Caller, timed_out: bool = False) -> None:
        """The caller does not want the answer any more: a waiting request is dropped, a sent one cancelled."""
        self.timed.discard(caller)
        caller.gone = True
        caller.deadline = _NEVER
        if self._stale:
            self._stale = [held for held in self._stale if held[1] is not caller]
        if caller.link is not None:
            caller.link.abandon(caller, timed_out)
        elif caller.backend is not None:
            caller.backend.withdraw(caller)

    def expire(self, caller: Caller) -> None:
        """The deadline has passed: what runs is cancelled, and what waits will never run."""
        error = _late(caller)
        self.cancel(caller, timed_out=True)
        caller.on_failure(error)

    def _shadow(self, endpoint: Endpoint, caller: Caller) -> None:
        if caller.flags & framing.ARENA:  # routed anew, to an endpoint that has gained a shadow: memory has one reader
            return
        for tag in traffic.shadows(endpoint.traffic, self.chance):
            backend = self.backends.get(tag)
            original = caller.original() if backend is not None else None
            if backend is not None and original is not None:
                copy = ShadowCaller(original)
                copy.endpoint = endpoint
                timeout_s = backend.view.settings.request_timeout_s
                if timeout_s is not None:
                    self._set_deadline(copy, timeout_s)
                backend.submit(copy)

    def _set_deadline(self, caller: Caller, timeout_s: float | None) -> None:
        if timeout_s is not None:
            caller.deadline = min(caller.deadline, self.loop.time() + timeout_s)
        self.timed.add(caller)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(SWEEP_S, self._sweep)

    def _sweep(self) -> None:
        now = self.loop.time()
        for caller in [caller for caller in self.timed if caller.deadline <= now]:
            self.expire(caller)
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep) if self.timed else None

    # --- the snapshot ---

    def follow(self, snapshot: Snapshot) -> None:
        """Obey `snapshot` from now on; older ones than the one in force are ignored."""
        if snapshot.version <= self.snapshot.version or self.closed:
            return
        self.snapshot = snapshot
        self.endpoints = {endpoint.name: endpoint for endpoint in snapshot.endpoints}
        self._sole = {}
        views = {view.tag: view for view in snapshot.backends}
        deleted = [self.backends.pop(tag) for tag in list(self.backends) if tag not in views]
        for tag, view in views.items():
            backend = self.backends.get(tag)
            if backend is None:
                backend = self.backends[tag] = BackendRoute(self, view)
            elif backend.view is view:  # what a change does not concern is the same object (core/deltas.py)
                continue
            backend.follow(view)
        self._sole = {
            endpoint.name: (endpoint, backend)
            for endpoint in snapshot.endpoints
            if (backend := self.backends.get(traffic.sole(endpoint.traffic))) is not None
        }
        for backend in deleted:
            backend.end()
        self._resubmit_stale()

    def hold(self, caller: Caller, version: int) -> None:
        """This process was fenced: route the request anew once snapshot `version` is here."""
        if version <= self.snapshot.version:
            self.route_again(caller)
        else:
            self._stale.append((version, caller))

    def _resubmit_stale(self) -> None:
        stale, self._stale = self._stale, []
        for version, caller in stale:
            self.hold(caller, version)

    def route_again(self, caller: Caller) -> None:
        """Send a request that has not started where its endpoint leads now; a shadow is dropped."""
        assert caller.endpoint is not None
        endpoint = self.endpoints.get(caller.endpoint.name)
        if endpoint is None or isinstance(caller, ShadowCaller):
            self.timed.discard(caller)
            caller.on_failure(EndpointNotFound(f"endpoint {caller.endpoint.name!r} was deleted"))
        else:
            self._choose(endpoint, caller, caller.shard_key)

    # --- links ---

    def start_task(self, coroutine: Any) -> None:
        """Run a coroutine that ends with the router."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ping(self) -> None:
        now = self.loop.time()
        for backend in self.backends.values():
            for link in list(backend.links.values()):
                link.ping(now, SILENT_S)
        self._pinger = self.loop.call_later(PING_S, self._ping)

    def close(self) -> None:
        """Close every link. Requests without an answer are given up in silence."""
        self.closed = True
        self._pinger.cancel()
        if self._sweeper is not None:
            self._sweeper.cancel()
        for task in list(self._tasks):
            task.cancel()
        for backend in self.backends.values():
            for link in list(backend.links.values()):
                link.discard()
        self.backends.clear()
        self._sole.clear()


def _late(caller: Caller) -> RequestTimeout:
    name = caller.endpoint.name if caller.endpoint is not None else "?"
    if caller.link is not None:
        why = "while it ran; raise request_timeout_s if that is how long it may take"
    elif caller.backend is not None and caller.backend.trouble:
        why = f"because its backend has no replica: {caller.backend.trouble}"
    else:
        why = "while it waited for a replica; raise request_timeout_s or num_replicas"
    return RequestTimeout(f"the request to endpoint {name!r} passed its deadline {why}")


class ShadowCaller(Caller):
    """A copy of a request whose answer nobody wants."""

    def __init__(self, original: Caller) -> None:
        super().__init__()
        self.meta = original.meta
        self.head = original.head
        if original.segment is not None:  # which is the original's; this is a view of it
            self.flags, self.body = original.inline()
            return
        body = original.body
        self.body = bytes(body) if isinstance(body, memoryview) else body
        self.flags = original.flags

    def on_data(self, source: Any, start: int, end: int) -> None:
        self.grant(end - start)
