"""Calls that may wait without end, on threads that can be left behind.

What is called here belongs to somebody else's library, which has no deadline of its own. Whoever calls
waits for the future as long as it likes; the thread ends when the call does, and keeps nobody from exiting.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


def start(function: Callable[..., T], *arguments: Any, name: str) -> Future[T]:
    """Call `function(*arguments)` on a daemon thread of that name.

    >>> start(max, 1, 2, name="example").result(timeout=5)
    2
    """
    answer: Future[T] = Future()

    def run() -> None:
        value: Any = None
        problem: BaseException | None = None
        try:
            value = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            problem = error
        if answer.set_running_or_notify_cancel():  # else nobody waits any more
            if problem is None:
                answer.set_result(value)
            else:
                answer.set_exception(problem)

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer
