"""One backend as one router sees it: its waiting line, its replicas' load, its links.

Which replica is next and who waits is decided by core/assignment.py, when a request whose replica was
lost is tried again by core/retries.py; the links are wire/replica_link.py and, to other nodes,
wire/remote_link.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Protocol

from headgate.core.assignment import ReplicaSet, Waiting, assign
from headgate.core.drain_rate import DrainRate
from headgate.core.retries import Retries
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
    def expire(self, caller: Caller) -> None: ...
    def start_task(self, coroutine: Any) -> None: ...


class BackendRoute:
    """One backend as one router sees it: its waiting line, its replicas' load, its links."""

    def __init__(self, router: Routes, view: BackendView) -> None:
        self.router = router
        self.view = view
        self.waiting: Waiting[Caller] = Waiting()
        self.retries: Retries[Caller] = Retries()
        self._again, self._retried = self.retries.waiting, self.retries.under_way
        self.replicas = ReplicaSet(router.chance)
        self.links: dict[str, ReplicaLink] = {}
        self.addresses: dict[str, ReplicaAddress] = {}
        self._cold: set[str] = set()  # the first replicas, until each was dialled once
        self._early: list[Caller] = []  # came before that: sent then, spread over all, shed if too many
        self.completed = 0  # answers so far, for the drain rate
        self._drain = DrainRate()
        self._arrivals = 0
        self._ended = False
        self._lined = False  # whether anybody waits
        self._straight: ReplicaLink | None = None  # to the only replica, while nobody waits
        self._most = 0  # requests at one replica
        self.timeout_s: float | None = None

    # --- requests ---

    def submit(self, caller: Caller) -> None:
        """Send a request, or line it up, or shed it."""
        caller.backend = self
        caller.order = self._arrivals = self._arrivals + 1
        link = self._straight
        if link is not None and (counted := link.counted).load < self._most and not caller.tries:
            counted.load += 1
            link.call(caller, 0)
        elif self._cold:
            self._wait_for_dial(caller)
        else:
            self._submit_to_any(caller)

    def _submit_to_any(self, caller: Caller) -> None:
        if caller.tries:  # routed anew: it stays within the budget
            self.retries.add(caller)
            self.dispatch()
            return
        if not self._lined:
            slot = self.replicas.reserve()
            if slot is not None:
                self.links[slot[0]].call(caller, slot[1])
                return
        limit = self._limit(caller)
        if self.waiting.push(caller, limit):
            if not self._lined:
                self._line_changed()
        else:
            self._shed(caller, limit)

    def _wait_for_dial(self, caller: Caller) -> None:
        """Nothing is known of the replicas yet: as many wait as they may hold and the line may."""
        limit = self._limit(caller)
        if limit is not None and len(self._early) >= limit + self._slots():
            self._shed(caller, limit)
        else:
            self._early.append(caller)

    def _slots(self) -> int:
        return self.view.settings.max_concurrent_queries * max(1, len(self.addresses))

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
        """Send what waits to replicas that have room: first what is to be tried again, then the line."""
        if self._again or self._retried:
            self._retry()
        leaving, late = assign(self.waiting, self.replicas, self.router.loop.time())
        for caller, replica, want in leaving:
            self.links[replica].call(caller, want)
        self._line_changed()
        for caller in late:
            self.router.expire(caller)

    def _line_changed(self) -> None:
        """Note when a line begins and ends."""
        is_line = bool(self.waiting)
        if is_line is not self._lined:
            self._lined = is_line
            self._look_ahead()
            (self._drain.begin if is_line else self._drain.end)(self.router.loop.time(), self.completed)

    def _look_ahead(self) -> None:
        """Note where the next request goes if that can only be one replica."""
        only = self.replicas.only
        self._straight = None if only is None or self._cold or self._lined else self.links[only.name]

    def _retry(self) -> None:
        now = self.router.loop.time()
        for caller in [caller for caller in self._again if caller.deadline <= now]:
            self.router.expire(caller)
        active = len(self._again) + len(self.waiting) + self._running()
        room = self.retries.room(active)
        for left in reversed(range(room)):
            slot = self.replicas.reserve(left + len(self.waiting))
            if slot is None:
                return
            self.links[slot[0]].call(self.retries.take(), slot[1])

    def _running(self) -> int:
        return sum(self.replicas.in_flight(replica) for replica in self.links)

    def withdraw(self, caller: Caller) -> None:
        """The request does not wait any more."""
        if caller in self._early:
            self._early.remove(caller)
        elif not self.retries.remove(caller):
            self.waiting.remove(caller)
            self._line_changed()

    def again(self, caller: Caller) -> None:
        """The request goes back to the head of the line; the caller of this dispatches."""
        if self._ended:
            self.router.route_again(caller)
        elif caller.tries:
            self.retries.add(caller)
        else:
            self.waiting.push_front(caller)
            self._line_changed()

    def answered(self, count: int) -> None:
        """So many slots are free again."""
        self.completed += count
        if self._lined or self._again or self._retried:
            self.dispatch()

    @property
    def trouble(self) -> str:
        """Why there is no replica; "" if there is one, or one is on its way."""
        return self.view.trouble

    def _overloaded(self, limit: int | None) -> HeadgateError:
        running = sum(self.replicas.in_flight(replica) for replica in self.links)
        waiting = len(self.waiting) + len(self._early)
        retry_s = self._drain.retry_after_s(self.router.loop.time(), self.completed, running + waiting)
        error = BackendOverloaded(
            f"backend {self.view.tag!r} is full: {running} requests in flight and {waiting} "
            f"waiting (limits {self._slots()} and {limit}); "
            + (f"it has no replica: {self.trouble}" if self.trouble else _MEND_FULL)
            + f", or retry in {retry_s} s"
        )
        error.retry_after_s = retry_s
        return error

    # --- replicas ---

    def follow(self, view: BackendView) -> None:
        """Obey a newer description of this backend."""
        self.view = view
        self.timeout_s = view.settings.request_timeout_s
        was, self.addresses = self.addresses, {replica.id: replica for replica in view.replicas}
        self._configure()
        if not self.links.keys() & self.addresses.keys():  # a new version has none of the old one's
            self._cold |= self.addresses.keys() - was.keys()
        for gone in self._cold - self.addresses.keys():
            self._dialled(gone)
        self._look_ahead()
        for replica in view.replicas:
            if replica.id in self.links:
                self.links[replica.id].keep()
            elif replica.id not in was:
                self.router.start_task(self._dial(replica))
        for link in list(self.links.values()):
            if link.replica.id not in self.addresses:
                link.retire()
        self.dispatch()

    async def _dial(self, replica: ReplicaAddress) -> None:
        while self._lacks(replica):
            try:
                link = await open_replica_link(self.router, self, replica)
            except (OSError, ProtocolError) as error:
                log.debug("replica %s does not answer yet: %s", replica.id, error)
                self._dialled(replica.id)
                await asyncio.sleep(_REDIAL_S)
                continue
            if not self._lacks(replica):  # any more: nobody would ever close this link
                link.discard()
                return
            self.links[replica.id] = link
            self._configure()
            self.replicas.resume(replica.id)
            self.dispatch()
            self._dialled(replica.id)  # after those who have waited longer
            return

    def _lacks(self, replica: ReplicaAddress) -> bool:
        """Whether it is still listed there, and has no link."""
        return not self._ended and self.addresses.get(replica.id) == replica and replica.id not in self.links

    def _dialled(self, replica_id: str) -> None:
        self._cold.discard(replica_id)
        if not self._cold:
            self._look_ahead()
            early, self._early = self._early, []
            now = self.router.loop.time()
            for caller in early:
                if caller.deadline <= now:
                    self.router.expire(caller)
                else:
                    self.submit(caller)

    def _configure(self) -> None:
        usable = [
            replica for replica in self.addresses if replica in self.links and not self.links[replica].closed
        ]
        near = [replica for replica in usable if self.addresses[replica].node == self.router.node]
        self._most = self.view.settings.max_concurrent_queries
        self.replicas.configure(usable, self._most, near=near)
        for replica in usable:
            self.links[replica].counted = self.replicas.replica(replica)
        self._look_ahead()

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
        if caller.tries < MAX_TRIES:
            self.again(caller)
        elif caller.ran_twice:
            self._died(caller, f"{caller.tries} times, once while it ran the request", started=True)
        else:
            self._died(caller, f"{caller.tries} times before it started the request", started=False)

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
        self._cold.clear()
        self._configure()
        early, self._early = self._early, []
        for caller in early:
            self.router.route_again(caller)
        for caller in self.retries.clear():
            self.router.route_again(caller)
        while self.waiting:
            self.router.route_again(self.waiting.pop())
        for link in list(self.links.values()):
            link.retire()
