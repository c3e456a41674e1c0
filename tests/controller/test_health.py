"""Only the dead are called dead."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from fake_peers import FakePeer

from headgate.controller.health import Heartbeats, is_stopped_in_proc
from headgate.wire import messages


class Quiet(FakePeer):
    """A process that hears pings and leaves the answer to the test."""

    def tell(self, message: messages.FromController) -> None:
        self.told.append(message)


def beats(*, timeout_s: float = 30.0, stopped: bool = False) -> Heartbeats:
    return Heartbeats(lambda id: timeout_s, lambda pid: stopped)


def rounds_until_dead(heartbeats: Heartbeats, peer: Quiet, most: int = 100) -> tuple[int, str]:
    for second in range(most):
        if dead := heartbeats.round([peer], float(second)):
            return second, dead[0][1]
    return most, ""


def test_a_proxy_may_miss_one_ping_and_not_two() -> None:
    assert rounds_until_dead(beats(), Quiet("proxy", "p")) == (2, "did not answer for 2 s")


def test_a_replica_may_be_silent_for_its_time() -> None:
    assert rounds_until_dead(beats(timeout_s=7.0), Quiet("replica", "r")) == (7, "did not answer for 7 s")


def test_a_replica_that_is_stopped_has_three_seconds() -> None:
    second, reason = rounds_until_dead(beats(stopped=True), Quiet("replica", "r"))
    assert (second, reason) == (3, "its process was stopped for 3 s")


def test_the_pid_of_a_replica_of_another_node_means_nothing_here() -> None:
    peer = Quiet("replica", "r", node="far")
    peer.is_local = False
    assert rounds_until_dead(beats(timeout_s=7.0, stopped=True), peer) == (7, "did not answer for 7 s")


def test_an_agent_that_is_silent_is_logged_once_and_lives(caplog: pytest.LogCaptureFixture) -> None:
    assert rounds_until_dead(beats(stopped=True), Quiet("agent", "agent@far")) == (100, "")
    assert [record.getMessage() for record in caplog.records] == ["agent@far has not answered for 10 s"]


def test_a_client_may_be_silent_for_ever() -> None:
    assert rounds_until_dead(beats(stopped=True), Quiet("client", "c")) == (100, "")


def test_whoever_answers_lives() -> None:
    heartbeats, peer = beats(timeout_s=2.0), Quiet("replica", "r")
    for second in range(100):
        assert not heartbeats.round([peer], float(second))
        heartbeats.heard(peer)
    assert peer.told == [messages.Ping()] * 100


def test_nobody_is_to_blame_when_the_controller_was_held_up() -> None:
    heartbeats, peer = beats(), Quiet("proxy", "p")
    for second in (0.0, 1.0, 60.0, 61.0):
        assert not heartbeats.round([peer], second)
    assert heartbeats.round([peer], 62.0)


def test_whoever_has_gone_is_forgotten() -> None:
    heartbeats, peer = beats(), Quiet("proxy", "p")
    heartbeats.round([peer], 0.0)
    heartbeats.round([peer], 1.0)
    heartbeats.gone(peer)
    assert not heartbeats.round([peer], 2.0)


def test_a_stopped_process_is_known_by_its_state() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not is_stopped_in_proc(process.pid)
        os.kill(process.pid, signal.SIGSTOP)
        give_up = time.monotonic() + 5.0
        while not is_stopped_in_proc(process.pid) and time.monotonic() < give_up:
            pass
        assert is_stopped_in_proc(process.pid)
    finally:
        process.kill()
        process.wait()
    assert not is_stopped_in_proc(process.pid)
