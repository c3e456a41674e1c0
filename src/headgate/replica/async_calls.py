"""Calls of `async def` handlers, side by side on the loop, on tasks that are used again.

To make a task, to enter it in asyncio's list and to begin it in a later turn takes longer than many a handler. Here
a Runner, which is one task, makes call after call for as long as they return without having waited. A call that waits
keeps its runner to itself, and another one goes on.

To user code a runner is the task of its call, which can be cancelled, has timeouts and groups, and each call has
contextvars of its own. A runner that something might be left in is not used again: its task was cancelled or renamed,
or has callbacks, or somebody still refers to it.
"""

from __future__ import annotations

import asyncio
import os
import types
from collections import deque
from contextvars import copy_context
from sys import getrefcount
from time import monotonic
from typing import TYPE_CHECKING, Any
from weakref import getweakrefcount

from headgate.replica.job import NEVER
from headgate.replica.response import WHOLE
from headgate.wire.link import TOGETHER

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from headgate.replica.job import Job, Outcome
    from headgate.replica.worker import Worker

#: So many runners are made in one turn, when none is free.
_AT_ONCE = 16
#: So many are kept while there is nothing to do: 1.5 KB each.
_MOST_FREE = 256


class AsyncCalls:
    """The calls of a worker's `async def` handlers that take one request each."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.waiting: deque[Job] = deque()  # not begun
        self.free: list[Runner] = []
        self.runners: set[Runner] = set()
        self.context = copy_context()  # what each call begins with
        self._loop = asyncio.get_running_loop()
        self._is_scheduled = False
        self._is_beginning = False
        self._answered: list[tuple[Job, bytes]] = []  # in this turn, with what is to be written

    @property
    def is_busy(self) -> bool:
        """Whether anything of a call runs or will; it may outlast its request."""
        return len(self.runners) > len(self.free)

    def add(self, jobs: list[Job]) -> None:
        """Begin calls when the read that brought them ends, or in the next turn of the loop."""
        self.waiting.extend(jobs)
        if not jobs[0].link.is_reading:
            self.go_on()

    def go_on(self) -> None:
        """Begin what waits in the next turn of the loop."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_soon(self._scheduled)

    def _scheduled(self) -> None:
        self._is_scheduled = False
        self.begin()

    def begin(self) -> None:
        """Begin what waits, as far as there are free runners; not from within a task."""
        waiting, free = self.waiting, self.free
        if not waiting:
            return
        self._is_beginning = True
        try:
            while waiting and free:
                free.pop().step()
        finally:  # a signal handler of the user's may raise anywhere
            self._is_beginning = False
            self._settle()
        if waiting:
            for _ in range(min(len(waiting), _AT_ONCE)):
                self.runners.add(Runner(self, self._loop))

    def _settle(self) -> None:
        """Write the answers of calls of this turn, those of one link together, and free what they held."""
        answered, self._answered = self._answered, []
        if not answered:
            return
        try:
            self._write(answered)
        except BaseException:  # a signal handler of the user's raised: nobody knows what was written
            for job, _ in answered:
                job.link.abort()
            raise
        finally:
            with self.worker.lock:
                self.worker.end([job for job, _ in answered])

    def _write(self, answered: list[tuple[Job, bytes]]) -> None:
        frames: list[bytes] = []
        link = answered[0][0].link
        for job, frame in answered:
            if job.link is not link:
                link.send_at_once(b"".join(frames))
                frames.clear()
                link = job.link
            frames.append(frame)
        link.send_at_once(b"".join(frames))

    async def answer(self, job: Job) -> None:
        """Make a call and answer it."""
        outcome: Outcome | None
        outcomes = self.worker.outcomes
        if job.cancelled or (job.deadline is not NEVER and job.deadline < monotonic()):
            outcome = job.refusal()
        else:
            try:
                method, request = job.method, job.begin(True)
                call = method.function(request) if method.takes_request else method.function()
                result = await call
                if type(result) in WHOLE:
                    outcome = outcomes.of(job, request, result)
                else:
                    outcome = await outcomes.of_async(job, request, result)
            except BaseException as error:  # noqa: BLE001 - user code may raise anything
                outcome = outcomes.failure(job, error)
        if type(outcome) is not bytes or self.worker.is_fork:
            if outcome is not None:
                self.worker.finish(job, outcome)
        elif self._is_beginning:
            self._answered.append((job, outcome))
            if job.deadline is not NEVER:
                job.deadline = NEVER  # is met: watch.py looks at it until the job is freed
            if len(self._answered) >= TOGETHER:
                self._settle()
        else:
            job.link.finish(job, outcome)


class Runner:
    """A task that makes calls, and what it waits for when there are none.

    asyncio takes for a future whatever has `_asyncio_future_blocking`; what it gives to `add_done_callback` goes on
    with the task at once.
    """

    __slots__ = ("_asyncio_future_blocking", "_calls", "_is_cancelled", "_loop", "_wake", "task")

    def __init__(self, calls: AsyncCalls, loop: asyncio.AbstractEventLoop) -> None:
        self._calls = calls
        self._loop = loop
        self._asyncio_future_blocking = self._is_cancelled = False
        self._wake: Callable[[Runner], None] | None = None
        # asyncio's own, whatever the loop's task factory makes: of others nobody knows what a call leaves in them.
        self.task: asyncio.Task[None] = asyncio.Task(self._run(), loop=loop)
        self.task._log_destroy_pending = False  # type: ignore[attr-defined]  # a loop may just close
        self.task.add_done_callback(self._ended)

    def step(self) -> None:
        """Go on with the task, in place of whoever calls: from the loop only, not from within a task."""
        wake, self._wake = self._wake, None
        if wake is not None:  # else it is about to begin
            wake(self)

    # --- the future that it waits for ---

    def add_done_callback(self, wake: Callable[[Runner], None], *, context: object = None) -> None:
        self._wake = wake

    def result(self) -> None:
        if self._is_cancelled:
            raise asyncio.CancelledError

    def cancel(self, msg: object = None) -> bool:
        """Somebody cancels the task while it is free: it ends, and takes no more calls."""
        self._is_cancelled = True
        if self in self._calls.free:
            self._calls.free.remove(self)
        self._loop.call_soon(self.step)
        return True

    # --- the task ---

    async def _run(self) -> None:
        await self._make_calls()

    def _ended(self, task: asyncio.Task[None]) -> None:
        calls = self._calls
        calls.runners.discard(self)
        if calls.waiting:
            calls.go_on()
        if calls.worker.draining:
            calls.worker.check_drained()

    @types.coroutine
    def _make_calls(self) -> Generator[Any, Any, None]:
        calls, worker, waiting = self._calls, self._calls.worker, self._calls.waiting
        task: Any = self.task
        yield self._be_free()
        name, callbacks = task.get_name(), _callbacks(task)
        refs, weak_refs = getrefcount(task), getweakrefcount(task)  # nobody else knows it yet
        while getrefcount(task) == refs and getweakrefcount(task) == weak_refs:
            if not waiting:
                if len(calls.free) >= _MOST_FREE:
                    return
                yield self._be_free()
                continue
            job = waiting.popleft()
            call = calls.answer(job)
            run = calls.context.copy().run
            thrown: BaseException | None = None
            try:
                awaited = run(call.send, None)
                job.task = task
                if waiting:
                    calls.go_on()
                while True:  # the call waits: go on with it as a task would
                    if worker.is_fork:  # user code forked, and waits in the copy too
                        os._exit(0)
                    try:
                        yield awaited
                    except BaseException as error:  # noqa: BLE001 - goes to the call
                        thrown = error
                    awaited = run(call.send, None) if thrown is None else run(call.throw, thrown)
                    thrown = None  # its traceback has this frame, and the call's
            except StopIteration:
                pass
            job.task = awaited = thrown = None
            del job, call, run  # what a call held must not live until the next one
            if task.cancelling() or task._must_cancel or _callbacks(task) != callbacks or task.get_name() != name:
                return

    def _be_free(self) -> Runner:
        """To be waited for until there is a call to make."""
        calls = self._calls
        calls.free.append(self)
        if calls.waiting:
            calls.go_on()
        if calls.worker.draining:
            calls.worker.check_drained()
        self._asyncio_future_blocking = True
        return self


def _callbacks(task: Any) -> int:
    """How many are told of the task's end; asyncio has no other way to ask."""
    return len(getattr(task, "_callbacks", None) or ())

