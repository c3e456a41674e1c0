"""A controller that dies or freezes: no request fails, and everything is as it was.

Killed in the middle of a change: test_fault_failpoints.py. With damaged goals: test_fault_goals.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_load import Load, get, in_thread
from msgspec.structs import replace
from promises import Promise
from running import eventually, grown_controller, is_alive, key_of, on_ray, pid_of
from under_load import address_of, described, proxy_pid, replica_pids, serve, under_load, worker

import headgate
from headgate.controller.store import NEWEST, pack, unpack
from headgate.errors import ControllerUnavailable

START = {"http_options": {"port": 0}}

LOCAL = pytest.mark.local("asks the supervisor's own processes")


def kill_controller(client: headgate.Client) -> int:
    """Its pid, which is free now."""
    pid = pid_of(key_of(client), "headgate-ctl")
    os.kill(pid, signal.SIGKILL)
    return pid


def undisturbed(client: headgate.Client, promise: Promise, change: Callable[[Load], Any]) -> None:
    """While `await change(load)` runs no request fails, and the replicas stay the same processes."""
    before = sorted(replica_pids(client))
    running = under_load(client, change)
    assert described(running.failed) == []
    promise.none_of(running.sent, "requests failed")
    assert sorted(replica_pids(client)) == before


@pytest.mark.promise("controller kill -9: 0 failed requests, back in 0.5 s, the same replica pids")
def test_a_killed_controller_fails_no_request_and_keeps_all_replicas(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    handle = serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    before = sorted(replica_pids(client))
    back_s, is_local = 0.0, not on_ray()

    async def kill_some(running: Load) -> None:
        nonlocal back_s
        for _ in range(promise.size(20, 2)):
            if is_local:
                await in_thread(grown_controller, key_of(client))
            await in_thread(kill_controller, client)
            begun = time.monotonic()
            assert sorted(await in_thread(replica_pids, client)) == before  # answered by its successor
            back_s = max(back_s, time.monotonic() - begun)
            assert await in_thread(handle.call) == "done"

    undisturbed(client, promise, kill_some)
    promise.within(back_s, 0.5 if is_local else 10.0, "back")
    client.update_backend_config("it", {"num_replicas": 1})
    assert len(replica_pids(client)) == 1


def test_what_was_deployed_survives_the_controller(client: headgate.Client, tmp_path: Path) -> None:
    handle = serve(client, worker(tmp_path / "log", "v1"))
    client.create_backend("other", worker(tmp_path / "log", "other"))
    client.set_traffic("it", {"it": 0.0, "other": 1.0})
    endpoints, backends = client.list_endpoints(), client.list_backends()
    kill_controller(client)
    assert client.list_endpoints() == endpoints
    assert client.list_backends() == backends
    client.update_backend("other", worker(tmp_path / "log", "new"))
    assert handle.call() == "new"


@LOCAL
@pytest.mark.promise("controller in a crash loop: killed 10 times as soon as it is there; it backs off, all serves on")
def test_a_controller_in_a_crash_loop_backs_off_and_ends_up_fine(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    times = promise.size(10, 8)
    grown_controller(key_of(client))
    deaths: dict[int, float] = {}  # by pid
    supervisor = str(pid_of(key_of(client), "headgate-super"))
    children = Path("/proc", supervisor, "task", supervisor, "children")

    def kill_the_next() -> None:
        def there() -> bool:
            for pid in map(int, children.read_text().split()):
                with contextlib.suppress(OSError):
                    if pid not in deaths and Path("/proc", str(pid), "comm").read_text() == "headgate-ctl\n":
                        os.kill(pid, signal.SIGKILL)
                        deaths[pid] = time.monotonic()
                        return True
            return False

        eventually(there)

    async def kill_all(running: Load) -> None:
        for _ in range(times):
            await in_thread(kill_the_next)
        begun = time.monotonic()
        await in_thread(client.list_endpoints)
        promise.within(time.monotonic() - begun, 5.5, "back after the last")

    undisturbed(client, promise, kill_all)
    pauses = [after - before for before, after in itertools.pairwise(deaths.values())]
    assert max(pauses) > 0.05 * 2 ** (times - 5)  # the first three are replaced at once
    promise.says(f"{times} in {sum(pauses):.1f} s")
    client.update_backend_config("it", {"num_replicas": 1})


@LOCAL
@pytest.mark.promise("a replica that dies while the controller is away is replaced when that is back")
def test_a_replica_that_died_meanwhile_is_replaced(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    slowest_s, failed, sent = 0.0, 0, 0

    async def kill_both(running: Load) -> None:
        nonlocal slowest_s
        victim, other = await in_thread(replica_pids, client)
        controller = await in_thread(grown_controller, key_of(client))
        os.kill(controller, signal.SIGSTOP)
        os.kill(victim, signal.SIGKILL)
        await in_thread(eventually, lambda: not is_alive(victim))
        os.kill(controller, signal.SIGKILL)
        begun = time.monotonic()
        await in_thread(eventually, lambda: len(replica_pids(client)) == 2)
        slowest_s = max(slowest_s, time.monotonic() - begun)
        assert other in replica_pids(client)

    for _ in range(promise.size(10, 2)):
        running = under_load(client, kill_both)
        assert all(answer.headers.get("x-headgate-started") == "1" for answer in running.failed.values())
        sent, failed = sent + running.sent, failed + len(running.failed)
    promise.within(slowest_s, 1.0, "count back")
    promise.says(f"{failed} of {sent:,} answered 502, all of them started")


@LOCAL
@pytest.mark.promise("a proxy that dies while the controller is away: nobody is refused, answers in 0.5 s")
def test_a_proxy_that_died_meanwhile_is_replaced(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    before = sorted(replica_pids(client))
    slowest_s, tries = 0.0, promise.size(10, 1)
    for _ in range(tries):
        proxy, controller = proxy_pid(client), grown_controller(key_of(client))
        os.kill(controller, signal.SIGSTOP)
        os.kill(proxy, signal.SIGKILL)
        eventually(lambda: not is_alive(proxy))  # noqa: B023
        os.kill(controller, signal.SIGKILL)
        begun = time.monotonic()
        assert asyncio.run(get(address_of(client), "/it")).status == 200
        slowest_s = max(slowest_s, time.monotonic() - begun)
    assert sorted(replica_pids(client)) == before
    promise.within(slowest_s, 0.5, "answered")
    promise.none_of(tries, "connects refused")


@LOCAL
@pytest.mark.promise("replicas that no goal knows are stopped, the others stay")
def test_unknown_replicas_are_stopped(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    slowest_s = 0.0

    async def forget(running: Load) -> None:
        nonlocal slowest_s
        await in_thread(lambda: client.create_backend("unknown", print, config={"num_replicas": 2}))
        unknown = await in_thread(replica_pids, client, "unknown")
        record = Path(key_of(client), NEWEST)
        goals = unpack(record.read_bytes())
        kept = tuple(goal for goal in goals.backends if goal.tag != "unknown")
        record.with_suffix(".other").write_bytes(pack(replace(goals, backends=kept)))
        record.with_suffix(".other").rename(record)
        await in_thread(grown_controller, key_of(client))
        await in_thread(kill_controller, client)
        begun = time.monotonic()
        await in_thread(eventually, lambda: not any(is_alive(pid) for pid in unknown))
        slowest_s = max(slowest_s, time.monotonic() - begun)

    for _ in range(promise.size(5, 1)):
        undisturbed(client, promise, forget)
    promise.within(slowest_s, 1.5, "stopped")


@LOCAL
@pytest.mark.promise("controller SIGSTOP: serving goes on, calls raise in 5 s, it is replaced after 10 s")
def test_a_frozen_controller_is_an_error_and_then_replaced(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    frozen = pid_of(key_of(client), "headgate-ctl")

    async def freeze(running: Load) -> None:
        os.kill(frozen, signal.SIGSTOP)
        await asyncio.sleep(1.0)
        os.kill(frozen, signal.SIGCONT)  # a short stop counts for nothing
        await in_thread(client.list_endpoints)
        os.kill(frozen, signal.SIGSTOP)
        begun = time.monotonic()
        with pytest.raises(ControllerUnavailable, match="no sign of life for 5 s"):
            await in_thread(client.list_endpoints)
        promise.within(time.monotonic() - begun, 5.5, "calls raise")
        assert is_alive(frozen)
        await in_thread(eventually, lambda: not is_alive(frozen), 20.0)
        promise.within(time.monotonic() - begun, 10.5, "ended")
        assert await in_thread(client.list_endpoints)
        promise.within(time.monotonic() - begun, 11.0, "replaced")

    undisturbed(client, promise, freeze)


@LOCAL
def test_a_call_that_waits_is_answered_by_the_successor(client: headgate.Client) -> None:
    with concurrent.futures.ThreadPoolExecutor() as pool:
        os.kill(grown_controller(key_of(client)), signal.SIGSTOP)
        call = pool.submit(client.list_endpoints)
        time.sleep(0.3)
        assert not call.done()
        kill_controller(client)
        assert call.result(5.0) == {}
