"""The reading half of an HTTP connection: bytes in, requests out, one at a time and in order.

A head is judged by core/http11.py and second_opinion.py; a request leaves when its body is complete.
What a client sends while its request runs is kept, up to a limit, so that its going away is
noticed; it is read as the next request once the answer is out.

All connections of a proxy receive into one buffer: a read is handled at once and only what is
incomplete is copied. A large body of known length goes straight into the arena (upload.py). No
object, task or timer is made for a request: the connection is what waits for the answer.

Where a complete request goes is dispatch.py, how a connection begins and ends connection.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from headgate.core import http11
from headgate.core.http11 import BODY, IDLE, RUNNING, Head, Reject, check_head, check_start
from headgate.core.replies import CONTINUE
from headgate.proxy.body import Collected, Placed
from headgate.proxy.chunked import Chunked
from headgate.proxy.dispatch import Dispatching

if TYPE_CHECKING:
    from headgate.proxy.server import Server

log = logging.getLogger("headgate.proxy")

#: How much a client may send ahead while its request runs.
_AHEAD_BYTES = 64 * 1024
#: A body of this size that comes with its head is not counted.
_SMALL_BYTES = 16 * 1024
_AHEAD, _BUDGET = 1, 2  # why reading is paused
_EMPTY_LINE = (b"\r", b"\r\n")


class Intake(Dispatching):
    """One connection's requests."""

    __slots__ = ("_again", "_body_follows", "_busy", "_filling", "_incoming", "_known", "_rest", "_unread")

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        # The newest head, so that the same one again is not judged twice.
        self._known = b""  # empty if it has to be looked at closer each time
        self._again = b""  # `_known`, if it is all of a request
        self._body_follows = False
        self._incoming: Collected | Placed | Chunked | None = None
        self._filling: memoryview | None = None
        self._rest = b""  # received, not looked at
        self._busy = False  # inside _take, which goes on to the next request by itself
        self._unread = 0  # why reading is paused

    def refuse(self, reject: Reject) -> None:
        """Answer what is no request, and end the connection."""
        raise NotImplementedError

    def abort(self) -> None:
        """End the connection now."""
        raise NotImplementedError

    def buffer_updated(self, nbytes: int) -> None:
        """So many bytes were received, where `get_buffer` said."""
        try:
            if self._filling is not None:
                self._fill(nbytes)
                return
            server = self.server
            data = server.memory[:nbytes]
            if data == self._again and self.state == IDLE and not (self._rest or self.paused):
                self.request_id = server.new_id()
                self._dispatch()
                return
            if self._rest:
                data, self._rest = self._rest + data, b""
            self._take(data)
        except Exception:
            log.exception("a connection failed")
            self.abort()

    def _take(self, data: bytes) -> None:
        """Look at what was received, until a request runs or more is needed."""
        self._busy = True
        while data:
            state = self.state
            if state < BODY and not self.paused:
                data = self._take_head(data)
            elif state == BODY:
                data = self._take_body(data)
            else:
                if state <= RUNNING and not self.closed:
                    self._keep(data)
                break
        self._busy = False

    def _keep(self, data: bytes) -> None:
        """For later. A client that sends too much ahead is not read on."""
        self._rest = data
        if len(data) > _AHEAD_BYTES:
            self.pause(_AHEAD)

    def _proceed(self) -> None:
        """On to what was received while a request ran."""
        if self.state < BODY and not self._busy and not self.paused and not self.closed:
            data, self._rest = self._rest, b""
            self._take(data)
            if self._unread and len(self._rest) <= _AHEAD_BYTES:
                self.resume(_AHEAD)

    def pause(self, reason: int = _BUDGET) -> None:
        """Stop reading."""
        if not self._unread and not self.transport.is_closing():
            self.transport.pause_reading()
        self._unread |= reason

    def resume(self, reason: int = _BUDGET) -> None:
        """Read on, unless there is another reason not to."""
        if self._unread == reason and not self.transport.is_closing():
            self.transport.resume_reading()
        self._unread &= ~reason
        self.since = self.server.now

    def _take_head(self, data: bytes) -> bytes:
        """Begin the request whose head this starts with; what remains of the data."""
        server = self.server
        known = self._known
        if known and data.startswith(known):  # the client asks the same again: it was judged before
            end = len(known)
        else:
            if data.startswith(b"\r"):  # RFC 9112 §2.2: an empty line before a request is ignored; one, however cut
                if data in _EMPTY_LINE:
                    self._rest = data
                    return b""
                data = data.removeprefix(b"\r\n")
            end = self._judge(data)
            if not end:
                return b""
        self.request_id = server.new_id()
        head = self.facts
        assert head is not None
        if head.special:
            self._look_closer(self.head, head)
        self.last = server.leaving or not head.keep_alive
        if self._body_follows:
            size = head.content_length
            if not size or len(data) - end < size:
                return self._begin_body(data[end:], head)
            self.body = data[end : end + size]  # most bodies
            end += size
            if size > _SMALL_BYTES:
                self.untidy = True
                server.budget.add(self, size)
                server.budget.complete(self)
        self._dispatch()
        return data[end:]

    def _judge(self, data: bytes) -> int:
        """Where the head ends that this starts with; 0 if it does not end yet, or was refused."""
        end = data.find(b"\r\n\r\n") + 4
        server = self.server
        try:
            if end < 4:
                self._wait_for_head(data)
                return 0
            raw = data[:end]
            head = check_head(raw, server.limits)
            server.second_opinion.check(raw, head)
        except Reject as reject:
            self.refuse(reject)
            return 0
        self.method = head.method
        self.http10 = head.http10
        self.unusual = head.http10 or head.method == "HEAD"
        self.head = raw
        self.facts = head
        self._body_follows = head.chunked or head.content_length > 0
        self._known = b"" if head.special else raw
        self._again = b"" if self._body_follows else self._known
        self._routed_by = None
        return end

    def _wait_for_head(self, data: bytes) -> None:
        check_start(data, self.server.limits)
        self._rest = data
        if self.state == IDLE:
            self.state, self.since = http11.HEAD, self.server.now

    # --- bodies that come in pieces ---

    def _begin_body(self, data: bytes, head: Head) -> bytes:
        server = self.server
        refusal = None if server.app is not None else server.refusal(head, self.head, self.scheme, self.local)
        if refusal is not None:  # not worth receiving a body for
            self.last = self.lingers = True
            self.answer(refusal)
            return b""
        self.state, self.since = BODY, server.now
        self.untidy = True
        if head.expect_continue and not data:
            self.transport.write(CONTINUE)
        if head.chunked:
            self._incoming = Chunked(server.limits)
        else:
            self.upload = server.borrow(self, head.content_length)
            self._incoming = Placed(self.upload) if self.upload else Collected(head.content_length)
            self._filling = self._incoming.filling
        return data

    def _take_body(self, data: bytes) -> bytes:
        """Take the part of the data that belongs to the body; what remains."""
        assert self._incoming is not None
        try:
            count = self._incoming.take(data)
        except Reject as reject:
            self.refuse(reject)
            return b""
        self._placed(count)
        return data[count:]

    def _fill(self, count: int) -> None:
        """So many bytes were received straight into the body's place."""
        assert isinstance(self._incoming, Placed)
        self._incoming.received(count)
        self._placed(count)

    def _placed(self, count: int) -> None:
        incoming, server = self._incoming, self.server
        assert incoming is not None
        self._filling = incoming.filling
        self.since = http11.progressed(self.since, server.now, count)
        server.budget.add(self, count)
        if incoming.done:
            self.body = incoming.body
            server.budget.complete(self)
            self._dispatch()
