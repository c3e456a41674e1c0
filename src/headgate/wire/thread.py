"""The headgate thread: an event loop of headgate's own in a process whose loops belong to its user.

It holds the control connection, so that a snapshot is in force and acknowledged however busy the
user's code is, and it carries the requests of sync handles. Nothing of the user's runs on it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from headgate.wire.control import ControlClient
from headgate.wire.own_thread import OwnThread, is_own

T = TypeVar("T")


class HeadgateThread:
    """A daemon thread with an event loop."""

    def __init__(self, name: str = "headgate") -> None:
        self.loop: asyncio.AbstractEventLoop
        self._started = threading.Event()
        self.thread = OwnThread(self._run, name)

    @property
    def alive(self) -> bool:
        """Whether the loop runs; False in a process that was forked from the one that started it."""
        return self.thread.is_alive()

    def start(self) -> None:
        """Start the loop; returns when it runs."""
        self.loop = asyncio.SelectorEventLoop()
        self.thread.start()
        self._started.wait()

    def connect(self, control: Callable[[], ControlClient], timeout_s: float | None = None) -> ControlClient:
        """Make the control client on this thread's loop and connect it. Raises InstanceError, TimeoutError."""

        async def make() -> ControlClient:
            client = control()
            await client.open()
            return client

        return self.run(make(), timeout_s)

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine on the thread and wait for its result. Not for the hot path.

        Raises TimeoutError; whoever stops waiting, by Ctrl-C too, cancels it.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        try:
            return future.result(timeout_s)
        except BaseException:
            future.cancel()
            raise

    def stop(self) -> None:
        """End the loop and the thread; idempotent.

        Returns when the thread has ended, but on a thread of headgate's own. On the thread itself it ends after this
        turn.
        """
        if self.thread.is_alive():
            self.loop.call_soon_threadsafe(self.loop.stop)
            if not is_own():
                self.thread.join(2.0)

    def _run(self) -> None:
        loop = self.loop
        asyncio.set_event_loop(loop)
        loop.call_soon(self._started.set)
        try:
            loop.run_forever()
            self._cancel_all()
        finally:
            asyncio.set_event_loop(None)
            loop.close()

    def _cancel_all(self) -> None:
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self.loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())  # what tasks began in their last moments
        self.loop.run_until_complete(asyncio.sleep(0))  # transports that were closed say good-bye
