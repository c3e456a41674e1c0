"""A handle's call: first the request that a router carries, then its outcome.

The answer is kept as bytes, which whoever waits turns into a value on a thread of its own: user
code never runs on the headgate thread.

The rule: a call ends on its lane's loop, exactly once. How it gets to the router of that loop is
lanes.py; what its caller holds is refs.py.
"""

from __future__ import annotations

import asyncio
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextvars import Context
from itertools import product
from time import monotonic
from typing import Any, Protocol

import msgspec

from headgate.core import framing
from headgate.core.lending import SMALLEST_BYTES
from headgate.errors import (
    BackendOverloaded,
    EndpointNotFound,
    HeadgateError,
    ProtocolError,
    ReplicaDied,
    RequestCancelled,
    RequestError,
    RequestTimeout,
)
from headgate.router import Caller
from headgate.wire import payload
from headgate.wire.caller import NEVER
from headgate.wire.segments import Store

_TOTAL = struct.Struct("<Q")
_ERRORS: dict[int, type[HeadgateError]] = {
    kind.http_status: kind
    for kind in (EndpointNotFound, RequestCancelled, ReplicaDied, BackendOverloaded, RequestTimeout)
}

_taking = threading.Lock()
_DIGITS = tuple(b"%02x" % number for number in range(256))
#: The start of each CALL's meta: that of an array of 6, and the request id, a str of 25: the process, then a number.
_starts: Iterator[bytes] = iter(())


def _name_process() -> None:
    """Number calls anew; iterators that are not Python code, so that any thread may ask for the next one."""
    global _starts
    start = b"\x96\xb9%b-" % os.urandom(6).hex().encode()
    _starts = map(b"".join, product((start,), *[_DIGITS] * 6))


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

    __slots__ = ("_with_kwargs", "endpoint", "flags", "missing_ok", "options", "plain")

    def __init__(self, endpoint: str, missing_ok: bool, options: Options) -> None:
        self.endpoint = endpoint
        self.missing_ok = missing_ok
        self.options = options
        self.flags = framing.VALUE | (framing.HEAD if options.method_name else 0)
        fields = (endpoint, options.method_name, options.http_method, options.http_headers)
        self.plain = msgspec.msgpack.encode((*fields, False))[1:]  # without the array's own length
        self._with_kwargs = msgspec.msgpack.encode((*fields, True))[1:]

    def meta(self, has_kwargs: bool) -> bytes:
        """A CALL's meta with a new request id: [id, endpoint, method, http method, headers, has kwargs]."""
        return next(_starts) + (self._with_kwargs if has_kwargs else self.plain)


class Way(Protocol):
    """How a call gets to a router: a Lane, lanes.py."""

    loop: asyncio.AbstractEventLoop
    pending: set[Call]
    segments: Store

    def put(self, call: Call) -> None:
        """Submit it, from any thread."""

    def wake(self, call: AwaitedCall) -> None:
        """It is done, or was cancelled: have the task that awaits it go on in the loop's next turn; on the loop."""

    def submit(self, call: Call) -> None:
        """Submit it, on the loop."""

    def cancel(self, call: Call) -> None:
        """Give it up, from any thread."""

    def expire(self, call: Call) -> None:
        """End it at its deadline though it was not submitted yet; on the loop."""

    def run(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call something on the loop."""

    def shadowed(self, endpoint: str) -> bool:
        """Whether copies of requests to that endpoint go to shadows; from any thread."""


class Call(Caller):
    """One call, and then its outcome.

    assigned   a replica was chosen, or need not be waited for
    done       `take` gives the value or raises the error

    It has slots for what is set or asked in each call, also of a Caller: a dict for each took half a microsecond.
    """

    __slots__ = (
        "_buffer", "_filled", "_is_passed_on", "_is_taken", "_waiters", "answering", "assigned", "backend", "body",
        "deadline", "done", "endpoint", "error", "expires", "flags", "gone", "head", "lane", "link", "meta",
        "on_assignment", "order", "raised", "ran_twice", "raw", "segment", "shard_key", "slot", "target", "tries",
    )  # fmt: skip

    def __init__(self, lane: Way, target: Target) -> None:
        self.lane = lane
        self.target = target
        self.flags = target.flags
        self.meta = self.head = self.body = b""
        self.deadline = NEVER
        self.endpoint = self.shard_key = self.backend = self.link = self.segment = None
        self.order = self.slot = self.tries = 0
        self.ran_twice = self.answering = self.gone = False
        self.assigned = self.done = False
        self.raw: Any = None  # the encoded value or error
        self.raised = False  # `raw` is an error
        self.error: HeadgateError | None = None  # one that came without bytes
        self.expires: float | None = None  # on time.monotonic
        self.on_assignment: Callable[[], object] | None = None
        self._buffer: bytearray | None = None
        self._filled = 0
        self._is_taken = False  # `raw` belongs to the value
        self._is_passed_on = False  # `raw` is, or becomes, another call's body
        self._waiters: list[Callable[[], object]] = []
        if target.options.timeout_s is not None:
            self.expires = monotonic() + target.options.timeout_s

    def fill(self, data: object, kwargs: dict[str, Any]) -> None:
        """Encode the arguments; SerializationError if one cannot travel."""
        parts = payload.encode((data, kwargs) if kwargs else data)
        body = parts[0]
        if len(parts) == 1 and len(body) < SMALLEST_BYTES:  # most
            self.body = body
        else:
            self._carry(parts)
        self.meta = self.target.meta(True) if kwargs else next(_starts) + self.target.plain

    def fill_encoded(self, body: Any) -> None:
        """As `fill` without keyword arguments, with data that was encoded before."""
        self._carry([body])
        self.meta = self.target.meta(False)

    def _carry(self, parts: Sequence[payload.Buffer]) -> None:
        self.segment = segment = self.lane.segments.write(parts)
        if segment is None:
            self.body = parts[0] if len(parts) == 1 else b"".join(parts)
        else:
            self.body = segment.place
            self.flags |= framing.SEGMENT

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
        raw = self.raw
        if type(raw) is bytes:
            return payload.decode(raw)
        with _taking:
            own, self._is_taken = not (self._is_passed_on or self._is_taken), True
        return payload.decode(raw, own)

    def pass_on(self) -> Any:
        """The encoded value as it came, for another call; None if it is an error or a value was made of it."""
        if self.raised:
            return None
        with _taking:
            if self._is_taken:
                return None
            self._is_passed_on = True
        return self.raw

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
        buffer = self._buffer
        if buffer is not None and self._filled + size <= len(buffer):  # else on_reply_end finds it too much
            buffer[self._filled : self._filled + size] = memoryview(source)[start:end]
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
        if self.segment is not None:
            segment, self.segment = self.segment, None
            segment.end()
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


class AwaitedCall(Call):
    """A call that one task awaits, on its lane's loop. Once its value was taken, `spare` has it for another one.

    It is what the task waits for, so that there is no future: asyncio takes for one whatever has
    `_asyncio_future_blocking`. Of a future's two costs, to be made and to have the loop call back each task by itself,
    the first is none and the second shared: the tasks of all answers of one read go on in one turn (Lane.wake).
    """

    __slots__ = ("_asyncio_future_blocking", "_is_cancelled", "_message", "_spare", "_waiting")

    def __init__(self, lane: Way, target: Target, spare: deque[AwaitedCall]) -> None:
        super().__init__(lane, target)
        self._spare = spare
        self._asyncio_future_blocking = self._is_cancelled = False
        self._waiting: tuple[Context, Callable[[AwaitedCall], None]] | None = None  # what has the task go on
        self._message: object = None

    def __await__(self) -> Generator[AwaitedCall, None, None]:
        self._asyncio_future_blocking = True
        return iter((self,))  # type: ignore[return-value]  # as a generator that yields it once, but without a frame

    def go_on(self) -> None:
        """Go on with the task; from the loop only, not from within a task."""
        waiting = self._waiting
        if waiting is not None:  # else it went on before: it was cancelled as well
            self._waiting = None
            waiting[0].run(waiting[1], self)

    def take(self) -> Any:
        """The value; raises the error. To be asked once, and then nothing more."""
        raw = self.raw
        if type(raw) is not bytes or self.raised or self.tries or self.expires is not None:
            return super().take()
        self.done = False
        self.raw = None
        self.body = b""
        self._spare.append(self)
        return payload.decode(raw)

    # --- the future that a task waits for ---

    def get_loop(self) -> asyncio.AbstractEventLoop:
        return self.lane.loop

    def add_done_callback(self, go_on: Callable[[AwaitedCall], None], *, context: Context) -> None:
        self._waiting = context, go_on

    def result(self) -> None:
        if self._is_cancelled:
            raise asyncio.CancelledError() if self._message is None else asyncio.CancelledError(self._message)

    def cancel(self, msg: object = None) -> bool:
        """Its task is cancelled: it goes on with that error, and gives the call up itself."""
        if self.done or self._is_cancelled:
            return False
        self._is_cancelled = True
        self._message = msg
        self.lane.wake(self)
        return True

    # --- what the router calls ---

    def on_assigned(self) -> None:
        """Nobody waits for that alone."""

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        if self.segment is None and not self.done:
            self.raw = source[start + meta_len : end]
            self.done = True
            self.lane.wake(self)
        else:
            super().on_reply(arg, flags, meta_len, source, start, end)

    def _end(self, raw: Any) -> None:
        if not self.done:
            super()._end(raw)
            self.lane.wake(self)
