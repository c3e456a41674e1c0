"""The reading half of an HTTP connection: bytes in, requests out, one at a time and in order.

A head is looked at by core/http11.py and second_opinion.py; a body is complete before its request
leaves. What a client sends while its request runs is kept, up to a limit, so that its going away
is noticed; it is read as the next request when the answer is out.

All connections of a proxy receive into one buffer: a read is handled at once and only what is
incomplete is copied. A large body of known length goes straight into the arena (upload.py). The
connection itself is what waits for the answer (answer.py): no object, task or timer per request.
Time-outs are found by the server's one sweep.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from msgspec.msgpack import encode

from headgate.core import framing, http11
from headgate.core.http11 import BODY, IDLE, RUNNING, WRITE, Head, Reject, check_head, check_start
from headgate.core.replies import CONTINUE
from headgate.proxy import admin, fields
from headgate.proxy.answer import Answering
from headgate.proxy.chunked import Chunked

if TYPE_CHECKING:
    from headgate.proxy.asgi import Exchange
    from headgate.proxy.server import Server
    from headgate.proxy.upload import Upload

log = logging.getLogger("headgate.proxy")

#: Beyond the states of core/http11.py. LINGER: the answer is out, what the client still sends is thrown
#: away, so that it gets to read the answer (RFC 9112 §9.6). CLOSING: the last bytes are being written.
LINGER, CLOSING = 5, 6
_LINGER_S = 1.0
#: How much a client may send ahead while its request runs.
_AHEAD_BYTES = 64 * 1024
_NEVER = float("inf")
_AHEAD, _BUDGET = 1, 2  # why reading is paused


class Connection(Answering, asyncio.BufferedProtocol):
    """One client's connection, from accept to close; see the module."""

    transport: asyncio.Transport

    def __init__(self, server: Server) -> None:
        self.server = server
        self.state = IDLE
        self.since = server.now
        self.facts: Head | None = None
        self.upload: Upload | None = None
        self.exchange: Exchange | None = None
        self.client = ("", 0)
        self.local_address = ("", 0)
        self.scheme = server.scheme
        self._rest = b""  # received, not looked at
        self._busy = False  # in _take: the next request is begun there
        self._filling: memoryview | None = None  # where the body goes that is being received
        self._missing = 0
        self._chunks: Chunked | None = None
        self._held = 0  # bytes of this body in the budget
        self._unread = 0  # why reading is paused
        self._pending = 0  # bytes the client had not taken when we last looked
        self._special: fields.Fields | None = None

    # --- the transport's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.client = _address(transport.get_extra_info("peername"))
        self.local_address = _address(transport.get_extra_info("sockname"))
        self._origin = _origin(self.client, self.local_address, self.scheme)
        if not self.server.admit(self):
            self.last = True
            limit = self.server.options.max_connections
            self.local(admin.error(503, f"{limit} connections are open (max_connections)", b"retry-after: 1\r\n"))

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
        except Exception:  # noqa: BLE001 - an error here ends this connection, not the proxy
            log.exception("a connection failed")
            self.abort()

    def eof_received(self) -> bool:
        self._leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self.server.connections.discard(self)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.exchange is not None:
            self.exchange.resumed()
        if self.state == IDLE:
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
                if state < LINGER:
                    self._keep(data)
                break
        self._busy = False

    def _keep(self, data: bytes) -> None:
        """For later. A client that sends too much ahead is not read on."""
        self._rest = data
        if len(data) > _AHEAD_BYTES:
            self._pause_reading(_AHEAD)

    def _proceed(self) -> None:
        """On to what was received while a request ran."""
        if self._rest and not self._busy and not self.paused:
            data, self._rest = self._rest, b""
            self._take(data)
        if self._unread & _AHEAD and len(self._rest) <= _AHEAD_BYTES:
            self._resume_reading(_AHEAD)

    def _take_head(self, data: bytes) -> bytes:
        """Begin the request whose head this starts with; what remains of the data."""
        if data[0] == 13 and data[:2] in (b"\r\n", b"\r"):  # RFC 9112 §2.2: one empty line before is ignored
            if len(data) == 1:
                return self._wait_for_head(data)
            data = data[2:]
        end = data.find(b"\r\n\r\n") + 4
        server = self.server
        try:
            if end < 4:
                if data:
                    check_start(data, server.limits)
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
        if head.content_length or head.chunked:
            return self._begin_body(data, end, head)
        self._dispatch(head)
        return data[end:]

    def _wait_for_head(self, data: bytes) -> bytes:
        if data:
            self._rest = data
            if self.state == IDLE:
                self.state, self.since = http11.HEAD, self.server.now
        return b""

    def _look_closer(self, raw: bytes, head: Head) -> None:
        server = self.server
        absolute = not raw.startswith(b"/", len(head.method) + 1)
        trusted = server.is_trusted(self.client[0])
        self._special = special = fields.read(raw, absolute, trusted, server.is_trusted)
        self.head = special.head
        if special.request_id is not None:
            self.request_id = special.request_id

    # --- bodies ---

    def _begin_body(self, data: bytes, end: int, head: Head) -> bytes:
        size = head.content_length
        if size and len(data) - end >= size:  # most bodies
            self.body = data[end : end + size]
            self._dispatch(head)
            return data[end + size :]
        refusal = self._route_refusal(head)
        if refusal is not None:
            self.last = True  # not worth receiving the body
            self.local(refusal)
            return b""
        self.state, self.since = BODY, self.server.now
        if head.expect_continue and end == len(data):
            self.transport.write(CONTINUE)
        if head.chunked:
            self._chunks = Chunked(self.server.limits)
        else:
            self._missing = size
            self.upload = self.server.borrow(self, size)
            if self.upload is None:
                self.body = bytearray()
            else:
                self._filling = self.upload.view
        return data[end:]

    def _take_body(self, data: bytes) -> bytes:
        """Take the part of the data that belongs to the body; what remains."""
        if self._chunks is not None:
            return self._take_chunks(self._chunks, data)
        count = min(self._missing, len(data))
        if self._filling is not None:
            self._filling[:count] = data[:count]
        else:
            self.body += memoryview(data)[:count]
        self._received(count)
        return data[count:]

    def _take_chunks(self, chunks: Chunked, data: bytes) -> bytes:
        before = len(chunks.body)
        try:
            end = chunks.feed(data, 0)
        except Reject as reject:
            self._refuse(reject)
            return b""
        self._hold(len(chunks.body) - before)
        if chunks.done:
            self.body = chunks.body
            self._complete()
        return data[end:]

    def _fill(self, count: int) -> None:
        """So many bytes were received straight into the body's place."""
        self._received(count)
        self._proceed()

    def _received(self, count: int) -> None:
        self._missing -= count
        if self._filling is not None:
            self._filling = self._filling[count:] if self._missing else None
        self._hold(count)
        if not self._missing:
            self._complete()

    def _hold(self, count: int) -> None:
        self.since = self.server.now
        self._held += count
        self.server.budget.add(self, count)

    def _complete(self) -> None:
        """The body is there."""
        self._chunks = None
        self.server.budget.complete(self)
        assert self.facts is not None
        self._dispatch(self.facts)

    # --- requests ---

    def _route_refusal(self, head: Head) -> admin.Local | None:
        """The answer to a request that no endpoint serves."""
        return None if self.server.app is not None else self.server.refusal(head, self)

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
            local = server.refusal(head, self)
            assert local is not None
            self.local(local)
            return
        endpoint, piece = server.targets[outcome[1]]
        if outcome[2]:
            piece += encode(outcome[2])
        else:
            piece += b"\x90"
        shard_key = None
        if self._special is None:
            self.meta = b"\x98\xb4%b%b%b" % (self.request_id, piece, self._origin)
        else:
            shard_key = self._special.shard_key
            self.meta = self._special_meta(self._special, piece)
        if self.upload is None:
            server.router.submit(endpoint, self, shard_key)
        else:
            self._submit_upload(self.upload, endpoint, shard_key)

    def _special_meta(self, special: fields.Fields, piece: bytes) -> bytes:
        client = (special.client, 0) if special.client is not None else self.client
        origin = _origin(client, self.local_address, special.scheme or self.scheme, special.call_method)
        if special.call_method is not None:
            self.flags = framing.HEAD
        return b"\x98%b%b%b" % (encode(self.request_id.decode()), piece, origin)
