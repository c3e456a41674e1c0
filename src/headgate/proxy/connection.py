"""The reading half of an HTTP connection: bytes in, requests out, one at a time and in order.

A head is judged by core/http11.py and second_opinion.py; a request leaves when its body is complete.
What a client sends while its request runs is kept, up to a limit, so that its going away is
noticed; it is read as the next request once the answer is out.

All connections of a proxy receive into one buffer: a read is handled at once and only what is
incomplete is copied. A large body of known length goes straight into the arena (upload.py). The
connection itself is what waits for the answer (answer.py): no object, task or timer per request.
Time-outs are found by the server's one sweep.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from msgspec.msgpack import encode

from headgate.core import framing, http11
from headgate.core.http11 import BODY, IDLE, RUNNING, Head, Reject, check_head, check_start
from headgate.core.replies import CONTINUE
from headgate.proxy import admin, fields
from headgate.proxy.answer import Answering
from headgate.proxy.body import Collected, Placed
from headgate.proxy.chunked import Chunked

if TYPE_CHECKING:
    from headgate.core.state import Endpoint
    from headgate.proxy.asgi import Exchange
    from headgate.proxy.server import Server
    from headgate.proxy.upload import Upload

log = logging.getLogger("headgate.proxy")

#: Beyond the states of core/http11.py. LINGER: the last answer is out, and what the client still sends is
#: thrown away, so that it gets to read the answer (RFC 9112 §9.6). CLOSING: the rest is being written.
LINGER, CLOSING = 5, 6
_LINGER_S = 1.0
#: How much a client may send ahead while its request runs.
_AHEAD_BYTES = 64 * 1024
_NEVER = float("inf")
_AHEAD, _BUDGET = 1, 2  # why reading is paused


class Connection(Answering, asyncio.BufferedProtocol):
    """One client's connection, from accept to close."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.state = IDLE
        self.since = server.now  # when the state began or last made progress
        self.facts: Head | None = None
        self.upload: Upload | None = None  # the request, if its body is in the arena
        self.exchange: Exchange | None = None  # the request, if it goes through middlewares
        self.client = self.local = ("", 0)
        self._origin = b""
        self._special: fields.Fields | None = None
        self._incoming: Collected | Placed | Chunked | None = None
        self._filling: memoryview | None = None
        self._held = 0  # bytes of this body in the budget
        self._rest = b""  # received, not looked at
        self._busy = False  # inside _take, which goes on to the next request by itself
        self._unread = 0  # why reading is paused
        self._linger = False
        self._untaken = 0  # bytes the client had not taken when the sweep last looked

    # --- the transport's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.client = _address(transport.get_extra_info("peername"))
        self.local = _address(transport.get_extra_info("sockname"))
        self._origin = _origin(self.client, self.local, self.server.scheme)
        self.server.connections.add(self)
        limit = self.server.options.max_connections
        if len(self.server.connections) > limit:
            self._refuse(Reject(503, f"{limit} connections are open already (max_connections)"))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self.server.view if self._filling is None else self._filling

    def buffer_updated(self, nbytes: int) -> None:
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

    def eof_received(self) -> bool:
        self._leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self.server.connections.discard(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.since, self._untaken = self.server.now, -1

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.exchange is not None:
            self.exchange.resumed()
        self._proceed()

    # --- input ---

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
        if data[0] == 13 and data[:2] in (b"\r\n", b"\r"):  # RFC 9112 §2.2: an empty line before is ignored
            if len(data) == 1:
                return self._wait_for_head(data)
            data = data[2:]
        end = data.find(b"\r\n\r\n") + 4
        try:
            if end < 4:
                return self._wait_for_head(data)
            raw = data[:end]
            head = check_head(raw, server.limits)
            server.second_opinion.check(raw, head)
        except Reject as reject:
            self._refuse(reject)
            return b""
        self.method = head.method
        self.http10 = head.http10
        self.last = server.leaving or not head.keep_alive
        self.head = raw
        self.facts = head
        server.count = count = server.count + 1
        self.request_id = b"%b%011x" % (server.id_prefix, count)
        if head.special:
            self._look_closer(raw, head)
        size = head.content_length
        if not size and not head.chunked:
            self._dispatch(head)
            return data[end:]
        if size and len(data) - end >= size:  # most bodies
            self.body = data[end : end + size]
            self._dispatch(head)
            return data[end + size :]
        return self._begin_body(data[end:], head)

    def _wait_for_head(self, data: bytes) -> bytes:
        if data:
            if data != b"\r":
                check_start(data, self.server.limits)
            self._rest = data
            if self.state == IDLE:
                self.state, self.since = http11.HEAD, self.server.now
        return b""

    def _look_closer(self, raw: bytes, head: Head) -> None:
        absolute = not raw.startswith((b"/", b"*"), len(head.method) + 1)
        is_trusted = self.server.is_trusted
        self._special = special = fields.read(raw, absolute, is_trusted(self.client[0]), is_trusted)
        self.head = special.head
        if special.request_id is not None:
            self.request_id = special.request_id

    # --- bodies that come in pieces ---

    def _begin_body(self, data: bytes, head: Head) -> bytes:
        server = self.server
        refusal = None if server.app is not None else server.refusal(head, self.head, self.origin_scheme, self.local)
        if refusal is not None:  # not worth receiving a body for
            self.last = self._linger = True
            self.answer(refusal)
            return b""
        self.state, self.since = BODY, server.now
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
            self._refuse(reject)
            return b""
        self._received(count)
        return data[count:]

    def _fill(self, count: int) -> None:
        """So many bytes were received straight into the body's place."""
        assert isinstance(self._incoming, Placed)
        self._incoming.received(count)
        self._received(count)

    def _received(self, count: int) -> None:
        incoming, server = self._incoming, self.server
        assert incoming is not None and self.facts is not None
        self._filling = incoming.filling
        self.since = server.now
        self._held += count
        server.budget.add(self, count)
        if incoming.done:
            self.body = incoming.body
            server.budget.complete(self)
            self._dispatch(self.facts)

    # --- requests ---

    @property
    def origin_scheme(self) -> str:
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
        if server.app is not None:
            self.exchange = server.app.serve(self, head)
            return
        path = head.path
        outcome = server.table.match(path, head.method)
        if outcome[0] != "match" or path.startswith("/-/"):
            refusal = server.refusal(head, self.head, self.origin_scheme, self.local)
            assert refusal is not None
            self.answer(refusal)
            return
        target = server.targets[outcome[1]]
        if outcome[2]:
            route = target.route + encode(outcome[2])
        else:
            route = target.route_alone
        special = self._special
        if special is None:
            self.meta = b"\x98\xb4%b%b%b" % (self.request_id, route, self._origin)
        else:
            origin = _origin(self.origin, self.local, self.origin_scheme, special.call_method)
            self.flags = framing.HEAD if special.call_method is not None else 0
            self.meta = b"\x98%b%b%b" % (encode(self.request_id.decode()), route, origin)
        if self.upload is None:
            server.router.submit(target.endpoint, self, special and special.shard_key)
        else:
            self._submit_upload(self.upload, target.endpoint)

    def _submit_upload(self, upload: Upload, endpoint: Endpoint) -> None:
        upload.meta, upload.head = self.meta, self.head
        upload.flags |= self.flags
        if endpoint.traffic.shadows:  # several replicas would read it, and each say when it is done
            upload.body = bytes(upload.view)
            upload.flags &= ~framing.ARENA
        self.server.router.submit(endpoint, upload, self._special and self._special.shard_key)

    def allow(self, count: int) -> None:
        (self.upload or self).grant(count)

    # --- after an answer ---

    def answered(self) -> None:
        self.state = IDLE
        self.since = self.server.now
        self.body = b""
        self.deadline = _NEVER
        self.tries = self.flags = 0
        self.started = self.answering = self.ran_twice = False
        if self._special is not None or self._held or self.exchange is not None or self.upload is not None:
            self._clear()
        if self.last:
            self._end()
        elif self._rest and not self._busy:
            self._proceed()

    def _clear(self) -> None:
        """Let go of what the request held."""
        self._special = self.exchange = self._incoming = self._filling = None
        self.server.budget.complete(self)
        self.server.budget.release(self._held)
        self._held = 0
        if self.upload is not None:
            self.upload.end()
            self.upload = None

    def _refuse(self, reject: Reject) -> None:
        """Answer what is no request, or comes too slowly, and end the connection."""
        if self.state != BODY:
            self.method, self.http10, self.head = "GET", False, b""
            self.request_id = self.server.new_id()
        self._rest = b""
        self.last = self._linger = True
        self.answer(admin.error(reject.status, reject.reason))

    def _end(self) -> None:
        """The last answer is out."""
        self._filling = None
        if (self._linger or self._rest) and self.transport.can_write_eof():
            self.state = LINGER
            self.transport.write_eof()
            if self._unread:
                self.resume(self._unread)
        else:
            self.close()

    # --- the end ---

    def close(self) -> None:
        """End the connection once all is written."""
        self.closed = True
        self.state, self.since, self._untaken = CLOSING, self.server.now, -1
        self.transport.close()

    def abort(self) -> None:
        """End the connection now; whoever works on its request may stop."""
        self._leave()
        self.transport.abort()

    def break_off(self) -> None:
        self._clear()
        if self.http10:  # its client takes the end of the connection for the end of the answer
            self.closed = True
            self.transport.abort()
        else:
            self.close()

    def abandon(self) -> None:
        if self.exchange is not None:
            self.exchange.leave()
        else:
            self.server.router.cancel(self.upload or self)

    def _leave(self) -> None:
        """The client has gone."""
        if not self.closed:
            self.closed = True
            if self.state == RUNNING:
                self.gone = True
                self.abandon()
        self._clear()

    def leave_if_idle(self) -> None:
        """The server stops: a connection without a request has no use any more."""
        self.last = True
        if self.state == IDLE and not self.closed:
            self.close()

    # --- time-outs ---

    def sweep(self, now: float) -> None:
        """Called a few times a second; `server.tick_s` is how often."""
        state = self.state
        if self.paused or state == CLOSING:
            self._check_writing(now)
        elif state == RUNNING:
            return
        elif state == LINGER:
            if now >= self.since + _LINGER_S:
                self.close()
        elif not self._unread and now >= self._deadline():
            if state in http11.ANSWERED:
                what = "head" if state == http11.HEAD else "body"
                self._refuse(Reject(408, f"the rest of the request's {what} did not come in time"))
            else:
                self.close()

    def _deadline(self) -> float:
        return http11.next_deadline(self.state, self.since, self.server.limits) + self.server.tick_s

    def _check_writing(self, now: float) -> None:
        untaken = self.transport.get_write_buffer_size()
        if untaken != self._untaken:
            self._untaken, self.since = untaken, now
        elif now >= self.since + self.server.limits.write_timeout_s:
            self.abort()


def _address(given: Any) -> tuple[str, int]:
    return (str(given[0]), int(given[1])) if isinstance(given, tuple) else ("", 0)


def _origin(client: tuple[str, int], local: tuple[str, int], scheme: str, call_method: str | None = None) -> bytes:
    """The end of a request's meta: client, server, and the method that the client names."""
    return encode((*client, (*local, scheme), call_method))[1:]
