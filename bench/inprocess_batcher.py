"""The best that a batched model can do in one process: httptools, a list, one thread. Argument: the port.

While the thread computes, requests gather; when it is free it takes up to 32 of them. No
routing, no validation, no queue limits, nothing between processes: the bar, not a server.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from concurrent.futures import ThreadPoolExecutor

import httptools
import model
import uvloop


class Batcher:
    """Answers what waits, up to a batch at a time, oldest first."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Connection, bytes]] = []
        self.busy = False
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1)

    def add(self, connection: Connection, body: bytes) -> None:
        self.waiting.append((connection, body))
        if not self.busy:
            self.busy = True
            self._loop.call_soon(self._start)  # after all that this tick read

    def _start(self) -> None:
        batch, self.waiting = self.waiting[: model.MAX_BATCH_SIZE], self.waiting[model.MAX_BATCH_SIZE :]
        call = self._loop.run_in_executor(self._thread, model.predict, [body for _, body in batch])
        call.add_done_callback(lambda done: self._finish([each for each, _ in batch], done.result()))

    def _finish(self, connections: list[Connection], answers: list[float]) -> None:
        for connection, answer in zip(connections, answers, strict=True):
            connection.answer(b"%r" % answer)
        self.busy = bool(self.waiting)
        if self.busy:
            self._start()


class Connection(asyncio.Protocol):
    """One client; just enough HTTP/1.1 for it."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self._parser = httptools.HttpRequestParser(self)
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self._body)
        self._body.clear()
        self._batcher.add(self, body)

    def answer(self, body: bytes) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body)
        if not self._transport.is_closing():
            self._transport.write(head + body)  # type: ignore[attr-defined]


async def main() -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    batcher = Batcher()
    server = await loop.create_server(
        lambda: Connection(batcher), "127.0.0.1", int(sys.argv[1]), backlog=4096
    )
    await stopped.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(main())
