"""What is lost, and what is not, when processes die, stop, or are replaced under load."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_load import Answer, Connection, Load, get, in_thread, load
from running import died, eventually, is_alive, key_of, on_ray, one_instance, pid_of, slack

import headgate


@pytest.fixture(scope="module")
def shared() -> Iterator[headgate.Client]:
    with one_instance(http_options={"port": 0}) as client:
        yield client


def address_of(client: headgate.Client) -> str:
    assert client.http_address
    return client.http_address


def worker(log: Path, said: str = "done", seconds: float = 0.02) -> Callable[..., Any]:
    """Notes each request's id as it starts, then takes 20 ms."""

    async def work(request: Any) -> str:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{request.query_params.get('id')}\n".encode())
        os.close(fd)
        await asyncio.sleep(seconds)
        return said

    return work


def serve(client: headgate.Client, code: Any, *init_args: Any, **config: Any) -> Any:
    """A sync handle of the endpoint "it", also at /it."""
    client.create_backend("it", code, *init_args, config=config)
    client.create_endpoint("it", backend="it", route="/it")
    return client.get_handle("it")


def replica_pids(client: headgate.Client, tag: str = "it") -> list[int]:
    return [one.pid for one in client.status().replicas if one.backend == tag and one.state == "ready"]


def proxy_pid(client: headgate.Client) -> int:
    (proxy,) = client.status().proxies
    return proxy.pid


def starts(log: Path) -> Counter[str]:
    return Counter(log.read_text().split())


def described(answers: dict[str, Answer]) -> list[tuple[str, int, str]]:
    return [(id, answer.status, answer.text[:80]) for id, answer in answers.items()]


def under_load(client: headgate.Client, change: Callable[[Load], Any]) -> Load:
    """The load during which `await change(load)` ran; a quarter second of it before and after."""

    async def main() -> Load:
        async with load(address_of(client), "/it") as running:
            await asyncio.sleep(0.25)
            await change(running)
            await asyncio.sleep(0.25)
        return running

    return asyncio.run(main())


# --- replicas that die ---


def test_a_killed_replica_costs_at_most_what_it_had_started(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=2, max_concurrent_queries=100)

    async def kill_some(running: Load) -> None:
        for _ in range(6):
            pids = await in_thread(replica_pids, client)
            os.kill(pids[0], signal.SIGKILL)
            await in_thread(eventually, lambda: len(set(replica_pids(client)) - {pids[0]}) == 2)  # noqa: B023

    running = under_load(client, kill_some)
    assert len(running.answers) == running.sent > 50
    started = starts(log)
    assert max(started.values()) == 1, "a request ran twice"
    for id, answer in running.failed.items():
        assert answer.status == 502, (id, answer)
        assert answer.headers["x-headgate-started"] == "1"
    silent = set(running.answers) - set(started)  # killed between the mark and the handler's first line
    assert silent <= set(running.failed)
    assert len(silent) <= 6
    assert len(running.failed) < 6 * 10


def test_an_idempotent_request_is_run_once_more(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=2, max_concurrent_queries=100, idempotent=True)

    async def kill_some(running: Load) -> None:
        for _ in range(3):
            pids = await in_thread(replica_pids, client)
            os.kill(pids[0], signal.SIGKILL)
            await in_thread(eventually, lambda: len(set(replica_pids(client)) - {pids[0]}) == 2)  # noqa: B023
            await asyncio.sleep(0.1)

    running = under_load(client, kill_some)
    assert described(running.failed) == []
    assert max(starts(log).values()) <= 2


def test_a_request_that_kills_its_replica_kills_at_most_two(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = worker(log)

    async def poison(request: Any) -> None:
        await note(request)
        os._exit(1)

    serve(client, poison, idempotent=True)
    answer = asyncio.run(get(address_of(client), "/it?id=x"))
    assert (answer.status, answer.headers.get("x-headgate-started")) == (502, "1")
    assert starts(log) == {"x": 2}


@pytest.mark.local("a Ray ref is bound to its replica; requests over HTTP and handle.call are not, see above")
def test_what_had_not_started_is_run_elsewhere(client: headgate.Client, tmp_path: Path) -> None:
    """A plain replica dies in its first request; those behind it in the same process had not started."""

    def die_or_live(request: Any) -> str:
        with (tmp_path / "log").open("a") as file:
            file.write(request.query_params["id"] + "\n")
        if request.query_params["id"] == "fatal":
            time.sleep(0.5)
            os._exit(1)
        return "alive"

    handle = serve(client, die_or_live, max_concurrent_queries=10)
    fatal = handle.remote(id="fatal")
    refs = [handle.remote(id=str(number)) for number in range(5)]
    assert headgate.get(refs, timeout=10) == ["alive"] * 5
    with pytest.raises(died()):
        headgate.get(fatal, timeout=5)
    assert starts(tmp_path / "log") == {"fatal": 1, **{str(number): 1 for number in range(5)}}


def test_a_stopped_replica_gets_no_new_requests_and_is_replaced(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=2, max_concurrent_queries=100)
    stopped = replica_pids(client)[0]

    async def stop(running: Load) -> None:
        os.kill(stopped, signal.SIGSTOP)
        await in_thread(eventually, lambda: not is_alive(stopped), 20.0)
        await in_thread(eventually, lambda: len(replica_pids(client)) == 2, 10.0)

    running = under_load(client, stop)
    assert max(starts(log).values()) == 1
    assert {answer.status for answer in running.failed.values()} <= {502}
    assert all(answer.headers["x-headgate-started"] == "1" for answer in running.failed.values())
    assert len(running.failed) < 20
    assert set(running.answers) - set(starts(log)) <= set(running.failed)


# --- changes that lose nothing ---


def test_scaling_up_and_down_loses_nothing(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=3, max_concurrent_queries=100)

    async def scale(running: Load) -> None:
        for count in (1, 3, 2, 1):
            await in_thread(client.update_backend_config, "it", {"num_replicas": count})

    running = under_load(client, scale)
    assert described(running.failed) == []
    assert starts(log) == dict.fromkeys(running.answers, 1)


def test_an_update_loses_nothing_and_a_failing_one_changes_nothing(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    handle = serve(client, worker(log, "v1"), num_replicas=2, max_concurrent_queries=100)

    def broken() -> None:
        raise AssertionError

    class Broken:
        def __init__(self) -> None:
            raise ValueError("does not start")

        def __call__(self, request: Any) -> None: ...

    async def update(running: Load) -> None:
        for version in (2, 3):
            await in_thread(client.update_backend, "it", worker(log, f"v{version}"))
            assert (await get(address_of(client), "/it")).text == f"v{version}"
            assert await in_thread(handle.call) == f"v{version}"
            with pytest.raises(headgate.BackendStartError, match="does not start"):
                await in_thread(client.update_backend, "it", Broken)

    running = under_load(client, update)
    assert described(running.failed) == []
    assert {answer.text for answer in running.answers.values()} == {"v1", "v2", "v3"}


def test_moving_to_another_backend_and_deleting_the_old_one_loses_nothing(
    client: headgate.Client, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), max_concurrent_queries=100)

    async def move(running: Load) -> None:
        old = "it"
        for number in range(4):
            new = f"it{number}"
            await in_thread(lambda: client.create_backend(new, worker(log, new)))  # noqa: B023
            await in_thread(client.set_traffic, "it", {new: 1.0})
            await in_thread(client.delete_backend, old)
            assert (await get(address_of(client), "/it")).text == new
            old = new

    running = under_load(client, move)
    assert described(running.failed) == []


def test_a_full_queue_moves_along_when_its_backend_is_deleted(client: headgate.Client, tmp_path: Path) -> None:
    serve(client, worker(tmp_path / "old", "old", 0.3), max_concurrent_queries=1)
    client.create_backend("new", worker(tmp_path / "new", "new"))

    async def main() -> list[Answer]:
        asked = [asyncio.create_task(get(address_of(client), f"/it?id={number}")) for number in range(20)]
        await asyncio.sleep(0.2)
        await in_thread(client.set_traffic, "it", {"new": 1.0})
        await in_thread(client.delete_backend, "it")
        return await asyncio.gather(*asked)

    answers = asyncio.run(main())
    assert {answer.status for answer in answers} == {200}
    assert Counter(answer.text for answer in answers)["new"] > 10


# --- the proxy ---


def test_a_killed_proxy_refuses_nobody_and_is_served_again_at_once(client: headgate.Client, tmp_path: Path) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    back: list[float] = []

    async def kill_some(running: Load) -> None:
        for _ in range(5):
            began = time.monotonic()
            os.kill(await in_thread(proxy_pid, client), signal.SIGKILL)
            while True:
                try:
                    assert (await get(address_of(client), "/it")).status == 200
                    break
                except (ConnectionResetError, EOFError):
                    pass
            back.append(time.monotonic() - began)
            await asyncio.sleep(0.2)

    running = under_load(client, kill_some)
    kinds = {answer.body for answer in running.failed.values()}
    assert b"ConnectionRefusedError" not in kinds
    assert kinds <= {b"ConnectionResetError", b"IncompleteReadError", b"BrokenPipeError"}
    assert max(back) < 1.0 * slack()
    assert len(running.failed) < 0.25 * running.sent


def test_a_stopped_proxy_is_replaced(client: headgate.Client) -> None:
    serve(client, lambda: "here")
    stopped = proxy_pid(client)
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    eventually(lambda: not is_alive(stopped), 15)
    eventually(lambda: asyncio.run(get(address_of(client), "/it")).text == "here")
    assert time.monotonic() - began < 10


# --- the controller ---


def test_a_killed_controller_fails_no_request_and_keeps_all_replicas(client: headgate.Client, tmp_path: Path) -> None:
    handle = serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    before = sorted(replica_pids(client))
    key = key_of(client)

    async def kill_some(running: Load) -> None:
        for _ in range(3):
            os.kill(pid_of(key, "headgate-ctl"), signal.SIGKILL)
            assert await in_thread(handle.call) == "done"
            assert sorted(await in_thread(replica_pids, client)) == before  # answered by its successor
            await asyncio.sleep(0.2)

    running = under_load(client, kill_some)
    assert described(running.failed) == []
    assert sorted(replica_pids(client)) == before
    client.update_backend_config("it", {"num_replicas": 1})
    assert len(replica_pids(client)) == 1


def test_what_was_deployed_survives_the_controller(client: headgate.Client, tmp_path: Path) -> None:
    handle = serve(client, worker(tmp_path / "log", "v1"))
    client.create_backend("other", worker(tmp_path / "log", "other"))
    client.set_traffic("it", {"it": 0.0, "other": 1.0})
    endpoints, backends = client.list_endpoints(), client.list_backends()
    key = key_of(client)
    os.kill(pid_of(key, "headgate-ctl"), signal.SIGKILL)
    assert client.list_endpoints() == endpoints
    assert client.list_backends() == backends
    client.update_backend("other", worker(tmp_path / "log", "new"))
    assert handle.call() == "new"


# --- clients that leave ---


def test_a_client_that_leaves_has_its_async_handler_cancelled_at_once(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def hang(request: Any) -> str:
        if "stay" in request.query_params:
            return "free"
        log.write_text("started")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            log.write_text("cancelled")
            raise
        return "never"

    handle = serve(client, hang, max_concurrent_queries=1)

    async def leave(how: str) -> None:
        connection = await Connection(address_of(client)).open()
        await connection.send("/it")
        await in_thread(eventually, lambda: log.exists() and log.read_text() == "started")
        if how == "reset":
            sock: socket.socket = connection._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.reset()
        else:
            await connection.close()

    for how in ("close", "reset") * 3:
        log.unlink(missing_ok=True)
        asyncio.run(leave(how))
        began = time.monotonic()
        eventually(lambda: log.read_text() == "cancelled", 2.0)
        assert time.monotonic() - began < 0.5
        assert handle.call(stay="1") == "free"


def test_two_hundred_clients_that_reset_leave_all_slots_free(client: headgate.Client) -> None:
    async def hang(request: Any) -> str:
        if "stay" not in request.query_params:
            await asyncio.sleep(3600)
        return "free"

    handle = serve(client, hang, max_concurrent_queries=50)

    async def main() -> None:
        connections = await asyncio.gather(*(Connection(address_of(client)).open() for _ in range(200)))
        for connection in connections:
            await connection.send("/it")
        await asyncio.sleep(0.3)
        for connection in connections:
            sock: socket.socket = connection._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.reset()

    asyncio.run(main())
    assert headgate.get([handle.remote(stay="1") for _ in range(100)], timeout=5) == ["free"] * 100


def test_clients_that_leave_as_soon_as_they_have_asked_leave_all_slots_free(client: headgate.Client) -> None:
    async def quick(request: Any) -> str:
        await asyncio.sleep(0.001)
        return "free"

    handle = serve(client, quick, max_concurrent_queries=3)

    async def main() -> None:
        for delay in [0.0, 0.0002, 0.001] * 60:
            connection = await Connection(address_of(client)).open()
            await connection.send("/it")
            await asyncio.sleep(delay)
            connection.reset()

    asyncio.run(main())
    assert headgate.get([handle.remote() for _ in range(50)], timeout=5) == ["free"] * 50


# --- user code ---


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
