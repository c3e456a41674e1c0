"""A controller that dies: no request fails, and everything is as it was."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from http_load import Load, in_thread
from running import key_of, pid_of
from under_load import described, replica_pids, serve, under_load, worker

import headgate

START = {"http_options": {"port": 0}}


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
