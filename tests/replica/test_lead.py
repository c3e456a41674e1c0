"""The plain thread reads a link itself: with a real thread, for who reads when is all that lead.py is about."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from replica_rig import HEAD, RouterEnd, pack

import headgate
from headgate.core import framing
from headgate.core.state import Settings
from headgate.replica.callable import LoadedCallable
from headgate.replica.links import CallerLink
from headgate.replica.plain import PlainThread
from headgate.replica.worker import Worker
from headgate.wire.link import open_link

FINAL = (framing.REPLY, framing.ERROR, framing.END, framing.BUSY, framing.DRAINING)


class Stage:
    """A worker with a plain thread, on the running loop."""

    def __init__(self, target: Any, **settings: Any) -> None:
        loaded = LoadedCallable(target, (), "target")
        loaded.construct()
        self.drained = asyncio.Event()
        self.plain = PlainThread()
        self.interrupted: list[BaseException] = []
        limits = Settings(**{"max_concurrent_queries": 200, **settings})
        self.worker = Worker(loaded, limits, self.plain, on_drained=self.drained.set)
        assert self.worker.plain_calls.lead is not None
        self.lead = self.worker.plain_calls.lead
        self.links: list[Any] = []
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        while True:
            try:
                self.plain.run()
                return
            except BaseException as error:  # noqa: BLE001 - as replica/process.py
                self.interrupted.append(error)

    async def link(self, name: str = "router") -> tuple[RouterEnd, CallerLink]:
        ours, theirs = socket.socketpair()
        for sock in (ours, theirs):
            sock.setblocking(False)
        router = RouterEnd()
        caller = CallerLink(self.worker, name, router.page, None)
        await open_link(caller, theirs)
        await open_link(router, ours)
        self.links += [router, caller]
        return router, caller

    async def lent(self, name: str = "router") -> tuple[RouterEnd, CallerLink]:
        """A link that the plain thread reads, after a call in slot 0."""
        router, caller = await self.link(name)
        for _ in range(5000):
            router.http(0)
            await router.end(0)
            await asyncio.sleep(0)
            router.got.clear()
            if self.lead.link is caller:
                return router, caller
        raise AssertionError("it was not lent")

    def close(self) -> None:
        for link in self.links:
            link.abort()
        self.plain.stop()
        self.thread.join(10)
        os.close(self.plain._event)
        assert not self.thread.is_alive()


async def until(holds: Callable[[], Any]) -> Any:
    for _ in range(5000):
        if found := holds():
            return found
        await asyncio.sleep(0.002)
    raise AssertionError("waited 10 s in vain")


def staged(target: Any, **settings: Any) -> Callable[[Any], Callable[[], None]]:
    """Run an async test with a stage."""

    def decorate(test: Callable[[Stage], Awaitable[None]]) -> Callable[[], None]:
        def run() -> None:
            async def main() -> None:
                stage = Stage(target, **settings)
                try:
                    await test(stage)
                finally:
                    stage.close()
                    await asyncio.sleep(0)
                    gate.set()

            gate.clear()
            entered.clear()
            asyncio.run(main())

        run.__name__ = getattr(test, "__name__", "test")
        return run

    return decorate


gate, entered = threading.Event(), threading.Event()


def echo(request: Any) -> Any:
    """Answers with the body; "wait" waits for the gate."""
    if request.data == b"wait":
        entered.set()
        assert gate.wait(10)
    return request.data


@staged(echo)
async def test_quick_calls_are_read_run_and_answered_by_the_plain_thread(stage: Stage) -> None:
    router, caller = await stage.lent()
    readers: set[int] = set()
    receive = caller.receive

    def noted() -> Any:
        readers.add(threading.get_ident())
        return receive()

    caller.receive = noted  # type: ignore[method-assign]
    for slot in range(50):
        router.http(slot, b"%d" % slot)
    for slot in range(50):
        assert await router.end(slot) == (framing.REPLY, 200, b"%d" % slot)
    assert readers == {stage.thread.ident}
    assert stage.lead.link is caller
    assert [slot for _, _, slot, *_ in router.got] == list(range(50))
    await until(lambda: stage.worker.admission.held == 0)
    assert caller.jobs == {}


@staged(echo)
async def test_the_thread_waits_after_a_call_and_does_not_read_in_vain(stage: Stage) -> None:
    router, caller = await stage.lent()
    receive, found = caller.receive, []

    def noted() -> Any:
        frames = receive()
        found.append(len(frames or ()))
        return frames

    caller.receive = noted  # type: ignore[method-assign]
    for slot in range(50):
        router.http(slot)
        await router.end(slot)
    assert found.count(1) >= 49  # it may have been about to read when this began to count
    assert found.count(0) <= 1
    assert stage.lead.link is caller


@staged(echo)
async def test_while_a_call_takes_long_the_loop_reads(stage: Stage) -> None:
    router, _ = await stage.lent()
    router.http(1, b"wait")
    await asyncio.to_thread(entered.wait, 10)
    router.http(2, b"left")
    router.http(3, b"stays")
    router.frame(framing.CANCEL, 2)
    router.frame(framing.PING, 0, arg=7)
    await until(lambda: any(kind == framing.PONG and arg == 7 for kind, _, _, arg, _, _ in router.got))
    assert stage.lead.link is None
    assert router.ends() == {}
    gate.set()
    assert await router.end(1) == (framing.REPLY, 200, b"wait")
    assert (await router.end(2))[:2] == (framing.ERROR, 499)
    assert await router.end(3) == (framing.REPLY, 200, b"stays")
    assert router.page[2] == 0
    await until(lambda: stage.worker.admission.held == 0)


@staged(echo)
async def test_answers_of_quick_calls_do_not_wait_for_a_slow_one_behind_them(stage: Stage) -> None:
    router, _ = await stage.lent()
    together = RouterEnd()
    together.send = lambda data: frames.append(data)  # type: ignore[method-assign, assignment, misc]
    frames: list[bytes] = []
    for slot, body in enumerate([b"a", b"b", b"wait", b"c"]):
        together.http(slot, body)
    router.send(b"".join(frames))
    await asyncio.to_thread(entered.wait, 10)
    assert (await router.end(0))[2] == b"a"
    assert (await router.end(1))[2] == b"b"
    assert set(router.ends()) == {0, 1}
    gate.set()
    assert (await router.end(3))[2] == b"c"


def test_a_slow_handler_keeps_the_loop_reading() -> None:
    @staged(echo)
    async def test(stage: Stage) -> None:
        router, caller = await stage.lent()
        router.http(1, b"wait")
        await asyncio.to_thread(entered.wait, 10)
        await until(lambda: stage.lead.link is None)
        gate.set()
        await router.end(1)
        router.http(2)
        await router.end(2)
        assert stage.lead.link is None  # not so soon
        for slot in range(3, 3000):
            router.http(slot)
            await router.end(slot)
            if stage.lead.link is caller:
                return
        raise AssertionError("never lent again")

    test()


@staged(echo)
async def test_what_is_no_ordinary_call_goes_to_the_loop_and_keeps_its_place(stage: Stage) -> None:
    router, _ = await stage.lent()
    sent: list[bytes] = []
    meta_and_head = RouterEnd()
    meta_and_head.send = lambda data: sent.append(data)  # type: ignore[method-assign, assignment, misc]
    meta_and_head.http(2)
    size, *_ = framing.HEADER.unpack_from(sent[0])
    content = sent[0][framing.HEADER_BYTES :]
    meta_len = len(content) - len(HEAD)
    total = (5).to_bytes(8, "little")
    router.http(1, b"1")
    router.send(
        pack(size + 8, framing.CALL, framing.MORE, meta_len, 2, len(HEAD) << 32) + content + total
    )
    router.frame(framing.DATA, 2, body=b"in ")
    router.http(3, b"3")
    router.frame(framing.DATA, 2, body=b"it")
    router.frame(framing.END, 2)
    router.http(4, b"4")
    assert [(await router.end(slot))[2] for slot in (1, 2, 3, 4)] == [b"1", b"in it", b"3", b"4"]


@staged(echo, max_concurrent_queries=2)
async def test_the_limit_is_kept_and_calls_beyond_it_are_refused(stage: Stage) -> None:
    router, _ = await stage.lent()
    router.http(0, b"wait")
    for slot in range(1, 5):
        router.http(slot)
    for slot in (2, 3, 4):
        assert (await router.end(slot))[0] == framing.BUSY
    assert stage.worker.admission.held == 2
    gate.set()
    assert (await router.end(0))[0] == framing.REPLY
    assert (await router.end(1))[0] == framing.REPLY
    await until(lambda: [kind for kind, *_ in router.got].count(framing.ROOM) == 2)


@staged(echo)
async def test_a_link_that_ends_while_it_is_lent_is_over_and_others_are_served(stage: Stage) -> None:
    router, caller = await stage.lent()
    router.abort()
    await until(lambda: caller not in stage.worker.links)
    assert stage.lead.link is None
    _, theirs = await stage.lent("other")
    assert stage.lead.link is theirs


@staged(echo)
async def test_a_link_that_ends_while_its_call_runs_frees_its_slot(stage: Stage) -> None:
    router, caller = await stage.lent()
    router.http(1, b"wait")
    await asyncio.to_thread(entered.wait, 10)
    router.abort()
    await until(lambda: caller not in stage.worker.links)
    gate.set()
    await until(lambda: stage.worker.admission.held == 0)


@staged(echo)
async def test_a_drain_ends_when_all_is_answered(stage: Stage) -> None:
    router, _ = await stage.lent()
    router.http(1, b"wait")
    await asyncio.to_thread(entered.wait, 10)
    stage.worker.drain()
    router.http(2)
    assert (await router.end(2))[0] == framing.DRAINING
    assert not stage.drained.is_set()
    gate.set()
    await asyncio.wait_for(stage.drained.wait(), 10)
    assert (await router.end(1))[2] == b"wait"


@staged(echo)
async def test_a_drain_of_a_worker_that_only_listens_ends_at_once(stage: Stage) -> None:
    router, _ = await stage.lent()
    stage.worker.drain()
    await asyncio.wait_for(stage.drained.wait(), 10)
    router.http(1)
    assert (await router.end(1))[0] == framing.DRAINING


@staged(echo)
async def test_slots_are_freed_under_the_lock_whoever_does_it(stage: Stage) -> None:
    router, _ = await stage.lent()
    owned: list[bool] = []
    freed = stage.worker.freed

    def noted(count: int) -> None:
        owned.extend([stage.worker.lock._is_owned()] * count)  # type: ignore[attr-defined]
        freed(count)

    stage.worker.freed = noted  # type: ignore[method-assign]
    for slot in range(10):
        router.http(slot)
    await router.end(9)
    router.http(10, b"wait")
    await asyncio.to_thread(entered.wait, 10)
    stage.worker.drain()  # from here on the loop frees what the thread has answered
    gate.set()
    await asyncio.wait_for(stage.drained.wait(), 10)
    assert owned == [True] * 11


@staged(echo)
async def test_a_fence_holds_from_the_moment_it_is_set(stage: Stage) -> None:
    router, caller = await stage.lent("p")
    stage.worker.fenced = {caller.name: 9}
    for slot in range(1, 20):
        router.http(slot)
    for slot in range(1, 20):
        assert (await router.end(slot))[:2] == (framing.DRAINING, 9)
    assert not any(router.page[slot] for slot in range(1, 20))


@staged(echo)
async def test_what_is_queued_for_the_thread_is_done_while_it_waits_for_the_link(stage: Stage) -> None:
    await stage.lent()
    for _ in range(50):
        done = threading.Event()
        stage.plain.put(done.set)
        assert await asyncio.to_thread(done.wait, 10)


@staged(echo)
async def test_a_link_that_rests_is_read_while_a_call_of_another_takes_long(stage: Stage) -> None:
    router, _ = await stage.lent()
    await until(lambda: not stage.lead._looking)
    other, _ = await stage.link("other")
    other.http(1, b"wait")
    await asyncio.to_thread(entered.wait, 10)
    router.frame(framing.PING)
    router.http(1)
    router.frame(framing.CANCEL, 1)
    await until(lambda: any(kind == framing.PONG for kind, *_ in router.got))
    gate.set()
    assert (await router.end(1))[:2] == (framing.ERROR, 499)
    assert (await other.end(1))[2] == b"wait"


@staged(echo)
async def test_two_links_are_served_at_once(stage: Stage) -> None:
    one, _ = await stage.lent("one")
    two, _ = await stage.link("two")
    for slot in range(100):
        one.http(slot, b"one")
        two.http(slot, b"two")
    for slot in range(100):
        assert (await one.end(slot))[2] == b"one"
        assert (await two.end(slot))[2] == b"two"
    await until(lambda: stage.worker.admission.held == 0)


@pytest.mark.parametrize("while_reading", [True, False])
def test_a_signal_handler_that_raises_on_the_thread_leaves_nobody_unanswered(while_reading: bool) -> None:
    @staged(echo)
    async def test(stage: Stage) -> None:
        router, caller = await stage.lent()
        receive = caller.receive

        def interrupted() -> Any:
            frames = receive()
            if frames:
                caller.receive = receive  # type: ignore[method-assign]
                if while_reading:
                    raise KeyboardInterrupt
                stage.plain.put(interrupt)
            return frames

        def interrupt() -> None:
            raise KeyboardInterrupt

        caller.receive = interrupted  # type: ignore[method-assign]
        router.http(1)
        await until(lambda: stage.interrupted)
        if while_reading:  # nobody knows what had come: the router sends elsewhere what has not started
            await until(lambda: router.closed)
            assert router.page[1] == 0
        else:
            assert (await router.end(1))[0] == framing.REPLY
            router.http(2)
            assert (await router.end(2))[0] == framing.REPLY
        other, _ = await stage.link("other")
        other.http(5)
        assert (await other.end(5))[0] == framing.REPLY

    test()


@pytest.fixture(params=range(3))
def chance(request: pytest.FixtureRequest) -> random.Random:
    return random.Random(request.param)


def test_under_everything_at_once_each_request_ends_once(chance: random.Random) -> None:
    ran: list[bytes] = []

    def work(request: Any) -> bytes:
        ran.append(request.data)
        if request.data.startswith(b"long"):
            threading.Event().wait(0.012)
        return bytes(request.data)

    @staged(work, max_concurrent_queries=40)
    async def test(stage: Stage) -> None:
        routers = [(await stage.link(f"r{number}"))[0] for number in range(2)]
        slots = {router: iter(range(1, 60_000)) for router in routers}
        sent: dict[RouterEnd, list[int]] = {router: [] for router in routers}
        for turn in range(400):
            router = chance.choice(routers)
            for _ in range(chance.randrange(1, 20)):
                slot = next(slots[router])
                long = chance.random() < 0.01
                router.http(slot, b"%b %d %d" % (b"long" if long else b"quick", routers.index(router), slot))
                sent[router].append(slot)
                if chance.random() < 0.05:
                    router.frame(framing.CANCEL, slot)
                if chance.random() < 0.05:
                    router.frame(framing.PING)
            if chance.random() < 0.5:
                await asyncio.sleep(0)
            if turn % 100 == 99:
                stage.worker.configure(Settings(max_concurrent_queries=chance.randrange(20, 60)))
            grants = sum(arg for kind, _, _, arg, _, _ in router.got if kind == framing.ROOM)
            router.got = [frame for frame in router.got if frame[0] != framing.ROOM]
            if grants:
                router.frame(framing.ROOM, 0, arg=grants)  # nobody waits here: all go back
        for router in routers:
            await until(lambda router=router: len(router.ends()) == len(sent[router]))
            finals = [slot for kind, _, slot, *_ in router.got if kind in FINAL]
            assert sorted(finals) == sent[router]
        assert len(ran) == len(set(ran))
        await until(lambda: stage.worker.admission.held == 0)
        assert all(link.jobs == {} for link in stage.links if isinstance(link, CallerLink))

    test()


def test_only_a_plain_handler_that_takes_single_requests_is_led() -> None:
    async def later(request: Any) -> None: ...

    @headgate.accept_batch
    def batch(requests: Any) -> Any:
        return requests

    async def main() -> list[bool]:
        found = []
        for target in (echo, later, batch):
            loaded = LoadedCallable(target, (), "target")
            loaded.construct()
            plain = PlainThread()
            found.append(Worker(loaded, Settings(), plain).plain_calls.lead is not None)
            if plain._event >= 0:
                os.close(plain._event)
        return found

    assert asyncio.run(main()) == [True, False, False]
