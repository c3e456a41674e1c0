"""An HTTP client of the tests' own: one that sees every byte, and load on a fixed schedule.

httpx would hide which connection was refused, reset or closed, and costs more than the server.
"""

from __future__ import annotations

import asyncio
import json
import re
import select
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

#: The server may end a kept connection that was idle for 75 s (keep_alive_timeout_s): a load ends it before that.
KEPT_S = 60.0

_STATUS_LINE = re.compile(r"HTTP/1\.[01] ([1-5]\d\d) [^\r\n]*")
_CHUNK_SIZE = re.compile(rb"[0-9A-Fa-f]+\r\n")


class Answer(NamedTuple):
    """A complete answer, or (status 0) why there is none: in `body` the name of an exception, and what was wrong."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Asked(NamedTuple):
    """A request of a load: on which connection, when (time.monotonic()), and what came of it.

    It was `due` by the schedule and `sent` when this process came to it: its latency counts from
    the former, so that what a slow server delays is not left out.
    """

    id: str
    connection: Connection
    due: float
    sent: float
    ended: float
    answer: Answer

    @property
    def is_lost(self) -> bool:
        return self.answer.status == 0

    @property
    def took_s(self) -> float:
        return self.ended - self.due


class Closed(NamedTuple):
    """A kept connection that the server has ended: after its last answer (`connection.used`), before it was `seen`."""

    connection: Connection
    seen: float


class Connection:
    """One keep-alive connection; `begun` is when it was opened, or tried to be, `used` when its last answer came."""

    def __init__(self, address: str) -> None:
        self.begun = self.used = time.monotonic()
        host, _, port = address.removeprefix("http://").rpartition(":")
        self._host, self._port = host, int(port)
        self._reader: asyncio.StreamReader
        self._writer: asyncio.StreamWriter

    async def open(self) -> Connection:
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, limit=2**22)
        return self

    async def send(self, path: str, headers: Mapping[str, str] | None = None) -> None:
        lines = [f"GET {path} HTTP/1.1", "Host: test"]
        lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
        self._writer.write("\r\n".join([*lines, "", ""]).encode())

    def write(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)

    async def receive(self) -> Answer:
        """The next answer. ValueError or LimitOverrunError if its bytes are none."""
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        status = _STATUS_LINE.fullmatch(head[0])
        if status is None:
            raise ValueError(f"bad status line {head[0]!r}")
        fields = [_field(line) for line in head[1:]]
        match [field for field in fields if field[0] in ("content-length", "transfer-encoding")]:
            case [("content-length", length)] if length.isdecimal():
                body = await self._reader.readexactly(int(length))
            case [("transfer-encoding", "chunked")]:
                body = b"".join([chunk async for chunk in self._chunks()])
            case framing:
                raise ValueError(f"bad framing {framing!r}")
        self.used = time.monotonic()
        return Answer(int(status[1]), dict(fields), body)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while True:
            line = await self._reader.readuntil(b"\r\n")
            if not _CHUNK_SIZE.fullmatch(line):
                raise ValueError(f"bad chunk size {line!r}")
            size = int(line, 16)
            chunk = await self._reader.readexactly(size + 2)
            if not chunk.endswith(b"\r\n"):
                raise ValueError(f"bad end of a chunk {chunk[-80:]!r}")
            if not size:
                return
            yield chunk[:-2]

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        await self.send(path, headers)
        return await self.receive()

    @property
    def is_over(self) -> bool:
        """Whether the server has ended it, as far as this machine has heard."""
        if self._writer.is_closing():
            return True
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def unasked(self) -> bytes:
        """What has come after the last answer, or before the first request."""
        return bytes(self._reader._buffer)  # type: ignore[attr-defined]

    def reset(self) -> None:
        """Go away without a word."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass


def _field(line: str) -> tuple[str, str]:
    name, colon, value = line.partition(":")
    if not colon:
        raise ValueError(f"bad header {line!r}")
    return name.lower(), value.strip()


async def get(address: str, path: str, headers: Mapping[str, str] | None = None) -> Answer:
    """A request on a connection of its own."""
    connection = await Connection(address).open()
    try:
        return await connection.get(path, headers)
    finally:
        await connection.close()


async def get_many(address: str, paths: list[str], headers: Mapping[str, str] | None = None) -> list[Answer]:
    """All at once, each on a connection of its own; answers in order."""
    return await asyncio.gather(*(get(address, path, headers) for path in paths))


class Load:
    """Requests on a fixed schedule, whatever becomes of them: `answers[id]` for each, its id in ?id=.

    Its ids begin with `name`. Connections are kept and used again, the newest first, unless each
    request is to have a `fresh` one.

    asked        the requests in the order of their ends
    connects     how many connections were tried to be opened
    unconnected  the names of the errors of those that could not be
    closed       the kept connections that the server has ended while nothing was asked on them, though
                 the last answer did not say `connection: close`
    malformed    what was wrong with answers that are none
    """

    def __init__(self, address: str, path: str, per_second: float, fresh: bool = False, name: str = "r") -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[Asked] = []
        self.connects = 0
        self.unconnected: list[str] = []
        self.closed: list[Closed] = []
        self.malformed: list[str] = []
        self.sent = 0
        self._fresh = fresh
        self._name = name
        self._address = address
        self._path = path
        self._interval_s = 1 / per_second
        self._idle: list[Connection] = []  # the longest idle first
        self._asking: set[asyncio.Task[None]] = set()
        self._stop = False

    @property
    def failed(self) -> dict[str, Answer]:
        return {id: answer for id, answer in self.answers.items() if answer.status != 200}

    @property
    def sent_per_s(self) -> float:
        """The rate at which requests went out: less than the schedule's if this process could not keep up."""
        sent = [one.sent for one in self.asked]
        return (len(sent) - 1) / (max(sent) - min(sent))

    async def run(self) -> None:
        begin = time.monotonic()
        while not self._stop:
            due = begin + self.sent * self._interval_s
            task = asyncio.create_task(self._ask(f"{self._name}{self.sent}", due))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
            self.sent += 1
            await asyncio.sleep(max(0.0, due + self._interval_s - time.monotonic()))

    async def _ask(self, id: str, due: float) -> None:
        sent = time.monotonic()
        try:
            connection = await self._sent(f"{self._path}?id={id}")
        except OSError as error:
            self.unconnected.append(type(error).__name__)
            self.answers[id] = Answer(0, {}, type(error).__name__.encode())
            return
        answer = await self._received(connection)
        self.answers[id] = answer
        self.asked.append(Asked(id, connection, due, sent, time.monotonic(), answer))
        if self._fresh or answer.headers.get("connection") == "close":
            self._note_unasked(connection)
            await connection.close()
        elif answer.status:
            self._idle.append(connection)

    async def _received(self, connection: Connection) -> Answer:
        try:
            return await asyncio.wait_for(connection.receive(), 20.0)
        except (OSError, EOFError, TimeoutError) as error:
            why = type(error).__name__
        except Exception as error:  # noqa: BLE001 - whatever it is, the server has sent it
            why = f"{type(error).__name__}: {error}"
            self.malformed.append(why)
        connection.reset()
        return Answer(0, {}, why.encode())

    async def _sent(self, path: str) -> Connection:
        """The connection on which the request went out. One that was closed before that has not accepted it."""
        while kept := self._kept():
            await kept.send(path)
            if self._is_usable(kept):
                return kept
        while True:
            connection = await self._connect()
            if not connection.is_over:  # else a server that stops has closed it before anything was asked
                await connection.send(path)
                return connection
            connection.reset()

    def _kept(self) -> Connection | None:
        """A connection to use again; those that the server has closed are no use."""
        while self._idle and self._idle[0].used < time.monotonic() - KEPT_S:
            self._let_go(self._idle.pop(0))
        while self._idle:
            connection = self._idle.pop()
            if self._is_usable(connection):
                return connection
        return None

    def _is_usable(self, idle: Connection) -> bool:
        """Whether the server has left it open, and sent nothing that nobody asked for."""
        is_over = idle.is_over
        if is_over:
            self.closed.append(Closed(idle, time.monotonic()))
        if self._note_unasked(idle) or is_over:
            idle.reset()
            return False
        return True

    def _note_unasked(self, connection: Connection) -> bool:
        if unasked := connection.unasked:
            self.malformed.append(f"not asked for: {unasked[:200]!r}")
        return bool(unasked)

    def _let_go(self, idle: Connection) -> None:
        if self._is_usable(idle):
            idle.reset()

    async def _connect(self) -> Connection:
        self.connects += 1
        return await Connection(self._address).open()

    async def finish(self) -> None:
        """No more new requests; returns when each has had its answer."""
        self._stop = True
        while self._asking:
            await asyncio.wait(self._asking)
        while self._idle:
            self._let_go(self._idle.pop())

    def check(self, proxy_dies: bool) -> None:
        """To be called at the end: what no load may see, whatever the test is about."""
        without = self.sent - len(self.answers)
        assert without == 0, f"{without} of {self.sent} requests have neither an answer nor a reason why not"
        assert self.malformed == [], self.malformed[:5]
        if not proxy_dies:
            count = len(self.closed)
            assert count == 0, f"{count} of {self.connects} connections were closed by a server that said it keeps them"


@asynccontextmanager
async def load(
    address: str,
    path: str,
    per_second: float = 150,
    fresh: bool = False,
    name: str = "r",
    *,
    proxy_dies: bool = False,
) -> AsyncIterator[Load]:
    """Load while the block runs; at its end all requests are answered.

    Where a proxy is stopped or killed, or the whole instance, say that the `proxy_dies`: elsewhere it
    is an error that kept connections are closed.
    """
    running = Load(address, path, per_second, fresh, name)
    task = asyncio.create_task(running.run())
    try:
        while len(running.answers) < 5:
            await asyncio.sleep(0.01)
        yield running
    finally:
        await running.finish()
        await task
    running.check(proxy_dies)


async def in_thread(function: Any, *arguments: Any) -> Any:
    """A blocking call of the client while load runs."""
    return await asyncio.to_thread(function, *arguments)
