"""The answering half of an HTTP connection: what the router calls back becomes bytes for the client.

The proxy alone frames answers (core/replies.py). A whole answer is one write. One in parts goes out
with a length where it is known, else in chunks, and its source may send more only as the client
takes it: while the transport is full no credit is granted, so a slow reader holds up itself alone.
An answer that breaks off ends the connection without its last chunk.

The reading half is connection.py, which says what comes after an answer.
"""

from __future__ import annotations

import asyncio
import struct
from typing import TYPE_CHECKING

from headgate.core import framing
from headgate.core.replies import (
    CHUNKED,
    CONTENT_TYPES,
    LAST_CHUNK,
    OWN_HEADERS,
    has_body,
    reply_head,
    reply_head_with,
    reply_start,
)
from headgate.errors import ConfigError, HeadgateError
from headgate.proxy import admin
from headgate.wire.link import PIECE_BYTES, WINDOW_BYTES
from headgate.wire.replica_link import Caller

if TYPE_CHECKING:
    from headgate.proxy.server import Server
    from headgate.wire.link import Source

_OF_CALLERS = (
    "answering", "backend", "body", "deadline", "endpoint", "flags", "gone", "head", "link", "meta", "order",
    "ran_twice", "shard_key", "slot", "tries",
)  # fmt: skip
_TOTAL = struct.Struct("<Q")
_GRANT_BYTES = WINDOW_BYTES // 4
#: Beyond this a body is not joined to its head or chunk size, but written beside it.
_JOIN_BYTES = 32 * 1024
_MOST_STARTS = 1024
_EMPTY_LINE = b"\r\n\r\n"
NOTHING = memoryview(b"")


class Starts(dict[tuple[int, int], bytes]):
    """The starts of ordinary replies in this second, by a REPLY frame's argument and the body's length."""

    def __init__(self) -> None:
        self._date = b""

    def follow(self, date: bytes) -> None:
        """It is another second."""
        self._date = date
        self.clear()

    def make(self, arg: int, length: int) -> bytes:
        """One that is not here yet."""
        if len(self) >= _MOST_STARTS:
            self.clear()
        self[arg, length] = start = reply_start(arg & 0xFFFF, arg >> 16, length, self._date)
        return start


class Answering(Caller):
    """One connection's answers, one request at a time.

    It has slots, for what a Caller has too: a default that stands in the class takes four times as long to read.
    """

    __slots__ = (
        *_OF_CALLERS,
        "_chunked", "_left", "_lent", "_owed", "closed", "http10", "last", "lingers", "method", "paused", "request_id",
        "server", "started", "transport", "untidy", "unusual",
    )  # fmt: skip

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        for name in _OF_CALLERS:
            setattr(self, name, getattr(Caller, name))
        self.server = server
        self.closed = False  # nothing can be written any more
        self.paused = False  # the client does not take what was written
        # the request that is being answered
        self.request_id = b""
        self.method = "GET"
        self.http10 = False
        self.unusual = False  # its answers have no body, or are framed in the way of HTTP/1.0
        self.untidy = False  # it holds more than its head and meta
        self.last = False  # the connection ends after this answer
        self.lingers = False  # and the client may still be sending
        # its answer, if in parts
        self.started = False
        self._chunked = False
        self._left = -1  # bytes that are missing; -1: nobody knows
        self._owed = 0  # bytes that were taken and not yet granted again
        self._lent = NOTHING  # in the replica's memory, yet to be written

    def answered(self) -> None:
        """The answer is complete: on to the next request."""
        raise NotImplementedError

    def break_off(self) -> None:
        """The answer ends here, and the client must see that it is not complete."""
        raise NotImplementedError

    def abandon(self) -> None:
        """Nobody needs the rest of the answer."""
        raise NotImplementedError

    def allow(self, count: int) -> None:
        """The source of the answer may send so many more bytes."""
        self.grant(count)

    # --- what the router calls ---

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        size = end - start
        if flags or arg & 0xFFFF != 200 or size > _JOIN_BYTES or self.last or self.unusual:
            at = start + meta_len
            block = bytes(source[start:at]) if flags & framing.HEAD else None
            body = memoryview(source)[at:end]
            if flags & framing.SEGMENT and self.server.scheme == "https":
                self._piecemeal(arg & 0xFFFF, block or _content_type(arg >> 16), body)
            else:
                self.whole(arg & 0xFFFF, arg >> 16, block, body)
            return
        if not self.closed:
            starts = self.server.starts
            head = starts.get((arg, size)) or starts.make(arg, size)
            self.transport.write(b"".join((head, self.request_id, _EMPTY_LINE, source[start:end])))
            self.answered()

    def on_reply_start(
        self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int
    ) -> None:
        at = start + meta_len
        total = None
        if not flags & framing.STREAM:
            (total,) = _TOTAL.unpack_from(source, at)
            at += _TOTAL.size
        block = source[start : start + meta_len] if flags & framing.HEAD else _content_type(arg >> 16)
        if not self.start(arg & 0xFFFF, bytes(block), total):
            return
        if at < end:
            self.on_data(source, at, end)

    def on_data(self, source: Source, start: int, end: int) -> None:
        self.part(memoryview(source)[start:end])
        self._owed += end - start
        if self._owed >= _GRANT_BYTES and not self.paused:
            self._grant_owed()

    def on_reply_end(self) -> None:
        self.finish()

    def on_error(self, status: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        at = start + meta_len
        block = bytes(source[start:at]) if flags & framing.HEAD else b""
        text = bytes(source[at:end]).decode("utf-8", "replace")
        self.answer(admin.error(status, text, block))

    def on_failure(self, error: HeadgateError) -> None:
        self.answer(admin.failure(error))

    # --- whole answers ---

    def whole(self, status: int, kind: int, block: bytes | None, body: bytes | memoryview) -> None:
        """Answer with a complete body. `block` is header lines; None: the content type `kind`."""
        if self.closed:
            return
        try:
            if block is None and kind < OWN_HEADERS:
                head = reply_head(
                    status, kind, len(body), self.request_id, self.server.date, self.last, self.http10
                )
            else:
                lines = bytes(block or b"")
                head = reply_head_with(
                    status, lines, len(body), self.request_id, self.server.date, self.last, self.http10
                )
        except ConfigError as error:
            self.answer(admin.error(500, str(error)))
            return
        if not body or not has_body(status, self.method):
            self.transport.write(head)
        elif len(body) > _JOIN_BYTES:
            self.transport.writelines((head, body))
        else:
            self.transport.write(head + bytes(body))
        self.answered()

    def answer(self, answer: admin.Local) -> None:
        """Answer with a page or an error of the proxy's own; in the middle of an answer, break it off."""
        if self.started:
            self.break_off()
        else:
            if answer.status >= 400 and admin.wants_json(self.head):
                answer = admin.as_problem(answer)
            self.whole(answer.status, OWN_HEADERS, answer.block, answer.body)

    # --- answers in parts ---

    def start(self, status: int, block: bytes, length: int | None) -> bool:
        """Begin an answer of `length` bytes, or of nobody knows how many. False: no part is wanted."""
        if self.closed:
            return False
        refusal = self._begin(status, block, length)
        if refusal is not None:
            self.abandon()  # first: after the answer this may be another request's
            self.answer(refusal)
            return False
        if not has_body(status, self.method):
            self.abandon()
            self.answered()
            return False
        self.started = self.untidy = True
        self._chunked = length is None and not self.http10
        self._left = -1 if length is None else length
        self._owed = 0
        return True

    def bare(self, status: int, block: bytes, length: int | None) -> None:
        """Answer without a body, but with the head that it would have had."""
        if self.closed:
            return
        refusal = self._begin(status, block, length)
        if refusal is not None:
            self.answer(refusal)
        else:
            self.answered()

    def _begin(self, status: int, block: bytes, length: int | None) -> admin.Local | None:
        """Write a head; what is to be answered instead if that cannot be."""
        if length is None and self.http10:
            self.last = True
        size = CHUNKED if length is None else length
        try:
            head = reply_head_with(
                status, block, size, self.request_id, self.server.date, self.last, self.http10
            )
        except ConfigError as error:
            return admin.error(500, str(error))
        self.transport.write(head)
        return None

    def part(self, data: bytes | memoryview) -> None:
        """A part of the body."""
        if self.closed or not data:
            return
        if self._chunked:
            if len(data) > _JOIN_BYTES:
                self.transport.writelines((b"%x\r\n" % len(data), data, b"\r\n"))
            else:
                self.transport.write(b"%x\r\n%b\r\n" % (len(data), bytes(data)))
            return
        if self._left >= 0:
            self._left -= len(data)
            if self._left < 0:  # more than was announced would be read as the next answer
                self.abandon()
                self.break_off()
                return
        self.transport.write(data)

    def finish(self) -> None:
        """The end of the body."""
        if self.closed:
            return
        if self._left > 0:
            self.break_off()
            return
        if self._chunked:
            self.transport.write(LAST_CHUNK)
        self.answered()

    def _piecemeal(self, status: int, block: bytes, body: memoryview) -> None:
        """Answer with a body in the replica's memory, no faster than the client takes it: TLS makes a copy."""
        if self.start(status, block, len(body)):
            self._lent = body
            self._feed()

    def _feed(self) -> None:
        """Go on with an answer in the replica's memory."""
        while self._lent and not self.paused and not self.closed:
            piece, self._lent = self._lent[:PIECE_BYTES], self._lent[PIECE_BYTES:]
            self.part(piece)
        if not self._lent:
            self._lent = NOTHING
            self.finish()

    def _grant_owed(self) -> None:
        owed, self._owed = self._owed, 0
        self.allow(owed)

    # --- the transport's side ---

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.started and self._owed:
            self._grant_owed()
        if self._lent and not self.closed:
            self._feed()


def _content_type(kind: int) -> bytes:
    return b"content-type: %b\r\n" % CONTENT_TYPES[kind] if kind < OWN_HEADERS else b""

