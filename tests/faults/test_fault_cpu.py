"""A machine with four times more to do than it can: slow is not dead."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import needs
import pytest
from http_load import Load, in_thread
from promises import Promise
from running import instance_pids, key_of
from under_load import described, serve, starts, under_load, worker

import headgate

START = {"http_options": {"port": 0}}
pytestmark = pytest.mark.local("whom headgate's controller takes for dead; Ray has health checks of its own")

TIMES = 4


@contextmanager
def busy_machine() -> Iterator[int]:
    """So many processes that compute all the time, while the block runs."""
    count = TIMES * len(os.sched_getaffinity(0))
    command = [needs.program("stress-ng"), "--quiet", "--cpu", str(count), "--temp-path", "/tmp"]
    stress = subprocess.Popen(command)
    try:
        yield count
    finally:
        stress.terminate()  # it ends its workers
        stress.wait()


@pytest.mark.timeout(150)
@pytest.mark.promise("4 x CPU overcommit: no healthy process killed, no request lost")
def test_a_busy_machine(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    log = tmp_path / "log"
    handle = serve(client, worker(log), num_replicas=2, max_concurrent_queries=100)
    before = set(instance_pids(key_of(client)))
    seconds = promise.size(60, 5)
    calls = 0

    async def be_busy(running: Load) -> None:
        nonlocal calls
        with busy_machine() as count:
            until = asyncio.get_running_loop().time() + seconds
            while asyncio.get_running_loop().time() < until:
                assert await in_thread(handle.call) == "done"
                calls += 1
            promise.says(f"{count} busy processes on {len(os.sched_getaffinity(0))} cores for {seconds} s")

    running = under_load(client, be_busy)
    assert set(instance_pids(key_of(client))) == before
    assert described(running.failed) == []
    assert len(running.answers) == running.sent
    assert max(count for id, count in starts(log).items() if id != "None") == 1
    promise.none_of(running.sent + calls, "requests lost")
    promise.none_of(len(before), "processes killed or replaced")
