"""An HTTP client of the tests' own: one that sees every byte, and load on a fixed schedule.

httpx would hide which connection was refused, reset or closed, and costs more than the server.
"""

from __future__ import annotations

import asyncio
import json
import select
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple


class Answer(NamedTuple):
    """A complete answer, or (status 0) why there is none, as the name of an exception in `body`."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)


class Asked(NamedTuple):
    """A request of a load: on which connection, when (time.monotonic()), and what came of it."""

    id: str
    connection: Connection
    sent: float
    ended: float
    answer: Answer

    @property
    def is_lost(self) -> bool:
        return self.answer.status == 0


class Connection:
    """One keep-alive connection; `begun` is when it was opened, or tried to be."""

    def __init__(self, address: str) -> None:
        self.begun = time.monotonic()
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
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = (line.partition(":") for line in head[1:] if line)
        headers = {name.lower(): value.strip() for name, _, value in fields}
        if headers.get("transfer-encoding") == "chunked":
            body = b"".join([chunk async for chunk in self._chunks()])
        else:
            body = await self._reader.readexactly(int(headers["content-length"]))
        return Answer(int(head[0].split()[1]), headers, body)

    async def _chunks(self) -> AsyncIterator[bytes]:
        while size := int(await self._reader.readuntil(b"\r\n"), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readexactly(2)

    async def get(self, path: str, headers: Mapping[str, str] | None = None) -> Answer:
        await self.send(path, headers)
        return await self.receive()

    @property
    def is_over(self) -> bool:
        """Whether the server has ended it, as far as this machine has heard."""
        poll = select.poll()
        poll.register(self._writer.get_extra_info("socket").fileno(), select.POLLRDHUP)
        return self._writer.is_closing() or bool(poll.poll(0))

    def reset(self) -> None:
        """Go away without a word."""
        self._writer.transport.abort()

    async def close(self) -> None:
        self._writer.close()
        try:
            await self._writer.wait_closed()
        except OSError:
            pass


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
    """

    def __init__(self, address: str, path: str, per_second: float, fresh: bool = False, name: str = "r") -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[Asked] = []
        self.connects = 0
        self.unconnected: list[str] = []
        self.sent = 0
        self._fresh = fresh
        self._name = name
        self._address = address
        self._path = path
        self._interval_s = 1 / per_second
        self._idle: list[Connection] = []
        self._asking: set[asyncio.Task[None]] = set()
        self._stop = False

    @property
    def failed(self) -> dict[str, Answer]:
        return {id: answer for id, answer in self.answers.items() if answer.status != 200}

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        while not self._stop:
            task = asyncio.create_task(self._ask(f"{self._name}{self.sent}"))
            self._asking.add(task)
            task.add_done_callback(self._asking.discard)
            self.sent += 1
            await asyncio.sleep(max(0.0, begin + self.sent * self._interval_s - loop.time()))

    async def _ask(self, id: str) -> None:
        sent = time.monotonic()
        try:
            connection = await self._sent(f"{self._path}?id={id}")
        except OSError as error:
            self.unconnected.append(type(error).__name__)
            self.answers[id] = Answer(0, {}, type(error).__name__.encode())
            return
        try:
            answer = await asyncio.wait_for(connection.receive(), 20.0)
        except (OSError, EOFError, TimeoutError) as error:
            answer = Answer(0, {}, type(error).__name__.encode())
            connection.reset()
        self.answers[id] = answer
        self.asked.append(Asked(id, connection, sent, time.monotonic(), answer))
        if self._fresh or answer.headers.get("connection") == "close":
            await connection.close()
        elif answer.status:
            self._idle.append(connection)

    async def _sent(self, path: str) -> Connection:
        """The connection on which the request went out. One that was closed before that has not accepted it."""
        while kept := self._kept():
            await kept.send(path)
            if not kept.is_over:
                return kept
            kept.reset()
        connection = await self._connect()
        await connection.send(path)
        return connection

    def _kept(self) -> Connection | None:
        """A connection to use again; those that the server has closed are no use."""
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_over:
                return connection
            connection.reset()
        return None

    async def _connect(self) -> Connection:
        self.connects += 1
        return await Connection(self._address).open()

    async def finish(self) -> None:
        """No more new requests; returns when each has had its answer."""
        self._stop = True
        while self._asking:
            await asyncio.wait(self._asking)
        for connection in self._idle:
            await connection.close()


@asynccontextmanager
async def load(
    address: str, path: str, per_second: float = 150, fresh: bool = False, name: str = "r"
) -> AsyncIterator[Load]:
    """Load while the block runs; at its end all requests are answered."""
    running = Load(address, path, per_second, fresh, name)
    task = asyncio.create_task(running.run())
    try:
        while len(running.answers) < 5:
            await asyncio.sleep(0.01)
        yield running
    finally:
        await running.finish()
        await task


async def in_thread(function: Any, *arguments: Any) -> Any:
    """A blocking call of the client while load runs."""
    return await asyncio.to_thread(function, *arguments)
