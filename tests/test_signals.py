"""signals.py: SIGTERM ends a user's process as an exit would, and every handler comes back."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

import headgate
from headgate import signals
from headgate.wire.thread import HeadgateThread


@pytest.fixture(autouse=True)
def nobody_handles_sigterm() -> Iterator[None]:
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGTERM, before)


def on_a_thread(function: Callable[[], Any]) -> Any:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_sigterm_becomes_an_exit_with_the_status_that_a_shell_expects() -> None:
    assert signals.catch_sigterm()

    with pytest.raises(SystemExit) as end:
        signal.raise_signal(signal.SIGTERM)

    assert end.value.code == 143


def test_the_last_release_gives_sigterm_its_default_back() -> None:
    assert signals.catch_sigterm()
    assert signals.catch_sigterm()
    signals.release_sigterm()
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    signals.release_sigterm()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    signals.release_sigterm()  # once too often harms nobody
    assert signals.catch_sigterm()


@pytest.mark.parametrize("theirs", [signal.SIG_IGN, lambda number, frame: None])
def test_a_handler_of_the_user_s_stays(theirs: Any) -> None:
    signal.signal(signal.SIGTERM, theirs)

    assert not signals.catch_sigterm()
    assert signal.getsignal(signal.SIGTERM) is theirs


def test_a_handler_that_the_user_set_later_stays() -> None:
    assert signals.catch_sigterm()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signals.release_sigterm()

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_who_took_the_handler_away_starts_from_the_beginning() -> None:
    assert signals.catch_sigterm()
    assert signals.catch_sigterm()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signals.catch_sigterm()
    signals.release_sigterm()

    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_thread_leaves_signals_alone() -> None:
    assert on_a_thread(signals.catch_sigterm) is False
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    assert signals.catch_sigterm()
    on_a_thread(signals.release_sigterm)
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL


def test_held_signals_come_at_the_end_each_once() -> None:
    came: list[str] = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append("SIGTERM"))

    def work() -> None:
        with signals.Held():
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                signal.raise_signal(number)
            came.append("the block went on")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert came == ["the block went on", "SIGTERM"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_where_held_signals_are_let_they_come_at_once() -> None:
    came: list[str] = []

    def work() -> None:
        with signals.Held() as held:
            try:
                with held.let():
                    signal.raise_signal(signal.SIGINT)
                    came.append("never")
            finally:
                signal.raise_signal(signal.SIGINT)  # a second one while the first is cleaned up after
                came.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert came == ["cleaned up"]


def test_what_was_held_comes_when_it_is_let() -> None:
    came: list[str] = []

    def work() -> None:
        with signals.Held() as held:
            signal.raise_signal(signal.SIGINT)
            came.append("held")
            with held.let():
                came.append("never")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert came == ["held"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_that_raises_while_handlers_come_back_keeps_none_from_it() -> None:
    def raises(number: int, frame: Any) -> None:
        raise ZeroDivisionError

    def work() -> None:
        with signals.Held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, raises)
    with pytest.raises((ZeroDivisionError, KeyboardInterrupt)):
        work()
    assert signal.getsignal(signal.SIGTERM) is raises
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_no_function_handles_is_not_held() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.Held():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGINT, before)


def test_on_a_thread_nothing_is_held() -> None:
    def inside() -> Any:
        with signals.Held() as held, held.let():
            return signal.getsignal(signal.SIGINT)

    assert on_a_thread(inside) is signal.default_int_handler


def test_signals_are_not_for_the_headgate_thread() -> None:
    async def blocked() -> set[int]:
        return signal.pthread_sigmask(signal.SIG_BLOCK, ())

    thread = HeadgateThread()
    thread.start()
    try:
        assert {signal.SIGINT, signal.SIGTERM} <= thread.run(blocked())
    finally:
        thread.stop()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_inside_the_block_a_signal_is_a_call(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    calls: list[int] = []
    with signals.Interrupts(lambda: calls.append(1)):
        signal.raise_signal(number)
        signal.raise_signal(number)

    assert calls == [1, 1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_handlers_come_back_after_an_error_too() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), signals.Interrupts(lambda: 1 / 0):
        signal.raise_signal(signal.SIGINT)

    assert signal.getsignal(signal.SIGINT) is before


def test_on_a_thread_the_block_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)

    def inside() -> Any:
        with signals.Interrupts(lambda: None):
            return signal.getsignal(signal.SIGINT)

    assert on_a_thread(inside) is before


# --- client.wait() ---


class StandIn:
    """What `Client.wait` needs of an instance; it is gone by itself after a while."""

    def __init__(self) -> None:
        self.gone = False

    def when_gone(self, act: Callable[[], object]) -> None:
        self._timer = threading.Timer(0.05, act)
        self._timer.daemon = True
        self._timer.start()

    def check(self) -> None:
        pass


def ends_the_wait(handler: Any) -> bool:
    """Whether it is that of the wait, and not the one of the end that follows, which ends the process."""
    interrupts = getattr(handler, "__self__", None)
    return isinstance(interrupts, signals.Interrupts) and getattr(interrupts._then, "__name__", "") != "_force"


def test_a_signal_in_any_line_of_a_wait_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the handler runs while the waiting code holds a lock, it must not want that lock."""
    monkeypatch.setattr(headgate.Client, "shutdown", lambda self: sys.settrace(None))
    handler = signal.getsignal(signal.SIGTERM)
    hits = 0
    for at in range(40):
        lines = 0

        def trace(frame: FrameType, event: str, argument: Any) -> Any:
            nonlocal lines, hits
            if event == "line" and ends_the_wait(signal.getsignal(signal.SIGTERM)):
                lines += 1
                if lines - 1 == at:  # noqa: B023
                    hits += 1
                    signal.raise_signal(signal.SIGTERM)
            return trace

        sys.settrace(trace)
        try:
            headgate.Client(StandIn(), None, None).wait()  # type: ignore[arg-type]
        finally:
            sys.settrace(None)
    assert hits >= 4
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_second_instance_counts_though_sigterm_is_held_while_it_starts() -> None:
    assert signals.catch_sigterm()
    with signals.Held():
        assert signals.catch_sigterm()
    signals.release_sigterm()
    assert signal.getsignal(signal.SIGTERM) is signals._exit
    signals.release_sigterm()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
