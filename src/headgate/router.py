"""One request's way to a replica: endpoint, backend, a slot, the link, and back.

A Router lives on one event loop and follows one snapshot. It decides nothing itself: the
backend is chosen by core/traffic.py, the replica and the order of those that wait by
core/assignment.py; what stands here moves callers between the waiting line and the links
(wire/replica_link.py), gives up on those whose deadline passed, and sheds what is too much.

There is no task, future or timer per request: whoever waits is a `Caller` whose methods are
called. A request that had not started when its replica died is sent elsewhere, one that had
started never is (unless its backend is idempotent).
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from headgate.core import framing, traffic
from headgate.core.assignment import ReplicaSet, Waiting, assign
from headgate.core.state import BackendView, Endpoint, ReplicaAddress, Snapshot
from headgate.errors import (
    BackendOverloaded,
    EndpointNotFound,
    HeadgateError,
    ProtocolError,
    ReplicaDied,
    RequestTimeout,
)
from headgate.wire.replica_link import Caller, ReplicaLink, open_replica_link

__all__ = ["Caller", "Router"]

log = logging.getLogger("headgate.router")

SWEEP_S = 0.05
PING_S = 1.0
SILENT_S = 3.0
MAX_TRIES = 3
_NEVER = float("inf")
_REDIAL_S = 0.05
_MEND_FULL = "raise num_replicas or max_concurrent_queries"


class Router:
    """Sends requests to replicas as the newest snapshot says.

    token         the instance's, for the handshake with replicas
    name          this process's id, under which a replica may fence it
    arena_fd      shared memory passed to replicas for large bodies
    queue_limit   how many requests may wait per backend where its config does not say
    """

    def __init__(
        self,
        token: bytes,
        name: str,
        *,
        arena_fd: int | None = None,
        on_free: Callable[[int], None] = lambda offset: None,
        queue_limit: int | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self.snapshot = Snapshot()
        self.token = token
        self.name = name
        self.arena_fd = arena_fd
        self.on_free = on_free
        self.queue_limit = queue_limit
        self.chance = chance
        self.loop = asyncio.get_running_loop()
        self.backends: dict[str, BackendRoute] = {}
        self.endpoints: dict[str, Endpoint] = {}
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
            return
        caller.endpoint = endpoint
        caller.shard_key = shard_key
        timeout_s = backend.view.settings.request_timeout_s
        if timeout_s is not None or caller.deadline != _NEVER:
            self._set_deadline(caller, timeout_s)
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

    def _shadow(self, endpoint: Endpoint, caller: Caller) -> None:
        if caller.flags & framing.ARENA:  # routed anew, to an endpoint that has gained a shadow: memory has one reader
            return
        for tag in traffic.shadows(endpoint.traffic, self.chance):
            backend = self.backends.get(tag)
            if backend is not None:
                copy = ShadowCaller(caller)
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
            error = _late(caller)
            self.cancel(caller, timed_out=True)
            caller.on_failure(error)
        self._sweeper = self.loop.call_later(SWEEP_S, self._sweep) if self.timed else None

    # --- the snapshot ---

    def follow(self, snapshot: Snapshot) -> None:
        """Obey `snapshot` from now on; older ones than the one in force are ignored."""
        if snapshot.version <= self.snapshot.version or self.closed:
            return
        self.snapshot = snapshot
        self.endpoints = {endpoint.name: endpoint for endpoint in snapshot.endpoints}
        views = {view.tag: view for view in snapshot.backends}
        deleted = [self.backends.pop(tag) for tag in list(self.backends) if tag not in views]
        for tag, view in views.items():
            if tag not in self.backends:
                self.backends[tag] = BackendRoute(self, view)
            self.backends[tag].follow(view)
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


def _late(caller: Caller) -> RequestTimeout:
    name = caller.endpoint.name if caller.endpoint is not None else "?"
    if caller.link is not None:
        why = "while it ran; raise request_timeout_s if that is how long it may take"
    elif caller.backend is not None and caller.backend.trouble:
        why = f"because its backend has no replica: {caller.backend.trouble}"
    else:
        why = "while it waited for a replica; raise request_timeout_s or num_replicas"
    return RequestTimeout(f"the request to endpoint {name!r} passed its deadline {why}")


class BackendRoute:
    """One backend as one router sees it: its waiting line, its replicas' load, its links."""

    def __init__(self, router: Router, view: BackendView) -> None:
        self.router = router
        self.view = view
        self.waiting: Waiting[Caller] = Waiting()
        self.replicas = ReplicaSet(router.chance)
        self.links: dict[str, ReplicaLink] = {}
        self.addresses: dict[str, ReplicaAddress] = {}
        self._cold: set[str] = set()  # the first replicas, until each was dialled once
        self._early: list[Caller] = []  # came before that: sent then, spread over all, shed if too many
        self.completed = 0  # answers so far, for the drain rate
        self._rate_since = router.loop.time()
        self._rate_from = 0
        self._arrivals = 0
        self._ended = False
        self._lined = False  # whether anybody waits; asked twice per request

    # --- requests ---

    def submit(self, caller: Caller) -> None:
        """Send a request, or line it up, or shed it."""
        caller.backend = self
        if self._cold:
            self._early.append(caller)
            return
        self._arrivals += 1
        caller.order = self._arrivals
        if not self._lined:
            slot = self.replicas.reserve()
            if slot is not None:
                self.links[slot[0]].call(caller, slot[1])
                return
        limit = self._limit(caller)
        if self.waiting.push(caller, limit):
            self._lined = True
        else:
            self._shed(caller, limit)

    def _limit(self, caller: Caller) -> int | None:
        limit = self.view.settings.max_queued_requests
        if limit is None:
            limit = self.router.queue_limit if not caller.unlimited else None
        return limit

    def _shed(self, caller: Caller, limit: int | None) -> None:
        self.router.timed.discard(caller)
        caller.on_failure(self._overloaded(limit))

    def refused(self, caller: Caller) -> None:
        """A replica was full: the request waits, or the newest that waits makes room for it."""
        self.again(caller)
        self.dispatch()
        limit = self._limit(caller)
        if limit is not None and len(self.waiting) > limit:
            self._shed(self.waiting.pop_newest(), limit)

    def dispatch(self) -> None:
        """Send what waits to replicas that have room."""
        for caller, replica, want in assign(self.waiting, self.replicas):
            self.links[replica].call(caller, want)
        self._lined = bool(self.waiting)

    def withdraw(self, caller: Caller) -> None:
        """The request does not wait any more."""
        if caller in self._early:
            self._early.remove(caller)
        else:
            self.waiting.remove(caller)
            self._lined = bool(self.waiting)

    def again(self, caller: Caller) -> None:
        """The request goes back to the head of the line; the caller of this dispatches."""
        if self._ended:
            self.router.route_again(caller)
        else:
            self.waiting.push_front(caller)
            self._lined = True

    def answered(self) -> None:
        """A slot is free again."""
        self.completed += 1
        if self._lined:
            self.dispatch()

    @property
    def trouble(self) -> str:
        """Why there is no replica; "" if there is one, or one is on its way."""
        return self.view.trouble

    def _overloaded(self, limit: int | None) -> HeadgateError:
        running = sum(self.replicas.in_flight(replica) for replica in self.links)
        rate = self._drain_rate()
        retry_s = max(1, min(60, round(((len(self.waiting) + running) / rate) if rate else 1)))
        slots = self.view.settings.max_concurrent_queries * max(1, len(self.links))
        error = BackendOverloaded(
            f"backend {self.view.tag!r} is full: {running} requests in flight and {len(self.waiting)} "
            f"waiting (limits {slots} and {limit}); "
            + (f"it has no replica: {self.trouble}" if self.trouble else _MEND_FULL)
            + f", or retry in {retry_s} s"
        )
        error.retry_after_s = retry_s
        return error

    def _drain_rate(self) -> float:
        now = self.router.loop.time()
        elapsed = now - self._rate_since
        rate = (self.completed - self._rate_from) / elapsed if elapsed > 0 else 0.0
        if elapsed > 5.0:
            self._rate_since, self._rate_from = now, self.completed
        return rate

    # --- replicas ---

    def follow(self, view: BackendView) -> None:
        """Obey a newer description of this backend."""
        self.view = view
        was, self.addresses = self.addresses, {replica.id: replica for replica in view.replicas}
        self._configure()
        if not self.links:
            self._cold |= self.addresses.keys() - was.keys()
        for gone in self._cold - self.addresses.keys():
            self._dialled(gone)
        for replica in view.replicas:
            if replica.id not in was:
                self.router.start_task(self._dial(replica))
        for link in list(self.links.values()):
            if link.replica.id not in self.addresses:
                link.retire()
        self.dispatch()

    async def _dial(self, replica: ReplicaAddress) -> None:
        while not self._ended and self.addresses.get(replica.id) == replica:
            try:
                link = await open_replica_link(self.router, self, replica)
            except (OSError, ProtocolError) as error:
                log.debug("replica %s does not answer yet: %s", replica.id, error)
                self._dialled(replica.id)
                await asyncio.sleep(_REDIAL_S)
                continue
            self.links[replica.id] = link
            self._configure()
            self.replicas.resume(replica.id)
            self._dialled(replica.id)
            self.dispatch()
            return

    def _dialled(self, replica_id: str) -> None:
        self._cold.discard(replica_id)
        if not self._cold:
            early, self._early = self._early, []
            for caller in early:
                self.submit(caller)

    def _configure(self) -> None:
        usable = [replica for replica in self.addresses if replica in self.links]
        self.replicas.configure(usable, self.view.settings.max_concurrent_queries)

    def lost(self, link: ReplicaLink) -> None:
        """The link ended: its replica gets nothing more, unless it is still listed and answers again."""
        if self.links.get(link.replica.id) is link:
            del self.links[link.replica.id]
            self.replicas.lost(link.replica.id)
            self._configure()
            if link.replica.id in self.addresses and not self.router.closed:
                self.router.start_task(self._redial(link.replica))

    async def _redial(self, replica: ReplicaAddress) -> None:
        await asyncio.sleep(_REDIAL_S)
        await self._dial(replica)

    def recover(self, caller: Caller, started: bool) -> None:
        """The replica that held this request is gone."""
        idempotent = self.view.settings.idempotent and not caller.answering
        if started and not (idempotent and not caller.ran_twice):
            self._died(caller, "while it ran the request", started=True)
            return
        if started:
            caller.ran_twice = True
        caller.tries += 1
        if caller.tries >= MAX_TRIES:
            self._died(caller, f"{caller.tries} times before it started the request", started=False)
        else:
            self.again(caller)

    def _died(self, caller: Caller, when: str, *, started: bool) -> None:
        self.router.timed.discard(caller)
        error = ReplicaDied(
            f"a replica of backend {self.view.tag!r} died {when}; "
            + ("it is not run again, unless the backend is idempotent=True" if started else "see its log")
        )
        error.started = started
        caller.on_failure(error)

    def end(self) -> None:
        """The backend was deleted."""
        self._ended = True
        self.addresses = {}
        self._configure()
        self._cold.clear()
        early, self._early = self._early, []
        for caller in early:
            self.router.route_again(caller)
        while self.waiting:
            self.router.route_again(self.waiting.pop())
        for link in list(self.links.values()):
            link.retire()


class ShadowCaller(Caller):
    """A copy of a request whose answer nobody wants."""

    def __init__(self, original: Caller) -> None:
        super().__init__()
        self.meta = original.meta
        self.head = original.head
        body = original.body
        self.body = bytes(body) if isinstance(body, memoryview) else body
        self.flags = original.flags

    def on_data(self, source: Any, start: int, end: int) -> None:
        self.grant(end - start)
