"""The router against replicas that answer as the test says: real links on real sockets, virtual time."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import virtual_time

from headgate.core import deltas, framing
from headgate.core.state import BackendView, Endpoint, ReplicaAddress, Settings, Snapshot, Traffic
from headgate.errors import BackendOverloaded, EndpointNotFound, HeadgateError, ReplicaDied, RequestTimeout
from headgate.router import Caller, Router
from headgate.wire.address import address_of, listen
from headgate.wire.control import Acceptor
from headgate.wire.link import Link, open_link
from headgate.wire.slots import map_memory

TOKEN = b"t" * 32
pack = framing.HEADER.pack


class Asked(Caller):
    """A caller that keeps what it is told."""

    def __init__(self, body: bytes = b"", head: bytes = b"") -> None:
        self.body = body
        self.head = head
        self.got: list[Any] = []
        self.ended = asyncio.Event()

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self._end(("reply", arg, bytes(source[start:end])))

    def on_reply_start(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self.got.append(("start", arg))

    def on_data(self, source: Any, start: int, end: int) -> None:
        self.got.append(("data", bytes(source[start:end])))

    def on_reply_end(self) -> None:
        self._end(("end",))

    def on_error(self, status: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self._end(("error", status, bytes(source[start:end])))

    def on_failure(self, error: HeadgateError) -> None:
        self._end(error)

    def _end(self, what: Any) -> None:
        assert not self.ended.is_set(), "a request ended twice"
        self.got.append(what)
        self.ended.set()

    async def result(self) -> Any:
        await self.ended.wait()
        return self.got[-1]


class ReplicaEnd(Link):
    """The replica's end of a link: keeps the calls, answers when told."""

    def __init__(self, replica: Replica, page: Any) -> None:
        super().__init__()
        self.replica = replica
        self.page = page
        replica.links.append(self)

    def on_frames(self, frames: list[framing.Frame]) -> None:
        for kind, flags, meta_len, slot, arg, source, start, end in frames:
            payload = bytes(source[start + meta_len : end])
            self.replica.heard.append((kind, slot, arg, payload))
            if kind == framing.CALL:
                self.replica.calls.append((self, slot, payload))
                if not flags & framing.MORE:
                    self.replica.on_call(self, slot, payload)
            elif kind == framing.PING and self.replica.alive:
                self.send(pack(0, framing.PONG, 0, 0, 0, 0))

    def answer(self, kind: int, slot: int, arg: int = 0, body: bytes = b"", flags: int = 0) -> None:
        self.send(pack(len(body), kind, flags, 0, slot, arg) + body)


class Replica:
    """A listening replica whose behaviour is `on_call`."""

    def __init__(self, name: str, folder: Path, node: str = "local") -> None:
        self.name = name
        self.node = node
        self.address = str(folder / f"{name}.sock") if node == "local" else "tcp://127.0.0.1:0"
        self.calls: list[tuple[ReplicaEnd, int, bytes]] = []
        self.heard: list[tuple[int, int, int, bytes]] = []
        self.links: list[ReplicaEnd] = []
        self.alive = True
        self.on_call: Callable[[ReplicaEnd, int, bytes], None] = lambda link, slot, body: None
        listener = listen(self.address)
        self.address = address_of(listener)
        self.acceptor = Acceptor(listener, TOKEN, self._admit)
        self.acceptor.open()

    async def _admit(self, sock: socket.socket, name: str, fds: list[int]) -> None:
        await open_link(ReplicaEnd(self, map_memory(fds[0]) if fds else None), sock)
        for fd in fds[1:]:
            os.close(fd)

    def listed(self) -> ReplicaAddress:
        """How a snapshot lists it: on another node it is reached by `remote` alone."""
        if self.node == "local":
            return ReplicaAddress(self.name, self.address, os.getpid())
        return ReplicaAddress(self.name, "/nowhere", 0, self.node, self.address)

    def echo(self) -> Replica:
        def reply(link: ReplicaEnd, slot: int, body: bytes) -> None:
            link.answer(framing.REPLY, slot, 200, self.name.encode() + b":" + body)

        self.on_call = reply
        return self

    def refuse_with(self, kind: int, arg: int = 0) -> Replica:
        self.on_call = lambda link, slot, body: link.answer(kind, slot, arg)
        return self

    def close(self) -> None:
        self.acceptor.close()
        for link in self.links:
            link.abort()


class Rig:
    """A router and its replicas."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder = folder
        self.router = Router(TOKEN, "test", **options)
        self.version = 0
        self.replicas: list[Replica] = []

    def replica(self, name: str, node: str = "local") -> Replica:
        self.replicas.append(Replica(name, self.folder, node))
        return self.replicas[-1]

    def publish(
        self, backends: dict[str, list[Replica]], traffic: Traffic | None = None, trouble: str = "", **settings: Any
    ) -> Endpoint:
        self.version += 1
        first = next(iter(backends), "none")
        endpoint = Endpoint("e", None, ("GET",), traffic or Traffic(weights=((first, 1.0),)))
        views = tuple(
            BackendView(
                tag,
                1,
                Settings(**settings),
                tuple(one.listed() for one in replicas),
                trouble,
            )
            for tag, replicas in backends.items()
        )
        self.follow(Snapshot(self.version, (endpoint,), views, ready=True))
        return endpoint

    def follow(self, snapshot: Snapshot) -> None:
        """As control.py hands it on: what did not change is the same object as before."""
        delta = deltas.between(self.router.snapshot, snapshot)
        self.router.follow(deltas.apply(self.router.snapshot, delta) if delta else snapshot)

    async def ask(self, endpoint: Endpoint, body: bytes = b"", **options: Any) -> Any:
        caller = Asked(body)
        self.router.submit(endpoint, caller, **options)
        return await caller.result()

    def close(self) -> None:
        self.router.close()
        for replica in self.replicas:
            replica.close()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hg-") as path:
        yield Path(path)


def routed(test: Callable[[Rig], Awaitable[None]]) -> Callable[[Path], None]:
    """Run an async test with a Rig on virtual time."""

    def run(folder: Path) -> None:
        async def main() -> None:
            rig = Rig(folder)
            try:
                await test(rig)
            finally:
                rig.close()
                await settle()

        virtual_time.run(main())

    run.__name__ = getattr(test, "__name__", "test")
    return run


async def settle() -> None:
    """Let everything that is under way arrive."""
    for _ in range(50):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


@routed
async def test_a_request_reaches_its_replica_and_its_answer_comes_back(rig: Rig) -> None:
    endpoint = rig.publish({"b": [rig.replica("r1").echo()]})
    assert await rig.ask(endpoint, b"hi") == ("reply", 200, b"r1:hi")


@routed
async def test_a_backend_that_a_change_does_not_concern_is_left_alone(rig: Rig) -> None:
    one, two = rig.replica("one").echo(), rig.replica("two").echo()
    rig.publish({"a": [one], "b": [two]})
    followed: list[str] = []
    for tag, backend in rig.router.backends.items():
        follow = backend.follow

        def listen_in(view: BackendView, tag: str = tag, follow: Callable[[BackendView], None] = follow) -> None:
            followed.append(tag)
            follow(view)

        backend.follow = listen_in  # type: ignore[method-assign]
    endpoint = rig.publish({"a": [one], "b": [two]}, Traffic(weights=(("b", 1.0),)))
    assert not followed
    assert await rig.ask(endpoint, b"x") == ("reply", 200, b"two:x")
    endpoint = rig.publish({"a": [one], "b": [one]}, Traffic(weights=(("b", 1.0),)))
    assert followed == ["b"]
    assert await rig.ask(endpoint, b"x") == ("reply", 200, b"one:x")


@routed
async def test_requests_spread_over_all_replicas(rig: Rig) -> None:
    replicas = [rig.replica(f"r{n}").echo() for n in range(3)]
    endpoint = rig.publish({"b": replicas})
    await settle()
    answers = [await rig.ask(endpoint) for _ in range(6)]
    assert sorted(answer[2] for answer in answers) == [b"r0:", b"r0:", b"r1:", b"r1:", b"r2:", b"r2:"]


@routed
async def test_a_request_before_any_replica_waits_for_one(rig: Rig) -> None:
    endpoint = rig.publish({"b": []})
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    await settle()
    assert caller.got == []
    rig.publish({"b": [rig.replica("r1").echo()]})
    assert await caller.result() == ("reply", 200, b"r1:x")


@routed
async def test_first_requests_wait_for_all_first_links_and_then_spread(rig: Rig) -> None:
    replicas = [rig.replica(f"r{n}").echo() for n in range(3)]
    endpoint = rig.publish({"b": replicas}, max_queued_requests=0)
    callers = [Asked() for _ in range(6)]
    for caller in callers:
        rig.router.submit(endpoint, caller)
    answers = [(await caller.result())[2] for caller in callers]
    assert sorted(answers) == [b"r0:", b"r0:", b"r1:", b"r1:", b"r2:", b"r2:"]


@routed
async def test_a_new_version_sheds_nobody_before_its_links_are_there(rig: Rig) -> None:
    endpoint = rig.publish({"b": [rig.replica("old")]}, max_queued_requests=1, max_concurrent_queries=1)
    await settle()
    callers = [Asked() for _ in range(4)]
    for caller in callers[:2]:  # one runs, one waits
        rig.router.submit(endpoint, caller)
    await settle()
    endpoint = rig.publish({"b": [rig.replica("new").echo()]}, max_queued_requests=1, max_concurrent_queries=4)
    for caller in callers[2:]:
        rig.router.submit(endpoint, caller)
    assert [await caller.result() for caller in callers[1:]] == [("reply", 200, b"new:")] * 3


@routed
async def test_a_first_replica_that_does_not_answer_holds_up_nobody_for_long(rig: Rig) -> None:
    live, dead = rig.replica("r1").echo(), rig.replica("r2")
    dead.close()
    endpoint = rig.publish({"b": [live, dead]})
    assert await rig.ask(endpoint, b"x") == ("reply", 200, b"r1:x")


@routed
async def test_a_request_cancelled_before_the_first_link_is_never_sent(rig: Rig) -> None:
    replica = rig.replica("r1").echo()
    endpoint = rig.publish({"b": [replica]})
    gone, stays = Asked(b"gone"), Asked(b"stays")
    rig.router.submit(endpoint, gone)
    rig.router.submit(endpoint, stays)
    rig.router.cancel(gone)
    assert await stays.result() == ("reply", 200, b"r1:stays")
    assert [body for _, _, body in replica.calls] == [b"stays"]


@routed
async def test_no_more_than_the_limit_is_sent_and_the_rest_waits_in_order(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=2)
    callers = [Asked(b"%d" % n) for n in range(5)]
    for caller in callers:
        rig.router.submit(endpoint, caller)
    await settle()
    assert [body for _, _, body in replica.calls] == [b"0", b"1"]
    replica.echo()
    for link, slot, body in replica.calls[:2]:
        replica.on_call(link, slot, body)
    await asyncio.gather(*(caller.result() for caller in callers))
    assert [body for _, _, body in replica.calls] == [b"0", b"1", b"2", b"3", b"4"]


@routed
async def test_a_busy_replica_keeps_its_request_first_in_line_and_room_lets_it_go(rig: Rig) -> None:
    replica = rig.replica("r1").refuse_with(framing.BUSY)
    endpoint = rig.publish({"b": [replica]})
    first, second = Asked(b"first"), Asked(b"second")
    rig.router.submit(endpoint, first)
    await until(lambda: replica.calls)
    await settle()
    rig.router.submit(endpoint, second)
    await settle()
    assert [body for _, _, body in replica.calls] == [b"first"], "nothing more is sent before ROOM"
    replica.echo()
    replica.links[0].answer(framing.ROOM, 0, 1)
    assert await first.result() == ("reply", 200, b"r1:first")
    replica.links[0].answer(framing.ROOM, 0, 1)
    assert await second.result() == ("reply", 200, b"r1:second")


@routed
async def test_room_that_nobody_needs_is_handed_back(rig: Rig) -> None:
    replica = rig.replica("r1").refuse_with(framing.BUSY)
    endpoint = rig.publish({"b": [replica]})
    caller = Asked()
    rig.router.submit(endpoint, caller)
    await until(lambda: replica.calls)
    await settle()
    rig.router.cancel(caller)
    replica.links[0].answer(framing.ROOM, 0, 1)
    await until(lambda: any(kind == framing.ROOM for kind, *_ in replica.heard))
    assert [arg for kind, _, arg, _ in replica.heard if kind == framing.ROOM] == [1]


@routed
async def test_a_draining_replica_s_late_request_goes_elsewhere(rig: Rig) -> None:
    leaving = rig.replica("r1").refuse_with(framing.DRAINING)
    staying = rig.replica("r2").echo()
    endpoint = rig.publish({"b": [leaving, staying]})
    await settle()
    answers = [await rig.ask(endpoint) for _ in range(4)]
    assert {answer[2] for answer in answers} == {b"r2:"}
    assert len(leaving.calls) == 1


@routed
async def test_a_fenced_process_routes_anew_with_the_snapshot_it_lacked(rig: Rig) -> None:
    old, new = rig.replica("old").refuse_with(framing.DRAINING, arg=2), rig.replica("new").echo()
    endpoint = rig.publish({"a": [old], "b": [new]})
    caller = Asked()
    rig.router.submit(endpoint, caller)
    await until(lambda: old.calls)
    await settle()
    assert caller.got == []
    rig.publish({"a": [old], "b": [new]}, Traffic(weights=(("b", 1.0),)))
    assert await caller.result() == ("reply", 200, b"new:")


@routed
async def test_a_request_that_had_not_started_survives_its_replica(rig: Rig) -> None:
    dying = rig.replica("r1")
    dying.on_call = lambda link, slot, body: link.abort()
    endpoint = rig.publish({"b": [dying]})
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    await until(lambda: dying.calls)
    rig.publish({"b": [rig.replica("r2").echo()]})
    # The "process" behind the link is this one, which lives: nobody can say that it did not start.
    error = await caller.result()
    assert isinstance(error, ReplicaDied)
    assert error.started


@routed
async def test_what_the_slot_page_says_decides_when_the_process_is_dead(rig: Rig) -> None:
    child = os.posix_spawn("/bin/true", ["/bin/true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # dead, and its pid is kept
    dying = rig.replica("r1")

    def start_second_only(link: ReplicaEnd, slot: int, body: bytes) -> None:
        if body == b"started":
            link.page[slot] = 1
            asyncio.get_running_loop().call_later(0.01, link.abort)

    dying.on_call = start_second_only
    endpoint = rig.publish({"b": [dying]})
    waiting, started = Asked(b"waiting"), Asked(b"started")
    await settle()
    link = rig.router.backends["b"].links["r1"]
    os.close(link._pidfd)
    link._pidfd = os.pidfd_open(child)
    rig.router.submit(endpoint, waiting)
    rig.router.submit(endpoint, started)
    await until(lambda: len(dying.calls) == 2)
    rig.publish({"b": [rig.replica("r2").echo()]})
    assert await waiting.result() == ("reply", 200, b"r2:waiting")
    error = await started.result()
    assert isinstance(error, ReplicaDied)
    assert error.started
    assert rig.router.backends["b"].replicas.idle("r1")
    os.waitpid(child, 0)


def dead_process() -> int:
    """The pid of a process that has ended; to be waited for."""
    child = os.posix_spawn("/bin/true", ["/bin/true"], {})
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    return child


async def lose(rig: Rig, replica: Replica, dead: int) -> None:
    """The process behind the replica's link is gone: what its page says is believed."""
    link = rig.router.backends["b"].links[replica.name]
    os.close(link._pidfd)
    link._pidfd = os.pidfd_open(dead)
    replica.links[-1].abort()
    await settle()


def test_what_a_dead_replica_had_not_started_is_tried_again_a_few_at_a_time(folder: Path) -> None:
    dead = dead_process()

    @routed
    async def test(rig: Rig) -> None:
        dying, other = rig.replica("r1"), rig.replica("r2")
        endpoint = rig.publish({"b": [dying]}, max_concurrent_queries=100)
        callers = [Asked(b"%d" % number) for number in range(30)]
        for caller in callers:
            rig.router.submit(endpoint, caller)
        await until(lambda: len(dying.calls) == 30)
        rig.publish({"b": [other]}, max_concurrent_queries=100)
        await settle()
        for number in range(20):  # of 50 active requests 10 may be retries
            callers.append(Asked(b"new %d" % number))
            rig.router.submit(endpoint, callers[-1])
        await lose(rig, dying, dead)
        await until(lambda: len(other.calls) == 30)
        await settle()
        retried = [body for _, _, body in other.calls if not body.startswith(b"new")]
        assert retried == [b"%d" % number for number in range(10)]
        late = Asked(b"new late")
        rig.router.submit(endpoint, late)  # what is no retry overtakes those that wait for the budget
        await until(lambda: other.calls[-1][2] == b"new late")
        callers.append(late)
        answered = 0
        while answered < len(callers):
            await until(lambda: len(other.calls) > answered)  # noqa: B023
            running = [caller for caller in callers if caller.retrying]
            assert len(running) <= 10
            link, slot, _ = other.calls[answered]
            link.answer(framing.REPLY, slot, 200)
            answered += 1
        for caller in callers:
            assert (await caller.result())[:2] == ("reply", 200)

    test(folder)
    os.waitpid(dead, 0)


def test_a_request_that_waits_to_be_tried_again_may_leave_expire_and_be_routed_anew(folder: Path) -> None:
    dead = dead_process()

    @routed
    async def test(rig: Rig) -> None:
        dying = rig.replica("r1")
        endpoint = rig.publish({"b": [dying]}, request_timeout_s=5.0)
        left, late, moved = Asked(b"left"), Asked(b"late"), Asked(b"moved")
        late.deadline = asyncio.get_running_loop().time() + 1.0
        for caller in (left, late, moved):
            rig.router.submit(endpoint, caller)
        await until(lambda: len(dying.calls) == 3)
        rig.publish({"b": []}, request_timeout_s=5.0)
        await lose(rig, dying, dead)
        assert len(rig.router.backends["b"].retries.waiting) == 3
        rig.router.cancel(left)
        assert isinstance(await late.result(), RequestTimeout)
        rig.publish({"new": [rig.replica("r2").echo()]})
        assert await moved.result() == ("reply", 200, b"r2:moved")
        assert left.got == []

    test(folder)
    os.waitpid(dead, 0)


def test_a_request_has_three_tries(folder: Path) -> None:
    dead = dead_process()

    @routed
    async def test(rig: Rig) -> None:
        caller = Asked(b"x")
        for number in range(3):
            dying = rig.replica(f"r{number}")
            endpoint = rig.publish({"b": [dying]})
            if number == 0:
                rig.router.submit(endpoint, caller)
            await until(lambda: dying.calls)  # noqa: B023
            await lose(rig, dying, dead)
        error = await caller.result()
        assert isinstance(error, ReplicaDied)
        assert not error.started
        assert "3 times before it started" in str(error)

    test(folder)
    os.waitpid(dead, 0)


@routed
async def test_a_replica_that_is_listed_again_keeps_its_link(rig: Rig) -> None:
    replica, other = rig.replica("r1"), rig.replica("r2").echo()
    endpoint = rig.publish({"b": [replica]})
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    await until(lambda: replica.calls)
    rig.publish({"b": [other]})
    await settle()
    rig.publish({"b": [replica, other]})
    await settle()
    assert len(replica.links) == 1
    link, slot, _ = replica.calls[0]
    replica.echo()
    link.answer(framing.REPLY, slot, 200, b"late")
    assert await caller.result() == ("reply", 200, b"late")
    await settle()
    assert {(await rig.ask(endpoint))[2] for _ in range(4)} == {b"r1:", b"r2:"}


@routed
async def test_a_replica_that_is_taken_out_and_listed_again_while_it_is_dialled_gets_one_link(rig: Rig) -> None:
    replica = rig.replica("r1").echo()
    endpoint = rig.publish({"b": [replica]})
    for _ in range(5):
        rig.publish({"b": []})
        endpoint = rig.publish({"b": [replica]})
        await asyncio.sleep(0)
    assert await rig.ask(endpoint, b"x") == ("reply", 200, b"r1:x")
    await settle()
    assert len([link for link in replica.links if not link.closed]) == 1


@routed
async def test_an_idempotent_request_is_run_once_more(rig: Rig) -> None:
    dying = rig.replica("r1")

    def die(link: ReplicaEnd, slot: int, body: bytes) -> None:
        link.page[slot] = 1
        link.abort()

    dying.on_call = die
    endpoint = rig.publish({"b": [dying]}, idempotent=True)
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    await until(lambda: dying.calls)
    rig.publish({"b": [rig.replica("r2").echo()]}, idempotent=True)
    assert await caller.result() == ("reply", 200, b"r2:x")


@routed
async def test_an_answer_that_had_begun_is_never_asked_for_again(rig: Rig) -> None:
    dying = rig.replica("r1")

    def begin_and_die(link: ReplicaEnd, slot: int, body: bytes) -> None:
        link.answer(framing.REPLY, slot, 200, flags=framing.MORE | framing.STREAM)
        link.answer(framing.DATA, slot, body=b"part")
        asyncio.get_running_loop().call_later(0.01, link.abort)

    dying.on_call = begin_and_die
    endpoint = rig.publish({"b": [dying]}, idempotent=True)
    caller = Asked()
    rig.router.submit(endpoint, caller)
    assert isinstance(await caller.result(), ReplicaDied)
    assert caller.got[:2] == [("start", 200), ("data", b"part")]


@routed
async def test_what_a_dead_replica_had_sent_still_counts(rig: Rig) -> None:
    replica = rig.replica("r1")

    def answer_and_die(link: ReplicaEnd, slot: int, body: bytes) -> None:
        link.answer(framing.REPLY, slot, 200, b"last words")
        link.flush()
        link.close()

    replica.on_call = answer_and_die
    endpoint = rig.publish({"b": [replica]})
    assert await rig.ask(endpoint) == ("reply", 200, b"last words")


@routed
async def test_a_deadline_ends_a_request_that_waits_and_one_that_runs(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, request_timeout_s=1.5, max_concurrent_queries=1)
    running, waiting = Asked(), Asked()
    rig.router.submit(endpoint, running)
    rig.router.submit(endpoint, waiting)
    for caller in (running, waiting):
        assert isinstance(await caller.result(), RequestTimeout)
    assert 1.5 <= asyncio.get_running_loop().time() <= 1.65
    await settle()
    assert [arg for kind, _, arg, _ in replica.heard if kind == framing.CANCEL] == [1]
    assert [arg & 0xFFFFFFFF for kind, _, arg, _ in replica.heard if kind == framing.CALL] == [1500]
    assert not rig.router.timed


@routed
async def test_a_request_whose_deadline_came_while_it_waited_is_never_sent(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=1)
    running, late, patient = Asked(b"1"), Asked(b"2"), Asked(b"3")
    rig.router.submit(endpoint, running)
    late.deadline = asyncio.get_running_loop().time() + 0.468
    rig.router.submit(endpoint, late)
    rig.router.submit(endpoint, patient)
    await until(lambda: replica.calls)
    link, slot, _ = replica.calls[0]
    await asyncio.sleep(late.deadline - asyncio.get_running_loop().time() + 0.004)  # before the next sweep
    assert not late.got
    replica.echo()
    link.answer(framing.REPLY, slot, 200)
    assert isinstance(await late.result(), RequestTimeout)
    assert await patient.result() == ("reply", 200, b"r1:3")
    assert len(replica.calls) == 2
    assert not rig.router.timed


@routed
async def test_a_request_that_comes_after_its_deadline_is_never_sent(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]})
    late = Asked()
    late.deadline = asyncio.get_running_loop().time() - 0.001
    rig.router.submit(endpoint, late)
    assert isinstance(await late.result(), RequestTimeout)
    await settle()
    assert not replica.calls


@routed
async def test_before_the_first_dial_no_more_requests_wait_than_the_limits_allow(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=1, max_queued_requests=2)
    callers = [Asked(str(number).encode()) for number in range(5)]
    for caller in callers:
        rig.router.submit(endpoint, caller)
    for caller in callers[3:]:
        error = await caller.result()
        assert isinstance(error, BackendOverloaded)
        assert "3 waiting (limits 1 and 2)" in str(error)
    assert not any(caller.got for caller in callers[:3])


def pidfds() -> int:
    return sum("pidfd" in os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd"))


@routed
async def test_a_link_that_cannot_be_opened_keeps_no_descriptor(rig: Rig) -> None:
    replica = rig.replica("r1").echo()

    async def fail(link: Link, sock: socket.socket) -> None:
        sock.close()
        raise OSError(errno.EMFILE, "no descriptor left")

    before = pidfds()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headgate.wire.replica_link.open_link", fail)
        endpoint = rig.publish({"b": [replica]})
        await asyncio.sleep(2.0)  # some forty attempts
        assert pidfds() == before
    assert (await rig.ask(endpoint))[0] == "reply"


@routed
async def test_who_waits_for_a_backend_that_does_not_start_hears_why(rig: Rig) -> None:
    endpoint = rig.publish({"b": []}, request_timeout_s=1.0, max_queued_requests=1, trouble="bad disk")
    waiting, shed = Asked(), Asked()
    rig.router.submit(endpoint, waiting)
    rig.router.submit(endpoint, shed)
    for caller in (shed, waiting):
        assert "no replica: bad disk" in str(await caller.result())


@routed
async def test_a_slot_is_taken_until_the_replica_s_last_word_on_a_cancelled_request(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=1)
    first, second = Asked(b"1"), Asked(b"2")
    rig.router.submit(endpoint, first)
    await until(lambda: replica.calls)
    rig.router.cancel(first)
    rig.router.submit(endpoint, second)
    await settle()
    assert len(replica.calls) == 1
    link, slot, _ = replica.calls[0]
    replica.echo()
    link.answer(framing.ERROR, slot, 499)
    assert await second.result() == ("reply", 200, b"r1:2")
    assert first.got == []


@routed
async def test_too_many_waiting_requests_are_shed_with_figures(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=1, max_queued_requests=1)
    await settle()
    callers = [Asked() for _ in range(3)]
    for caller in callers:
        rig.router.submit(endpoint, caller)
    error = await callers[2].result()
    assert isinstance(error, BackendOverloaded)
    assert error.retry_after_s >= 1
    assert "1 requests in flight and 1 waiting (limits 1 and 1)" in str(error)


@routed
async def test_a_shed_request_is_told_when_the_line_will_have_moved_on(rig: Rig) -> None:
    """However long the backend was idle before: the rate is that of the time with a line."""
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=1, max_queued_requests=5)
    await settle()
    await asyncio.sleep(3600.0)
    loop, begin = asyncio.get_running_loop(), asyncio.get_running_loop().time()
    replica.on_call = lambda link, slot, body: loop.call_later(2.0, link.answer, framing.REPLY, slot, 200) and None
    while loop.time() < begin + 20.0:
        for _ in range(8):
            rig.router.submit(endpoint, Asked())
        await asyncio.sleep(0.5)
    error = await rig.ask(endpoint)
    assert isinstance(error, BackendOverloaded)
    assert error.retry_after_s in (12, 13, 14)  # six, of two seconds each


@routed
async def test_a_deleted_backend_fails_what_waits_for_it(rig: Rig) -> None:
    endpoint = rig.publish({"b": []})
    caller = Asked()
    rig.router.submit(endpoint, caller)
    rig.publish({})
    assert isinstance(await caller.result(), EndpointNotFound)
    assert isinstance(await rig.ask(endpoint), EndpointNotFound)


@pytest.mark.parametrize("after_ping_s", [0.01, 0.3, 0.6, 0.99])
def test_a_silent_replica_gets_nothing_new_after_three_seconds_until_it_answers_again(
    folder: Path, after_ping_s: float
) -> None:
    @routed
    async def test(rig: Rig) -> None:
        silent, live = rig.replica("r1").echo(), rig.replica("r2").echo()
        endpoint = rig.publish({"b": [silent, live]})
        await settle()
        await asyncio.sleep(5.0 + after_ping_s)
        silent.alive = False
        await asyncio.sleep(1.9)
        answers = {(await rig.ask(endpoint))[2] for _ in range(4)}
        assert answers == {b"r1:", b"r2:"}
        await asyncio.sleep(1.1)
        answers = {(await rig.ask(endpoint))[2] for _ in range(4)}
        assert answers == {b"r2:"}
        silent.alive = True
        await asyncio.sleep(1.5)
        answers = {(await rig.ask(endpoint))[2] for _ in range(4)}
        assert answers == {b"r1:", b"r2:"}

    test(folder)


@routed
async def test_a_shadow_gets_a_copy_and_the_main_request_does_not_wait_for_it(rig: Rig) -> None:
    main, shadow = rig.replica("r1").echo(), rig.replica("r2")
    endpoint = rig.publish({"a": [main], "b": [shadow]}, Traffic(weights=(("a", 1.0),), shadows=(("b", 1.0),)))
    assert await rig.ask(endpoint, b"x") == ("reply", 200, b"r1:x")
    await until(lambda: shadow.calls)
    assert shadow.calls[0][2] == b"x"


@routed
async def test_a_large_body_goes_in_pieces_and_a_small_one_overtakes_it(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]})
    large, small = Asked(b"L" * 1_000_000), Asked(b"small")
    rig.router.submit(endpoint, large)
    rig.router.submit(endpoint, small)
    await until(lambda: any(kind == framing.END for kind, *_ in replica.heard))
    pieces = [payload for kind, _, _, payload in replica.heard if kind == framing.DATA]
    assert b"".join(pieces) == b"L" * 1_000_000
    assert max(map(len, pieces)) <= 64 * 1024


@routed
async def test_a_removed_replica_s_link_is_closed_once_it_is_idle(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]})
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    await until(lambda: replica.calls)
    rig.publish({"b": []})
    await settle()
    assert not replica.links[0].closed
    link, slot, _ = replica.calls[0]
    link.answer(framing.REPLY, slot, 200, b"done")
    assert await caller.result() == ("reply", 200, b"done")
    await until(lambda: replica.links[0].closed)


@pytest.mark.parametrize("cut", range(0, 140, 7))
def test_answers_may_come_in_any_order_and_cut_anywhere(folder: Path, cut: int) -> None:
    @routed
    async def told(rig: Rig) -> None:
        replica = rig.replica("r1")
        endpoint = rig.publish({"b": [replica]})
        callers = [Asked() for _ in range(4)]
        for caller in callers:
            rig.router.submit(endpoint, caller)
        await until(lambda: len(replica.calls) == 4)
        (link, one, _), (_, two, _), (_, three, _), (_, four, _) = replica.calls
        stream = b"".join(
            pack(len(body), kind, flags, 0, slot, arg) + body
            for kind, flags, slot, arg, body in (
                (framing.REPLY, 0, one, 200, b"one"),
                (framing.REPLY, framing.MORE | framing.STREAM, two, 200, b"two"),
                (framing.REPLY, 0, three, 201, b"three"),
                (framing.DATA, 0, two, 0, b"more"),
                (framing.END, 0, two, 0, b""),
                (framing.REPLY, 0, four, 202, b"four"),
            )
        )
        assert len(stream) == 139
        link.send_at_once(stream[:cut])
        await settle()
        link.send_at_once(stream[cut:])
        assert [await caller.result() for caller in callers] == [
            ("reply", 200, b"one"), ("end",), ("reply", 201, b"three"), ("reply", 202, b"four"),
        ]  # fmt: skip
        assert callers[1].got == [("start", 200), ("data", b"more"), ("end",)]

    told(folder)


@routed
async def test_what_came_whole_before_a_broken_frame_is_an_answer(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]})
    one, two = Asked(), Asked()
    rig.router.submit(endpoint, one)
    rig.router.submit(endpoint, two)
    await until(lambda: len(replica.calls) == 2)
    (link, first, _), (_, second, _) = replica.calls
    link.send(pack(1, framing.REPLY, 0, 0, first, 200) + b"1" + pack(1, framing.REPLY, 0, 2, second, 200) + b"2")
    assert await one.result() == ("reply", 200, b"1")
    assert isinstance(await two.result(), ReplicaDied)


@routed
async def test_a_broken_frame_closes_the_link_and_a_new_one_is_made(rig: Rig) -> None:
    replica = rig.replica("r1").echo()
    endpoint = rig.publish({"b": [replica]})
    await until(lambda: replica.links)
    replica.links[0].send(pack(0, 77, 0, 0, 0, 0))
    await until(lambda: len(replica.links) == 2)
    await settle()
    assert await rig.ask(endpoint, b"again") == ("reply", 200, b"r1:again")




@routed
async def test_what_waits_for_a_deleted_backend_goes_where_its_endpoint_leads_now(rig: Rig) -> None:
    endpoint = rig.publish({"old": []})
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    rig.publish({"new": [rig.replica("r1").echo()]})
    assert await caller.result() == ("reply", 200, b"r1:x")


@routed
async def test_a_request_that_is_routed_anew_is_not_shadowed_twice(rig: Rig) -> None:
    main, shadow = rig.replica("r1").echo(), rig.replica("r2").echo()
    endpoint = rig.publish({"old": [], "b": [shadow]}, Traffic(weights=(("old", 1.0),), shadows=(("b", 1.0),)))
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    rig.publish({"new": [main], "b": [shadow]}, Traffic(weights=(("new", 1.0),), shadows=(("b", 1.0),)))
    assert await caller.result() == ("reply", 200, b"r1:x")
    await settle()
    assert len(shadow.calls) == 1


@routed
async def test_a_shadow_that_waits_for_a_deleted_backend_is_dropped(rig: Rig) -> None:
    main = rig.replica("r1").echo()
    endpoint = rig.publish({"a": [main], "b": []}, Traffic(weights=(("a", 1.0),), shadows=(("b", 1.0),)))
    assert await rig.ask(endpoint, b"x") == ("reply", 200, b"r1:x")
    rig.publish({"a": [main]})
    await settle()
    assert len(main.calls) == 1


@routed
async def test_a_shadow_has_the_deadline_of_its_own_backend(rig: Rig) -> None:
    main, shadow = rig.replica("r1").echo(), rig.replica("r2")
    traffic = Traffic(weights=(("a", 1.0),), shadows=(("b", 1.0),))
    endpoint = rig.publish({"a": [main], "b": [shadow]}, traffic, request_timeout_s=1.5)
    assert await rig.ask(endpoint, b"x") == ("reply", 200, b"r1:x")
    await asyncio.sleep(2.0)
    assert [arg for kind, _, arg, _ in shadow.heard if kind == framing.CANCEL] == [1]
    assert not rig.router.timed


@routed
async def test_what_a_replica_refuses_waits_only_if_there_is_room_in_the_line(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=2, max_queued_requests=1)
    await settle()
    older, newer = Asked(b"1"), Asked(b"2")
    rig.router.submit(endpoint, older)
    rig.router.submit(endpoint, newer)
    await until(lambda: len(replica.calls) == 2)
    for link, slot, _ in list(replica.calls):
        link.answer(framing.BUSY, slot)
    assert isinstance(await newer.result(), BackendOverloaded)
    replica.echo()
    replica.links[0].answer(framing.ROOM, 0, 2)
    assert await older.result() == ("reply", 200, b"r1:1")


# --- several nodes ---


@routed
async def test_a_replica_of_another_node_is_reached_by_its_other_address(rig: Rig) -> None:
    endpoint = rig.publish({"b": [rig.replica("r1", "far").echo()]})
    assert await rig.ask(endpoint, b"hi") == ("reply", 200, b"r1:hi")
    assert rig.replicas[0].links[0].page is None


@routed
async def test_of_idle_replicas_those_of_the_same_node_are_asked(rig: Rig) -> None:
    far, near, other = rig.replica("r1", "far").echo(), rig.replica("r2").echo(), rig.replica("r3", "far").echo()
    endpoint = rig.publish({"b": [far, near, other]}, max_concurrent_queries=1)
    await until(lambda: len(rig.router.backends["b"].links) == 3)
    assert {(await rig.ask(endpoint))[2] for _ in range(6)} == {b"r2:"}
    answers = await asyncio.gather(*(rig.ask(endpoint) for _ in range(3)))
    assert {answer[2] for answer in answers} == {b"r1:", b"r2:", b"r3:"}


# --- slots that are held for later ---


class Reserving(Asked):
    """A caller that wants a slot only; its shadows, if it can have any, get `copy`."""

    flags = framing.RESERVE

    def __init__(self, copy: Caller | None = None) -> None:
        super().__init__()
        self.copy = copy

    def original(self) -> Caller | None:
        return self.copy


def grant(link: ReplicaEnd, slot: int, body: bytes) -> None:
    link.answer(framing.REPLY, slot, body=b"8 bytes!", flags=framing.MORE)


@routed
async def test_a_reserved_slot_is_taken_until_the_replica_says_that_it_is_not(rig: Rig) -> None:
    replica = rig.replica("r1")
    replica.on_call = grant
    endpoint = rig.publish({"b": [replica]}, max_concurrent_queries=1)
    caller, next_one = Reserving(), Asked(b"x")
    rig.router.submit(endpoint, caller)
    await until(lambda: caller.answering)
    rig.router.submit(endpoint, next_one)
    await settle()
    assert len(replica.calls) == 1
    replica.echo()
    replica.links[0].answer(framing.END, replica.calls[0][1])
    assert await caller.result() == ("end",)
    assert await next_one.result() == ("reply", 200, b"r1:x")


@pytest.mark.parametrize("idempotent", [False, True])
def test_a_reservation_that_was_granted_is_never_made_again_elsewhere(folder: Path, idempotent: bool) -> None:
    @routed
    async def test(rig: Rig) -> None:
        child = os.posix_spawn("/bin/true", ["/bin/true"], {})
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        dying = rig.replica("r1")
        dying.on_call = grant
        endpoint = rig.publish({"b": [dying]}, idempotent=idempotent)
        await settle()
        link = rig.router.backends["b"].links["r1"]
        os.close(link._pidfd)
        link._pidfd = os.pidfd_open(child)  # the process is dead, and had not begun: its page says so
        caller = Reserving()
        rig.router.submit(endpoint, caller)
        await until(lambda: caller.answering)
        other = rig.replica("r2").echo()
        rig.publish({"b": [dying, other]}, idempotent=idempotent)
        dying.links[0].abort()
        assert isinstance(await caller.result(), ReplicaDied)
        await settle()
        assert not other.calls
        assert rig.router.backends["b"].replicas.idle("r1")
        os.waitpid(child, 0)

    test(folder)


@routed
async def test_a_reservation_that_was_not_granted_yet_may_go_elsewhere(rig: Rig) -> None:
    leaving, staying = rig.replica("r1").refuse_with(framing.DRAINING), rig.replica("r2")
    staying.on_call = grant
    endpoint = rig.publish({"b": [leaving]})
    caller = Reserving()
    rig.router.submit(endpoint, caller)
    await until(lambda: leaving.calls)
    rig.publish({"b": [staying]})
    await until(lambda: caller.answering)


@routed
async def test_the_shadow_of_a_reservation_is_an_ordinary_request(rig: Rig) -> None:
    main, shadow = rig.replica("r1"), rig.replica("r2").echo()
    main.on_call = grant
    traffic = Traffic(weights=(("a", 1.0),), shadows=(("b", 1.0),))
    endpoint = rig.publish({"a": [main], "b": [shadow]}, traffic)
    for caller in (Reserving(Asked(b"encoded")), Reserving()):
        rig.router.submit(endpoint, caller)
        await until(lambda caller=caller: caller.answering)
    await until(lambda: shadow.calls)
    await settle()
    assert [body for _, _, body in shadow.calls] == [b"encoded"]
    assert [body for _, _, body in main.calls] == [b"", b""]
