"""Middlewares: requests that pass through ASGI applications before and after their endpoint.

Loaded, with Starlette, only where `http_options` has middlewares; the last in the list is the
outermost. The innermost application, `Endpoints` (endpoints.py),
is the proxy itself.

Each request is a task here. An exception that leaves the outermost middleware is logged with its
traceback and answered with 500.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import cloudpickle

from headgate.core.http11 import Head
from headgate.core.replies import OWN_HEADERS, has_body
from headgate.proxy import admin
from headgate.proxy.endpoints import EXCHANGE, Endpoints, Inner

if TYPE_CHECKING:
    from starlette.middleware import Middleware

    from headgate.proxy.dispatch import Dispatching
    from headgate.proxy.server import Server

log = logging.getLogger("headgate.proxy")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]



def load(server: Server, pickled: bytes) -> Stack:
    """The middlewares that the driver packed, around `server`'s endpoints."""
    return Stack(server, cloudpickle.loads(pickled))


class Stack:
    """The applications, built once."""

    def __init__(self, server: Server, middlewares: list[Middleware]) -> None:
        self.server = server
        app: Any = Endpoints(server)
        for cls, args, kwargs in middlewares:
            app = cls(app, *args, **kwargs)
        self.app: App = app
        self._tasks: set[asyncio.Task[None]] = set()

    def serve(self, connection: Dispatching, head: Head) -> Exchange:
        """Run the applications for the request that `connection` has read."""
        exchange = Exchange(connection, bytes(connection.body))
        task = asyncio.get_running_loop().create_task(exchange.run(self.app, _scope(connection, head, exchange)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return exchange


def _scope(connection: Dispatching, head: Head, exchange: Exchange) -> dict[str, Any]:
    lines = connection.head[:-4].split(b"\r\n")[1:]
    fields = (line.partition(b":") for line in lines)
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.0" if head.http10 else "1.1",
        "method": head.method,
        "scheme": connection.scheme,
        "path": head.path,
        "raw_path": head.raw_path,
        "query_string": head.query,
        "root_path": "",
        "headers": [(name.lower(), value.strip(b" \t")) for name, _, value in fields],
        "client": connection.origin,
        "server": connection.local,
        "state": {},
        EXCHANGE: exchange,
    }


class Exchange:
    """One request's `receive` and `send`, and its answer on the connection."""

    def __init__(self, connection: Dispatching, body: bytes) -> None:
        self.request_id = connection.request_id
        self.caller: Inner | None = None  # the request at its endpoint
        self._connection: Dispatching | None = connection
        self._body: bytes | None = body
        self._start: Message | None = None
        self._started = False
        self._complete = False
        self._bodied = True
        self._wake: list[asyncio.Future[None]] = []

    # --- the connection's side ---

    def leave(self) -> None:
        """The client has gone."""
        self._connection = None
        if self.caller is not None:
            self.caller.leave()
        self.resumed()

    def resumed(self) -> None:
        """The client takes more, or has gone."""
        wake, self._wake = self._wake, []
        for future in wake:
            if not future.done():
                future.set_result(None)

    async def _wait(self) -> None:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._wake.append(future)
        await future

    # --- the applications' side ---

    async def run(self, app: App, scope: dict[str, Any]) -> None:
        """Run the applications to their end, and see that the request gets an answer."""
        problem = "a middleware returned without an answer"
        try:
            await app(scope, self.receive, self.send)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            if self._connection is not None or not isinstance(error, OSError):
                log.exception("a request failed in a middleware", extra={"request_id": self.request_id.decode()})
        connection = self._connection
        if connection is not None and not self._complete:
            self._complete = True
            connection.answer(admin.error(500, problem))  # breaks off an answer that has begun

    async def receive(self) -> Message:
        """The body in one piece; then, once the answer is out or the client has gone, that."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        while self._connection is not None and not self._complete:
            await self._wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass on the answer; waits while the client does not take it. OSError once it has gone."""
        if self._connection is None:
            raise OSError("the client has gone")
        if self._complete:
            if not self._bodied:
                return
            raise RuntimeError(f"{message['type']!r} after the answer was complete")
        if message["type"] == "http.response.start":
            if self._start is not None:
                raise RuntimeError("an answer can begin only once")
            self._start = message
        elif message["type"] == "http.response.body":
            if self._start is None:
                raise RuntimeError("'http.response.body' came before 'http.response.start'")
            self._part(self._connection, self._start, message.get("body", b""), message.get("more_body", False))
            while self._connection is not None and self._connection.paused and not self._complete:
                await self._wait()

    def _part(self, connection: Dispatching, start: Message, body: bytes, more: bool) -> None:
        if not self._started:
            self._started = True
            block, length = _header_block(start.get("headers", ()))
            self._bodied = has_body(start["status"], connection.method)
            if not more and self._bodied:
                self._finish()
                connection.whole(start["status"], OWN_HEADERS, block, body)
                return
            if not self._bodied:
                self._finish()
                connection.bare(start["status"], block, length if length is not None or more else len(body))
                return
            if not connection.start(start["status"], block, length):
                self._finish()
                return
        connection.part(body)
        if not more:
            self._finish()
            connection.finish()

    def _finish(self) -> None:
        self._complete = True
        self.resumed()


def _header_block(headers: Any) -> tuple[bytes, int | None]:
    """Header lines, and the content-length among them."""
    length = None
    lines = []
    for name, value in headers:
        if name.lower() == b"content-length" and value.isdigit():
            length = int(value)
        lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines), length
