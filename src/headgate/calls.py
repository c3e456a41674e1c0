"""A handle's call on its way: to the router of an event loop, and back as an outcome.

A `Call` is what the router carries; it keeps its answer as bytes, which whoever waits turns into
a value on a thread of its own: user code never runs on the headgate thread. A `Lane` is the way
from any thread to the router of one loop. Submissions that gather share one wake-up of it.

The rule: a call ends on its lane's loop, exactly once, also when the instance ends under it.
Handles are handle.py; what their callers hold is refs.py.
"""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from collections import deque
from collections.abc import Callable
from itertools import count
from time import monotonic
from typing import Any

import msgspec

from headgate.core import framing
from headgate.errors import (
    BackendOverloaded,
    EndpointNotFound,
    HeadgateError,
    InstanceError,
    ProtocolError,
    ReplicaDied,
    RequestCancelled,
    RequestError,
    RequestTimeout,
)
from headgate.instance import Instance
from headgate.router import Caller, Router
from headgate.wire import payload

#: How long a call of a handle with missing_ok waits for its endpoint.
MISSING_S = 5.0
_POLL_S = 0.02  # how often it looks
_SWEEP_S = 0.25  # how soon a call notices that its instance has ended

ENDED = "this instance has already been shut down, or has ended; call headgate.start() for a new one"

_TOTAL = struct.Struct("<Q")
_ERRORS: dict[int, type[HeadgateError]] = {
    kind.http_status: kind
    for kind in (EndpointNotFound, RequestCancelled, ReplicaDied, BackendOverloaded, RequestTimeout)
}

_numbers = count(1)
_process = b""


def _name_process() -> None:
    global _process
    _process = os.urandom(6).hex().encode()


_name_process()
os.register_at_fork(after_in_child=_name_process)


class Options(msgspec.Struct, frozen=True):
    """What `handle.options(...)` has set so far."""

    method_name: str | None = None
    shard_key: str | None = None
    http_method: str | None = None
    http_headers: dict[str, str] | None = None
    timeout_s: float | None = None


class Target:
    """Where calls go and what they have in common, encoded once."""

    __slots__ = ("_plain", "_with_kwargs", "endpoint", "flags", "missing_ok", "options")

    def __init__(self, endpoint: str, missing_ok: bool, options: Options) -> None:
        self.endpoint = endpoint
        self.missing_ok = missing_ok
        self.options = options
        self.flags = framing.VALUE | (framing.HEAD if options.method_name else 0)
        fields = (endpoint, options.method_name, options.http_method, options.http_headers)
        self._plain = msgspec.msgpack.encode((*fields, False))[1:]  # without the array's own length
        self._with_kwargs = msgspec.msgpack.encode((*fields, True))[1:]

    def meta(self, has_kwargs: bool) -> bytes:
        """A CALL's meta with a new request id: [id, endpoint, method, http method, headers, has kwargs]."""
        rest = self._with_kwargs if has_kwargs else self._plain
        return b"\x96\xb9%b-%012x%b" % (_process, next(_numbers), rest)  # array of 6, str of 25


class Call(Caller):
    """One call, and then its outcome.

    assigned   a replica was chosen, or need not be waited for
    done       `take` gives the value or raises the error
    """

    assigned = False
    done = False
    raw: Any = None  # the encoded value or error
    raised = False  # `raw` is an error
    error: HeadgateError | None = None  # one that came without bytes
    expires: float | None = None  # on time.monotonic
    _buffer: bytearray | None = None
    _filled = 0

    def __init__(self, lane: Lane, target: Target) -> None:
        self.lane = lane
        self.target = target
        self.flags = target.flags
        self.on_assignment: Callable[[], object] | None = None
        self._waiters: list[Callable[[], object]] = []
        if target.options.timeout_s is not None:
            self.expires = monotonic() + target.options.timeout_s

    def fill(self, data: object, kwargs: dict[str, Any]) -> None:
        """Encode the arguments; SerializationError if one cannot travel."""
        if kwargs:
            self.body = b"".join(payload.encode((data, kwargs)))
            self.meta = self.target.meta(True)
        else:
            self.fill_encoded(b"".join(payload.encode(data)))

    def fill_encoded(self, body: Any) -> None:
        """As `fill` without keyword arguments, with data that was encoded before."""
        self.body = body
        self.meta = self.target.meta(False)

    # --- waiting for it ---

    def on_done(self, waiter: Callable[[], object]) -> None:
        """Call `waiter()` once it is done, at once if it is: on the lane's loop or this thread."""
        self._waiters.append(waiter)
        if self.done:
            try:
                self._waiters.remove(waiter)
            except ValueError:  # taken by `_end`, which calls it
                return
            waiter()

    def forget(self, waiter: Callable[[], object]) -> None:
        """The waiter of `on_done` does not wait any more."""
        try:
            self._waiters.remove(waiter)
        except ValueError:
            pass

    def take(self) -> Any:
        """The value; raises the error. Rebuilding either may run code of the user's."""
        if self.error is not None:
            raise self.error
        if self.raised:
            raise payload.decode_error(self.raw)
        return payload.decode(self.raw)

    # --- what the router calls ---

    def on_assigned(self) -> None:
        self.assigned = True
        waiter = self.on_assignment
        if waiter is not None:
            self.on_assignment = None
            waiter()

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self._end(source[start + meta_len : end])

    def on_reply_start(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self._buffer = bytearray(_TOTAL.unpack_from(source, start + meta_len)[0])

    def on_data(self, source: Any, start: int, end: int) -> None:
        size = end - start
        self.grant(size)
        assert self._buffer is not None
        if self._filled + size <= len(self._buffer):  # else on_reply_end finds that it is too much
            self._buffer[self._filled : self._filled + size] = memoryview(source)[start:end]
        self._filled += size

    def on_reply_end(self) -> None:
        buffer, self._buffer = self._buffer, None
        if buffer is None or self._filled != len(buffer):
            self.on_failure(ProtocolError(f"a result came with {self._filled} bytes, not as announced"))
        else:
            self._end(buffer)

    def on_error(self, status: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        raw = bytes(source[start + meta_len : end])
        if flags & framing.VALUE:
            self.raised = True
            self._end(raw)
        else:
            self.on_failure(_ERRORS.get(status, RequestError)(raw.decode("utf-8", "replace")))

    def on_failure(self, error: HeadgateError) -> None:
        if not self.done:
            self.error = error
            self._buffer = None
            self._end(None)

    def _end(self, raw: Any) -> None:
        if self.done:
            return
        self.raw = raw
        self.done = True
        self.lane.pending.discard(self)
        waiter = self.on_assignment
        if waiter is not None:
            self.on_assignment = None
            waiter()
        waiters = self._waiters
        while waiters:
            try:
                waiters.pop()()
            except IndexError:  # `on_done` or `forget` took the last one
                break


class Lane:
    """The way from any thread to the router of one event loop. Made by `lane_of`."""

    def __init__(self, instance: Instance, loop: asyncio.AbstractEventLoop) -> None:
        self.instance = instance
        self.loop = loop
        self.pending: set[Call] = set()  # with the router, or waiting for an endpoint
        self.closed = False
        self._router: Router | None = None
        self._arrived: deque[Call] = deque()
        self._scheduled = False
        self._missing: dict[Call, float] = {}  # -> when it gives up
        self._sweeper: asyncio.TimerHandle | None = None
        self._keeper: asyncio.Task[None] | None = None

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
                ENDED if self.closed or not self.instance.usable else "the event loop of this call is closed"
            ) from None

    # --- on the loop ---

    def _drain(self) -> None:
        self._scheduled = False
        arrived = self._arrived
        while arrived:
            self.submit(arrived.popleft())

    def submit(self, call: Call) -> None:
        """Give a call to the router. It fails as any other way: through the call."""
        if call.done:
            return
        router = self._router
        if router is None or router.closed:
            router = self._open()
            if router is None:
                call.on_failure(InstanceError(ENDED))
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
        self._missing.pop(call, None)
        if self._router is not None and call.backend is not None:
            self._router.cancel(call)
        call.on_failure(RequestCancelled("the request was cancelled by its caller"))

    # --- endpoints that are not there ---

    def _miss(self, call: Call) -> None:
        if not call.target.missing_ok:
            call.on_failure(no_endpoint(self.instance, call.target.endpoint))
            return
        if not self._missing:
            self.loop.call_later(_POLL_S, self._look)
        self._missing[call] = min(self.loop.time() + MISSING_S, call.deadline)

    def _look(self) -> None:
        now = self.loop.time()
        waiting, self._missing = self._missing, {}
        for call, until in waiting.items():
            if call.done:
                continue
            name = call.target.endpoint
            if self.instance.endpoint(name) is not None:
                self.submit(call)
            elif now < until:
                self._missing[call] = until
            elif until == call.deadline:
                call.on_failure(RequestTimeout(f"endpoint {name!r} was not there before the deadline"))
            else:
                call.on_failure(no_endpoint(self.instance, name, f" within {MISSING_S:g} s"))
        if self._missing:
            self.loop.call_later(_POLL_S, self._look)

    # --- its end ---

    def _open(self) -> Router | None:
        if self.closed or not self.instance.usable:
            return None
        self._router = self.instance.router()
        if self._keeper is None:
            self._keeper = self.loop.create_task(self._keep())
            self._keeper._log_destroy_pending = False  # type: ignore[attr-defined]  # a loop may just close
        return self._router

    async def _keep(self) -> None:
        try:
            await self.loop.create_future()
        finally:  # asyncio.run, or the headgate thread, cancels all tasks at its end
            self.end()

    def _sweep(self) -> None:
        self._sweeper = None
        if not self.instance.usable or self._router is None or self._router.closed:
            self._fail_all()
        elif self.pending:
            self._sweeper = self.loop.call_later(_SWEEP_S, self._sweep)

    def end(self) -> None:
        """The loop ends: nothing is answered any more."""
        self.closed = True
        _lanes.pop((self.instance, self.loop), None)
        if self._sweeper is not None:
            self._sweeper.cancel()
        self.pending.update(self._arrived)
        self._arrived.clear()
        self._fail_all()

    def _fail_all(self) -> None:
        self._missing.clear()
        error = InstanceError(
            ENDED if not self.instance.usable else "the event loop of this call ended before its answer came"
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
        for key in [key for key in _lanes if key[1].is_closed()]:  # a loop that closed without a word
            del _lanes[key]
        return _lanes.setdefault((instance, loop), Lane(instance, loop))


def no_endpoint(instance: Instance, name: str, when: str = "") -> EndpointNotFound:
    """The error that names the endpoints there are."""
    known = ", ".join(repr(each.name) for each in instance.snapshot.endpoints) or "none"
    return EndpointNotFound(f"there is no endpoint {name!r}{when}; known endpoints: {known}")
