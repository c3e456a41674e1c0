"""Calls of `async def` handlers: to user code each has a task of its own, though tasks are used again."""

from __future__ import annotations

import asyncio
import os
import sys
import weakref
from contextvars import ContextVar
from typing import Any

import pytest
from replica_rig import Rig, served
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse

from headgate.core import framing
from headgate.replica import async_calls

WAIT = b"wait"
variable: ContextVar[str] = ContextVar("variable", default="unset")
tasks: list[Any] = []  # by name: an address may be given anew
kept: list[Any] = []


@pytest.fixture(autouse=True)
def _clear(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    tasks.clear()
    kept.clear()


def current() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def noting(request: Any) -> Any:
    """Notes its task; waits if it is told to."""
    tasks.append(current().get_name())
    if request.data == WAIT:
        await asyncio.sleep(1.0)
    return len(tasks)


async def answers(rig: Rig, *bodies: bytes, together: bool = False) -> list[tuple[int, int, bytes]]:
    """The answers to calls with these bodies, one after another or at once."""
    link = await rig.link()
    for slot, body in enumerate(bodies):
        link.http(slot, body)
        if not together:
            await link.end(slot)
    return [await link.end(slot) for slot in range(len(bodies))]


@served(noting, max_concurrent_queries=100)
async def test_one_task_makes_the_calls_that_do_not_wait(rig: Rig) -> None:
    await answers(rig, *[b""] * 40, together=True)
    await answers(rig, *[b""] * 5)
    assert len(tasks) == 45
    assert len(set(tasks)) <= 16  # as many as are made when none is free


@served(noting, max_concurrent_queries=100)
async def test_calls_that_wait_have_a_task_each_and_begin_in_order(rig: Rig) -> None:
    sent = [WAIT] * 40
    assert [body for _, _, body in await answers(rig, *sent, together=True)] == [b"40"] * 40
    assert len(set(tasks)) == 40
    assert not rig.worker.async_calls.is_busy
    await answers(rig, *sent, together=True)
    assert len(set(tasks)) == 40  # the same ones


@served(noting)
async def test_calls_begin_with_the_end_of_the_read_that_brought_them(rig: Rig) -> None:
    await answers(rig, b"")
    scheduled: list[int] = []
    rig.worker.async_calls.go_on = lambda: scheduled.append(1)  # type: ignore[method-assign]
    assert [status for _, status, _ in await answers(rig, b"", b"", together=True)] == [200, 200]
    assert not scheduled


@served(noting, max_concurrent_queries=1000)
async def test_no_more_than_a_few_tasks_are_kept(rig: Rig) -> None:
    await answers(rig, *[WAIT] * 400, together=True)
    await asyncio.sleep(0.01)
    assert len(set(tasks)) == 400
    assert len(rig.worker.async_calls.runners) <= async_calls._MOST_FREE + 1


async def sets(request: Any) -> Any:
    seen = variable.get()
    variable.set("set by the call before")
    if request.data == WAIT:
        await asyncio.sleep(0.1)
        return [seen, variable.get()]
    return [seen]


@served(sets)
async def test_each_call_has_context_variables_of_its_own(rig: Rig) -> None:
    for _, status, body in await answers(rig, b"", b"", WAIT, WAIT, b""):
        assert (status, body[:8]) == (200, b'["unset"')
    assert variable.get() == "unset"


async def starts(request: Any) -> Any:
    variable.set(request.data.decode())
    return await asyncio.create_task(reads())


async def reads() -> str:
    await asyncio.sleep(0)
    return variable.get()


@served(starts)
async def test_tasks_of_a_call_see_its_context_variables(rig: Rig) -> None:
    assert [body for _, _, body in await answers(rig, b"a", b"b")] == [b"a", b"b"]


LEFT_IN_TASKS = [b"reference", b"weak reference", b"callback", b"name", b"cancelled", b"cancels"]
if sys.version_info < (3, 13):  # later ones take the whole cancellation back: nothing is left
    LEFT_IN_TASKS.append(b"uncancelled")


async def leaves(request: Any) -> Any:
    """Leaves something in its task."""
    task = current()
    tasks.append(task.get_name())
    what = request.data
    if what.startswith(b"late "):
        await asyncio.sleep(0.1)
        what = what[5:]
    if what == b"reference":
        kept.append(task)
    elif what == b"weak reference":
        kept.append(weakref.ref(task))
    elif what == b"callback":
        task.add_done_callback(kept.append)
    elif what == b"cancelled":
        task.cancel()
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            pass
    elif what == b"uncancelled":
        task.cancel()
        task.uncancel()
    elif what == b"name":
        task.set_name(f"{task.get_name()} of the call")
    elif what == b"cancels":
        task.cancel()
    return task.get_name()


@pytest.mark.parametrize("when", [b"", b"late "])
@pytest.mark.parametrize("what", LEFT_IN_TASKS)
def test_a_task_that_something_may_be_left_in_makes_no_other_call(when: bytes, what: bytes) -> None:
    @served(leaves)
    async def check(rig: Rig) -> None:
        link = await rig.link()
        for slot in range(4):
            link.http(slot, when + what)
            link.http(slot + 4, b"")
            assert (await link.end(slot))[1] == (await link.end(slot + 4))[1] == 200
        for at in range(0, 8, 2):
            assert tasks[at] not in tasks[at + 1 :]
        assert not any("of the call" in name for name in tasks)
        if what == b"callback":
            assert [task.done() for task in kept if task] == [True] * 4

    check()


async def limits(request: Any) -> Any:
    tasks.append(current().get_name())
    try:
        async with asyncio.timeout(0.5):
            await asyncio.sleep(float(request.data))
    except TimeoutError:
        return "late"
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(0.1))
    return await asyncio.wait_for(reads(), 1.0)


@served(limits)
async def test_timeouts_and_groups_work_as_in_any_task(rig: Rig) -> None:
    assert [body for _, _, body in await answers(rig, b"0.1", b"9", b"0.1")] == [b"unset", b"late", b"unset"]


@served(noting, max_concurrent_queries=100)
async def test_a_cancelled_call_ends_and_the_next_is_not_cancelled(rig: Rig) -> None:
    link = await rig.link()
    link.http(0, WAIT)
    await asyncio.sleep(0.1)
    link.frame(framing.CANCEL, 0)
    link.http(1, WAIT)
    assert (await link.end(0))[:2] == (framing.ERROR, 499)
    assert (await link.end(1))[:2] == (framing.REPLY, 200)


@served(noting, max_concurrent_queries=100)
async def test_what_is_cancelled_by_the_read_that_brought_it_never_begins(rig: Rig) -> None:
    link = await rig.link()
    link.http(0)
    link.frame(framing.CANCEL, 0)
    link.http(1)
    assert (await link.end(0))[:2] == (framing.ERROR, 499)
    assert (await link.end(1))[:2] == (framing.REPLY, 200)
    assert len(tasks) == 1


async def cancels_all(request: Any) -> Any:
    if request.data == b"all":
        for task in asyncio.all_tasks() - {current(), *kept}:
            task.cancel()
    elif request.data == WAIT:
        await asyncio.sleep(1.0)
    return "well"


@served(cancels_all, max_concurrent_queries=100)
async def test_a_handler_that_cancels_every_task_does_not_end_the_replica(rig: Rig) -> None:
    kept.append(asyncio.current_task())
    link = await rig.link()
    for slot in range(20):
        link.http(slot, WAIT)
    await asyncio.sleep(2.0)  # now twenty tasks have nothing to do
    link.http(20, WAIT)
    await asyncio.sleep(0.1)
    for slot in range(21, 30):
        link.http(slot, b"all" if slot == 21 else b"")
    assert (await link.end(20))[1] == 500
    for slot in range(21, 30):
        assert await link.end(slot) == (framing.REPLY, 200, b"well")
    assert not rig.worker.async_calls.is_busy


async def raises_later(request: Any) -> Any:
    try:
        await asyncio.wait_for(asyncio.sleep(9), 0.1)
    except TimeoutError:
        pass
    try:
        await asyncio.sleep(0)
        raise KeyError("own")
    except KeyError as error:
        return error.__context__ is None


@served(raises_later)
async def test_what_was_thrown_into_a_call_is_no_context_of_later_errors(rig: Rig) -> None:
    assert (await answers(rig, b""))[0] == (framing.REPLY, 200, b"true")


class Held:
    """What a handler holds while it runs."""


async def holds(request: Any) -> Any:
    held, what = Held(), request.data
    kept.append(weakref.ref(held))
    if what.startswith(b"late "):
        await asyncio.sleep(0.1)
    if what.endswith(b"raises"):
        raise ValueError(held)
    if what == WAIT:
        await asyncio.sleep(9)
    return 1


@served(holds)
async def test_what_a_call_held_is_let_go_with_its_end(rig: Rig) -> None:
    link = await rig.link()
    for slot, body in enumerate((b"", b"late ", b"raises", b"late raises", WAIT)):
        link.http(slot, body)
        await asyncio.sleep(0.05)
        if body == WAIT:
            link.frame(framing.CANCEL, slot)
        await link.end(slot)
        await asyncio.sleep(0.01)
        assert kept.pop()() is None, body


async def raises_after_its_answer(request: Any) -> Any:
    async def after(error: Exception | None) -> None:
        if error is not None:
            raise error

    return JSONResponse(1, background=BackgroundTask(after, ValueError("late") if request.data == b"fails" else None))


@served(raises_after_its_answer)
async def test_a_background_task_that_raises_does_not_answer_again(rig: Rig) -> None:
    link = await rig.link()
    for slot, body in enumerate((b"fails", b"", b"fails")):
        link.http(slot, body)
        await asyncio.sleep(0.01)
    assert [kind for kind, *_ in link.got] == [framing.REPLY, framing.DATA, framing.END] * 3
    assert rig.worker.admission.held == 0
    assert not rig.worker.async_calls.is_busy


@served(noting)
async def test_a_runner_that_is_cancelled_before_it_began_is_forgotten(rig: Rig) -> None:
    calls = rig.worker.async_calls
    runner = async_calls.Runner(calls, asyncio.get_running_loop())
    calls.runners.add(runner)
    assert calls.is_busy
    runner.task.cancel()
    await asyncio.sleep(0.01)
    assert not calls.is_busy
    assert [status for _, status, _ in await answers(rig, b"")] == [200]


@served(noting)
async def test_a_task_factory_of_the_users_makes_no_runners(rig: Rig) -> None:
    made: list[Any] = []

    def factory(loop: Any, coroutine: Any, **options: Any) -> Any:
        made.append(coroutine)
        return asyncio.Task(coroutine, loop=loop, **options)

    asyncio.get_running_loop().set_task_factory(factory)
    assert [status for _, status, _ in await answers(rig, b"", WAIT, b"")] == [200] * 3
    assert not made


class Ends(BaseException):
    """What os._exit is here."""


async def forks(request: Any) -> Any:
    tasks.append(request.data)
    if request.data == b"forks":
        kept[0].is_fork = True  # as where os.fork() returns in the copy
        await asyncio.sleep(1.0)


@served(forks)
async def test_a_copy_of_the_process_begins_no_call_while_its_own_waits(rig: Rig) -> None:
    def end(status: int) -> None:
        rig.worker.async_calls.waiting.clear()  # nothing goes on in a process that has ended
        raise Ends

    kept.append(rig.worker)
    link = await rig.link()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "_exit", end)
        link.http(0, b"forks")
        link.http(1)
        await asyncio.sleep(0.1)
    rig.worker.is_fork = False
    assert tasks == [b"forks"]


@served(noting, max_concurrent_queries=100)
async def test_answered_calls_are_no_longer_overdue(rig: Rig) -> None:
    deadlines: list[float] = []
    end = rig.worker.end
    rig.worker.end = lambda jobs: (deadlines.extend(job.deadline for job in jobs), end(jobs))  # type: ignore[assignment,func-returns-value]
    link = await rig.link()
    for slot in range(3):
        link.http(slot, ms=5)
    await link.end(2)
    assert deadlines == [float("inf")] * 3


@served(noting, max_concurrent_queries=100)
async def test_a_drain_waits_for_calls_that_have_not_begun(rig: Rig) -> None:
    link = await rig.link()
    link.http(0, WAIT)
    await asyncio.sleep(0.5)
    rig.worker.drain()
    await asyncio.sleep(0.4)
    assert not rig.drained
    assert (await link.end(0))[1] == 200
    await asyncio.sleep(0.01)
    assert rig.drained


async def begun_together(rig: Rig, *links: Any) -> None:
    """A call by each link, twice, that all begin in one turn."""
    await answers(rig, b"")  # there is a task
    calls, begin = rig.worker.async_calls, rig.worker.async_calls.begin
    calls.begin = lambda: None  # type: ignore[method-assign]
    for slot in range(2):
        for link in links:
            link.http(slot)
            await asyncio.sleep(0.01)
    calls.begin = begin  # type: ignore[method-assign]
    asyncio.get_running_loop().call_soon(begin)
    await asyncio.sleep(0.01)


@served(noting)
async def test_answers_of_one_turn_go_each_to_its_link(rig: Rig) -> None:
    one, two = await rig.link(), await rig.link()
    await begun_together(rig, one, two)
    assert [body for *_, body in one.got] == [b"2", b"4"]
    assert [body for *_, body in two.got] == [b"3", b"5"]
    assert rig.worker.admission.held == 0


@served(noting)
async def test_a_link_ends_if_nobody_knows_what_was_written_to_it(rig: Rig) -> None:
    """A signal handler of the user's raises where it likes."""
    calls, write, raised = rig.worker.async_calls, rig.worker.async_calls._write, [TimeoutError("an alarm")]

    def interrupted(answered: Any) -> None:
        if len(answered) == 2:
            raise raised.pop()
        write(answered)

    calls._write = interrupted  # type: ignore[method-assign]
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    link = await rig.link()
    await begun_together(rig, link)
    assert not raised
    assert link.closed
    assert rig.worker.admission.held == 0
    assert [status for _, status, _ in await answers(rig, b"")] == [200]
