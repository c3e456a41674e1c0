"""Streams of bytes sent to a real instance, and what its app saw of them.

The app notes each request that it sees in a file: the client's port, so that it is known on which connection it
came, an id that a proxy in front may have given it, method, target and body.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import headgate

METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "M-SEARCH"]
#: Sent after a stream, so that the connection ends whatever came of it.
LAST = b"GET /after HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
_AT_ONCE = 64
_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [^\r]*\r\n")


class Seen(NamedTuple):
    port: int
    id: str
    method: str
    target: str
    body: bytes

    @property
    def plain(self) -> tuple[str, str, bytes]:
        return self.method, self.target, self.body


class Answers(NamedTuple):
    """What a client got on its connection."""

    port: int  # its own
    raw: bytes
    ended: bool  # by the other side, and in time

    @property
    def statuses(self) -> list[int]:
        return [status for status in map(int, _STATUS.findall(self.raw)) if status != 100]


def app(log: Path) -> Any:
    """Notes what it sees in the file."""

    def see(request: Any) -> str:
        scope = request.scope
        target = scope["raw_path"] + (b"?" + scope["query_string"] if scope["query_string"] else b"")
        case = request.headers.get("case-id", "")
        line = json.dumps([scope["client"][1], case, request.method, target.decode(), request.data.hex()])
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, line.encode() + b"\n")
        os.close(fd)
        return "ok"

    return see


def serve(client: headgate.Client, log: Path) -> None:
    """The app, at every path."""
    log.write_text("")
    client.create_backend("app", app(log))
    client.create_endpoint("app", backend="app", route="/{path:path}", methods=METHODS)


def seen(log: Path) -> list[Seen]:
    """What the app has seen, in order."""
    lines = map(json.loads, log.read_text().splitlines())
    return [Seen(port, id, method, target, bytes.fromhex(body)) for port, id, method, target, body in lines]


def by_port(requests: Iterable[Seen]) -> dict[int, list[Seen]]:
    """By the client's connection."""
    found: dict[int, list[Seen]] = defaultdict(list)
    for each in requests:
        found[each.port].append(each)
    return found


async def _connect(
    address: tuple[str, int], used: set[int]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, int]:
    """A connection from a port that is not in use by another stream, nor was; the port is added."""
    while True:
        reader, writer = await asyncio.open_connection(*address, limit=2**20)
        port = writer.get_extra_info("sockname")[1]
        if port not in used:
            used.add(port)
            return reader, writer, port
        writer.close()


async def _send(address: tuple[str, int], pieces: Sequence[bytes], pause_s: float, used: set[int]) -> Answers:
    reader, writer, port = await _connect(address, used)
    sock: socket.socket = writer.get_extra_info("socket")
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    raw, ended = b"", False
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        async with asyncio.timeout(10.0):
            while part := await reader.read(65536):
                raw += part
        ended = True
    except ConnectionError:
        ended = True
    except TimeoutError:
        pass
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return Answers(port, raw, ended)


def send_all(address: tuple[str, int], streams: Sequence[Sequence[bytes]], pause_s: float = 0.002) -> list[Answers]:
    """Each stream on a connection of its own, piece by piece; many at once, no two from the same port."""

    used: set[int] = set()

    async def run() -> list[Answers]:
        gate = asyncio.Semaphore(_AT_ONCE)

        async def one(pieces: Sequence[bytes]) -> Answers:
            async with gate:
                return await _send(address, pieces, pause_s, used)

        return await asyncio.gather(*map(one, streams))

    return asyncio.run(run())
