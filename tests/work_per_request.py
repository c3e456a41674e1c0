"""How much work headgate does for one request, as counts that are the same on every machine.

A proxy's connections, its router, a replica's link and its worker run in one process on one event loop, on virtual
time; only the clients' sockets and the thread of plain handlers are played. Counted are the bytecode instructions of
headgate's own code, and its calls into C. Both depend on the version of Python, neither on time.

    python tests/work_per_request.py                 what a request costs now, beside what is stored
    python tests/work_per_request.py --functions     the functions that it goes through, the dearest first
    python tests/work_per_request.py --store         store what it costs now (work_per_request.json), to be reviewed

Run it with the Python whose counts are to be stored; those of other versions stay as they are.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import sys
import tempfile
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

sys.path.extend(str(Path(__file__).parent / folder) for folder in ("", "proxy", "replica"))

import virtual_time
from fakes import DATE, FakeTransport, get, post
from replica_rig import PlainOnLoop

import headgate
from headgate.config import HTTPOptions
from headgate.core.state import BackendView, Endpoint, ReplicaAddress, Settings, Snapshot, Traffic
from headgate.proxy.connection import Connection
from headgate.proxy.server import Server
from headgate.replica import plain_calls
from headgate.replica.callable import LoadedCallable
from headgate.replica.links import CallerLink
from headgate.replica.worker import Worker
from headgate.router import Router
from headgate.wire.address import address_of, listen
from headgate.wire.control import Acceptor
from headgate.wire.link import open_link
from headgate.wire.slots import map_memory

STORED = Path(__file__).with_suffix(".json")
PYTHON = f"{sys.version_info[0]}.{sys.version_info[1]}"
SOURCES = str(Path(headgate.__file__).parent)
TOKEN = b"t" * 32
CONNECTIONS, WARM_UP, ROUNDS = 8, 3, 5
#: By how much a request may cost more before a test fails.
MARGIN = 0.10

#: kind of work -> how much of it a request takes
Counts = dict[str, float]


def plain(request: Any) -> dict[str, str]:
    return {"message": "hello"}


async def waits_for_nothing(request: Any) -> dict[str, str]:
    return {"message": "hello"}


def reads_its_body(request: Any) -> dict[str, Any]:
    return {"message": json.loads(request.data)["message"]}


def batched(requests: list[Any]) -> list[dict[str, str]]:
    return [{"message": "hello"} for _ in requests]


class Case(NamedTuple):
    """What is asked of which handler."""

    handler: Callable[..., Any]
    request: bytes
    settings: Mapping[str, Any] = {}


CASES = {
    "plain handler": Case(plain, get()),
    "async def handler": Case(waits_for_nothing, get()),
    "POST that reads its body": Case(reads_its_body, post(b'{"message": "hello"}')),
    "batches of 8": Case(headgate.accept_batch(batched), get(), {"max_batch_size": 8}),
}


class Counting:
    """Counts while it is on; by function, for who asks."""

    def __init__(self) -> None:
        self.instructions: Counter[CodeType] = Counter()
        self.calls: Counter[CodeType] = Counter()

    def start(self) -> None:
        sys.setprofile(self._profile)
        sys.settrace(self._enter)

    def stop(self) -> None:
        sys.settrace(None)
        sys.setprofile(None)

    def clear(self) -> None:
        self.instructions.clear()
        self.calls.clear()

    def _enter(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCES):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return self._step

    def _step(self, frame: FrameType, event: str, _: Any) -> Any:
        if event == "opcode":
            self.instructions[frame.f_code] += 1
        return self._step

    def _profile(self, frame: FrameType, event: str, _: Any) -> None:
        if event == "c_call" and frame.f_code.co_filename.startswith(SOURCES):
            self.calls[frame.f_code] += 1


class Replica:
    """A worker that listens as a replica does."""

    def __init__(self, folder: str, case: Case) -> None:
        loaded = LoadedCallable(case.handler, (), "it")
        loaded.construct()
        self.settings = Settings(max_concurrent_queries=100, **case.settings)
        self._worker = Worker(loaded, self.settings, PlainOnLoop())
        self._links: list[CallerLink] = []
        listener = listen(f"{folder}/replica.sock")
        self.address = ReplicaAddress("it#0001", address_of(listener), os.getpid())
        self._acceptor = Acceptor(listener, TOKEN, self._admit)
        self._acceptor.open()

    async def _admit(self, sock: socket.socket, name: str, fds: list[int]) -> None:
        link = CallerLink(self._worker, name, map_memory(fds[0]), None, os.getpid())
        for fd in fds[1:]:
            os.close(fd)
        self._links.append(link)
        await open_link(link, sock)

    def close(self) -> None:
        self._acceptor.close()
        for link in self._links:
            link.abort()


async def served(case: Case, use: Callable[[list[Client]], Awaitable[None]]) -> None:
    """`use` clients of a proxy whose router has a link to a replica."""
    with tempfile.TemporaryDirectory(prefix="hg-") as folder:
        replica, router = Replica(folder, case), Router(TOKEN, "proxy")
        server = Server(HTTPOptions(), router)
        endpoint = Endpoint("hello", "/hello", ("GET", "POST"), Traffic((("it", 1.0),)))
        view = BackendView("it", 1, replica.settings, (replica.address,))
        server.follow(Snapshot(1, (endpoint,), (view,), ready=True))
        server.sweep(0.0, DATE)
        try:
            await use([Client(server) for _ in range(CONNECTIONS)])
        finally:
            router.close()
            replica.close()
            await turns(50)


class Client:
    """A connection that was accepted, and what was written to it."""

    def __init__(self, server: Server) -> None:
        self._connection, self._transport = Connection(server), FakeTransport()
        self._connection.connection_made(self._transport)  # type: ignore[arg-type]

    def send(self, request: bytes) -> None:
        self._connection.get_buffer(-1)[: len(request)] = request
        self._connection.buffer_updated(len(request))

    def answer(self) -> bytes:
        """What came since this was last asked."""
        output, self._transport.output = self._transport.output, b""
        return output


async def turns(number: int) -> None:
    for _ in range(number):
        await asyncio.sleep(0)


async def round_of(clients: list[Client], request: bytes) -> None:
    """All clients ask in one turn of the loop, and are answered."""
    for client in clients:
        client.send(request)
    answers = [b""] * len(clients)
    while not all(answers):
        await asyncio.sleep(0.001)
        answers = [had + client.answer() for had, client in zip(answers, clients, strict=True)]
    assert all(answer.endswith(b'{"message":"hello"}') for answer in answers), answers


def counted(case: Case) -> Counting:
    """What all rounds of a case took; the first ones, which set things up, are left out."""
    counter = Counting()

    async def use(clients: list[Client]) -> None:
        counter.start()
        for _ in range(WARM_UP):
            await round_of(clients, case.request)
        counter.clear()
        for _ in range(ROUNDS):
            await round_of(clients, case.request)
        counter.stop()

    with mock.patch.object(plain_calls, "QUICK_S", math.inf):  # counting makes them slow
        virtual_time.run(served(case, use))
    return counter


def work_of(case: Case) -> Counts:
    """Per request."""
    counter, requests = counted(case), CONNECTIONS * ROUNDS
    return {
        "instructions": round(counter.instructions.total() / requests, 1),
        "calls into C": round(counter.calls.total() / requests, 1),
    }


def measured() -> dict[str, Counts]:
    """Of all cases. The first one is counted twice: Python 3.12 finds nothing the first time that it counts."""
    counted(next(iter(CASES.values())))
    return {name: work_of(case) for name, case in CASES.items()}


def stored() -> dict[str, dict[str, Counts]]:
    """version of Python -> case -> counts"""
    found: dict[str, dict[str, Counts]] = json.loads(STORED.read_text()) if STORED.exists() else {}
    return found


def grown(before: Counts, now: Counts) -> list[str]:
    """What takes more than MARGIN more than it did, a sentence each.

    >>> grown({"instructions": 1000.0, "calls into C": 40.0}, {"instructions": 1099.0, "calls into C": 45.0})
    ['calls into C: 45 per request, 40 are stored (+12 %)']
    """
    return [
        f"{kind}: {count:.4g} per request, {before[kind]:.4g} are stored ({(count / before[kind] - 1) * 100:+.0f} %)"
        for kind, count in now.items()
        if count > before[kind] * (1.0 + MARGIN)
    ]


def store(now: dict[str, Counts]) -> None:
    versions = {**stored(), PYTHON: now}
    STORED.write_text(json.dumps(dict(sorted(versions.items())), indent=1) + "\n")


def show(now: dict[str, Counts]) -> None:
    before = stored().get(PYTHON, {})
    for name, counts in now.items():
        for kind, count in counts.items():
            was = before.get(name, {}).get(kind)
            beside = "" if was is None else f"   stored: {was:.1f} ({count / was - 1:+.1%})"
            print(f"{name:26} {kind:13} {count:8.1f}{beside}")


def show_functions() -> None:
    for name, case in CASES.items():
        counter, requests = counted(case), CONNECTIONS * ROUNDS
        print(f"\n{name}: instructions and calls into C, per request")
        for code, count in counter.instructions.most_common(50):
            place = f"{Path(code.co_filename).relative_to(SOURCES)}:{code.co_firstlineno}"
            print(f"{count / requests:8.1f} {counter.calls[code] / requests:6.1f}  {code.co_qualname}  {place}")


def main() -> None:
    if "--functions" in sys.argv:
        show_functions()
        return
    now = measured()
    if "--json" in sys.argv:
        print(json.dumps(now))
        return
    show(now)
    if "--store" in sys.argv:
        store(now)


if __name__ == "__main__":
    main()
