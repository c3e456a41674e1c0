"""User code at its worst: what it raises, what it does to its process, how it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
from http_load import get
from running import on_ray
from under_load import address_of, serve

import headgate

START = {"http_options": {"port": 0}}


class Odd:
    """Does what no handler should; `pid` tells whether the process is still the same."""

    def __call__(self, request: Any) -> Any:
        return getattr(self, request.query_params["do"])()

    def pid(self) -> int:
        return os.getpid()

    def exit(self) -> None:
        raise SystemExit(3)

    def interrupt(self) -> None:
        raise KeyboardInterrupt

    def generator_exit(self) -> None:
        raise GeneratorExit

    def cancelled(self) -> None:
        raise asyncio.CancelledError

    def recursion(self) -> None:
        self.recursion()

    def close_stdout(self) -> str:
        import sys

        sys.stdout.close()
        os.close(1)
        return "closed"

    def print_a_lot(self) -> str:
        line = "x" * 1000
        for _ in range(20_000):
            print(line)
        return "printed"

    def chdir(self) -> str:
        os.chdir("/")
        os.umask(0o777)
        return "there"

    def signals(self) -> str:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)
        return "ignored"

    def fork(self) -> str:
        pid = os.fork()
        if pid == 0:
            return "child"
        os.waitpid(pid, 0)
        return "parent"

    def fork_and_wait_there(self) -> None:
        if os.fork() == 0:
            time.sleep(3600)
        time.sleep(0.1)
        os._exit(3)

    def pool(self) -> list[int]:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, [-1, 2, -3])

    def hard_exit(self) -> None:
        os._exit(3)

    def segfault(self) -> None:
        import ctypes

        ctypes.string_at(0)


class OddLater(Odd):
    async def __call__(self, request: Any) -> Any:  # type: ignore[override]
        return getattr(self, request.query_params["do"])()


ODD = pytest.mark.parametrize("kind", [Odd, OddLater])
RAISING = {
    "exit": "SystemExit",
    "interrupt": "KeyboardInterrupt",
    "generator_exit": "GeneratorExit",
    "cancelled": "CancelledError",
    "recursion": "RecursionError",
}


@ODD
def test_whatever_a_handler_raises_is_a_500_and_the_replica_goes_on(client: headgate.Client, kind: Any) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    for name, error in RAISING.items():
        answer = asyncio.run(get(address_of(client), f"/it?do={name}"))
        assert (answer.status, error in answer.text) == (500, True), (name, answer)
        with pytest.raises(headgate.BackendError, match=error):
            handle.call(do=name)
    assert handle.call(do="pid") == before


@ODD
def test_what_a_handler_does_to_its_process_touches_nobody_else(client: headgate.Client, kind: Any) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    signals = () if on_ray() else ("signals",)  # a Ray worker's main thread is Ray's
    for name in ("chdir", *signals, "print_a_lot", "close_stdout"):
        assert asyncio.run(get(address_of(client), f"/it?do={name}")).status == 200, name
        assert handle.call(do="pid") == before, name
    client.update_backend_config("it", {"num_replicas": 2})
    client.update_backend_config("it", {"num_replicas": 1})
    assert asyncio.run(get(address_of(client), "/it?do=pid")).status == 200


@ODD
def test_a_fork_in_a_handler_answers_once(client: headgate.Client, kind: Any) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    for _ in range(3):
        assert asyncio.run(get(address_of(client), "/it?do=fork")).text == "parent"
        assert handle.call(do="fork") == "parent"
    assert handle.call(do="pid") == before


@pytest.mark.local("threads of Ray's in its workers may hold locks that a fork never gets back")
@ODD
def test_a_handler_may_use_processes_of_its_own(client: headgate.Client, kind: Any) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    assert asyncio.run(get(address_of(client), "/it?do=pool")).json() == [1, 2, 3]
    assert handle.call(do="pool") == [1, 2, 3]
    assert handle.call(do="pid") == before


@ODD
@pytest.mark.parametrize("how", ["hard_exit", "segfault", "fork_and_wait_there"])
def test_a_handler_that_kills_its_process_fails_its_own_request_only(
    client: headgate.Client, kind: Any, how: str
) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    answer = asyncio.run(get(address_of(client), f"/it?do={how}"))
    assert (answer.status, answer.headers.get("x-headgate-started")) == (502, "1")
    assert handle.options(timeout_s=10).call(do="pid") != before
    with pytest.raises(headgate.ReplicaDied):
        handle.call(do=how)
