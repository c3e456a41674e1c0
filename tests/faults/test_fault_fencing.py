"""A process that is frozen while traffic changes: nobody waits for it long, and it cannot act on what is no more."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

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


def answers(caller: Script) -> set[str]:
    """Which backends answered the next twenty calls."""
    return set(json.loads(caller.line()))


@pytest.mark.promise("a process that does not acknowledge a snapshot in 2 s is fenced: it never acts on an older one")
def test_a_frozen_process_delays_a_change_for_two_seconds_and_then_follows_it(
    script: Callable[..., Script], tmp_path: Path, promise: Promise
) -> None:
    os.mkfifo(tmp_path / "asks")
    frozen, awake = [], []
    with headgate.start(detached=True, namespace="fenced", http_options={"location": None}) as client:
        client.create_backend("old", lambda request: "old")
        client.create_backend("new", lambda request: "new")
        client.create_endpoint("model", backend="old")
        caller = script(CALLER)
        assert caller.line() == "ready"
        with (tmp_path / "asks").open("w", buffering=1) as ask:
            for number in range(promise.size(5, 1)):
                ask.write("\n")
                assert answers(caller) == {"old"}

                caller.send(signal.SIGSTOP)
                ask.write("\n")  # what it will do first when it wakes
                begun = time.monotonic()
                client.set_traffic("model", {"new": 1.0})
                frozen.append(time.monotonic() - begun)
                if number % 2:  # else it is there still, and refuses who is fenced
                    client.delete_backend("old")
                caller.send(signal.SIGCONT)
                assert answers(caller) == {"new"}

                eventually(lambda: not client.status().waiting)
                if number % 2:
                    client.create_backend("old", lambda request: "old")
                begun = time.monotonic()
                client.set_traffic("model", {"old": 1.0})  # it follows again: nobody waits
                awake.append(time.monotonic() - begun)
            ask.write("\n")
            assert answers(caller) == {"old"}
        assert caller.end() == 0
    promise.within(max(frozen), 2.2, "set_traffic beside a frozen process")
    promise.within(max(awake), 0.2, "and when it follows again")


@pytest.mark.local("Ray restarts the controller's actor in its own time")
@pytest.mark.promise("a process that is frozen while the controller restarts is fenced too: replicas say who is linked")
def test_a_process_frozen_over_a_restart_of_the_controller_is_fenced_all_the_same(
    script: Callable[..., Script], tmp_path: Path, promise: Promise
) -> None:
    os.mkfifo(tmp_path / "asks")
    frozen, awake = [], []
    with headgate.start(detached=True, namespace="fenced", http_options={"location": None}) as client:
        client.create_backend("old", lambda request: "old")
        client.create_backend("new", lambda request: "new")
        client.create_endpoint("model", backend="old")
        caller = script(CALLER)
        assert caller.line() == "ready"
        with (tmp_path / "asks").open("w", buffering=1) as ask:
            for _ in range(promise.size(5, 1)):
                ask.write("\n")
                assert answers(caller) == {"old"}

                caller.send(signal.SIGSTOP)
                ask.write("\n")  # what it will do first when it wakes
                os.kill(pid_of(key_of(client), "headgate-ctl"), signal.SIGKILL)
                begun = time.monotonic()
                client.set_traffic("model", {"new": 1.0})
                frozen.append(time.monotonic() - begun)
                caller.send(signal.SIGCONT)
                assert answers(caller) == {"new"}

                eventually(lambda: not client.status().waiting)
                begun = time.monotonic()
                client.set_traffic("model", {"old": 1.0})
                awake.append(time.monotonic() - begun)
            ask.write("\n")
            assert answers(caller) == {"old"}
        assert caller.end() == 0
    promise.within(max(frozen), 2.7, "set_traffic beside a frozen process, as the controller restarts")
    promise.within(max(awake), 0.2, "and when it follows again")
