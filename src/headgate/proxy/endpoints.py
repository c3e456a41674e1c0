"""The proxy as an ASGI application, for middlewares to stand around.

It routes what they let through as they left it, pages under `/-/` included, and passes the answer
on part by part. Without middlewares connection.py does the same, in less time.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

from msgspec.msgpack import encode

from headgate.core import framing
from headgate.core.http11 import Head
from headgate.core.replies import CONTENT_TYPES, OWN_HEADERS
from headgate.errors import HeadgateError
from headgate.proxy import admin
from headgate.wire.link import PIECE_BYTES
from headgate.wire.replica_link import Caller

if TYPE_CHECKING:
    from headgate.proxy.asgi import Exchange
    from headgate.proxy.server import Server
    from headgate.wire.link import Source

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

#: Where the scope has the Exchange; a middleware that makes up a scope of its own may leave it out.
EXCHANGE = "headgate.exchange"
_TOTAL = struct.Struct("<Q")
_MAX_HEAD_BYTES = 0xFFFF  # of a head that middlewares added to, in a frame


class Endpoints:
    """The innermost application: sends each request to its endpoint."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"a middleware asked for {scope['type']!r}; only 'http' is served")
        body = await _read(receive)
        raw = _raw_head(scope)
        head = _facts(scope)
        server = scope.get("server") or ("", 0)
        refusal = self._server.refusal(head, raw, scope.get("scheme", "http"), tuple(server))
        if refusal is None and len(raw) > _MAX_HEAD_BYTES:
            refusal = admin.error(431, "the middlewares made the head longer than 65535 bytes")
        if refusal is not None:
            if refusal.status >= 400 and admin.wants_json(raw):
                refusal = admin.as_problem(refusal)
            await _send_local(send, refusal)
            return
        exchange: Exchange | None = scope.get(EXCHANGE)
        inner = Inner(raw, body)
        if exchange is not None:
            exchange.caller = inner
        shard_key = inner.address(self._server, scope, head, exchange)
        try:
            self._server.router.submit(inner.target, inner, shard_key)
            await inner.pass_on(send)
        finally:
            if not inner.over:
                inner.leave()
                self._server.router.cancel(inner)


async def _read(receive: Receive) -> bytes:
    parts = []
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise OSError("the client has gone")
        parts.append(message.get("body", b""))
        more = message.get("more_body", False)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _facts(scope: MutableMapping[str, Any]) -> Head:
    query = scope.get("query_string", b"")
    return Head(scope["method"], scope["path"], b"", query, False, True, 0, False, False, True)


def _raw_head(scope: MutableMapping[str, Any]) -> bytes:
    """The head as the middlewares left it."""
    from urllib.parse import quote  # with Starlette's middlewares it is imported anyway

    path = scope["path"]
    target = quote(path, safe="/:@!$&'()*+,;=~").encode() if path != "*" else b"*"
    if scope.get("query_string"):
        target += b"?" + scope["query_string"]
    lines = [b"%b %b HTTP/1.1" % (scope["method"].encode(), target)]
    lines += [b"%b: %b" % (name, value) for name, value in scope["headers"]]
    if any(b"\r" in line or b"\n" in line or b"\0" in line for line in lines):
        raise ValueError("a middleware put CR, LF or NUL into a request header")
    return b"\r\n".join(lines) + b"\r\n\r\n"


async def _send_local(send: Send, answer: admin.Local) -> None:
    await send({"type": "http.response.start", "status": answer.status, "headers": _header_list(answer.block)})
    await send({"type": "http.response.body", "body": answer.body, "more_body": False})


def _header_list(block: bytes) -> list[tuple[bytes, bytes]]:
    fields = (line.partition(b":") for line in block.split(b"\r\n") if line)
    return [(name.lower(), value.strip()) for name, _, value in fields]


class Inner(Caller):
    """A request at its endpoint; its answer is queued and passed on by the request's task."""

    target: Any = None

    def __init__(self, head: bytes, body: bytes) -> None:
        self.head = head
        self.body = body
        self.over = False
        self._events: deque[tuple[Any, ...]] = deque()
        self._ready: asyncio.Future[None] | None = None

    def address(
        self, server: Server, scope: MutableMapping[str, Any], head: Head, exchange: Exchange | None
    ) -> str | None:
        """Fill in endpoint and meta; the shard key."""
        outcome = server.table.match(head.path, head.method)
        assert outcome[0] == "match"
        found = server.targets[outcome[1]]
        self.target = found.endpoint
        headers = dict(reversed(scope["headers"]))  # the first of each name
        call_method = headers.get(b"x-serve-call-method")
        shard_key = headers.get(b"x-serve-shard-key")
        request_id = (exchange.request_id if exchange is not None else server.new_id()).decode()
        client = tuple(scope.get("client") or ("", 0))
        local = tuple(scope.get("server") or ("", 0))
        named = call_method.decode("utf-8", "replace") if call_method is not None else None
        tail = encode((*client, (*local, scope.get("scheme", "http")), named))[1:]
        self.meta = b"\x98%b%b%b%b" % (encode(request_id), found.route, encode(outcome[2]), tail)
        self.flags = framing.HEAD if named is not None else 0
        return shard_key.decode("utf-8", "replace") if shard_key is not None else None

    def leave(self) -> None:
        """The client has gone."""
        self._push("gone")

    def _push(self, *event: Any) -> None:
        self._events.append(event)
        if self._ready is not None and not self._ready.done():
            self._ready.set_result(None)

    async def _next(self) -> tuple[Any, ...]:
        while not self._events:
            self._ready = asyncio.get_running_loop().create_future()
            await self._ready
        return self._events.popleft()

    async def pass_on(self, send: Send) -> None:
        """Send the answer's parts as they come."""
        started = False
        while not self.over:
            kind, *what = await self._next()
            if kind == "gone":
                raise OSError("the client has gone")
            if kind == "failed":
                self.over = True
                if started:
                    raise what[0]
                local = admin.failure(what[0])
                await _send_local(send, admin.as_problem(local) if admin.wants_json(self.head) else local)
            elif kind == "start":
                started = True
                await send({"type": "http.response.start", "status": what[0], "headers": what[1]})
            else:
                self.over = what[1]
                part = bytes(what[0])
                await send({"type": "http.response.body", "body": part, "more_body": not what[1]})
                if not self.over:
                    self.grant(len(part))

    # --- what the router calls ---

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        body = start + meta_len
        self._begin(arg, flags, source, start, body, end - body)
        for at in range(body, end - PIECE_BYTES, PIECE_BYTES):  # copied when it is sent
            self._push("part", memoryview(source)[at : at + PIECE_BYTES], False)
            body = at + PIECE_BYTES
        self._push("part", memoryview(source)[body:end], True)

    def on_reply_start(
        self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int
    ) -> None:
        body = start + meta_len
        total = None if flags & framing.STREAM else _TOTAL.unpack_from(source, body)[0]
        self._begin(arg, flags, source, start, body, total)

    def _begin(self, arg: int, flags: int, source: Source, start: int, end: int, length: int | None) -> None:
        kind = arg >> 16
        headers = []
        if flags & framing.HEAD:
            headers = _header_list(bytes(source[start:end]))
        elif kind < OWN_HEADERS:
            headers = [(b"content-type", CONTENT_TYPES[kind])]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        self._push("start", arg & 0xFFFF, headers)

    def on_data(self, source: Source, start: int, end: int) -> None:
        self._push("part", bytes(source[start:end]), False)

    def on_reply_end(self) -> None:
        self._push("part", b"", True)

    def on_error(self, status: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        body = start + meta_len
        block = _header_list(bytes(source[start:body])) if flags & framing.HEAD else []
        if self.answering:
            self.on_failure(HeadgateError(bytes(source[body:end]).decode("utf-8", "replace")))
            return
        self._push("start", status, [(b"content-type", CONTENT_TYPES[1]), *block])
        self._push("part", bytes(source[body:end]), True)

    def on_failure(self, error: HeadgateError) -> None:
        self._push("failed", error)
