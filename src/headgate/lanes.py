"""The way of calls to a router: one lane for each event loop that has one.

A sync handle's calls come from any thread to the loop of the headgate thread; those that gather
share one wake-up of it. An async handle's are on their loop already.

A lane sees to it that every call ends: also one whose endpoint is not there yet, and those that
are without an answer when the instance or the loop ends.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic
from typing import Any

from headgate.calls import AwaitedCall, Call, Target
from headgate.errors import EndpointNotFound, InstanceError, RequestCancelled, RequestTimeout
from headgate.instance import Instance
from headgate.reservations import Actors
from headgate.router import Router
from headgate.routers import LoopEnd
from headgate.wire.calling import OVER
from headgate.wire.segments import Store

#: How long a call of a handle with missing_ok waits for its endpoint.
MISSING_S = 5.0
#: Awaited calls that are kept to be used again.
_MOST_SPARE = 1024
_SWEEP_S = 0.25  # how soon a call notices that its instance has ended


class Lane:
    """The way from any thread to the router of one event loop. Made by `lane_of`.

    actors   the replicas as actors (reservations.py); None where they are plain processes
    """

    def __init__(self, instance: Instance, loop: asyncio.AbstractEventLoop) -> None:
        self.instance = instance
        self.loop = loop
        self.actors: Actors | None = getattr(instance.home, "actors", None)
        self.pending: set[Call] = set()  # with the router, or waiting for an endpoint
        self.closed = False
        self.segments = Store(self._later, loop.time)
        self._router: Router | None = None
        self._spare: deque[AwaitedCall] = deque(maxlen=_MOST_SPARE)
        self._woken: deque[AwaitedCall] = deque()
        self._is_waking = False
        self._arrived: deque[Call] = deque()
        self._scheduled = False
        self._missing: dict[Call, asyncio.TimerHandle] = {}  # -> what ends its patience
        self._sweeper: asyncio.TimerHandle | None = None
        self._keeper: LoopEnd | None = None

    # --- from any thread ---

    def put(self, call: Call) -> None:
        """Submit a call from any thread. InstanceError if the loop has ended."""
        self._arrived.append(call)
        if not self._scheduled:
            self._scheduled = True
            self.run(self._drain)

    def cancel(self, call: Call) -> None:
        """Nobody wants this call's answer any more; from any thread."""
        try:
            if asyncio._get_running_loop() is self.loop:
                self._cancel(call)
            else:
                self.run(self._cancel, call)
        except InstanceError as error:
            call.on_failure(error)

    def run(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call `function(*arguments)` on the loop; InstanceError if it has ended."""
        try:
            self.loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            raise InstanceError(
                OVER if self.closed or not self.instance.usable else "the event loop of this call is closed"
            ) from None

    def _later(self, seconds: float, function: Callable[[], object]) -> None:
        self.run(self.loop.call_later, seconds, function)

    def shadowed(self, endpoint: str) -> bool:
        """Whether copies of requests to that endpoint go to shadows; from any thread."""
        known = self.instance.endpoint(endpoint)
        return known is not None and bool(known.traffic.shadows)

    # --- on the loop ---

    def _drain(self) -> None:
        self._scheduled = False
        arrived = self._arrived
        while arrived:
            call = arrived.popleft()
            if not call.done:
                self.submit(call)

    def submit(self, call: Call) -> None:
        """Give a call to the router. It fails as any other way: through the call."""
        router = self._router
        if router is None or router.closed:
            router = self._open()
            if router is None:
                call.on_failure(InstanceError(OVER))
                return
        snapshot = self.instance.snapshot
        if router.snapshot is not snapshot:
            router.follow(snapshot)
        self.pending.add(call)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)
        if call.expires is not None:
            call.deadline = self.loop.time() + call.expires - monotonic()
        endpoint = router.endpoints.get(call.target.endpoint)
        if endpoint is None:
            self._miss(call)
            return
        router.submit(endpoint, call, call.target.options.shard_key)

    def awaited(self, target: Target) -> AwaitedCall:
        """A call to be filled, submitted and awaited."""
        if not self._spare or target.options.timeout_s is not None:
            return AwaitedCall(self, target, self._spare)
        call = self._spare.pop()
        call.target = target
        call.flags = target.flags
        return call

    def wake(self, call: AwaitedCall) -> None:
        """It is done, or was cancelled: have the task that awaits it go on in the loop's next turn."""
        self.pending.discard(call)
        self._woken.append(call)
        if not self._is_waking:
            self._is_waking = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        woken = self._woken
        try:
            for _ in range(len(woken)):
                woken.popleft().go_on()
        finally:  # a task that ends with SystemExit or KeyboardInterrupt ends this too
            self._is_waking = bool(woken)
            if woken:
                self.loop.call_soon(self._go_on)

    def expire(self, call: Call) -> None:
        """Have a call that waits for its arguments end at its deadline."""
        if call.expires is not None:
            self.loop.call_later(max(0.0, call.expires - monotonic()), self._expire, call)

    def _expire(self, call: Call) -> None:
        if not call.done and call not in self.pending:  # else the router sees to it
            call.on_failure(RequestTimeout("the request passed its deadline while it waited for its arguments"))

    def _cancel(self, call: Call) -> None:
        if call.done:
            return
        call.gone = True
        self._forget(call)
        if self._router is not None and call.backend is not None:
            self._router.cancel(call)
        call.on_failure(RequestCancelled("the request was cancelled by its caller"))

    # --- endpoints that are not there ---

    def _miss(self, call: Call) -> None:
        if not call.target.missing_ok:
            call.on_failure(no_endpoint(self.instance, call.target.endpoint))
            return
        until = min(self.loop.time() + MISSING_S, call.deadline)
        self._missing[call] = self.loop.call_at(until, self._give_up, call, until == call.deadline)
        if len(self._missing) == 1:
            self.instance.watch(self._changed)
            self.loop.call_soon(self._look)  # it may have come before the watch began

    def _changed(self) -> None:
        try:
            self.run(self._look)
        except InstanceError:  # the loop was closed, and its calls with it
            self.instance.unwatch(self._changed)

    def _look(self) -> None:
        for call in list(self._missing):
            if self.instance.endpoint(call.target.endpoint) is not None:
                self._forget(call)
                self.submit(call)

    def _give_up(self, call: Call, at_its_deadline: bool) -> None:
        self._forget(call)
        name = call.target.endpoint
        if at_its_deadline:
            call.on_failure(RequestTimeout(f"endpoint {name!r} was not there before the deadline"))
        else:
            call.on_failure(no_endpoint(self.instance, name, f" within {MISSING_S:g} s"))

    def _forget(self, call: Call) -> None:
        timer = self._missing.pop(call, None)
        if timer is not None:
            timer.cancel()
            if not self._missing:
                self.instance.unwatch(self._changed)

    # --- its end ---

    def _open(self) -> Router | None:
        if self.closed or not self.instance.usable:
            return None
        if self._router is not None:  # it was closed: whoever is still with it would wait for ever
            self._fail_all()
        self._router = self.instance.router()
        if self._keeper is None:
            self._keeper = LoopEnd(self.end)
        return self._router

    def _sweep(self) -> None:
        self._sweeper = None
        if not self.instance.usable or self._router is None or self._router.closed:
            self._fail_all()
        elif self.pending:
            self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)

    def retire(self) -> None:
        """Its instance or its loop has ended; from any thread."""
        if self._keeper is not None and self.instance.pid == os.getpid() and not self.loop.is_closed():
            self.run(self._keeper.now)

    def end(self) -> None:
        """The loop ends: nothing is answered any more."""
        self.closed = True
        _lanes.pop((self.instance, self.loop), None)
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.pending.update(self._arrived)
        self._arrived.clear()
        self._fail_all()
        self.segments.close()

    def _fail_all(self) -> None:
        for call in list(self._missing):
            self._forget(call)
        error = InstanceError(
            OVER if not self.instance.usable else "the event loop of this call ended before its answer came"
        )
        for call in list(self.pending):
            call.on_failure(error)


_lanes: dict[tuple[Instance, asyncio.AbstractEventLoop], Lane] = {}
_lanes_lock = threading.Lock()


def lane_of(instance: Instance, loop: asyncio.AbstractEventLoop) -> Lane:
    """The lane to `instance` by the router of `loop`."""
    lane = _lanes.get((instance, loop))
    if lane is not None:
        return lane
    with _lanes_lock:
        for key in [key for key in _lanes if key[1].is_closed() or not key[0].usable]:
            _lanes.pop(key).retire()
        return _lanes.setdefault((instance, loop), Lane(instance, loop))


def no_endpoint(instance: Instance, name: str, when: str = "") -> EndpointNotFound:
    """The error that names the endpoints there are."""
    known = ", ".join(repr(each.name) for each in instance.snapshot.endpoints) or "none"
    return EndpointNotFound(f"there is no endpoint {name!r}{when}; known endpoints: {known}")
