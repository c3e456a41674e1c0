"""A process that is frozen while traffic changes: nobody waits for it long, and it cannot act on what is no more."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import pytest
from promises import Promise
from running import Script, eventually, key_of, pid_of

import headgate

CALLER = """
import headgate, json
client = headgate.connect("fenced")
handle = client.get_handle("model")
print("ready", flush=True)
asks = open("asks")
while asks.readline():
    print(json.dumps([handle.call(None) for _ in range(20)]), flush=True)
"""


class Stage:
    """The backends "old", which has all the traffic, and "new"; and a process that calls them when it is asked to."""

    def __init__(self, client: headgate.Client, caller: Script, asks: TextIO) -> None:
        self.client = client
        self.caller = caller
        self._asks = asks

    def ask(self) -> None:
        """Twenty calls, whose answers `answers` takes."""
        self._asks.write("\n")

    def answers(self) -> set[str]:
        """Which backends answered the twenty calls."""
        return set(json.loads(self.caller.line()))

    def freeze(self) -> None:
        """Stop the process while it follows; it calls as soon as it wakes."""
        self.ask()
        assert self.answers() == {"old"}
        self.caller.send(signal.SIGSTOP)
        os.waitid(os.P_PID, self.caller.pid, os.WSTOPPED)  # until all its threads are
        self.ask()

    def switch(self, tag: str) -> float:
        """Give the backend all the traffic: for how many seconds the call waits."""
        begun = time.monotonic()
        self.client.set_traffic("model", {tag: 1.0})
        return time.monotonic() - begun

    def wake(self) -> None:
        """The process goes on, acts on nothing old, and follows again."""
        self.caller.send(signal.SIGCONT)
        assert self.answers() == {"new"}
        eventually(lambda: not self.client.status().waiting)

    def end(self) -> None:
        self.ask()
        assert self.answers() == {"old"}
        self._asks.close()
        assert self.caller.end() == 0


@pytest.fixture
def stage(script: Callable[..., Script], tmp_path: Path) -> Iterator[Stage]:
    os.mkfifo(tmp_path / "asks")
    with headgate.start(detached=True, namespace="fenced", http_options={"location": None}) as client:
        client.create_backend("old", lambda request: "old")
        client.create_backend("new", lambda request: "new")
        client.create_endpoint("model", backend="old")
        caller = script(CALLER)
        assert caller.line() == "ready"
        with (tmp_path / "asks").open("w", buffering=1) as asks:
            yield Stage(client, caller, asks)


@pytest.mark.promise("a process that does not acknowledge a snapshot in 2 s is fenced: it never acts on an older one")
def test_a_frozen_process_delays_a_change_for_two_seconds_and_then_follows_it(stage: Stage, promise: Promise) -> None:
    frozen, awake = [], []
    for number in range(promise.size(5, 1)):
        stage.freeze()
        frozen.append(stage.switch("new"))
        if number % 2:  # else it is there still, and refuses who is fenced
            stage.client.delete_backend("old")
        stage.wake()
        if number % 2:
            stage.client.create_backend("old", lambda request: "old")
        awake.append(stage.switch("old"))  # it follows again: nobody waits
    stage.end()
    assert min(frozen) > 1.9, frozen
    promise.within(max(frozen), 2.2, "set_traffic beside a frozen process")
    promise.within(max(awake), 0.2, "and when it follows again")


@pytest.mark.local("Ray restarts the controller's actor in its own time")
@pytest.mark.promise("a process that is frozen while the controller restarts is fenced too: replicas say who is linked")
def test_a_process_frozen_over_a_restart_of_the_controller_is_fenced_all_the_same(
    stage: Stage, promise: Promise
) -> None:
    frozen, awake = [], []
    for _ in range(promise.size(5, 1)):
        stage.freeze()
        os.kill(pid_of(key_of(stage.client), "headgate-ctl"), signal.SIGKILL)
        frozen.append(stage.switch("new"))
        stage.wake()
        awake.append(stage.switch("old"))
    stage.end()
    promise.within(max(frozen), 2.7, "set_traffic beside a frozen process, as the controller restarts")
    promise.within(max(awake), 0.2, "and when it follows again")
