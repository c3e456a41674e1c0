"""The best that a batched model can do in one process: httptools, a list, one thread.

While the thread computes, requests gather; when it is free it takes up to 32 of them. No
routing, no validation, no queue limits, nothing between processes: the bar, not a server.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

import httptools
import uvloop

from . import commandline, jobs, model
from .floor_server import as_json, serve


class Batcher:
    """Answers what waits, up to a batch at a time, oldest first."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Connection, bytes]] = []
        self._busy = False
        self._thread = ThreadPoolExecutor(1)

    def add(self, connection: Connection, body: bytes) -> None:
        self._waiting.append((connection, body))
        if not self._busy:
            self._busy = True
            asyncio.get_running_loop().call_soon(self._start)  # after all that this tick read

    def _start(self) -> None:
        batch, self._waiting = self._waiting[: jobs.MAX_BATCH_SIZE], self._waiting[jobs.MAX_BATCH_SIZE :]
        rows = [body for _, body in batch]
        call = asyncio.get_running_loop().run_in_executor(self._thread, model.predict, rows)
        call.add_done_callback(lambda done: self._finish([each for each, _ in batch], done.result()))

    def _finish(self, connections: list[Connection], answers: list[dict[str, int]]) -> None:
        for connection, answer in zip(connections, answers, strict=True):
            connection.answer(as_json(answer))
        self._busy = bool(self._waiting)
        if self._busy:
            self._start()


class Connection(asyncio.Protocol):
    """One client; just enough HTTP/1.1 for it."""

    transport: asyncio.Transport

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
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
        self._batcher.add(self, body)

    def answer(self, response: bytes) -> None:
        if not self.transport.is_closing():
            self.transport.write(response)


if __name__ == "__main__":
    batcher = Batcher()
    uvloop.run(serve(lambda: Connection(batcher), commandline.read().port))
