"""Changes under load, on kept connections, new ones and handles: nothing is lost, nobody sees an old version again."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from http_load import Answer, Load, get, in_thread, load
from promises import Promise
from running import on_ray
from under_load import address_of, described, serve, starts, under_both_loads, worker

import headgate

START = {"http_options": {"port": 0}}

#: Requests on connections of their own; on Ray everything of a cluster shares the machine with them.
FRESH_PER_S = 20 if on_ray() else 200
EACH = {"num_replicas": 2, "max_concurrent_queries": 100}


class Seen(NamedTuple):
    """One answer: who asked one after the other (a connection, a handle's thread or task), when, and what it said."""

    asker: object
    sent: float
    ended: float
    version: int


class Update(NamedTuple):
    """When it was called and when it returned."""

    version: int
    called: float
    returned: float


def code(kind: str, version: int) -> Any:
    """A backend that answers with its version."""

    async def waits(request: Any) -> str:
        await asyncio.sleep(0.02)
        return str(version)

    def plain(request: Any) -> str:
        time.sleep(0.001)
        return str(version)

    async def batches(requests: list[Any]) -> list[str]:
        await asyncio.sleep(0.01)
        return [str(version)] * len(requests)

    return {"async": waits, "plain": plain, "batched": headgate.accept_batch(batches)}[kind]


class Raises:
    def __init__(self) -> None:
        raise ValueError("does not start")

    @headgate.accept_batch
    def __call__(self, requests: list[Any]) -> None: ...


class Crashes:
    def __init__(self) -> None:
        os._exit(3)

    @headgate.accept_batch
    def __call__(self, requests: list[Any]) -> None: ...


#: What is known of a process that ended: Ray does not tell its status.
ENDED = "its process ended unexpectedly" if on_ray() else "exited with status 3"
#: Versions that do not start, and what the update says.
BROKEN = (Raises, "does not start"), ("no_such_module:it", "no_such_module"), (Crashes, ENDED)


def answers_of(*loads: Load) -> list[Seen]:
    return [
        Seen(one.connection, one.sent, one.ended, int(one.answer.text)) for running in loads for one in running.asked
    ]


def check_versions(seen: list[Seen], updates: list[Update]) -> None:
    """Nobody sees an older version after a newer one, nor one that was not in force while the request ran."""
    newest: dict[object, int] = defaultdict(int)
    for one in sorted(seen, key=lambda one: one.ended):
        assert one.version >= newest[one.asker], one
        newest[one.asker] = one.version
        in_force = max(update.version for update in updates if update.returned <= one.sent)
        called = max(update.version for update in updates if update.called <= one.ended)
        assert in_force <= one.version <= called, (one, in_force, called)


class Handles:
    """Calls through a sync handle on a thread and through an async one, each one after the other."""

    def __init__(self, client: headgate.Client) -> None:
        self._sync = client.get_handle("it")
        self._async = client.get_handle("it", sync=False)
        self._stop = threading.Event()
        self.seen: list[Seen] = []

    def _note(self, asker: str, sent: float, answer: Any) -> None:
        self.seen.append(Seen(asker, sent, time.monotonic(), int(answer)))

    def on_a_thread(self) -> None:
        while not self._stop.is_set():
            sent = time.monotonic()
            self._note("sync", sent, self._sync.call())
            time.sleep(0.01)

    async def on_the_loop(self) -> None:
        while not self._stop.is_set():
            sent = time.monotonic()
            self._note("async", sent, await self._async.call())
            await asyncio.sleep(0.01)

    async def during(self, change: Callable[[], Awaitable[Any]]) -> None:
        calls = asyncio.gather(in_thread(self.on_a_thread), self.on_the_loop())
        try:
            await change()
        finally:
            self._stop.set()
            await calls


@pytest.mark.promise("20 updates, 5 of them failing: 0 lost, 0 5xx, one version each, never an older one again")
@pytest.mark.parametrize("kind", ["async", "plain", "batched"])
def test_updates_lose_nothing_and_nobody_sees_an_older_version_again(
    client: headgate.Client, promise: Promise, kind: str
) -> None:
    batching = {"max_batch_size": 8, "batch_wait_timeout": 0.005} if kind == "batched" else {}
    serve(client, code(kind, 1), **EACH, **batching)
    count = promise.size(20, 4)
    failing = set(promise.random.sample(range(count), max(1, count // 4)))
    updates = [Update(1, 0.0, 0.0)]
    refused: list[float] = []
    handles = Handles(client)

    async def update() -> None:
        for number in range(count):
            called = time.monotonic()
            if number in failing:
                wrong, says = BROKEN[(len(refused) + ord(kind[0])) % 3]
                with pytest.raises(headgate.BackendStartError, match=says):
                    await in_thread(client.update_backend, "it", wrong)
                refused.append(time.monotonic() - called)
            else:
                version = updates[-1].version + 1
                updates.append(Update(version, called, float("inf")))
                await in_thread(client.update_backend, "it", code(kind, version))
                updates[-1] = Update(version, called, time.monotonic())

    loads = under_both_loads(client, lambda: handles.during(update), fresh_per_s=FRESH_PER_S)
    for running in loads:
        assert running.unconnected == []
        assert described(running.failed) == []
    seen = [*answers_of(*loads), *handles.seen]
    check_versions(seen, updates)
    assert {one.version for one in seen} == {update.version for update in updates}
    promise.none_of(len(seen), "requests lost, failed, or answered by an older version")
    promise.says(f"{len(refused)} failing updates refused after at most {max(refused):.2g} s")


@pytest.mark.promise("updates: a stream under way ends whole, from the version it began with")
def test_a_stream_that_is_under_way_during_an_update_ends_whole(client: headgate.Client, promise: Promise) -> None:
    parts = 20

    def streams(version: int) -> Any:
        async def stream(request: Any) -> Any:
            for _ in range(parts):
                yield f"{version} "
                await asyncio.sleep(0.02)

        return stream

    def plainly(version: int) -> Any:
        def stream(request: Any) -> Any:
            for _ in range(parts):
                yield f"{version} "
                time.sleep(0.005)

        return stream

    serve(client, streams(1), **EACH)

    async def update() -> None:
        for number in range(promise.size(10, 3)):
            # a plain one serves one at a time, and is pulled an item at a time
            make = plainly if number % 3 == 2 else streams
            await in_thread(client.update_backend, "it", make(number + 2))

    async def main() -> Load:
        async with load(address_of(client), "/it", 15) as running:
            await update()
            await asyncio.sleep(0.2)
        return running

    running = asyncio.run(main())
    assert described(running.failed) == []
    for one in running.asked:
        said = one.answer.text.split()
        assert len(said) == parts, said
        assert len(set(said)) == 1, said
    newest: dict[object, int] = defaultdict(int)
    for one in sorted(running.asked, key=lambda one: one.ended):
        assert int(one.answer.text.split()[0]) >= newest[one.connection]
        newest[one.connection] = int(one.answer.text.split()[0])
    promise.none_of(len(running.asked), "streams broken or mixed")


@pytest.mark.promise("scale up and down: 0 lost, 0 5xx, each request runs once")
def test_scaling_up_and_down_loses_nothing(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=3, max_concurrent_queries=100)

    async def scale() -> None:
        for number in range(promise.size(20, 4)):
            await in_thread(client.update_backend_config, "it", {"num_replicas": (1, 3, 2, 1)[number % 4]})

    kept, fresh = under_both_loads(client, scale, fresh_per_s=FRESH_PER_S)
    assert described(kept.failed | fresh.failed) == []
    assert starts(log) == dict.fromkeys([*kept.answers, *fresh.answers], 1)
    promise.none_of(kept.sent + fresh.sent, "requests lost, failed or run twice")


@pytest.mark.promise("set_traffic and delete_backend: 0 lost, 0 5xx, never an older version again")
def test_moving_to_another_backend_and_deleting_the_old_one_loses_nothing(
    client: headgate.Client, promise: Promise
) -> None:
    serve(client, code("async", 1), **EACH)
    updates = [Update(1, 0.0, 0.0)]

    async def move() -> None:
        old = "it"
        for number in range(2, 2 + promise.size(20, 4)):
            new = f"it{number}"
            await in_thread(lambda: client.create_backend(new, code("async", number)))  # noqa: B023
            updates.append(Update(number, time.monotonic(), float("inf")))
            await in_thread(client.set_traffic, "it", {new: 1.0})
            updates[-1] = updates[-1]._replace(returned=time.monotonic())
            await in_thread(client.delete_backend, old)
            old = new

    handles = Handles(client)
    loads = under_both_loads(client, lambda: handles.during(move))
    assert described(loads[0].failed | loads[1].failed) == []
    seen = [*answers_of(*loads), *handles.seen]
    check_versions(seen, updates)
    promise.none_of(len(seen), "requests lost, failed, or answered by an older version")


@pytest.mark.promise("endpoints that come and go: never a 404 at a route that is there all the time")
def test_routes_that_come_and_go_leave_the_others_alone(client: headgate.Client, promise: Promise) -> None:
    serve(client, code("async", 1), **EACH)
    client.create_backend("other", code("async", 2))
    routes = ["/it/more", "/{name}", "/{name}/{rest:path}", "/i", "/it2", "/other", "/it/{id:int}"]

    async def change() -> None:
        for number in range(promise.size(60, 10)):
            route = promise.random.choice(routes)
            await in_thread(lambda: client.create_endpoint(f"e{number}", backend="other", route=route))  # noqa: B023
            await asyncio.sleep(promise.random.uniform(0.0, 0.02))
            await in_thread(client.delete_endpoint, f"e{number}")

    loads = under_both_loads(client, change)
    assert described(loads[0].failed | loads[1].failed) == []
    assert {one.version for one in answers_of(*loads)} == {1}
    promise.none_of(sum(running.sent for running in loads), "requests lost, failed or sent elsewhere")


@pytest.mark.promise("delete_endpoint: what is in flight is answered, then 404, nothing else")
def test_an_endpoint_that_is_deleted_answers_what_it_has_and_then_404(
    client: headgate.Client, promise: Promise
) -> None:
    client.create_backend("it", code("async", 1), config=EACH)
    asked = 0

    async def once() -> int:
        async with (
            load(address_of(client), "/it", 100) as kept,
            load(address_of(client), "/it", 100, True) as fresh,
        ):
            await asyncio.sleep(0.05)
            called = time.monotonic()
            await in_thread(client.delete_endpoint, "it")
            returned = time.monotonic()
            await asyncio.sleep(0.1)
        for one in (*kept.asked, *fresh.asked):
            assert one.answer.status in (200, 404), one.answer
            assert one.answer.status == 200 or one.ended >= called
            assert one.answer.status == 404 or one.sent <= returned
        return kept.sent + fresh.sent

    for _ in range(promise.size(20, 2)):
        client.create_endpoint("it", backend="it", route="/it")
        asked += asyncio.run(once())
    promise.none_of(asked, "requests lost or failed otherwise")


@pytest.mark.promise("updates: nobody is shed while a new version takes over, though hardly anybody may wait")
def test_an_update_sheds_nobody_where_hardly_anybody_may_wait(client: headgate.Client, promise: Promise) -> None:
    serve(client, code("async", 1), **EACH, max_queued_requests=1)

    async def update() -> None:
        for number in range(promise.size(20, 3)):
            await in_thread(client.update_backend, "it", code("async", number + 2))

    loads = under_both_loads(client, update, fresh_per_s=20 if on_ray() else 300)
    assert described(loads[0].failed | loads[1].failed) == []
    promise.none_of(sum(running.sent for running in loads), "requests shed")


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
