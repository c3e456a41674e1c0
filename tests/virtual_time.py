"""An asyncio loop on virtual time: nothing sleeps, the clock jumps to the next timer.

`run(main())` is `asyncio.run` for tests. When every task waits and something is due later, the
clock jumps there at once; when nothing is ever due, the test fails instead of hanging. Sockets
within the process and `run_in_executor` work: their events come before any jump.

The time that code under test sees is `asyncio.get_running_loop().time()`; it begins at 0.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

#: How long, on the real clock, a thread of `run_in_executor` may keep the loop waiting.
THREAD_PATIENCE_S = 5.0


class Deadlock(AssertionError):
    """Every task waits and no timer is set: on a real clock the test would hang."""


class TooLate(AssertionError):
    """The virtual clock ran past the limit, kept going by timers alone."""


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while there is work, and jumps when there is none.

    limit_s   the virtual time after which a test is taken to be endless
    """

    def __init__(self, limit_s: float = 86_400.0) -> None:
        self.now = 0.0
        self._limit_s = limit_s
        self._in_threads = 0
        super().__init__(_JumpingSelector(self._wait))
        self._clock_resolution = 1e-9

    def time(self) -> float:
        return self.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        future = super().run_in_executor(executor, func, *args)
        self._in_threads += 1
        future.add_done_callback(self._thread_done)
        return future

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        self._in_threads += 1
        try:
            await super().shutdown_default_executor()
        finally:
            self._in_threads -= 1

    def _thread_done(self, _: asyncio.Future[Any]) -> None:
        self._in_threads -= 1

    def _wait(self, select: Callable[[float | None], list[Any]], timeout: float | None) -> list[Any]:
        """What the loop does instead of waiting: take what is there, else jump, else fail."""
        events = select(0)
        if events or (timeout is not None and timeout <= 0):
            return events
        if self._in_threads:
            return select(THREAD_PATIENCE_S) or self._fail()
        if timeout is None:
            self._fail()
        self.now = max(self.now + timeout, math.nextafter(self.now, math.inf))
        if self.now > self._limit_s:
            raise TooLate(f"still running after {self._limit_s:g} s of virtual time{self._tasks()}")
        return []

    def _fail(self) -> Any:
        raise Deadlock(f"deadlock: every task waits and no timer is set{self._tasks()}")

    def _tasks(self) -> str:
        lines = []
        for task in sorted(asyncio.all_tasks(self), key=lambda task: task.get_name()):
            at = [f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in task.get_stack()[-1:]]
            lines.append(f"\n  {task.get_name()} waits in {at[0] if at else '?'}")
        return "".join(lines)


class _JumpingSelector(selectors.DefaultSelector):
    """The real selector, which asks before it waits."""

    def __init__(self, wait: Callable[..., list[Any]]) -> None:
        super().__init__()
        self._wait = wait

    def select(self, timeout: float | None = None) -> list[Any]:
        return self._wait(super().select, timeout)


def run(main: Coroutine[Any, Any, T], *, limit_s: float = 86_400.0) -> T:
    """Run `main` to its end on virtual time and return its result.

    Raises Deadlock or TooLate, after every task was cancelled, so that nothing is left pending.

    >>> async def nap():
    ...     await asyncio.sleep(3600)
    ...     return asyncio.get_running_loop().time()
    >>> run(nap())
    3600.0
    """
    loop = VirtualTimeLoop(limit_s)
    try:
        return loop.run_until_complete(main)
    finally:
        try:
            _cancel_all(loop)
        finally:
            loop.close()


def _cancel_all(loop: VirtualTimeLoop) -> None:
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.run_until_complete(loop.shutdown_default_executor())
