"""User code at its worst: what it raises, what it does to its process, how it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_load import get, get_many
from promises import Promise
from running import eventually, is_alive, on_ray, one_instance
from under_load import address_of, serve

import headgate


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the instance's processes write to stderr."""
    return tmp_path_factory.mktemp("log") / "stderr"


@pytest.fixture(scope="module")
def shared(log: Path) -> Iterator[headgate.Client]:
    own = os.dup(2)
    with log.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        with one_instance(http_options={"port": 0}) as client:
            os.dup2(own, 2)
            yield client
    finally:
        os.dup2(own, 2)
        os.close(own)


class Tail:
    """What came to the log since this was made."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._since = log.stat().st_size

    def __contains__(self, text: str) -> bool:
        return self.count(text) > 0

    def count(self, text: str) -> int:
        return self._log.read_bytes()[self._since :].decode("utf-8", "replace").count(text)


class Odd:
    """Does what no handler should; `pid` tells whether the process is still the same."""

    def __init__(self, lines: int = 0) -> None:
        self.lines = lines

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

    def overflow(self) -> None:
        import sys

        sys.setrecursionlimit(10**9)
        sorted([1], key=lambda _: self.overflow())  # through C, so that it is the stack that ends

    def close_stdout(self) -> str:
        import sys

        sys.stdout.close()
        os.close(1)
        return "closed"

    def print_a_lot(self) -> str:
        line = "x" * 1000
        for _ in range(self.lines):
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


@pytest.mark.promise("whatever a handler raises, SystemExit too: 500 with its request id, and the replica stays")
@ODD
def test_whatever_a_handler_raises_is_a_500_and_the_replica_goes_on(
    client: headgate.Client, kind: Any, promise: Promise
) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    rounds = promise.size(full=200, small=5)
    for number in range(rounds):
        for name, error in RAISING.items():
            answer = asyncio.run(get(address_of(client), f"/it?do={name}", {"X-Request-ID": f"id-{number}"}))
            assert (answer.status, error in answer.text) == (500, True), (name, answer)
            assert answer.headers["x-request-id"] == f"id-{number}"
            with pytest.raises(headgate.BackendError, match=error):
                handle.call(do=name)
    assert handle.call(do="pid") == before
    promise.none_of(2 * rounds * len(RAISING), "answered otherwise, or fatal to the replica")


# --- what it does to its process ---


@pytest.mark.timeout(300)
@pytest.mark.promise("printing a gigabyte, closing stdout, changing cwd, umask or signals touches nobody else")
@ODD
def test_what_a_handler_does_to_its_process_touches_nobody_else(
    client: headgate.Client, kind: Any, promise: Promise
) -> None:
    kilobytes = promise.size(full=1_000_000, small=20_000)
    handle = serve(client, kind, kilobytes)
    client.create_backend("other", Odd)
    client.create_endpoint("other", backend="other", route="/other")
    others = client.get_handle("other").call(do="pid")
    before = handle.call(do="pid")
    signals = () if on_ray() else ("signals",)  # a Ray worker's main thread is Ray's
    slowest = 0.0

    async def do(name: str) -> None:
        nonlocal slowest
        doing = asyncio.create_task(get(address_of(client), f"/it?do={name}"))
        while True:
            began = time.monotonic()
            assert (await get(address_of(client), "/other?do=pid")).json() == others
            slowest = max(slowest, time.monotonic() - began)
            if doing.done():
                break
        assert (await doing).status == 200, name

    for name in ("chdir", *signals, "print_a_lot", "close_stdout"):
        asyncio.run(do(name))
        assert handle.call(do="pid") == before, name
    client.update_backend_config("it", {"num_replicas": 2})
    client.update_backend_config("it", {"num_replicas": 1})
    assert asyncio.run(get(address_of(client), "/it?do=pid")).status == 200
    promise.within(slowest, 0.5, f"the slowest answer of another backend while {kilobytes / 1000:g} MB were printed")


@pytest.mark.promise("a fork in a handler answers once")
@ODD
def test_a_fork_in_a_handler_answers_once(client: headgate.Client, kind: Any, promise: Promise) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    forks = promise.size(full=50, small=3)
    for _ in range(forks):
        assert asyncio.run(get(address_of(client), "/it?do=fork")).text == "parent"
        assert handle.call(do="fork") == "parent"
    assert handle.call(do="pid") == before
    promise.none_of(2 * forks, "answered twice or by the child")


@pytest.mark.local("threads of Ray's in its workers may hold locks that a fork never gets back")
@ODD
def test_a_handler_may_use_processes_of_its_own(client: headgate.Client, kind: Any) -> None:
    handle = serve(client, kind)
    before = handle.call(do="pid")
    assert asyncio.run(get(address_of(client), "/it?do=pool")).json() == [1, 2, 3]
    assert handle.call(do="pool") == [1, 2, 3]
    assert handle.call(do="pid") == before


@pytest.mark.promise("segfault, os._exit, stack overflow: 502 for that request only, and the stack is in the log")
@ODD
@pytest.mark.parametrize("how", ["hard_exit", "segfault", "overflow", "fork_and_wait_there"])
def test_a_handler_that_kills_its_process_fails_its_own_request_only(
    client: headgate.Client, kind: Any, how: str, promise: Promise, log: Path
) -> None:
    count = promise.size(full=10, small=1)
    for _ in range(count):
        handle = serve(client, kind)  # anew each time: one that crashes again and again backs off
        tail = Tail(log)
        before = handle.options(timeout_s=10).call(do="pid")
        answer = asyncio.run(get(address_of(client), f"/it?do={how}"))
        if how == "overflow" and answer.status == 500:  # CPython 3.12 and later end it themselves
            assert "RecursionError" in answer.text
            assert handle.call(do="pid") == before
        else:
            assert (answer.status, answer.headers.get("x-headgate-started")) == (502, "1"), answer
            if how in ("segfault", "overflow") and not on_ray():
                assert "Fatal Python error: Segmentation fault" in tail
                assert f"in {how}" in tail
            assert handle.options(timeout_s=10).call(do="pid") != before
            with pytest.raises(headgate.ReplicaDied):
                handle.call(do=how)
        client.delete_endpoint("it")
        client.delete_backend("it")
    promise.none_of(2 * count, "answered otherwise, or run again")


# --- what it returns ---


WRONG = {
    "short": (lambda n: [1] * (n - 1), ("2 results for 3 requests",)),
    "long": (lambda n: [1] * (n + 1), ("4 results for 3 requests",)),
    "dict": (lambda n: dict.fromkeys(range(n)), ("dict",)),
    "set": (lambda n: set(range(n)), ("set",)),
    "none": (lambda n: None, ("NoneType",)),
    "text": (lambda n: "x" * n, ("str",)),
}


@pytest.mark.promise("wrong batch length or type: 500 for that batch with one clear message")
@pytest.mark.parametrize("is_async", [False, True])
def test_a_wrong_batch_result_fails_that_batch_only(client: headgate.Client, is_async: bool, promise: Promise) -> None:
    makes = {kind: make for kind, (make, _) in WRONG.items()}

    def plain(requests: list[Any]) -> Any:
        bad = next((each for request in requests if (each := request.query_params.get("bad"))), None)
        return makes[bad](len(requests)) if bad else ["good"] * len(requests)

    async def later(requests: list[Any]) -> Any:
        return plain(requests)

    code = headgate.accept_batch(later if is_async else plain)
    handle = serve(client, code, max_batch_size=3, batch_wait_timeout=0.3)
    rounds = promise.size(full=10, small=1)
    for kind, (_, texts) in list(WRONG.items()) * rounds:
        refs = [handle.remote(bad=kind) for _ in range(2)]
        answer = asyncio.run(get(address_of(client), f"/it?bad={kind}"))
        assert answer.status == 500
        messages = [answer.text]
        for ref in refs:
            with pytest.raises(headgate.RequestError) as caught:
                headgate.get(ref, timeout=5)
            messages.append(str(caught.value))
        for message in messages:
            assert all(text in message for text in texts), message
        assert len({message.removeprefix("BackendError: ") for message in messages}) == 1, messages
    assert handle.call() == "good"
    promise.none_of(3 * rounds * len(WRONG), "answered otherwise")


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__("it holds a lock")
        self.lock = threading.Lock()


@pytest.mark.promise("an argument, result or exception that does not pickle: a typed error that names it")
@pytest.mark.parametrize("is_async", [False, True])
def test_what_does_not_pickle_is_named(client: headgate.Client, is_async: bool, promise: Promise) -> None:
    def plain(request: Any) -> Any:
        if request.data == "raise":
            raise Unpicklable
        return threading.Lock() if request.data == "return" else os.getpid()

    async def later(request: Any) -> Any:
        return plain(request)

    handle = serve(client, later if is_async else plain)
    before = handle.call()
    count = promise.size(full=100, small=3)
    for _ in range(count):
        with pytest.raises(headgate.SerializationError, match="lock"):
            handle.call("return")
        with pytest.raises(TypeError, match="lock"):
            handle.call(threading.Lock())
        with pytest.raises(headgate.BackendError, match="Unpicklable: it holds a lock") as caught:
            handle.call("raise")
        assert "raise Unpicklable" in caught.value.remote_traceback
    assert handle.call() == before
    promise.none_of(3 * count, "ended otherwise")


# --- how long it takes ---


@pytest.mark.promise("a handler that blocks the loop is found: logged with the stack after 1 s, and not called dead")
def test_a_loop_that_is_held_up_for_a_while_costs_nothing(client: headgate.Client, promise: Promise, log: Path) -> None:
    async def slow(request: Any) -> int:
        time.sleep(float(request.query_params.get("s", "0")))
        return os.getpid()

    handle = serve(client, slow, health_check_timeout_s=0.5)
    before = handle.call()
    count = promise.size(full=5, small=1)
    tail = Tail(log)
    for _ in range(count):
        assert handle.call(s="2.5") == before
    assert handle.call() == before
    if not on_ray():
        assert tail.count("the event loop has not turned for") == count
        assert "in slow" in tail
    promise.none_of(count, "unnoticed, noticed twice or fatal to the replica")


def never_returns(request: Any) -> int:
    if "forever" in request.query_params:
        time.sleep(3600)
    return os.getpid()


async def never_returns_later(request: Any) -> int:
    return never_returns(request)


@pytest.mark.timeout(300)
@pytest.mark.promise("a handler that never returns: 504 at its deadline, replaced health_check_timeout_s later")
@pytest.mark.parametrize("code", [never_returns, never_returns_later])
def test_a_handler_that_never_returns_costs_its_replica(
    client: headgate.Client, promise: Promise, code: Callable[..., Any]
) -> None:
    """A plain one, or one that blocks its loop for ever; those behind it in the replica had not started."""
    handle = serve(client, code, request_timeout_s=0.5, health_check_timeout_s=1.0, max_concurrent_queries=8)
    deadlines, replaced = [], []
    for _ in range(promise.size(full=20, small=1)):
        before = handle.options(timeout_s=10).call()
        began = time.monotonic()
        answers = asyncio.run(get_many(address_of(client), ["/it?forever=1", "/it", "/it"]))
        deadlines.append(time.monotonic() - began)
        assert [answer.status for answer in answers] == [504, 504, 504]
        eventually(lambda: not is_alive(before), 15)  # noqa: B023
        replaced.append(time.monotonic() - began)

        def after() -> int | None:
            try:
                return handle.call()
            except headgate.RequestError:
                return None

        assert eventually(after, 8) != before
    assert min(deadlines) >= 0.5
    assert min(replaced) >= 1.5
    promise.within(max(deadlines) - 0.5, 0.2, "504 after the deadline")
    slow_to_look = 0.0 if code is never_returns else 1.5  # a loop is looked at twice a second, and is late by then
    promise.within(max(replaced) - 1.5, 0.3 + slow_to_look, "the replica's end after health_check_timeout_s")


@pytest.mark.promise("an async handler that never returns: 504 at its deadline, and it is cancelled")
def test_an_async_handler_is_cancelled_at_its_deadline(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    log = tmp_path / "log"

    async def slow(request: Any) -> str:
        try:
            await asyncio.sleep(float(request.query_params.get("s", "0")))
        except asyncio.CancelledError:
            log.write_text("cancelled")
            raise
        return "done"

    handle = serve(client, slow, request_timeout_s=0.3, max_concurrent_queries=1)
    late = []
    for _ in range(promise.size(full=50, small=2)):
        log.unlink(missing_ok=True)
        began = time.monotonic()
        assert asyncio.run(get(address_of(client), "/it?s=60")).status == 504
        eventually(lambda: log.exists() and log.read_text() == "cancelled")
        late.append(time.monotonic() - began - 0.3)
        assert handle.call() == "done"  # its slot is free again
    promise.within(max(late), 0.2, "cancelled after the deadline")
