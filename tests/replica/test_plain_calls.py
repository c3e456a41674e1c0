"""Calls of plain handlers: given to the thread by the read, answered from there, freed on the loop; on virtual time.

`Paced` plays the thread: a handler takes the time that its request says, and the loop turns meanwhile.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from replica_rig import Rig, RouterEnd, pack, served

import headgate.replica.links
from headgate.core import framing
from headgate.core.admission import Admission
from headgate.replica import plain_calls
from headgate.replica.links import CallerLink
from headgate.replica.plain_calls import PlainCalls
from headgate.replica.watch import LoopWatch

QUICK, SLOW = b"0", b"1"
LARGE = b"0." + b"0" * 9_998  # as large an answer


def now() -> float:
    return asyncio.get_running_loop().time()


@pytest.fixture(autouse=True)
def _virtual(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("CRITICAL")
    monkeypatch.setattr(plain_calls, "monotonic", now)
    monkeypatch.setattr(headgate.replica.links, "monotonic", now)


class Handler:
    """b"0.5" takes so long; b"raise", b"large" and b"stream" do so at once."""

    def __init__(self) -> None:
        self.took_s = 0.0
        self.ran: list[bytes] = []
        self.during: Callable[[], None] = lambda: None

    def __call__(self, request: Any) -> Any:
        self.ran.append(request.data)
        self.during()
        if request.data == b"raise":
            raise SystemExit("on purpose")
        if request.data == b"large":
            return b"z" * 200_000
        if request.data == b"stream":
            return (part for part in ("a", "b"))
        self.took_s = float(request.data)
        return request.data


class Paced(PlainCalls):
    """As on the thread, at the pace of the handler."""

    def __init__(self, rig: Rig) -> None:
        super().__init__(rig.worker)
        self._handler = handler_of(rig)
        self._lists: deque[Iterator[None]] = deque()

    def _give(self, calls: Any) -> None:
        self._lists.append(self.steps(calls))
        if len(self._lists) == 1:
            asyncio.get_running_loop().call_soon(self.step)

    def step(self) -> None:
        while self._lists:
            self._handler.took_s = 0.0
            for _ in self._lists[0]:
                asyncio.get_running_loop().call_later(self._handler.took_s, self.step)
                return
            self._lists.popleft()


class Wire:
    """The kernel under `send`; `takes` says of the next writes how much it takes, or what it raises."""

    def __init__(self, raw: Any) -> None:
        self._raw = raw
        self.takes: list[int | OSError] = []
        self.writes: list[float] = []  # when
        self.during: Callable[[], None] = lambda: None

    def send(self, data: bytes) -> int:
        self.writes.append(now())
        self.during()
        take = self.takes.pop(0) if self.takes else len(data)
        if isinstance(take, OSError):
            raise take
        return int(self._raw.send(data[:take]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._raw, name)


def handler_of(rig: Rig) -> Handler:
    handler: Handler = rig.worker.loaded.method().function.__self__  # type: ignore[attr-defined]
    return handler


def paced(**settings: Any) -> Any:
    """As `served`, with `Paced` in the thread's place."""

    def decorate(test: Any) -> Any:
        async def run(rig: Rig) -> None:
            rig.worker.plain_calls = Paced(rig)
            await test(rig)

        run.__name__ = test.__name__
        return served(Handler, **{"max_concurrent_queries": 100, **settings})(run)

    return decorate


async def linked(rig: Rig) -> tuple[RouterEnd, CallerLink, Wire]:
    router = await rig.link()
    caller: Any = rig.links[-1]
    caller._raw = wire = Wire(caller._raw)
    return router, caller, wire


def call(router: RouterEnd, *bodies: bytes, first: int = 0) -> None:
    """Calls that come in one read, in slots from `first` on."""
    for slot, body in enumerate(bodies, first):
        router.http(slot, body)
    router.flush()


def replies(router: RouterEnd) -> list[int]:
    return [slot for kind, _, slot, *_ in router.got if kind in (framing.REPLY, framing.ERROR)]


def reads(router: RouterEnd, does: bool) -> None:
    transport: Any = router._transport
    transport.resume_reading() if does else transport.pause_reading()


async def rest(rig: Rig) -> None:
    """Everything is over, and nothing is held."""
    await asyncio.sleep(10.0)
    assert rig.worker.admission.held == 0
    assert not any(link.jobs for link in rig.worker.links)
    assert not rig.worker.plain_calls.is_busy
    assert not rig.worker.plain_calls._ticking


# --- answers ---


@paced()
async def test_quick_calls_of_one_read_are_answered_in_order_in_one_write(rig: Rig) -> None:
    router, _, wire = await linked(rig)
    call(router, *[QUICK] * 10)
    await rest(rig)
    assert replies(router) == list(range(10))
    assert len(wire.writes) == 1


@paced()
async def test_answers_go_to_their_own_links(rig: Rig) -> None:
    one, two = (await linked(rig))[0], (await linked(rig))[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rig.worker, "read_done", lambda: None)  # so that one list holds calls of both
        call(one, QUICK, QUICK)
        await asyncio.sleep(0.001)
    call(two, QUICK, QUICK)
    call(one, QUICK, first=2)
    await rest(rig)
    assert (replies(one), replies(two)) == ([0, 1, 2], [0, 1])


@paced()
async def test_a_slow_call_does_not_hold_back_the_answers_of_those_before_it(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    call(router, QUICK, QUICK, SLOW, QUICK)
    await asyncio.sleep(0.003)
    assert replies(router) == [0, 1]
    await rest(rig)
    assert replies(router) == [0, 1, 2, 3]


@paced()
async def test_nor_does_it_when_its_list_comes_up_long_after_it_was_given(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    call(router, QUICK, SLOW)
    await asyncio.sleep(0.1)
    call(router, QUICK, QUICK, SLOW, first=2)
    await asyncio.sleep(0.902)  # the loop has come to tick slowly
    assert replies(router) == [0, 1, 2, 3]


@paced()
async def test_who_is_not_quick_is_answered_at_once_and_all_after_it(rig: Rig) -> None:
    router, _, wire = await linked(rig)
    call(router, b"0.0004", QUICK, b"0.0004", QUICK)
    begun = now()
    await rest(rig)
    assert [round(at - begun, 4) for at in wire.writes] == [0.0004, 0.0004, 0.0008, 0.0008]
    assert replies(router) == [0, 1, 2, 3]


class Lent:
    """In place of a Lead (test_lead.py) whose thread reads `link`."""

    def __init__(self, link: CallerLink) -> None:
        self.link = link

    def consider(self, link: CallerLink) -> None:
        pass


@paced()
async def test_quick_calls_of_a_link_that_was_lent_after_slow_ones_are_answered_in_one_write(rig: Rig) -> None:
    router, caller, wire = await linked(rig)
    calls: Any = rig.worker.plain_calls
    call(router, QUICK, b"0.1")
    await asyncio.sleep(0.1)  # the loop has come to tick slowly
    calls.lead = Lent(caller)
    await asyncio.sleep(0.1)
    wire.writes.clear()
    call(router, *[QUICK] * 10, first=2)
    await asyncio.sleep(0.1)
    assert len(wire.writes) == 1
    calls.lead = None
    call(router, QUICK, first=12)
    await rest(rig)
    assert sorted(replies(router)) == list(range(13))


@paced()
async def test_what_one_raises_fails_only_its_own_call(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    call(router, QUICK, b"raise", QUICK)
    await rest(rig)
    assert [router.ends()[slot][:2] for slot in range(3)] == [
        (framing.REPLY, 200),
        (framing.ERROR, 500),
        (framing.REPLY, 200),
    ]


@paced()
async def test_answers_that_are_no_frame_are_made_on_the_loop(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    call(router, QUICK, b"large", b"stream", QUICK, b"large")
    await rest(rig)
    assert {slot: kind for slot, (kind, *_) in router.ends().items()} == {
        0: framing.REPLY,
        1: framing.END,
        2: framing.END,
        3: framing.REPLY,
        4: framing.END,
    }
    assert router.stream(1) == router.stream(4) == b"z" * 200_000
    assert router.stream(2) == b"ab"


# --- at most once ---


@paced()
async def test_only_what_user_code_is_in_has_started(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    seen: list[tuple[Any, bytes]] = []

    def during() -> None:
        running: Any = rig.worker.running
        seen.append((running.slot, bytes(router.page[:3])))

    handler_of(rig).during = during
    call(router, QUICK, SLOW, QUICK)
    await rest(rig)
    assert seen == [(0, b"\1\0\0"), (1, b"\1\1\0"), (2, b"\1\1\1")]
    assert rig.worker.running is None


@paced()
async def test_those_cancelled_or_expired_in_the_list_never_start(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    router.http(0, SLOW)
    router.http(1, QUICK)
    router.http(2, QUICK, ms=500)
    router.http(3, b"0.0")
    await asyncio.sleep(0.5)
    router.frame(framing.CANCEL, 1)
    await rest(rig)
    assert [router.ends()[slot][1] for slot in range(4)] == [200, 499, 504, 200]
    assert handler_of(rig).ran == [SLOW, b"0.0"]
    assert bytes(router.page[:4]) == b"\1\0\0\1"


@paced()
async def test_those_of_a_link_that_ends_never_start_and_free_their_slots(rig: Rig) -> None:
    router, other = (await linked(rig))[0], (await linked(rig))[0]
    call(router, QUICK, SLOW, QUICK, QUICK)
    call(other, b"0.0")
    await asyncio.sleep(0.5)
    router.abort()
    await rest(rig)
    assert handler_of(rig).ran == [QUICK, SLOW, b"0.0"]
    assert replies(other) == [0]


@paced()
async def test_calls_before_a_frame_that_breaks_the_protocol_free_their_slots(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    router.http(0, QUICK)
    router.frame(framing.PONG)
    await rest(rig)
    assert rig.worker.links == set()


@served(Handler, max_concurrent_queries=100)
async def test_an_interruption_between_two_calls_does_not_lose_those_that_wait(rig: Rig) -> None:
    """A signal handler of the user's raises where it likes."""
    router, _, _ = await linked(rig)
    times: Iterator[Any] = iter([0.0, 0.0, TimeoutError("an alarm of the user's"), *[0.0] * 10])

    def monotonic() -> float:
        time = next(times)
        if isinstance(time, BaseException):
            raise time
        return float(time)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_calls, "monotonic", monotonic)
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
        call(router, *[QUICK] * 5)
        await rest(rig)
    assert replies(router) == [0, 1, 2, 3, 4]


# --- slots ---


class Eager(RouterEnd):
    """Sends a call for each answer, on the link `other`, until there were `most`."""

    other: RouterEnd
    most = 300

    def on_frames(self, frames: list[framing.Frame]) -> None:
        before = len(self.got)
        super().on_frames(frames)
        for kind, _, slot, *_ in self.got[before:]:
            if kind == framing.REPLY and self.most:
                self.other.most -= 1  # type: ignore[attr-defined]
                self.other.http(slot, QUICK)
                self.other.flush()


@paced(max_concurrent_queries=4)
async def test_a_call_that_comes_right_after_an_answer_is_admitted_and_never_one_too_many(rig: Rig) -> None:
    held: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("replica_rig.RouterEnd", Eager)
        ends: list[Any] = [(await linked(rig))[0] for _ in range(2)]
        take, offer = Admission.take, Admission.offer

        def taken(self: Any, link: Any, count: int) -> None:
            take(self, link, count)
            held.extend([self.held] * count)

        def offered(self: Any, *arguments: Any) -> bool:
            accepted = offer(self, *arguments)
            held.append(self.held)
            return accepted

        patch.setattr(Admission, "take", taken)
        patch.setattr(Admission, "offer", offered)
        for one, other in (ends, ends[::-1]):
            one.other = other
        call(ends[0], QUICK, QUICK)
        call(ends[1], QUICK, QUICK, first=2)
        await rest(rig)
    kinds = {kind for end in ends for kind, *_ in end.got}
    assert kinds == {framing.REPLY}
    assert len(held) > 300
    assert max(held) <= 4


@paced(max_concurrent_queries=2)
async def test_a_call_beyond_the_limit_is_refused_and_gets_room_with_the_answer(rig: Rig) -> None:
    one, two = (await linked(rig))[0], (await linked(rig))[0]
    call(one, SLOW, SLOW)
    await asyncio.sleep(0.5)
    call(two, QUICK)
    await asyncio.sleep(0.4999)  # the loop has come to tick slowly
    assert [kind for kind, *_ in two.got] == [framing.BUSY]
    await asyncio.sleep(0.0002)
    assert [kind for kind, *_ in two.got] == [framing.BUSY, framing.ROOM]
    assert replies(one) == [0]


@paced(max_concurrent_queries=3)
async def test_one_refused_at_the_moment_of_an_answer_gets_room_at_once(rig: Rig) -> None:
    one, two = (await linked(rig))[0], (await linked(rig))[0]
    calls: Any = rig.worker.plain_calls
    call(one, QUICK, SLOW, b"5")
    await asyncio.sleep(0.1)
    call(two, QUICK)  # one slot is free again
    await asyncio.sleep(0.5)  # the loop has come to tick slowly
    offer = Admission.offer

    def answered_first(*arguments: Any) -> bool:  # after `settle`: the thread may at any moment
        calls.step()
        return offer(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "offer", answered_first)
        call(two, QUICK, first=1)
        await asyncio.sleep(0.0001)
    assert replies(one) == [0, 1]
    assert [kind for kind, *_ in two.got] == [framing.BUSY, framing.ROOM]


@paced()
async def test_an_answer_at_the_moment_of_what_could_be_the_last_tick_frees_its_slot(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    calls: Any = rig.worker.plain_calls
    settle = calls.settle

    def then_answered() -> None:
        settle()
        if now() > 0.5:
            calls.step()

    calls.settle = then_answered
    call(router, QUICK, SLOW)
    await rest(rig)
    assert replies(router) == [0, 1]


@paced()
async def test_a_call_that_was_answered_is_not_overdue(rig: Rig) -> None:
    router, caller, wire = await linked(rig)
    watch = LoopWatch(rig.worker, None)  # type: ignore[arg-type]
    overdue: list[tuple[int, bool]] = []
    wire.during = lambda: overdue.append((len(caller.jobs), watch._is_overdue(now() + 100.0)))
    router.http(0, QUICK, ms=1000)
    await rest(rig)
    assert overdue == [(1, False)]


# --- draining ---


@paced()
async def test_a_drain_waits_for_an_answer_that_is_being_written(rig: Rig) -> None:
    router, _, wire = await linked(rig)
    drained: list[bool] = []

    def loop_turns() -> None:
        rig.worker.settle()
        drained.append(rig.drained)

    wire.during = loop_turns
    call(router, QUICK, SLOW)
    await asyncio.sleep(0.5)
    rig.worker.drain()
    await rest(rig)
    assert drained == [False, False]
    assert rig.drained
    assert replies(router) == [0, 1]


@paced()
async def test_a_drain_ends_with_the_last_answer(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    call(router, QUICK, SLOW)
    await asyncio.sleep(0.5)
    rig.worker.drain()
    await asyncio.sleep(0.5001)  # the loop has come to tick slowly
    assert rig.drained
    assert replies(router) == [0, 1]


@paced()
async def test_a_drain_waits_for_what_the_kernel_did_not_take(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    reads(router, False)
    call(router, *[LARGE] * 100)
    await asyncio.sleep(0.5)
    rig.worker.drain()
    await asyncio.sleep(0.5)
    assert rig.worker.admission.held == 0
    assert not rig.drained
    reads(router, True)
    await rest(rig)
    assert rig.drained
    assert len(replies(router)) == 100


@paced()
async def test_a_drain_frees_what_was_answered(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    calls = rig.worker.plain_calls
    call(router, SLOW)
    await asyncio.sleep(0.5)
    calls._ticking = True  # and the next tick is far
    await asyncio.sleep(0.6)
    assert (replies(router), rig.worker.admission.held) == ([0], 1)
    rig.worker.drain()
    assert rig.drained


# --- writing from two threads ---


@pytest.mark.parametrize(
    "takes",
    [[1], [30], [200], [BlockingIOError()], [OSError(errno.ENOBUFS, "no memory")], [7, 1], [BlockingIOError(), 3]],
    ids=str,
)
def test_frames_stay_whole_when_the_kernel_takes_a_part_and_the_loop_writes_meanwhile(takes: list[Any]) -> None:
    @paced()
    async def test(rig: Rig) -> None:
        router, caller, wire = await linked(rig)
        wire.takes = takes
        wire.during = lambda: caller.send(pack(0, framing.ROOM, 0, 0, 0, 1))
        call(router, *[QUICK] * 5)
        await asyncio.sleep(0.01)
        call(router, *[QUICK] * 5, first=5)
        await rest(rig)
        rooms = [kind for kind, *_ in router.got].count(framing.ROOM)
        assert (replies(router), rooms) == (list(range(10)), len(wire.writes))

    test()


@paced()
async def test_answers_go_after_what_waits_to_be_written(rig: Rig) -> None:
    router, caller, wire = await linked(rig)
    call(router, SLOW)
    await asyncio.sleep(0.5)
    caller._out.append(pack(0, framing.ROOM, 0, 0, 0, 1))
    await rest(rig)
    assert [kind for kind, *_ in router.got] == [framing.ROOM, framing.REPLY]
    assert wire.writes == []


@paced()
async def test_a_reader_that_does_not_keep_up_gets_every_answer_whole(rig: Rig) -> None:
    router, _, _ = await linked(rig)
    reads(router, False)
    for read in range(20):
        call(router, *[LARGE] * 5, first=5 * read)
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.5)
    reads(router, True)
    await rest(rig)
    assert sorted(replies(router)) == list(range(100))
    assert {body for _, _, body in router.ends().values()} == {LARGE}


@paced()
async def test_nothing_is_written_to_a_link_that_has_ended(rig: Rig) -> None:
    router, caller, wire = await linked(rig)
    router.abort()
    await asyncio.sleep(0.1)
    caller.send_from_any_thread(b"late")
    assert caller.closed
    assert wire.writes == []


@paced()
async def test_a_fork_does_not_wait_for_a_write_of_a_thread_that_it_has_not(rig: Rig) -> None:
    _, caller, _ = await linked(rig)
    thread = threading.Thread(target=caller._writing.acquire)
    thread.start()
    thread.join()
    null = os.open(os.devnull, os.O_RDWR)
    caller.cut(null)
    os.close(null)
    assert caller._writing.acquire(blocking=False)
