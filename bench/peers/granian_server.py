"""Granian with an RSGI application, its own interface: an HTTP server in Rust, no framework on top."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

from granian.constants import Interfaces, Loops
from granian.server import Server

from . import commandline, jobs

JSON_HEADERS = [("content-type", "application/json")]


def answer(protocol: Any, value: object) -> None:
    protocol.response_str(200, JSON_HEADERS, json.dumps(value, separators=(",", ":")))


async def json_get(scope: Any, protocol: Any) -> None:
    answer(protocol, jobs.ANSWER)


async def json_post(scope: Any, protocol: Any) -> None:
    json.loads(await protocol())
    answer(protocol, jobs.ANSWER)


async def length(scope: Any, protocol: Any) -> None:
    answer(protocol, {"length": len(await protocol())})


async def echo(scope: Any, protocol: Any) -> None:
    protocol.response_bytes(200, [("content-type", jobs.BINARY)], await protocol())


async def stream(scope: Any, protocol: Any) -> None:
    await send_tokens(protocol, 0.0)


async def stream_paced(scope: Any, protocol: Any) -> None:
    await send_tokens(protocol, jobs.TOKEN_SECONDS)


async def send_tokens(protocol: Any, pause_s: float) -> None:
    transport = protocol.response_stream(200, [("content-type", "text/plain")])
    for number in range(jobs.TOKENS):
        if pause_s:
            await asyncio.sleep(pause_s)
        await transport.send_str(jobs.token(number))


HANDLERS: dict[str, Callable[[Any, Any], Awaitable[None]]] = {
    "json": json_get,
    "json_post": json_post,
    "length": length,
    "echo": echo,
    "stream": stream,
    "stream_paced": stream_paced,
}


def app(*_: Any) -> Callable[[Any, Any], Awaitable[None]]:
    """The application of this process's job."""
    return HANDLERS[commandline.read().job]


def main() -> None:
    asked = commandline.read()
    Server(
        "peers.granian_server:app",
        address="127.0.0.1",
        port=asked.port,
        interface=Interfaces.RSGI,
        loop=Loops.uvloop,
        workers=asked.replicas,
        factory=True,
        log_access=False,
        log_enabled=False,
    ).serve()


if __name__ == "__main__":
    main()
