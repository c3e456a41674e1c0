"""Signals in the user's process: SIGTERM as an ordinary exit, Ctrl-C in `client.wait()` and while things start or end,
and none on headgate's own threads.

Rule: handlers are the user's. They are set in the main thread only, SIGTERM's only where nobody
has set one, and what was there before comes back.

This is imported before the supervisor is executed, and kept as bare as engine/ignition.py for that.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # see headgate/__init__.py
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable
    from types import FrameType
    from typing import Any
else:
    import _signal as signal

_TERMINATED = 128 + signal.SIGTERM

_users = 0

#: Left to the other threads: Python runs handlers on the main thread, and one that sleeps is not woken up
#: when the kernel has given the signal to a thread of headgate's.
_SIGNALS = (
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD, signal.SIGALRM, signal.SIGUSR1,
    signal.SIGUSR2,
)  # fmt: skip
#: Those of them that were not left to others already by whoever started the thread.
_withheld: set[int] = set()


def withhold_signals() -> None:
    """Have this thread, one of headgate's own that runs nothing of the user's, take no signals."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    _withheld.update(number for number in _SIGNALS if number not in before)


def take_signals() -> None:
    """Have this thread, and what it executes, take the signals that it does not because a headgate thread began it.

    A new thread has the mask of the one that starts it: to be called by each that runs code of the user's.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _withheld)


def _is_main_thread() -> bool:
    threading = sys.modules.get("threading")  # without it there is no other
    return threading is None or threading.current_thread() is threading.main_thread()


def catch_sigterm() -> bool:
    """Make SIGTERM run what runs at exit, if nobody else handles it; whether it will."""
    global _users
    if not _is_main_thread():
        return False
    if signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)
        _users = 0
    handler = signal.getsignal(signal.SIGTERM)
    if isinstance(held := getattr(handler, "__self__", None), Held):
        handler = held.handler(signal.SIGTERM)
    if handler is not _exit:
        return False
    _users += 1
    return True


def release_sigterm() -> None:
    """Undo one `catch_sigterm` that was True; the last one gives SIGTERM its default back."""
    global _users
    _users = max(0, _users - 1)
    if _users or not _is_main_thread():
        return
    if signal.getsignal(signal.SIGTERM) is _exit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(_TERMINATED)


class Held:
    """SIGINT and SIGTERM wait while a `with` block runs, if their handlers are Python functions.

    What begins or ends processes is not to be left half done by a KeyboardInterrupt. At the end of the block the
    handler is called. Inside `let()` the handlers are called as ever: there the block waits for something.
    Outside of the main thread nothing changes.

    >>> held = Held()
    >>> try:
    ...     with held:
    ...         signal.raise_signal(signal.SIGINT)
    ...         print("goes on")
    ... except KeyboardInterrupt:
    ...     print("interrupted")
    goes on
    interrupted
    """

    def __init__(self) -> None:
        self._before: dict[int, Callable[[int, FrameType | None], Any]] = {}
        self._noted: list[int] = []
        self._letting = False

    def __enter__(self) -> Held:
        if _is_main_thread():
            try:
                for number in (signal.SIGINT, signal.SIGTERM):
                    handler = signal.getsignal(number)
                    if callable(handler):
                        self._before[number] = handler
                        signal.signal(number, self._handle)
            except BaseException:  # the second one's handler, before it was held
                self._restore()
                raise
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._letting:
            self._before[number](number, frame)
        else:
            self._noted.append(number)

    def handler(self, number: int) -> Callable[[int, FrameType | None], Any] | None:
        """The handler that waits; None if none does."""
        return self._before.get(number)

    def let(self) -> _Let:
        """A block inside the block in which handlers are called at once; those that waited first."""
        return _Let(self)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._restore()
        for number in dict.fromkeys(self._noted):
            signal.raise_signal(number)

    def _restore(self) -> None:
        if self._before:
            number, handler = self._before.popitem()
            try:
                signal.signal(number, handler)
            finally:  # that handler may have been called and have raised
                self._restore()


class _Let:
    def __init__(self, held: Held) -> None:
        self._held = held

    def __enter__(self) -> None:
        held = self._held
        held._letting = True
        try:
            while held._noted:
                held._handle(held._noted.pop(0), None)
        except BaseException:
            held._letting = False
            raise

    def __exit__(self, *_: object) -> None:
        self._held._letting = False


class Interrupts:
    """SIGINT and SIGTERM call `then` inside a `with` block; outside of the main thread nothing changes."""

    def __init__(self, then: Callable[[], object]) -> None:
        self._then = then
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if _is_main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._then()

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
