"""Middlewares around the proxy, on a transport and a router in memory."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from fakes import Wire, get, post
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, StreamingResponse

from headgate.errors import BackendOverloaded, ReplicaDied
from headgate.proxy.asgi import Stack


class Tag:
    """Adds its name to a header of the request and of the answer."""

    def __init__(self, app: Any, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope = {**scope, "headers": [*scope["headers"], (b"x-in", self.name.encode())]}

        async def tagged(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-out", self.name.encode())]
            await send(message)

        await self.app(scope, receive, tagged)


def wired(*middlewares: Middleware) -> Wire:
    wire = Wire()
    wire.server.app = Stack(wire.server, list(middlewares))
    return wire


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(test())  # type: ignore[arg-type]


def test_the_last_middleware_is_the_outermost() -> None:
    async def test() -> None:
        wire = wired(Middleware(Tag, name="inner"), Middleware(Tag, name="outer"))
        wire.receive(post(b"abc", "X-Request-ID: mine", "X-Serve-Shard-Key: k"))
        await settle()
        head, body = wire.router.seen[0]
        assert head.index(b"x-in: outer") < head.index(b"x-in: inner")
        assert head.startswith(b"POST /hello HTTP/1.1\r\n")
        assert body == b"abc"
        assert wire.router.shard_keys == ["k"]
        assert wire.meta()[:4] == ["mine", "hello", "/hello", []]
        wire.reply(b"ok", 201)
        await settle()
        output = wire.output
        assert output.startswith(b"HTTP/1.1 201 ")
        assert output.index(b"x-out: inner") < output.index(b"x-out: outer")
        assert output.endswith(b"\r\n\r\nok")
        assert b"content-length: 2\r\n" in output
        wire.receive(get())
        await settle()
        assert len(wire.router.callers) == 2

    run(test)


def test_a_middleware_may_answer_by_itself_and_pages_pass_through_it() -> None:
    async def answer(request: Request, call_next: Any) -> Any:
        if request.url.path == "/own":
            return PlainTextResponse("own", status_code=418)
        return await call_next(request)

    async def test() -> None:
        wire = wired(Middleware(BaseHTTPMiddleware, dispatch=answer), Middleware(Tag, name="t"))
        for path, status in (("/own", 418), ("/-/healthz", 200), ("/nope", 404)):
            wire.receive(get(path))
            await settle()
            output = wire.output
            assert output.startswith(b"HTTP/1.1 %d " % status)
            assert b"x-out: t\r\n" in output
        assert not wire.router.callers

    run(test)


def test_a_stream_passes_part_by_part_and_waits_for_the_client() -> None:
    async def test() -> None:
        wire = wired(Middleware(Tag, name="t"))
        granted: list[int] = []
        wire.receive(get())
        await settle()
        wire.router.callers[-1].grant = granted.append
        wire.start()
        wire.part(b"abc")
        await settle()
        assert wire.output.endswith(b"3\r\nabc\r\n")
        assert granted == [3]
        wire.connection.pause_writing()
        for _ in range(3):
            wire.part(b"defg")
        await settle()
        assert granted == [3]
        wire.connection.resume_writing()
        await settle()
        assert granted == [3, 4, 4, 4]
        wire.router.callers[-1].on_reply_end()
        await settle()
        assert wire.output.endswith(b"\r\n0\r\n\r\n")

    run(test)


def test_a_client_that_goes_cancels_its_request() -> None:
    async def test() -> None:
        wire = wired(Middleware(Tag, name="t"))
        wire.receive(get())
        await settle()
        wire.connection.eof_received()
        await settle()
        assert wire.router.cancelled == wire.router.callers

    run(test)


def test_an_exception_is_a_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: Request, call_next: Any) -> Any:
        raise ValueError("no")

    async def test() -> None:
        wire = wired(Middleware(BaseHTTPMiddleware, dispatch=broken))
        wire.receive(get() + get("/hello?2"))
        await settle()
        await settle()
        assert wire.statuses() == [500, 500]
        assert "ValueError: no" in caplog.text

    run(test)


def test_failures_keep_their_status_and_a_broken_stream_breaks(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        wire = wired(Middleware(Tag, name="t"))
        wire.router.fails = BackendOverloaded("full")
        wire.receive(get())
        await settle()
        output = wire.output
        assert output.startswith(b"HTTP/1.1 503 ")
        assert b"retry-after: 1\r\n" in output
        wire.router.fails = None
        wire.receive(get())
        await settle()
        wire.start()
        wire.part(b"abc")
        wire.router.callers[-1].on_failure(ReplicaDied("gone"))
        await settle()
        assert wire.output.endswith(b"3\r\nabc\r\n")
        assert wire.transport.closing

    run(test)


def test_starlettes_own_middlewares_work() -> None:
    async def test() -> None:
        wire = wired(Middleware(GZipMiddleware, minimum_size=10), Middleware(CORSMiddleware, allow_origins=["*"]))
        wire.receive(get("/hello", "Accept-Encoding: gzip", "Origin: http://y"))
        await settle()
        wire.reply(b"x" * 1000)
        await settle()
        output = wire.output
        assert b"content-encoding: gzip\r\n" in output
        assert b"access-control-allow-origin: *\r\n" in output
        length = int(output.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        assert length == len(output.partition(b"\r\n\r\n")[2]) < 200

    run(test)


def test_head_gets_no_body_from_a_middleware_that_streams() -> None:
    async def stream(request: Request, call_next: Any) -> Any:
        async def items() -> Any:
            for _ in range(3):
                yield "abc"

        return StreamingResponse(items())

    async def test() -> None:
        wire = wired(Middleware(BaseHTTPMiddleware, dispatch=stream))
        wire.receive(get(method="HEAD"))
        await settle()
        assert wire.output.endswith(b"\r\n\r\n")
        wire.receive(get())
        await settle()
        assert wire.output.endswith(b"3\r\nabc\r\n0\r\n\r\n")

    run(test)


def test_nothing_is_written_after_a_head_that_cannot_be() -> None:
    """A body must not pass for an answer of its own."""

    async def splits(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"x-a", b"a\x01b"), (b"content-length", b"90")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"HTTP/1.1 200 OK\r\n", "more_body": True})
        await send({"type": "http.response.body", "body": b"not asked for", "more_body": False})

    async def test() -> None:
        wire = wired(Middleware(lambda app: splits))
        wire.receive(get())
        await settle()
        assert wire.transport.output.startswith(b"HTTP/1.1 500 ")
        assert b"200 OK" not in wire.transport.output
        assert b"not asked for" not in wire.transport.output

    run(test)
