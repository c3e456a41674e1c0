"""The thread that runs plain user code: constructor, reconfigure, check_health, and calls one at a time.

What it is to do comes through a queue, in order; what it has done goes back to the worker's loop
in bulk: one wake-up carries every answer that has gathered since the last.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class PlainThread:
    """A queue of calls and the thread that empties it; `run` is that thread's main function."""

    def __init__(self) -> None:
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._done: deque[tuple[Any, Any]] = deque()  # (request, what it ended with), on the way back
        self._signalled = False
        self._wake: Callable[[Callable[[], None]], None] | None = None
        self._finish: Callable[[Any, Any], None] | None = None
        self._thread: threading.Thread | None = None
        self.put = self._queue.put

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

    def stop(self) -> None:
        """Let `run` return after what is queued now."""
        self._queue.put(None)

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
