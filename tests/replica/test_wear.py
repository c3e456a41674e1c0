"""A worker's wear: it is told once, after the right request or at the next look at its memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import virtual_time
from msgspec.structs import replace

from headgate.core.state import Settings
from headgate.replica.wear import PERIOD_S, Wear, rss_bytes


class FakeWorker:
    """What of a worker its wear needs."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.served = 0
        self.last_request = 0
        self.wear: Wear | None = None

    def serve(self, count: int) -> None:
        for _ in range(count):
            self.served += 1
            if self.served == self.last_request and self.wear is not None:
                self.wear.look()


class NoLoop:
    """A loop whose first turn never comes."""

    def call_soon_threadsafe(self, function: Callable[[], object]) -> None: ...


def made(worker: FakeWorker, told: list[str], *, spread: float = 0.0, rss: list[int] | None = None) -> Wear:
    memory = [0] if rss is None else rss
    return Wear(worker, told.append, spread=spread, rss=lambda: memory[-1])  # type: ignore[arg-type]


def wear(worker: FakeWorker, told: list[str], *, spread: float = 0.0, rss: list[int] | None = None) -> Wear:
    """One that was started, and looks at memory when it is told to."""
    found = made(worker, told, spread=spread, rss=rss)
    found.start(NoLoop())  # type: ignore[arg-type]
    return found


def test_before_it_starts_it_does_nothing() -> None:
    worker, told, memory = FakeWorker(Settings(max_requests=1, max_rss_bytes=1000)), list[str](), list[int]()
    worker.served = 7
    found = made(worker, told, rss=memory)  # there is no memory yet to look at
    assert (worker.wear, worker.last_request, told) == (None, 0, [])
    memory.append(500)
    found.start(NoLoop())  # type: ignore[arg-type]
    assert (worker.wear, worker.last_request) == (found, 1)
    assert told == ["it has served 7 requests (max_requests = 1)"]


def test_it_is_told_with_the_last_request_and_once() -> None:
    worker, told = FakeWorker(Settings(max_requests=100)), list[str]()
    wear(worker, told, spread=0.5)
    worker.serve(104)
    assert told == []
    worker.serve(200)
    assert told == ["it has served 105 requests (max_requests = 100)"]


def test_without_limits_nothing_is_told() -> None:
    worker, told = FakeWorker(Settings()), list[str]()
    wear(worker, told)
    worker.serve(1000)
    assert told == []


def test_a_new_limit_that_was_passed_already_is_told_at_once() -> None:
    worker, told = FakeWorker(Settings()), list[str]()
    found = wear(worker, told)
    worker.serve(50)
    worker.settings = replace(worker.settings, max_requests=50)
    found.configure(worker.settings)
    assert told == ["it has served 50 requests (max_requests = 50)"]


def test_memory_is_looked_at_from_time_to_time() -> None:
    async def main() -> None:
        worker, told, memory = FakeWorker(Settings(max_rss_bytes=1000)), list[str](), [900]
        made(worker, told, rss=memory).start(asyncio.get_running_loop())
        await asyncio.sleep(10 * PERIOD_S)
        assert told == []
        memory.append(1001)
        await asyncio.sleep(PERIOD_S)
        assert told == ["it takes 1001 bytes of memory (max_rss_bytes = 1000)"]
        await asyncio.sleep(10 * PERIOD_S)
        assert len(told) == 1

    virtual_time.run(main())


def test_a_limit_that_no_replica_can_keep_is_said_and_ignored(caplog: pytest.LogCaptureFixture) -> None:
    worker, told = FakeWorker(Settings(max_rss_bytes=1000)), list[str]()
    found = wear(worker, told, rss=[2000])
    found.configure(worker.settings)
    found.look()
    assert told == []
    assert ["it is ignored" in record.getMessage() for record in caplog.records] == [True]
    worker.settings = Settings(max_rss_bytes=1500)
    found.configure(worker.settings)
    assert len(caplog.records) == 2


def test_the_memory_of_this_process_is_found() -> None:
    assert 10**7 < rss_bytes() < 10**10
