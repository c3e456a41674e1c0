"""The end of an instance that this process started: what a signal may interrupt, and what it may not."""

from __future__ import annotations

import signal

import pytest

from headgate.launch import Ending
from headgate.signals import Interrupts

STUBBORN = ["waits", "SIGTERM", "waits", "SIGKILL", "waits"]


class Launch:
    """What was started: it ends by SIGKILL only. SIGINT comes `when` it does that for the first time."""

    def __init__(self, when: str = "") -> None:
        self.did: list[str] = []
        self._when = when

    def kill(self, number: int = signal.SIGTERM) -> None:
        self._do(signal.Signals(number).name)

    def reap(self) -> None: ...

    def collect(self, timeout_s: float = 2.0) -> bool:
        self._do("waits")
        return "SIGKILL" in self.did

    def _do(self, what: str) -> None:
        self.did.append(what)
        if what == self._when:
            self._when = ""
            signal.raise_signal(signal.SIGINT)
            self.did.append("goes on")


def test_whoever_does_not_end_by_itself_is_killed() -> None:
    launch = Launch()
    Ending(launch, detached=False).now(force=True)
    assert launch.did == STUBBORN[1:]


def test_a_second_signal_is_not_held_while_processes_are_waited_for() -> None:
    """As in client.wait(), where it calls what ends everything at once."""
    launch = Launch(when="waits")
    ending = Ending(launch, detached=False)
    with Interrupts(lambda: launch.did.append("second")):
        ending._collect(force=False)
    assert launch.did == ["waits", "second", "goes on", *STUBBORN[1:]]


def test_a_signal_that_is_an_error_ends_the_waiting_and_kills() -> None:
    launch = Launch(when="waits")
    ending = Ending(launch, detached=False)
    with pytest.raises(KeyboardInterrupt):
        ending._collect(force=False)
    assert launch.did == STUBBORN


def test_a_signal_between_two_steps_waits_for_the_next_moment_in_which_nothing_is_done() -> None:
    launch = Launch(when="SIGTERM")
    with pytest.raises(KeyboardInterrupt):
        Ending(launch, detached=False)._collect(force=True)
    assert launch.did == ["SIGTERM", "goes on", *STUBBORN[1:]]


def test_force_does_not_stop_at_asking() -> None:
    launch = Launch()
    Ending(launch, detached=False).force()
    assert launch.did == STUBBORN[1:]
