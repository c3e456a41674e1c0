"""Signals in the user's process: SIGTERM as an ordinary exit, and Ctrl-C while `client.wait()` waits.

Rule: handlers are the user's. They are set in the main thread only, SIGTERM's only where nobody
has set one, and what was there before comes back.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_TERMINATED = 128 + signal.SIGTERM

_users = 0


def catch_sigterm() -> bool:
    """Make SIGTERM run what runs at exit, if nobody else handles it; whether it will."""
    global _users
    if threading.current_thread() is not threading.main_thread():
        return False
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)
        _users = 0
    if signal.getsignal(signal.SIGTERM) is not _exit:
        return False
    _users += 1
    return True


def release_sigterm() -> None:
    """Undo one `catch_sigterm` that was True; the last one gives SIGTERM its default back."""
    global _users
    _users = max(0, _users - 1)
    if _users or threading.current_thread() is not threading.main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(_TERMINATED)


class Interrupts:
    """SIGINT and SIGTERM call `then` inside a `with` block; outside of the main thread nothing changes."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._then()

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
