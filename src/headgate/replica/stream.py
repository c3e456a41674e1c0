"""Answers that travel in parts: large bodies, generators, and Starlette responses that stream.

Each part takes from the stream's window; the router grants more as its client reads, so that a
slow reader holds up its own stream alone. A `Flow` lives on the worker's loop; a plain
generator is pulled on the plain thread, one item at a turn, so that other calls go on between.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, MutableMapping
from typing import TYPE_CHECKING, Any

from headgate.core import framing
from headgate.replica.response import OWN_HEADERS, header_block, stream_item, stream_kind
from headgate.wire.link import PIECE_BYTES, WINDOW_BYTES

if TYPE_CHECKING:
    from starlette.responses import Response

    from headgate.replica.job import Job
    from headgate.replica.worker import Worker
    from headgate.wire.segments import Segment

_pack = framing.HEADER.pack
_TOTAL = struct.Struct("<Q")


class Flow:
    """A streamed answer: its window and its frames."""

    def __init__(self, worker: Worker, job: Job) -> None:
        self.worker = worker
        self.job = job
        self.window = WINDOW_BYTES
        job.flow = self

    def begin(self, status: int, kind: int, block: bytes | None, total: int | None) -> None:
        """Send the head. `total` is the length of the body where it is known."""
        block = block or b""
        flags = framing.MORE | (framing.HEAD if block else 0) | (framing.STREAM if total is None else 0)
        size = b"" if total is None else _TOTAL.pack(total)
        arg = status | kind << 16
        head = _pack(len(block) + len(size), framing.REPLY, flags, len(block), self.job.slot, arg)
        self.job.link.send(b"%b%b%b" % (head, block, size))

    def send(self, data: bytes | memoryview) -> None:
        """Send a part of the body, in pieces that hold up nobody."""
        link, slot = self.job.link, self.job.slot
        self.window -= len(data)
        if len(data) <= PIECE_BYTES:
            link.send(_pack(len(data), framing.DATA, 0, 0, slot, 0) + data)
            return
        view = memoryview(data)
        for at in range(0, len(view), PIECE_BYTES):
            piece = view[at : at + PIECE_BYTES]
            link.send_with(_pack(len(piece), framing.DATA, 0, 0, slot, 0), piece)

    def end(self) -> None:
        """The body is complete."""
        self.job.link.finish(self.job, _pack(0, framing.END, 0, 0, self.job.slot, 0))

    def fail(self, error: BaseException) -> None:
        """User code raised in the middle."""
        self.worker.finish(self.job, self.worker.outcomes.failure(self.job, error))

    def credit(self, size: int) -> None:
        """The router has room for `size` more bytes."""
        self.window += size

    def cancel(self) -> None:
        """The caller has gone."""


class BodyFlow(Flow):
    """A body that is there already but too large for one frame."""

    def __init__(self, worker: Worker, job: Job, flags: int, arg: int, block: bytes, body: memoryview) -> None:
        super().__init__(worker, job)
        self._body = body
        head = _pack(len(block) + 8, framing.REPLY, flags | framing.MORE, len(block), job.slot, arg)
        job.link.send(b"%b%b%b" % (head, block, _TOTAL.pack(len(body))))
        self._pump()

    def credit(self, size: int) -> None:
        super().credit(size)
        self._pump()

    def _pump(self) -> None:
        link, slot = self.job.link, self.job.slot
        if self.job.cancelled:  # maybe before this flow was made
            self._body = self._body[:0]
        while self._body and self.window > 0 and not link.paused:
            piece, self._body = self._body[:PIECE_BYTES], self._body[PIECE_BYTES:]
            self.window -= len(piece)
            link.send_with(_pack(len(piece), framing.DATA, 0, 0, slot, 0), piece)
        if not self._body:
            self.end()

    def cancel(self) -> None:
        self._pump()


class SegmentFlow(Flow):
    """An answer that the router reads where it lies; it says when it has it, or that it cannot.

    block_len   the segment begins with so many bytes of header lines
    """

    def __init__(self, worker: Worker, job: Job, segment: Segment, flags: int, arg: int, block_len: int) -> None:
        super().__init__(worker, job)
        self.segment = segment
        self._flags, self._arg, self._block_len = flags, arg, block_len
        if job.cancelled or job.link.closed:  # before this flow was made
            segment.end()
            self.end()
            return
        job.link.lent.add(segment)
        place = segment.place
        head = _pack(len(place), framing.REPLY, flags | framing.SEGMENT, 0, job.slot, arg | block_len << 32)
        job.link.send(head + place)

    def taken(self) -> None:
        """The router has the value."""
        self.segment.end()
        self.job.link.finish(self.job, b"")

    def refused(self) -> None:
        """The router waits for pieces."""
        view, at = self.segment.view(), self._block_len
        self.segment.end()
        BodyFlow(self.worker, self.job, self._flags, self._arg, view[:at].tobytes(), view[at:])

    def cancel(self) -> None:
        """The router takes what was sent for the end of a request that it has given up."""
        self.taken()


class GeneratorFlow(Flow):
    """A plain generator, pulled on the plain thread while there is room."""

    def __init__(self, worker: Worker, job: Job, items: Generator[Any, Any, Any]) -> None:
        super().__init__(worker, job)
        self._items = items
        self._kind = -1
        self._pulling = False
        self._done = False
        self._pull()

    def credit(self, size: int) -> None:
        super().credit(size)
        self._pull()

    def cancel(self) -> None:
        if not self._pulling and not self._done:
            self._pulling = True
            self.worker.plain.put(self._close)

    def _pull(self) -> None:
        if self.window > 0 and not self._pulling and not self._done:
            self._pulling = True
            self.worker.plain.put(self._next)

    def _next(self) -> None:  # on the plain thread
        if self.job.cancelled:
            self._close()
            return
        try:
            item = next(self._items)
            kind = stream_kind(item) if self._kind < 0 else self._kind
            data = stream_item(item, kind)
        except StopIteration:
            self.worker.from_any_thread(self._pulled, None, max(self._kind, 0))
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self.worker.from_any_thread(self._raised, error)
        else:
            self.worker.from_any_thread(self._pulled, data, kind)

    def _close(self) -> None:  # on the plain thread
        try:
            self._items.close()
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self.worker.from_any_thread(self._raised, error)
        else:
            self.worker.from_any_thread(self._raised, asyncio.CancelledError())

    def _pulled(self, data: bytes | None, kind: int) -> None:
        self._pulling = False
        if self._kind < 0:
            self._kind = kind
            self.begin(200, kind, None, None)
        if data is None:
            self._done = True
            self.end()
            return
        if data:
            self.send(data)
        if self.job.cancelled:
            self.cancel()
        else:
            self._pull()

    def _raised(self, error: BaseException) -> None:
        self._done = True
        self.fail(error)


class TaskFlow(Flow):
    """A stream that a task on the worker's loop produces."""

    def __init__(self, worker: Worker, job: Job) -> None:
        super().__init__(worker, job)
        self._room = asyncio.Event()
        self._room.set()

    def credit(self, size: int) -> None:
        super().credit(size)
        if self.window > 0 and not self.job.link.paused:
            self._room.set()

    def cancel(self) -> None:
        if self.job.task is not None:
            self.job.task.cancel()

    async def push(self, data: bytes | memoryview) -> None:
        """Send a part, then wait until the window has room."""
        if self.job.link.closed:
            raise OSError("the caller has gone")
        self.send(data)
        if self.window <= 0 or self.job.link.paused:
            self._room.clear()
            await self._room.wait()

    async def run_generator(self, items: AsyncGenerator[Any, Any]) -> None:
        """Send what an async generator yields."""
        kind = -1
        try:
            async for item in items:
                if kind < 0:
                    kind = stream_kind(item)
                    self.begin(200, kind, None, None)
                await self.push(stream_item(item, kind))
        finally:
            await items.aclose()
        if kind < 0:
            self.begin(200, 0, None, None)
        self.end()

    async def run_response(self, response: Response, request: Any) -> None:
        """Run a Starlette response as the ASGI application that it is."""
        scope = getattr(request, "scope", None) or {"type": "http", "method": "GET", "headers": [], "asgi": {}}
        sender = _AsgiSender(self)
        await response(scope, self._receiver(), sender)
        if not sender.ended:
            raise RuntimeError(f"{type(response).__name__} ended without completing its answer")

    def _receiver(self) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
        async def receive() -> MutableMapping[str, Any]:
            await asyncio.get_running_loop().create_future()  # a client that leaves cancels this task
            raise AssertionError

        return receive


class _AsgiSender:
    """The `send` of an ASGI response: messages in, frames out. What fits one frame goes in one."""

    def __init__(self, flow: TaskFlow) -> None:
        self._flow = flow
        self._start: MutableMapping[str, Any] | None = None
        self._begun = False
        self.ended = False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._start = message
            return
        if message["type"] != "http.response.body" or self.ended:
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        if not self._begun:
            self._begin(None if more else len(body))
        if body:
            await self._flow.push(body)
        if not more:
            self.ended = True
            self._flow.end()

    def _begin(self, total: int | None) -> None:
        assert self._start is not None
        self._begun = True
        headers = list(self._start.get("headers", ()))
        if total is None:
            sizes = [value for name, value in headers if name.lower() == b"content-length"]
            total = int(sizes[0]) if sizes else None
        self._flow.begin(int(self._start["status"]), OWN_HEADERS, header_block(headers), total)
