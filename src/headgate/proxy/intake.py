"""The reading half of an HTTP connection: bytes in, requests out, one at a time and in order.

A head is judged by core/http11.py and second_opinion.py; a request leaves when its body is complete.
What a client sends while its request runs is kept, up to a limit, so that its going away is
noticed; it is read as the next request once the answer is out.

All connections of a proxy receive into one buffer: a read is handled at once and only what is
incomplete is copied. A large body of known length goes straight into the arena (upload.py). The
connection itself is what waits for the answer (answer.py): no object, task or timer per request.

Where a connection begins and ends, and its time-outs, is connection.py.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from msgspec.msgpack import encode

from headgate.core import framing, http11
from headgate.core.http11 import BODY, IDLE, RUNNING, Head, Reject, check_head, check_start
from headgate.core.replies import CONTINUE
from headgate.proxy import fields
from headgate.proxy.admin import PREFIX
from headgate.proxy.answer import Answering
from headgate.proxy.body import Collected, Placed
from headgate.proxy.chunked import Chunked

if TYPE_CHECKING:
    from headgate.core.routes import RouteTable
    from headgate.core.state import Endpoint
    from headgate.proxy.asgi import Exchange
    from headgate.proxy.server import Server
    from headgate.proxy.upload import Upload

log = logging.getLogger("headgate.proxy")

#: How much a client may send ahead while its request runs.
_AHEAD_BYTES = 64 * 1024
#: A body of this size that comes with its head is not counted.
_SMALL_BYTES = 16 * 1024
_AHEAD, _BUDGET = 1, 2  # why reading is paused


class Intake(Answering):
    """One connection's requests."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.state = IDLE
        self.since = server.now  # when the state began or last made progress
        self.facts: Head | None = None
        self.upload: Upload | None = None  # the request, if its body is in the arena
        self.exchange: Exchange | None = None  # the request, if it goes through middlewares
        self.client = self.local = ("", 0)
        self._tail = b""  # client and server, as a request's meta has them
        # The newest head, and where it leads, so that the same one again is not judged twice.
        self._known = b""  # empty if it has to be looked at closer each time
        self._body_follows = False
        self._table: RouteTable | None = None  # by which it was routed
        self._target: Any = None
        self._routed = b""  # endpoint, template and parameters, as a request's meta has them
        self._special: fields.Fields | None = None
        self._incoming: Collected | Placed | Chunked | None = None
        self._filling: memoryview | None = None
        self._untidy = False  # the request holds more than its head and meta
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
            data = bytes(self.server.view[:nbytes])
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
            if data.startswith(b"\r\n"):  # RFC 9112 §2.2: an empty line before a request is ignored
                data = data[2:]
            end = self._judge(data) if data else 0
            if not end:
                return b""
        server.count = count = server.count + 1
        self.request_id = b"%b%011x" % (server.id_prefix, count)
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
                self._untidy = True
                server.budget.add(self, size)
                server.budget.complete(self)
        self._dispatch(head)
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
        self.head = raw
        self.facts = head
        self._body_follows = head.chunked or head.content_length > 0
        self._known = b"" if head.special else raw
        self._table = None
        return end

    def _wait_for_head(self, data: bytes) -> None:
        if data != b"\r":
            check_start(data, self.server.limits)
        self._rest = data
        if self.state == IDLE:
            self.state, self.since = http11.HEAD, self.server.now

    def _look_closer(self, raw: bytes, head: Head) -> None:
        absolute = not raw.startswith((b"/", b"*"), len(head.method) + 1)
        is_trusted = self.server.is_trusted
        self._untidy = True
        self._special = special = fields.read(raw, absolute, is_trusted(self.client[0]), is_trusted)
        self.head = special.head
        if special.request_id is not None:
            self.request_id = special.request_id

    # --- bodies that come in pieces ---

    def _begin_body(self, data: bytes, head: Head) -> bytes:
        server = self.server
        refusal = None if server.app is not None else server.refusal(head, self.head, self.scheme, self.local)
        if refusal is not None:  # not worth receiving a body for
            self.last = self.lingers = True
            self.answer(refusal)
            return b""
        self.state, self.since = BODY, server.now
        self._untidy = True
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
        assert self.facts is not None
        self._filling = incoming.filling
        self.since = server.now
        server.budget.add(self, count)
        if incoming.done:
            self.body = incoming.body
            server.budget.complete(self)
            self._dispatch(self.facts)

    # --- requests ---

    @property
    def scheme(self) -> str:
        """The scheme that the client used, as far as we know."""
        return (self._special and self._special.scheme) or self.server.scheme

    @property
    def origin(self) -> tuple[str, int]:
        """Who sent the request, as far as we know."""
        named = self._special and self._special.client
        return (named, 0) if named else self.client

    def _dispatch(self, head: Head) -> None:
        """The request is complete: send it on its way."""
        self.state = RUNNING
        server = self.server
        if self._table is not server.table and not self._route(head):
            return
        special = self._special
        if special is None:
            self.meta = b"\x98\xb4%b%b%b" % (self.request_id, self._routed, self._tail)
            key = None
        else:
            tail = self._tail
            if special.client or special.scheme or special.call_method is not None:
                tail = meta_tail(self.origin, self.local, self.scheme, special.call_method)
            self.flags = framing.HEAD if special.call_method is not None else 0
            self.meta = b"\x98%b%b%b" % (encode(self.request_id.decode()), self._routed, tail)
            key = special.shard_key
        if self.upload is None:
            server.router.submit(self._target, self, key)
        else:
            self._submit_upload(self.upload, self._target, key)

    def _route(self, head: Head) -> bool:
        """Find the endpoint; False if none serves the request, or middlewares do it: then it is under way."""
        server = self.server
        if server.app is not None:
            self._untidy = True
            self.exchange = server.app.serve(self, head)
            return False
        outcome = server.table.match(head.path, head.method)
        if outcome[0] != "match" or head.path.startswith(PREFIX):
            refusal = server.refusal(head, self.head, self.scheme, self.local)
            assert refusal is not None
            self.answer(refusal)
            return False
        target = server.targets[outcome[1]]
        self._target = target.endpoint
        self._routed = target.route + encode(outcome[2]) if outcome[2] else target.route_alone
        self._table = server.table
        return True

    def _submit_upload(self, upload: Upload, endpoint: Endpoint, key: str | None) -> None:
        upload.meta, upload.head = self.meta, self.head
        upload.flags |= self.flags
        if endpoint.traffic.shadows:  # several replicas would read it, and each say when it is done
            upload.body = bytes(upload.view)
            upload.flags &= ~framing.ARENA
        self.server.router.submit(endpoint, upload, key)

    def allow(self, count: int) -> None:
        (self.upload or self).grant(count)


def meta_tail(client: tuple[str, int], local: tuple[str, int], scheme: str, call_method: str | None = None) -> bytes:
    """The end of a request's meta: client, server, and the method that the client names."""
    return encode((*client, (*local, scheme), call_method))[1:]
