"""Many processes on one virtual clock: each has an event loop of its own, and dies, freezes or goes on by itself.

`Clock` holds every callback of every process and runs them one at a time, in the order of their
times. A `ProcessLoop` is what asyncio's code inside one process takes for its event loop: futures, tasks,
`asyncio.sleep`, `timeout`, locks. What a dead process still had to do never happens; what a frozen one has to do
happens when it thaws.

There are no threads, sockets or selectors, so that a simulated second costs what its callbacks cost.
"""

from __future__ import annotations

import asyncio
import heapq
from asyncio import events
from collections import deque
from collections.abc import Callable
from typing import Any


class Ended(SystemExit):
    """Raised in the middle of a process's code: the process is gone from here on."""


class NeverAtRest(AssertionError):
    """Callbacks go on for ever without any time passing, or far more of them than any run needs."""


class Clock:
    """Virtual time, and everything that is due. `steps` counts callbacks."""

    #: A run that needs more callbacks goes in circles.
    MOST_STEPS = 600_000

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0
        self.ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._count = 0

    def at(self, when: float, handle: asyncio.TimerHandle) -> None:
        """Run `handle` then; ties in the order of asking."""
        self._count += 1
        heapq.heappush(self._timers, (when, self._count, handle))

    def run(self, until: float) -> None:
        """Let everything happen that is due by then."""
        ready, timers = self.ready, self._timers
        while True:
            while ready:
                self._step(ready.popleft())
            if not timers or timers[0][0] > until:
                break
            when, _, handle = heapq.heappop(timers)
            if not handle._cancelled:  # type: ignore[attr-defined]
                self.now = max(self.now, when)
                self._step(handle)
        self.now = max(self.now, until)

    def _step(self, handle: asyncio.Handle) -> None:
        if handle._cancelled:  # type: ignore[attr-defined]
            return
        self.steps += 1
        if self.steps > self.MOST_STEPS:
            raise NeverAtRest(f"still busy after {self.steps} callbacks, at {self.now:.3f} s")
        handle._loop.step(handle)  # type: ignore[attr-defined]


class ProcessLoop(asyncio.AbstractEventLoop):
    """The event loop of one process.

    on_error   called with what a callback raised: a bug, in the product or here
    """

    def __init__(self, clock: Clock, name: str, on_error: Callable[[str, BaseException | None], None]) -> None:
        self.name = name
        self.clock = clock
        self.dead = False
        self.frozen = False
        self.tasks: dict[asyncio.Task[Any], None] = {}
        #: Whether what a descriptor stands for has happened already.
        self.probe: Callable[[int], bool] = lambda fd: False
        self._watchers: dict[int, asyncio.Handle | tuple[Any, ...]] = {}
        self._held: list[asyncio.Handle] = []
        self._on_error = on_error

    # --- life ---

    def step(self, handle: asyncio.Handle) -> None:
        """Run a callback as this process, if it can run anything."""
        if self.dead:
            return
        if self.frozen:
            self._held.append(handle)
            return
        events._set_running_loop(self)
        try:
            handle._run()  # type: ignore[attr-defined]
        except Ended:
            assert self.dead, "a process that lives was ended"
        finally:
            events._set_running_loop(None)

    def within(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call `function` at once, as this process."""
        before = events._get_running_loop()
        events._set_running_loop(self)
        try:
            return function(*arguments)
        finally:
            events._set_running_loop(before)

    def end(self) -> None:
        """kill -9."""
        self.dead = True
        self._held.clear()
        for task in self.tasks:
            coroutine: Any = task.get_coro()
            if coroutine.cr_frame is not None and not coroutine.cr_suspended and not coroutine.cr_running:
                coroutine.close()  # it never began: nothing of it runs, and nobody warns

    def freeze(self) -> None:
        """SIGSTOP."""
        self.frozen = True

    def thaw(self) -> None:
        """SIGCONT: all that fell due meanwhile happens now."""
        if self.frozen:
            self.frozen = False
            self.clock.ready.extend(self._held)
            self._held.clear()

    # --- what asyncio asks of a loop ---

    def time(self) -> float:
        return self.clock.now

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Any = None) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self.clock.ready.append(handle)
        return handle

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.Handle:
        return self.call_soon(callback, *args, context=context)

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.clock.now + max(0.0, delay), callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self.clock.at(when, handle)
        return handle

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: Any = None, context: Any = None) -> asyncio.Task[Any]:
        task = asyncio.Task(coro, loop=self, name=name, context=context)
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # processes die in the middle
        self.tasks[task] = None
        task.add_done_callback(self._task_done)
        if self.dead:
            coro.close()
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        self.tasks.pop(task, None)

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:  # type: ignore[override]
        self._watchers[fd] = callback, *args
        if self.probe(fd):
            self.readable(fd)

    def remove_reader(self, fd: Any) -> bool:
        watcher = self._watchers.pop(fd, None)
        if isinstance(watcher, asyncio.Handle):
            watcher.cancel()
        return watcher is not None

    def readable(self, fd: int) -> None:
        """A descriptor has become readable, once and for ever; somebody may be watching it."""
        watcher = self._watchers.get(fd)
        if isinstance(watcher, tuple):
            self._watchers[fd] = self.call_soon(*watcher)

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not self.dead:
            self._on_error(f"{self.name}: {context.get('message')}", error)

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False
