"""What is known of a supervisor's children, from what it says: no process, no socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from headgate.core.state import Settings
from headgate.engine import asks
from headgate.engine.supervised import UNSEEN, Known, Supervised, cause_of
from headgate.errors import InstanceError
from headgate.wire import messages

SPEC = messages.ReplicaSpec("iris", 4, "code", Settings())
NOTE = messages.encode(SPEC)


class Stage:
    """A Supervised, what it asked, and what it told."""

    def __init__(self) -> None:
        self.asked: list[asks.Ask] = []
        self.told: list[str] = []
        self.supervised = Supervised(
            lambda data: self.asked.append(asks.decode_ask(data)), self.on_known, self.on_exit, "node7"
        )

    def on_known(self, known: Known) -> None:
        assert self.supervised.known[known.child.id] is known
        self.told.append(f"+{known.child.id}")

    def on_exit(self, id: str, cause: str) -> None:
        assert id not in self.supervised.known
        self.told.append(f"-{id} {cause}")

    def say(self, *answers: asks.Answer) -> None:
        for answer in answers:
            self.supervised.hear(asks.encode(answer))

    async def ask(self, asking: Awaitable[object]) -> asyncio.Future[object]:
        task = asyncio.ensure_future(asking)
        await asyncio.sleep(0)
        return task

    def n(self) -> int:
        last = self.asked[-1]
        assert isinstance(last, asks.Fork | asks.List)
        return last.n

    async def fork(self, name: str = "proxy") -> tuple[int, asyncio.Future[object]]:
        task = await self.ask(self.supervised.fork("proxy", name))
        return self.n(), task

    async def list(self, *children: asks.Child) -> tuple[str, ...]:
        """A whole listing: the ids that were found."""
        task = await self.ask(self.supervised.list())
        self.say(*children, asks.Listed(len(children), self.n()))
        found = await task
        assert isinstance(found, tuple)
        return tuple(known.child.id for known in found)


def child(id: str, role: str = "proxy", note: bytes = b"") -> asks.Child:
    return asks.Child(id, role, id.partition("#")[0], 100, 7.5, note)


def forked(n: int, id: str) -> asks.Forked:
    return asks.Forked(n, id, 100, 7.5)


def play(scene: Callable[[Stage], Awaitable[None]]) -> None:
    async def main() -> None:
        async with asyncio.timeout(5.0):
            await scene(Stage())

    asyncio.run(main())


def test_what_is_listed_is_known_with_what_it_runs() -> None:
    async def scene(stage: Stage) -> None:
        assert await stage.list(child("iris#0001", "replica", NOTE), child("proxy#0002")) == ("iris#0001", "proxy#0002")
        replica, proxy = (known.process for known in stage.supervised.known.values())
        assert (replica.kind, replica.backend, replica.version, replica.node) == ("replica", "iris", 4, "node7")
        assert (proxy.kind, proxy.backend, proxy.version, proxy.pid, proxy.started_at) == ("proxy", "", 0, 100, 7.5)
        assert stage.supervised.known["iris#0001"].spec == SPEC
        assert stage.told == ["+iris#0001", "+proxy#0002"]

    play(scene)


def test_a_fork_is_known_before_its_caller_goes_on() -> None:
    async def scene(stage: Stage) -> None:
        task = await stage.ask(stage.supervised.fork("replica", "iris", NOTE))
        assert [fork.note for fork in stage.supervised.asked()] == [NOTE]
        stage.say(forked(stage.n(), "iris#0001"))
        assert stage.supervised.known["iris#0001"].spec == SPEC
        assert list(stage.supervised.asked()) == []
        assert await task == "iris#0001"

    play(scene)


def test_a_fork_that_failed_says_why() -> None:
    async def scene(stage: Stage) -> None:
        n, task = await stage.fork()
        stage.say(asks.Forked(n, error="cannot fork a process: no room"))
        with pytest.raises(InstanceError, match="cannot start proxy: cannot fork a process: no room"):
            await task
        with pytest.raises(InstanceError, match="its env is longer"):
            await stage.supervised.fork("replica", "iris", bytes(200_000))

    play(scene)


def test_a_child_whose_asker_has_left_is_known_all_the_same() -> None:
    async def scene(stage: Stage) -> None:
        for error in ("", "no room"):
            n, task = await stage.fork()
            task.cancel()
            await asyncio.sleep(0)
            stage.say(asks.Forked(n, "" if error else "proxy#0001", error=error))
        assert list(stage.supervised.known) == ["proxy#0001"]

    play(scene)


def test_an_end_is_told_once_and_in_words() -> None:
    async def scene(stage: Stage) -> None:
        await stage.list(child("proxy#0001"))
        stage.say(*[asks.Exited("proxy#0001", 100, 9)] * 2, asks.Exited("never#0009", 100, 9))
        assert stage.told == ["+proxy#0001", "-proxy#0001 killed by SIGKILL"]
        assert stage.supervised.known == {}

    play(scene)


def test_what_is_listed_no_more_has_ended() -> None:
    async def scene(stage: Stage) -> None:
        await stage.list(child("a#0001"), child("b#0002"))
        before = stage.supervised.known["b#0002"]
        assert await stage.list(child("b#0002"), child("c#0003")) == ("c#0003",)
        assert stage.told == ["+a#0001", "+b#0002", "+c#0003", f"-a#0001 {UNSEEN}"]
        assert stage.supervised.known["b#0002"] is before

    play(scene)


def test_what_ends_while_the_list_is_told_is_not_found() -> None:
    async def scene(stage: Stage) -> None:
        task = await stage.ask(stage.supervised.list())
        stage.say(child("a#0001"), asks.Exited("a#0001", 100, 9), asks.Listed(1, stage.n()))
        assert await task == ()
        assert stage.supervised.known == {}

    play(scene)


def test_a_fork_whose_answer_was_lost_is_found_by_the_next_list() -> None:
    async def scene(stage: Stage) -> None:
        _, first = await stage.fork()
        _, second = await stage.fork()
        _, third = await stage.fork()
        assert await stage.list(child("proxy#0001"), child("other#0002"), child("proxy#0003")) == ("other#0002",)
        assert [await first, await second] == ["proxy#0001", "proxy#0003"]
        with pytest.raises(InstanceError, match="was not reached"):
            await third
        assert list(stage.supervised.asked()) == []

    play(scene)


def test_a_fork_that_was_found_may_have_lost_its_asker() -> None:
    async def scene(stage: Stage) -> None:
        for name in ("proxy", "never"):
            _, task = await stage.fork(name)
            task.cancel()
        await asyncio.sleep(0)
        assert await stage.list(child("proxy#0001")) == ()
        assert list(stage.supervised.known) == ["proxy#0001"]

    play(scene)


def test_a_fork_asked_after_the_list_waits_for_its_own_answer() -> None:
    async def scene(stage: Stage) -> None:
        listing = await stage.ask(stage.supervised.list())
        list_n = stage.n()
        n, fork = await stage.fork()
        stage.say(asks.Listed(0, list_n))
        assert await listing == ()
        assert not fork.done()
        stage.say(forked(n, "proxy#0001"))
        assert await fork == "proxy#0001"

    play(scene)


def test_the_answer_to_a_list_of_an_earlier_connection_settles_nothing() -> None:
    async def scene(stage: Stage) -> None:
        first = await stage.ask(stage.supervised.list())
        first_n = stage.n()
        n, fork = await stage.fork()
        second = await stage.ask(stage.supervised.list())
        second_n = stage.n()
        stage.say(child("a#0001"), child("b#0002"), asks.Listed(2, first_n))
        assert not first.done()
        assert not fork.done()
        stage.say(forked(n, "proxy#0003"), child("a#0001"), child("proxy#0003"), asks.Listed(2, second_n))
        assert await first == ()
        found = await second
        assert isinstance(found, tuple)
        assert [known.child.id for known in found] == ["a#0001"]
        assert await fork == "proxy#0003"
        assert list(stage.supervised.known) == ["a#0001", "proxy#0003"]

    play(scene)


def test_what_was_found_for_one_who_left_is_told_to_the_next() -> None:
    async def scene(stage: Stage) -> None:
        task = await stage.ask(stage.supervised.list())
        task.cancel()
        await asyncio.sleep(0)
        stage.say(child("a#0001"), asks.Listed(1, stage.n()))
        assert await stage.list(child("a#0001")) == ("a#0001",)

    play(scene)


def test_an_answer_to_another_controller_is_nobody_s() -> None:
    async def scene(stage: Stage) -> None:
        n, task = await stage.fork()
        stage.say(forked(n + 1, "proxy#0001"))
        assert stage.supervised.known == {}
        assert not task.done()
        assert Stage().supervised._count != Stage().supervised._count
        stage.say(forked(n, "proxy#0002"))
        assert await task == "proxy#0002"

    play(scene)


def test_with_the_supervisor_all_ends() -> None:
    async def scene(stage: Stage) -> None:
        await stage.list(child("a#0001"), child("b#0002"))
        _, fork = await stage.fork()
        listing = await stage.ask(stage.supervised.list())
        stage.supervised.lost("its node left the cluster")
        ends = [f"-{id} its node left the cluster" for id in ("a#0001", "b#0002")]
        assert stage.told[2:] == ends
        for task in (fork, listing):
            with pytest.raises(InstanceError, match="the supervisor ended"):
                await task
        stage.supervised.lost()
        assert stage.told[2:] == ends
        assert await stage.list(child("a#0001")) == ("a#0001",)

    play(scene)


def test_who_waits_when_it_is_left_is_cancelled() -> None:
    async def scene(stage: Stage) -> None:
        _, fork = await stage.fork()
        listing = await stage.ask(stage.supervised.list())
        stage.supervised.leave()
        await asyncio.wait((fork, listing))
        assert fork.cancelled()
        assert listing.cancelled()

    play(scene)


def test_what_else_is_asked_is_sent() -> None:
    stage = Stage()
    stage.supervised.kill("a#0001")
    stage.supervised.close_listener()
    assert stage.asked == [asks.Kill("a#0001"), asks.CloseListener()]


@pytest.mark.parametrize(
    ("status", "cause"),
    [
        (9, "killed by SIGKILL"),
        (40, "killed by signal 40"),
        (0, "exited with status 0"),
        (3 << 8, "exited with status 3"),
    ],
)
def test_a_cause_is_in_words(status: int, cause: str) -> None:
    assert cause_of(status) == cause
