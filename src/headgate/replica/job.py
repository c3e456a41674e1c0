"""One request as a replica holds it, from its CALL to its one final answer.

A Job is the frame that brought it; where meta and body stand in it is found out when they are
needed. It knows how its answer travels: as an HTTP reply, or as a Python value for a handle
(or, reservation.py, by another way altogether).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import partial
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

    from headgate.replica.callable import Method
    from headgate.replica.links import CallerLink
    from headgate.replica.stream import Flow
    from headgate.wire.link import Frame, Source

#: The frame that ends a request, or what to do on the loop to end it or to begin a streamed answer.
Outcome = bytes | Callable[[], object]

NEVER = math.inf
VALUE, _BIG, _REPLY = framing.VALUE, framing.BIG, framing.REPLY
_new = object.__new__
_pack = framing.HEADER.pack
#: The header of a frame without flags and meta: framing.HEADER with the type as one number with both.
_pack_reply = struct.Struct("<IIIQ").pack
_ARENA = struct.Struct("<QQ")
_HTTPMeta = tuple[str, str, str | None, list[str], str, int, tuple[str, int, str], str | None]
_ValueMeta = tuple[str, str, str | None, str | None, dict[str, str] | None, bool]
_decode_http = msgspec.msgpack.Decoder(_HTTPMeta).decode
_decode_value = msgspec.msgpack.Decoder(_ValueMeta).decode


class Job(msgspec.Struct, eq=False, weakref=True):  # makes one in a third of the time that an `__init__` takes
    """A request that was accepted; `finish` of its link ends it."""

    link: CallerLink
    slot: int
    flags: int
    frame: Frame
    deadline: float = NEVER  # on the clock of `time.monotonic`
    method: Method = None  # type: ignore[assignment]  # once a worker took it
    cancelled: bool = False
    timed_out: bool = False
    flow: Flow | None = None  # a streamed answer in progress
    task: asyncio.Task[None] | None = None  # what is to be cancelled
    upload: bytearray | None = None  # a body that came in pieces
    uploaded: int = 0
    mapped: memoryview | None = None  # a body that lies in a segment of the caller's, until it is decoded
    borrowed: bool = False  # memory of the router's, which is told when nothing refers to it
    _meta: Any = None

    # --- what the caller sent ---

    @property
    def is_value(self) -> int:
        """Whether a handle called and wants a Python value; else it is an HTTP request."""
        return self.flags & VALUE

    @property
    def meta(self) -> Any:
        """The decoded meta; which fields it has depends on `is_value`."""
        if self._meta is None:
            _, _, meta_len, _, _, source, start, _ = self.frame
            raw = bytes(source[start : start + meta_len])
            self._meta = _decode_value(raw) if self.is_value else _decode_http(raw)
        return self._meta

    @property
    def source(self) -> Source:
        """The bytes that the frame is in."""
        return self.frame[5]

    @property
    def body_start(self) -> int:
        """Where in the frame's source the body begins, behind meta and head."""
        return self.frame[6] + self.frame[2] + (self.frame[4] >> 32 & 0xFFFF)

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
        _, _, meta_len, _, _, source, start, _ = self.frame
        return bytes(source[start + meta_len : self.body_start])

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
        source, end = self.frame[5], self.frame[7]
        if type(source) is bytes:
            return source[self.body_start : end]
        return memoryview(source)[self.body_start : end]

    @property
    def segment(self) -> tuple[int, int]:
        """Where in the arena the body lies: offset, size."""
        offset, size = _ARENA.unpack_from(self.frame[5], self.body_start)
        return offset, size

    def begin(self, is_async: bool) -> Any:
        """What the handler gets. From here on user code may have run: the request is never sent elsewhere."""
        try:  # first: decoding a handle's value runs user code already
            self.link.page[self.slot] = 1
        except IndexError:  # beyond the page slots count as started
            pass
        if not self.flags & VALUE:
            request = _new(HTTPRequest)  # its `__init__` would do no more
            request._received = self
            return request
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

    def refusal(self) -> Outcome:
        """The outcome of a request that must not start any more: it was cancelled, or is past its deadline."""
        if not self.cancelled:
            return self.error(RequestTimeout("the request passed its deadline while it waited in the replica"))
        if self.timed_out:
            return self.error(RequestTimeout("the request passed its deadline before it started"))
        return self.error(RequestCancelled("the caller had gone before the request started"))

    def on_cancel(self) -> None:
        """The caller does not wait any more; whatever runs goes on for now."""

    # --- its outcome ---

    def whole(self, arg: int, body: bytes) -> Outcome:
        """As `reply`, for one without header lines; `arg` is status and content-type code, as they travel."""
        size = len(body)
        if size > _BIG:
            return self.reply((arg & 0xFFFF, arg >> 16, None, body))
        return _pack_reply(size, _REPLY, self.slot, arg) + body

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
            return _pack_reply(len(body), _REPLY, self.slot, arg) + body
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
