"""The thread that runs plain user code: constructor, reconfigure, check_health, and calls one at a time.

What it is to do comes through a queue, in order; what it has done goes back to the worker's loop
in bulk: one wake-up carries every answer that has gathered since the last. Between two things to do
it may also read a link (lead.py): then it waits for both with `poll`.
"""

from __future__ import annotations

import os
import select
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class PlainThread:
    """A queue of calls and the thread that empties it; `run` is that thread's main function.

    reads_links   whether it may; what plays a thread in a test may not
    """

    reads_links = True

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._done: deque[tuple[Any, Any]] = deque()  # (request, what it ended with), on the way back
        self._signalled = False
        self._wake: Callable[[Callable[[], None]], None] | None = None
        self._finish: Callable[[Any, Any], None] | None = None
        self._thread: threading.Thread | None = None
        self._event = -1  # wakes `poll`
        self._polls = False
        self._poll: tuple[int, select.poll] | None = None

    def connect(self, wake: Callable[[Callable[[], None]], None], finish: Callable[[Any, Any], None]) -> None:
        """Whom this thread works for.

        wake     schedules a function on the worker's loop
        finish   runs there, for each `done`
        """
        self._wake = wake
        self._finish = finish

    def start(self) -> None:
        """Run on a thread of its own, if it does not run yet."""
        if self._thread is None:
            self._thread = threading.Thread(target=self.run, name="headgate-plain", daemon=True)
            self._thread.start()

    def run(self) -> None:
        """Do what is queued until `stop`. Whatever is queued catches what it raises itself."""
        get = self._queue.get
        while (work := get()) is not None:
            work()

    def put(self, work: Callable[[], None] | None) -> None:
        """Queue something to do; from any thread."""
        self._queue.put(work)
        if self._polls:
            self.wake()

    def prepare(self) -> None:
        """To be called once before `poll`: opens a file descriptor, which stays."""
        if self._event < 0:
            self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def poll(self, fd: int) -> None:
        """On the plain thread: wait until something is queued, `wake` is called, or `fd` has something to read."""
        if self._poll is None or self._poll[0] != fd:
            self._poll = fd, select.poll()
            self._poll[1].register(fd, select.POLLIN)
            self._poll[1].register(self._event, select.POLLIN)
        self._polls = True  # first: whoever queues something after the look below sees it
        try:
            if self._queue.empty():
                for found, _ in self._poll[1].poll():
                    if found == self._event:
                        os.eventfd_read(self._event)
        finally:
            self._polls = False

    def wake(self) -> None:
        """Have `poll` return, the next one if none waits; from any thread."""
        if self._event >= 0:
            os.eventfd_write(self._event, 1)

    @property
    def is_wanted(self) -> bool:
        """Whether something is queued."""
        return not self._queue.empty()

    def stop(self) -> None:
        """Let `run` return after what is queued now."""
        self.put(None)

    def done(self, request: Any, outcome: Any) -> None:
        """Hand an outcome back to the loop. Called on the plain thread."""
        self._done.append((request, outcome))
        if not self._signalled:
            self._signalled = True
            assert self._wake is not None
            self._wake(self._drain)

    def _drain(self) -> None:
        self._signalled = False
        done, finish = self._done, self._finish
        assert finish is not None
        while done:
            finish(*done.popleft())
