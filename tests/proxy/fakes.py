"""A transport and a router in memory, for tests of the proxy without sockets."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from headgate.config import HTTPOptions
from headgate.core import framing
from headgate.core.state import BackendView, Endpoint, Settings, Snapshot, Traffic
from headgate.errors import HeadgateError
from headgate.proxy.connection import Connection
from headgate.proxy.server import Server
from headgate.proxy.upload import Lender

DATE = 784111777.0  # Sun, 06 Nov 1994 08:49:37 GMT


class FakeTransport:
    """Keeps what is written; `full` makes the client stop taking it."""

    def __init__(self, peer: tuple[str, int] = ("127.0.0.1", 50000)) -> None:
        self.output = b""
        self.closing = self.aborted = self.reading_paused = self.eof_written = False
        self.untaken = 0
        self.peer = peer
        self.socket: Any = None  # where what the client sent lies before it is read

    def get_extra_info(self, name: str) -> Any:
        return {"peername": self.peer, "sockname": ("127.0.0.1", 8000), "socket": self.socket}[name]

    def write(self, data: bytes) -> None:
        assert not self.closing, "written after close"
        self.output += bytes(data)

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.eof_written = True

    def close(self) -> None:
        self.closing = True

    def abort(self) -> None:
        self.closing = self.aborted = True

    def is_closing(self) -> bool:
        return self.closing

    def pause_reading(self) -> None:
        assert not self.reading_paused
        self.reading_paused = True

    def resume_reading(self) -> None:
        assert self.reading_paused
        self.reading_paused = False

    def get_write_buffer_size(self) -> int:
        return self.untaken


class FakeRouter:
    """Keeps the requests; tests answer them. With `echo` each is answered at once."""

    def __init__(self, echo: bool = False) -> None:
        self.callers: list[Any] = []
        self.cancelled: list[Any] = []
        self.shard_keys: list[str | None] = []
        self.seen: list[tuple[bytes, bytes]] = []
        self.fails: HeadgateError | None = None
        self.echo = echo

    def follow(self, snapshot: Snapshot) -> None:
        pass

    def submit(self, endpoint: Endpoint, caller: Any, shard_key: str | None = None) -> None:
        caller.endpoint = endpoint
        self.callers.append(caller)
        self.shard_keys.append(shard_key)
        self.seen.append((bytes(caller.head), bytes(caller.body)))
        if self.fails is not None:
            caller.on_failure(self.fails)

    def cancel(self, caller: Any) -> None:
        self.cancelled.append(caller)


SNAPSHOT = Snapshot(
    version=1,
    endpoints=(
        Endpoint("hello", "/hello", ("GET", "POST"), Traffic((("hello", 1.0),))),
        Endpoint("user", "/user/{id:int}/{rest:path}", ("GET",), Traffic((("hello", 1.0),))),
        Endpoint("headless", None, ("GET",), Traffic((("hello", 1.0),))),
        Endpoint("shadowed", "/shadowed", ("POST",), Traffic((("hello", 1.0),), (("other", 0.5),))),
    ),
    backends=(BackendView("hello", 1, Settings()),),
    ready=True,
)


class Wire:
    """A server with one connection, a transport and a router that are fakes."""

    def __init__(self, *, lender: Lender | None = None, peer: str = "127.0.0.1", **options: Any) -> None:
        self.router = FakeRouter()
        self.server = Server(HTTPOptions(**options), self.router, lender)  # type: ignore[arg-type]
        self.server.follow(SNAPSHOT)
        self.server.sweep(0.0, DATE)
        self.connection, self.transport = self.connect(peer)

    def connect(self, peer: str = "127.0.0.1") -> tuple[Connection, FakeTransport]:
        connection, transport = Connection(self.server), FakeTransport((peer, 50000))
        connection.connection_made(transport)  # type: ignore[arg-type]
        return connection, transport

    def receive(self, data: bytes, connection: Connection | None = None) -> None:
        """What the loop does when bytes arrive."""
        connection = connection or self.connection
        while data:
            buffer = connection.get_buffer(-1)
            count = min(len(buffer), len(data))
            assert count > 0
            buffer[:count] = data[:count]
            connection.buffer_updated(count)
            data = data[count:]

    def reply(self, body: bytes = b"ok", status: int = 200, kind: int = 1, block: bytes = b"") -> None:
        """Answer the newest request."""
        flags = framing.HEAD if block else 0
        frame = block + body
        self.router.callers[-1].on_reply(status | kind << 16, flags, len(block), frame, 0, len(frame))

    def start(self, total: int | None = None, kind: int = 1, status: int = 200) -> None:
        """Begin an answer in parts."""
        size = b"" if total is None else total.to_bytes(8, "little")
        flags = framing.MORE | (framing.STREAM if total is None else 0)
        caller = self.router.callers[-1]
        caller.answering = True
        caller.on_reply_start(status | kind << 16, flags, 0, size, 0, len(size))

    def part(self, data: bytes) -> None:
        self.router.callers[-1].on_data(b"--" + data, 2, 2 + len(data))

    def meta(self) -> list[Any]:
        """The meta of the newest request."""
        return msgspec.msgpack.decode(self.router.callers[-1].meta)

    @property
    def output(self) -> bytes:
        """What was written since this was last asked."""
        output, self.transport.output = self.transport.output, b""
        return output

    def statuses(self) -> list[int]:
        """The status codes of what was written since."""
        return [int(code) for code in re.findall(rb"HTTP/1\.1 ([0-9]{3}) [A-Z]", self.output)]


def get(path: str = "/hello", *fields: str, method: str = "GET", version: str = "1.1") -> bytes:
    lines = [f"{method} {path} HTTP/{version}", "Host: x", *fields]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n"


def post(body: bytes, *fields: str, path: str = "/hello") -> bytes:
    return get(path, f"Content-Length: {len(body)}", *fields, method="POST") + body
