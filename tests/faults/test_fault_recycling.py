"""Replicas that have served their time (max_requests, max_rss_bytes) are replaced, and nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
from http_load import Load, in_thread
from promises import SLACK, Promise
from running import eventually
from under_load import described, replica_pids, serve, starts, under_load

import headgate

START = {"http_options": {"port": 0}}


def leaking(log: Path, leak_bytes: int = 0) -> Any:
    """As under_load.worker; answers with its pid, and keeps so many bytes of each request for ever."""
    kept: list[bytes] = []

    async def work(request: Any) -> int:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{request.query_params.get('id')}\n".encode())
        os.close(fd)
        if leak_bytes:
            kept.append(os.urandom(leak_bytes))
        await asyncio.sleep(0.02)
        return os.getpid()

    return work


def served_by(running: Load) -> dict[str, int]:
    """How many requests each replica served, by its pid."""
    found: dict[str, int] = {}
    for answer in running.answers.values():
        found[answer.text] = found.get(answer.text, 0) + 1
    return found


def start_s(client: headgate.Client) -> float:
    """How long another backend's replica takes to be ready, under this load."""
    began = time.monotonic()
    client.create_backend("other", print)
    took = time.monotonic() - began
    client.delete_backend("other")
    return took


def check_nothing_lost(client: headgate.Client, running: Load, log: Path, promise: Promise) -> None:
    assert described(running.failed) == []
    assert max(starts(log).values()) == 1
    (backend,) = client.status().backends
    assert sum(one.restarts for one in client.status().replicas) == 0  # it is no failure
    promise.none_of(running.sent, "requests failed or run twice")
    promise.says(f"{backend.recycled} replicas replaced; the last: {backend.last_recycled}")


@pytest.mark.timeout(300)
@pytest.mark.promise("max_requests: the replica is replaced, a new one first, 0 lost; not all at once")
def test_a_replica_that_has_served_its_requests_is_replaced(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    log = tmp_path / "log"
    serve(client, leaking(log), num_replicas=2, max_concurrent_queries=100, max_requests=60)
    first = set(replica_pids(client))
    rounds = promise.size(full=40, small=4)
    ready: list[int] = []
    starts_s: list[float] = []

    async def wait(running: Load) -> None:
        while (await in_thread(client.status)).backends[0].recycled < rounds:
            ready.append(len(await in_thread(replica_pids, client)))
            await asyncio.sleep(0.02)
        for _ in range(rounds):
            starts_s.append(await in_thread(start_s, client))

    running = under_load(client, wait)
    check_nothing_lost(client, running, log, promise)
    assert min(ready) >= 2, "fewer replicas than wanted"
    assert max(ready) <= 3, "more than one was replaced at a time"
    eventually(lambda: not first & set(replica_pids(client)))
    served = served_by(running)
    assert max(served.values()) >= 60
    ordinary, slack = statistics.median(starts_s), 1.0 if promise.full else SLACK
    # It says so at 60 to 65, and serves on while a new one starts, perhaps two in turn, and the routers hear of it.
    most = 65 + 200 * (2 * ordinary + 0.2) * slack
    promise.says(f"a replica served {max(served.values())} at most, of max_requests = 60 (promised {most:.0f})")
    promise.says(f"R = {ordinary:.2f} s, the median of {rounds} ordinary starts")
    assert max(served.values()) <= most, sorted(served.values())
    assert "has served" in client.status().backends[0].last_recycled


@pytest.mark.timeout(120)
@pytest.mark.promise("max_rss_bytes: the replica is replaced, a new one first, 0 lost")
def test_a_replica_that_takes_too_much_memory_is_replaced(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    log = tmp_path / "log"
    handle = serve(client, leaking(log, 200_000), num_replicas=2, max_concurrent_queries=100)
    rss = max(rss_of(pid) for pid in replica_pids(client))
    client.update_backend_config("it", {"max_rss_bytes": rss + 20_000_000})
    rounds = promise.size(full=10, small=2)

    async def wait(running: Load) -> None:
        while (await in_thread(client.status)).backends[0].recycled < rounds:
            await asyncio.sleep(0.05)

    running = under_load(client, wait)
    check_nothing_lost(client, running, log, promise)
    assert "max_rss_bytes" in client.status().backends[0].last_recycled
    assert handle.call() in replica_pids(client)


def rss_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_update_of_the_limit_holds_for_replicas_that_run(client: headgate.Client) -> None:
    def pid(request: Any) -> int:
        return os.getpid()

    handle = serve(client, pid)
    before = handle.call()
    for _ in range(20):
        assert handle.call() == before
    client.update_backend_config("it", {"max_requests": 10})
    eventually(lambda: handle.call() != before)


@pytest.mark.local("about what the controller remembers, which is the same on Ray; see tests/core/test_reconcile.py")
def test_a_worn_replica_whose_successor_does_not_start_serves_on(client: headgate.Client, tmp_path: Path) -> None:
    bad = tmp_path / "bad"

    class Moody:
        def __init__(self) -> None:
            if bad.exists():
                raise LookupError("no")

        def __call__(self, request: Any) -> int:
            return os.getpid()

    handle = serve(client, Moody, max_requests=5)
    bad.touch()
    before = handle.call()
    for _ in range(30):
        assert handle.call() == before
        time.sleep(0.01)
    assert any("serves until a new one is ready: it has served 5 requests" in one for one in client.status().waiting)
    bad.unlink()
    for _ in itertools.takewhile(lambda _: handle.call() == before, range(1000)):
        time.sleep(0.01)
    assert handle.call() != before
