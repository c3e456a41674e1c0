"""The end of an instance that this process started: what a signal may interrupt, and what it may not."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from headgate.launch import Ending
from headgate.signals import Interrupts
from headgate.wire.own_thread import OwnThread
from headgate.wire.thread import HeadgateThread

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


# --- a client that is collected on a thread of headgate's own, maybe another instance's ---

PATIENCE_S = 10.0


class SlowLaunch(Launch):
    """What was started: it ends when it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.let = threading.Event()
        self.ended_on: list[threading.Thread] = []

    def collect(self, timeout_s: float = 2.0) -> bool:
        self.ended_on.append(threading.current_thread())
        return self.let.wait(PATIENCE_S)


@pytest.fixture
def headgate_thread() -> Iterator[HeadgateThread]:
    thread = HeadgateThread()
    thread.start()
    yield thread
    thread.stop()


def test_a_thread_of_headgates_own_does_not_wait_for_an_end(headgate_thread: HeadgateThread) -> None:
    launch = SlowLaunch()
    ending = Ending(launch, detached=False)

    async def collected() -> bool:
        ending.now(force=True)
        return launch.let.is_set()

    assert headgate_thread.run(collected(), PATIENCE_S / 2) is False
    launch.let.set()
    ending.now()  # once the other thread has done it
    [thread] = launch.ended_on
    assert not isinstance(thread, OwnThread)
    assert not thread.daemon  # an exit waits for it


AT_EXIT = """
import threading
from test_launch import Launch
from headgate.launch import Ending
from headgate.wire.own_thread import OwnThread

class LastLaunch(Launch):
    def collect(self, timeout_s=2.0):
        threading.main_thread().join()  # it exits
        print("ended")
        return True

thread = OwnThread(lambda: Ending(LastLaunch(), detached=False).now(force=True))
thread.start()
thread.join()
print("exit", flush=True)
"""


def test_an_exit_waits_for_what_ends_aside() -> None:
    run = subprocess.run(
        [sys.executable, "-c", AT_EXIT],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert run.stdout.split() == ["exit", "ended"]


def test_without_another_thread_it_is_ended_at_once(
    headgate_thread: HeadgateThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    launch = Launch()

    async def collected() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            Ending(launch, detached=False).now()

    headgate_thread.run(collected(), PATIENCE_S)
    assert launch.did == STUBBORN[1:]
