"""One backend as one router sees it: its waiting line, its replicas' load, its links.

Which replica is next and who waits is decided by core/assignment.py; the links are wire/replica_link.py
and, to other nodes, wire/remote_link.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from headgate.core.assignment import ReplicaSet, Waiting, assign
from headgate.core.state import BackendView, ReplicaAddress
from headgate.errors import BackendOverloaded, HeadgateError, ProtocolError, ReplicaDied
from headgate.wire.caller import Caller, Hub
from headgate.wire.remote_link import open_replica_link
from headgate.wire.replica_link import ReplicaLink

log = logging.getLogger("headgate.router")

MAX_TRIES = 3
_REDIAL_S = 0.05
_MEND_FULL = "raise num_replicas or max_concurrent_queries"


class Routes(Hub, Protocol):
    """What a backend's route needs of its router (router.Router)."""

    chance: Callable[[], float]
    queue_limit: int | None
    closed: bool

    def route_again(self, caller: Caller) -> None: ...
    def start_task(self, coroutine: Any) -> None: ...


class BackendRoute:
    """One backend as one router sees it: its waiting line, its replicas' load, its links."""

    def __init__(self, router: Routes, view: BackendView) -> None:
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
        near = [replica for replica in usable if self.addresses[replica].node == self.router.node]
        self.replicas.configure(usable, self.view.settings.max_concurrent_queries, near=near)

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
        started = started or caller.answering  # one that holds its slot for later may not have begun
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
