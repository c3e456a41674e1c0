"""One request as a replica holds it, from its CALL to its one final answer.

A Job is the frame's bytes and where its parts stand in them; meta and body are read when they are
needed. It knows how its answer travels: as an HTTP reply, or as a Python value for a handle
(or, reservation.py, by another way altogether).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from headgate.core import framing
from headgate.errors import BackendError, HeadgateError, RequestCancelled, RequestTimeout
from headgate.replica.request import AsyncServeRequest, HTTPRequest, PlainServeRequest
from headgate.replica.response import Reply, error_reply
from headgate.replica.stream import BodyFlow, SegmentFlow
from headgate.wire import payload

if TYPE_CHECKING:
    import asyncio

    from headgate.replica.links import CallerLink
    from headgate.replica.stream import Flow

#: The frame that ends a request, or what to do on the loop to end it or to begin a streamed answer.
Outcome = bytes | Callable[[], object]

_NEVER = math.inf
_pack = framing.HEADER.pack
_ARENA = struct.Struct("<QQ")
_HTTPMeta = tuple[str, str, str | None, list[str], str, int, tuple[str, int, str], str | None]
_ValueMeta = tuple[str, str, str | None, str | None, dict[str, str] | None, bool]
_decode_http = msgspec.msgpack.Decoder(_HTTPMeta).decode
_decode_value = msgspec.msgpack.Decoder(_ValueMeta).decode


class Job:
    """A request that was accepted; `finish` of its link ends it."""

    __slots__ = (
        "__weakref__", "_meta", "body_end", "body_start", "borrowed", "cancelled", "deadline", "flags", "flow",
        "head_end", "is_value", "link", "mapped", "meta_end", "slot", "source", "start", "task", "timed_out", "upload",
        "uploaded",
    )  # fmt: skip

    def __init__(
        self, link: CallerLink, flags: int, meta_len: int, slot: int, arg: int, source: Any, start: int, end: int
    ) -> None:
        self.link = link
        self.slot = slot
        self.flags = flags
        self.is_value = flags & framing.VALUE  # a handle called and wants a Python value; else an HTTP reply
        self.source = source
        self.start = start
        self.meta_end = start + meta_len
        self.head_end = self.body_start = self.meta_end + (arg >> 32 & 0xFFFF)
        self.body_end = end
        remaining_ms = arg & 0xFFFFFFFF
        self.deadline = monotonic() + remaining_ms / 1000 if remaining_ms else _NEVER
        self.cancelled = self.timed_out = False
        self.flow: Flow | None = None  # a streamed answer in progress
        self.task: asyncio.Task[None] | None = None
        self.upload: bytearray | None = None  # a body that came in pieces
        self.uploaded = 0
        self.mapped: memoryview | None = None  # a body that lies in a segment of the caller's, until it is decoded
        self.borrowed = False  # memory of the router's, which is told when nothing refers to it
        self._meta: Any = None

    # --- what the caller sent ---

    @property
    def meta(self) -> Any:
        """The decoded meta; which fields it has depends on `is_value`."""
        if self._meta is None:
            raw = bytes(self.source[self.start : self.meta_end])
            self._meta = _decode_value(raw) if self.is_value else _decode_http(raw)
        return self._meta

    @property
    def request_id(self) -> str:
        return str(self.meta[0])

    @property
    def method_name(self) -> str | None:
        """The method that the caller named; None for `__call__`."""
        if not self.flags & framing.HEAD:
            return None
        name: str | None = self.meta[2] if self.is_value else self.meta[7]
        return name

    @property
    def head(self) -> bytes:
        return bytes(self.source[self.meta_end : self.head_end])

    @property
    def template(self) -> str:
        return self.meta[2] or ""

    @property
    def parameters(self) -> list[str]:
        found: list[str] = self.meta[3]
        return found

    @property
    def client(self) -> tuple[str, int]:
        return self.meta[4], self.meta[5]

    @property
    def server(self) -> tuple[str, int]:
        return self.meta[6][0], self.meta[6][1]

    @property
    def scheme(self) -> str:
        return str(self.meta[6][2])

    @property
    def is_gone(self) -> bool:
        """Whether the caller does not wait any more."""
        return self.cancelled or self.link.closed

    @property
    def body(self) -> bytes | memoryview:
        """The body; in the arena it is a view of memory that is freed with its last reference."""
        if self.upload is not None:
            return memoryview(self.upload)
        if self.flags & framing.ARENA:
            offset, size = self.segment
            self.borrowed = True
            return self.link.from_arena(offset, size)
        source = self.source
        if type(source) is bytes:
            return source[self.body_start : self.body_end]
        return memoryview(source)[self.body_start : self.body_end]

    @property
    def segment(self) -> tuple[int, int]:
        """Where in the arena the body lies: offset, size."""
        offset, size = _ARENA.unpack_from(self.source, self.body_start)
        return offset, size

    def request(self, is_async: bool) -> Any:
        """What the handler gets."""
        if not self.is_value:
            return HTTPRequest(self)
        request_id, _, _, http_method, headers, has_kwargs = self.meta
        data, kwargs = self._arguments(has_kwargs)
        if isinstance(data, HTTPRequest):
            return data
        kind = AsyncServeRequest if is_async else PlainServeRequest
        return kind(data, kwargs, headers, http_method or "GET", request_id)

    def _arguments(self, has_kwargs: bool) -> tuple[Any, dict[str, Any] | None]:
        """The data and the keyword arguments that a handle was called with."""
        own = self.mapped is not None or self.upload is not None  # nobody else reads it
        body, self.mapped = self.mapped if self.mapped is not None else self.body, None
        data = payload.decode(body, own)
        del body
        if has_kwargs:
            data, kwargs = data
            return data, kwargs
        return data, None

    # --- whether it may run ---

    def refusal(self) -> Outcome | None:
        """The outcome of a request that must not start any more, or None: go ahead."""
        if self.cancelled:
            if self.timed_out:
                return self.error(RequestTimeout("the request passed its deadline before it started"))
            return self.error(RequestCancelled("the caller had gone before the request started"))
        if self.deadline != _NEVER and self.deadline < monotonic():
            return self.error(RequestTimeout("the request passed its deadline while it waited in the replica"))
        return None

    def on_cancel(self) -> None:
        """The caller does not wait any more; whatever runs goes on for now."""

    def mark_started(self) -> None:
        """From here on user code may have run: the request is never sent elsewhere."""
        try:
            self.link.page[self.slot] = 1
        except IndexError:  # beyond the page slots count as started
            pass

    # --- its outcome ---

    def reply(self, reply: Reply) -> Outcome:
        """A whole HTTP reply: its frame, or a flow if it is so large that it has to go in pieces."""
        status, kind, block, body = reply
        arg = status | kind << 16
        if len(body) > framing.BIG:
            flags, block = framing.HEAD if block else 0, block or b""
            segment = self.link.write_answer(block, body)
            if segment is not None:
                return partial(SegmentFlow, self.link.worker, self, segment, flags, arg, len(block))
            return partial(BodyFlow, self.link.worker, self, flags, arg, block, memoryview(body))
        if block is None:
            return _pack(len(body), framing.REPLY, 0, 0, self.slot, arg) + body
        head = _pack(len(block) + len(body), framing.REPLY, framing.HEAD, len(block), self.slot, arg)
        return b"%b%b%b" % (head, block, body)

    def value(self, result: Any) -> Outcome:
        """A Python value for a handle."""
        parts = payload.encode(result)
        segment = self.link.write_segment(parts)
        if segment is not None:
            return partial(SegmentFlow, self.link.worker, self, segment, framing.VALUE, 200, 0)
        body = b"".join(parts)
        if len(body) > framing.BIG:
            return partial(BodyFlow, self.link.worker, self, framing.VALUE, 200, b"", memoryview(body))
        return _pack(len(body), framing.REPLY, framing.VALUE, 0, self.slot, 200) + body

    def failure(self, error: BaseException, traceback_text: str, expose: bool) -> Outcome:
        """The outcome of a request whose user code raised."""
        if isinstance(error, HeadgateError) and not isinstance(error, BackendError) and not traceback_text:
            return self.error(error)
        if self.is_value:
            body = payload.encode_error(error, traceback_text)
            return _pack(len(body), framing.ERROR, framing.VALUE, 0, self.slot, 500) + body
        status, _, _, text = error_reply(error, traceback_text, expose)
        return _pack(len(text), framing.ERROR, 0, 0, self.slot, status) + text

    def error(self, error: HeadgateError) -> Outcome:
        """The outcome of a request that headgate itself refuses."""
        return self.error_frame(error)

    def error_frame(self, error: HeadgateError) -> bytes:
        """The final frame of a request that headgate itself refuses."""
        if self.is_value:
            body = payload.encode_error(error, "")
            return _pack(len(body), framing.ERROR, framing.VALUE, 0, self.slot, error.http_status) + body
        text = str(error).encode("utf-8", "backslashreplace")
        return _pack(len(text), framing.ERROR, 0, 0, self.slot, error.http_status) + text
