"""Changes under load: scaling, updates, moves and deletions lose nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from http_load import Answer, Load, get, in_thread
from under_load import address_of, described, serve, starts, under_load, worker

import headgate

START = {"http_options": {"port": 0}}


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
