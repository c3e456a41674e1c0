"""wire/remote_link.py: a router and a replica on two event loops, with TCP between them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

import leftovers
import pytest

from headgate import eventloop
from headgate.core import framing
from headgate.core.state import BackendView, Endpoint, ReplicaAddress, Settings, Snapshot, Traffic
from headgate.errors import HeadgateError, ReplicaDied
from headgate.proxy.upload import Lender, Upload
from headgate.router import Caller, Router
from headgate.wire.address import address_of, listen
from headgate.wire.arena import Arena
from headgate.wire.control import Acceptor
from headgate.wire.link import WINDOW_BYTES, Link, open_link
from headgate.wire.thread import HeadgateThread

TOKEN = b"t" * 32
ENDPOINT = Endpoint("e", None, ("GET",), Traffic((("b", 1.0),)))
MIB = 1 << 20
pack = framing.HEADER.pack

eventloop.new_event_loop().close()  # the first of a process opens a pipe that stays: no leftover of a test


class FarEnd(Link):
    """The replica's end of a link: puts bodies together and answers by `serve`."""

    def __init__(self, replica: FarReplica) -> None:
        super().__init__()
        self.replica = replica
        self.bodies: dict[int, bytearray] = {}
        self.credit: dict[int, int] = {}
        replica.links.append(self)

    def on_frames(self, frames: list[framing.Frame]) -> None:
        for kind, flags, meta_len, slot, arg, source, start, end in frames:
            payload = source[start + meta_len : end]
            if kind == framing.CALL:
                self.replica.begun.append((slot, flags))
                self.bodies[slot] = bytearray()
                if not flags & framing.MORE:
                    self.serve(slot, bytes(payload))
            elif kind == framing.DATA:
                self.bodies[slot] += payload
            elif kind == framing.END:
                self.serve(slot, bytes(self.bodies[slot]))
            elif kind == framing.CREDIT:
                self.credit[slot] += arg
            elif kind == framing.PING:
                self.send(pack(0, framing.PONG, 0, 0, 0, 0))

    def serve(self, slot: int, body: bytes) -> None:
        self.replica.bodies.append(body)
        self.replica.serve(self, slot, body)

    def answer(self, kind: int, slot: int, body: bytes = b"", flags: int = 0) -> None:
        self.send(pack(len(body), kind, flags, 0, slot, 200) + body)


def echo(link: FarEnd, slot: int, body: bytes) -> None:
    link.answer(framing.REPLY, slot, body)


def silence(link: FarEnd, slot: int, body: bytes) -> None:
    pass


class FarReplica:
    """A replica on a thread of its own."""

    def __init__(self, id: str, serve: Callable[[FarEnd, int, bytes], object] = echo) -> None:
        self.serve = serve
        self.begun: list[tuple[int, int]] = []
        self.bodies: list[bytes] = []
        self.links: list[FarEnd] = []
        self.passed: list[int] = []
        self.thread = HeadgateThread("far replica")
        self.thread.start()
        listener = listen("tcp://127.0.0.1:0")
        self.acceptor = Acceptor(listener, TOKEN, self._admit)
        self.address = ReplicaAddress(id, "/nowhere", 0, node="there", remote=address_of(listener))
        self.on_thread(self.acceptor.open)

    def on_thread(self, function: Callable[[], object]) -> None:
        async def run() -> None:
            function()

        self.thread.run(run(), 5.0)

    async def _admit(self, sock: socket.socket, name: str, fds: list[int]) -> None:
        self.passed += fds
        await open_link(FarEnd(self), sock)

    def die(self) -> None:
        self.on_thread(lambda: [self.acceptor.close(), *(link.abort() for link in self.links)])

    def close(self) -> None:
        self.die()
        self.on_thread(lambda: None)
        self.thread.stop()


class Asked(Caller):
    """A caller that keeps its answer."""

    def __init__(self, body: Any = b"") -> None:
        self.body = body
        self.parts: list[bytes] = []
        self.result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self.result.set_result(bytes(source[start:end]))

    def on_data(self, source: Any, start: int, end: int) -> None:
        self.parts.append(bytes(source[start:end]))
        self.grant(end - start)

    def on_reply_end(self) -> None:
        self.result.set_result(b"".join(self.parts))

    def on_failure(self, error: HeadgateError) -> None:
        self.result.set_result(error)


def publish(router: Router, *replicas: ReplicaAddress, **settings: Any) -> None:
    version = router.snapshot.version + 1
    router.follow(Snapshot(version, (ENDPOINT,), (BackendView("b", 1, Settings(**settings), replicas),), ready=True))


def between_nodes(test: Callable[[Router, FarReplica], Awaitable[None]]) -> Callable[[], None]:
    """Run an async test with a router here and a replica there; the router on the loop of a proxy, and a user's."""

    @pytest.mark.parametrize("runs", [eventloop.run, asyncio.run], ids=["uvloop", "asyncio"])
    def run(runs: Callable[[Any], Any]) -> None:
        async def main() -> None:
            replica = FarReplica("r1")
            router = Router(TOKEN, "test", node="here")
            try:
                publish(router, replica.address)
                await test(router, replica)
            finally:
                router.close()
                replica.close()
                await asyncio.sleep(0.01)

        before = leftovers.descriptors()
        runs(asyncio.wait_for(main(), 20.0))
        assert leftovers.descriptors() == before

    run.__name__ = getattr(test, "__name__", "test")
    return run


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def ask(router: Router, body: Any = b"") -> Any:
    caller = Asked(body)
    router.submit(ENDPOINT, caller)
    return await caller.result


@between_nodes
async def test_a_request_crosses_and_its_answer_comes_back(router: Router, replica: FarReplica) -> None:
    for body in (b"", b"hi"):
        assert await ask(router, body) == body
    assert not replica.passed


@between_nodes
async def test_slots_are_used_again(router: Router, replica: FarReplica) -> None:
    for _ in range(3):
        await asyncio.gather(*(ask(router) for _ in range(4)))
    assert {slot for slot, _ in replica.begun} <= {0, 1, 2, 3}
    assert not router.backends["b"].links["r1"]._pending


@between_nodes
async def test_a_body_and_an_answer_of_a_mebibyte_cross(router: Router, replica: FarReplica) -> None:
    body = os.urandom(MIB)
    assert await ask(router, body) == body
    assert [flags & framing.MORE for _, flags in replica.begun] == [framing.MORE]


@between_nodes
async def test_a_stream_crosses_for_as_long_as_its_reader_grants_more(router: Router, replica: FarReplica) -> None:
    pieces = [os.urandom(64 * 1024) for _ in range(32)]

    async def produce(link: FarEnd, slot: int) -> None:
        link.answer(framing.REPLY, slot, flags=framing.MORE | framing.STREAM)
        for piece in pieces:
            while link.credit[slot] < len(piece):
                await asyncio.sleep(0.001)
            link.credit[slot] -= len(piece)
            link.answer(framing.DATA, slot, piece)
        link.answer(framing.END, slot)

    tasks = []

    def stream(link: FarEnd, slot: int, body: bytes) -> None:
        link.credit[slot] = WINDOW_BYTES
        tasks.append(asyncio.get_running_loop().create_task(produce(link, slot)))

    replica.serve = stream
    assert await ask(router) == b"".join(pieces)


@between_nodes
async def test_what_was_sent_to_a_replica_that_died_counts_as_started(router: Router, replica: FarReplica) -> None:
    replica.serve = silence
    await until(lambda: router.backends["b"].links)
    callers = [Asked(body) for body in (b"a", b"b", bytes(MIB))]
    for caller in callers:
        router.submit(ENDPOINT, caller)
    await until(lambda: len(replica.bodies) == 3)
    replica.die()
    for caller in callers:
        error = await caller.result
        assert isinstance(error, ReplicaDied)
        assert error.started
    assert router.backends["b"].replicas.idle("r1")


@between_nodes
async def test_a_body_that_was_not_sent_whole_goes_elsewhere(router: Router, replica: FarReplica) -> None:
    body = os.urandom(64 * MIB)
    await until(lambda: router.backends["b"].links and replica.links)
    replica.on_thread(lambda: replica.links[0]._transport.pause_reading())  # type: ignore[union-attr]
    caller = Asked(body)
    router.submit(ENDPOINT, caller)
    await until(lambda: router.backends["b"].links["r1"].paused)
    other = FarReplica("r2")
    try:
        replica.die()
        publish(router, other.address)
        assert await caller.result == body
    finally:
        other.close()


@between_nodes
async def test_an_idempotent_request_is_run_once_more(router: Router, replica: FarReplica) -> None:
    publish(router, replica.address, idempotent=True)
    replica.serve = silence
    caller = Asked(b"x")
    router.submit(ENDPOINT, caller)
    await until(lambda: replica.bodies)
    other = FarReplica("r2")
    try:
        replica.die()
        publish(router, other.address, idempotent=True)
        assert await caller.result == b"x"
    finally:
        other.close()


async def lend(size: int) -> tuple[Arena, Upload, Asked]:
    """A request whose body of `size` bytes lies in an arena."""
    arena = Arena(2 * MIB)
    owner = Asked()
    upload = Lender(arena).take(owner, size)  # type: ignore[arg-type]
    assert upload is not None
    upload.view[:] = os.urandom(size)
    return arena, upload, owner


@between_nodes
async def test_a_body_in_the_arena_is_copied_into_frames(router: Router, replica: FarReplica) -> None:
    for size in (100_000, MIB):  # in one frame, and in pieces
        arena, upload, owner = await lend(size)
        body = bytes(upload.view)
        try:
            router.submit(ENDPOINT, upload)
            assert await owner.result == body
            assert not replica.begun.pop()[1] & framing.ARENA
            assert upload.flags & framing.ARENA
            assert arena.segments.taken
            upload.end()
            assert not arena.segments.taken
        finally:
            os.close(arena.fd)


@between_nodes
async def test_the_arena_is_free_though_pieces_of_a_body_are_still_to_be_sent(
    router: Router, replica: FarReplica
) -> None:
    await until(lambda: router.backends["b"].links)
    arena, upload, _ = await lend(2 * MIB)
    try:
        router.submit(ENDPOINT, upload)
        router.cancel(upload)
        upload.end()
        assert not arena.segments.taken
        assert await ask(router, b"next") == b"next"
    finally:
        os.close(arena.fd)


@between_nodes
async def test_a_refused_body_keeps_its_place_in_the_arena(router: Router, replica: FarReplica) -> None:
    arena, upload, owner = await lend(MIB)
    body = bytes(upload.view)

    def refuse(link: FarEnd, slot: int, body: bytes) -> None:
        replica.serve = echo
        link.answer(framing.BUSY, slot)
        link.send(pack(0, framing.ROOM, 0, 0, 0, 1))

    replica.serve = refuse
    try:
        router.submit(ENDPOINT, upload)
        assert await owner.result == body
        assert replica.bodies == [body, body]
        upload.end()
        assert not arena.segments.taken
    finally:
        os.close(arena.fd)
