"""The floor: httptools on uvloop, answers made where requests are parsed. No routes, no limits, no validation.

What any server of these parsers in one Python process can reach at most. More replicas share the port.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
from collections.abc import Callable

import httptools
import uvloop

from . import commandline, jobs

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ntransfer-encoding: chunked\r\n\r\n"


def as_json(value: object) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    return HEAD % (b"application/json", len(body)) + body


def json_get(body: bytes) -> bytes:
    return as_json(jobs.ANSWER)


def json_post(body: bytes) -> bytes:
    json.loads(body)
    return as_json(jobs.ANSWER)


def length(body: bytes) -> bytes:
    return as_json({"length": len(body)})


def echo(body: bytes) -> bytes:
    return HEAD % (b"application/octet-stream", len(body)) + body


def chunk(number: int) -> bytes:
    text = jobs.token(number).encode()
    return b"%x\r\n%b\r\n" % (len(text), text)


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "json": json_get,
    "json_post": json_post,
    "length": length,
    "echo": echo,
}


class Connection(asyncio.Protocol):
    """One client; just enough HTTP/1.1 for it."""

    transport: asyncio.Transport

    def __init__(self, job: str) -> None:
        self._answer = ANSWERS.get(job)
        self._paced = job == "stream_paced"
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        if self._answer is not None:
            self.transport.write(self._answer(body))
        else:
            self.transport.write(STREAM_HEAD)
            self._send_token(0)

    def _send_token(self, number: int) -> None:
        """One write per token, as of a model that makes them one by one."""
        if self._paced and number < jobs.TOKENS:
            asyncio.get_running_loop().call_later(jobs.TOKEN_SECONDS, self._send_paced, number)
            return
        for each in range(number, jobs.TOKENS):
            self.transport.write(chunk(each))
        self.transport.write(b"0\r\n\r\n")

    def _send_paced(self, number: int) -> None:
        if not self.transport.is_closing():
            self.transport.write(chunk(number))
            self._send_token(number + 1)


async def serve(make: Callable[[], asyncio.Protocol], port: int) -> None:
    """Accept on 127.0.0.1:port until SIGINT or SIGTERM."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind(("127.0.0.1", port))
    server = await loop.create_server(make, sock=listener, backlog=4096)
    await stopped.wait()
    server.close()


def main() -> None:
    asked = commandline.read()
    children = []
    for _ in range(asked.replicas - 1):
        if pid := os.fork():
            children.append(pid)
        else:
            children.clear()
            break
    uvloop.run(serve(lambda: Connection(asked.job), asked.port))
    for pid in children:
        os.kill(pid, signal.SIGTERM)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main()
