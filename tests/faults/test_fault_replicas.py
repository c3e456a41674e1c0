"""Replicas that die or stop under load: what is lost is what they had started."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from http_load import Load, get, in_thread
from running import died, eventually, is_alive
from under_load import address_of, described, replica_pids, serve, starts, under_load, worker

import headgate

START = {"http_options": {"port": 0}}


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
