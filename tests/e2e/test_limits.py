"""What a replica holds, what waits for it, and for how long: over proxy and handles together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from held_up import Block
from http_load import Connection, get, get_many
from running import eventually
from under_load import address_of, serve

import headgate

START = {"http_options": {"port": 0}}


class Crowd:
    """Knows how many requests are in it; answers with the most there ever were."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.inside = self.most = 0

    async def __call__(self, request: Any) -> int:
        self.inside += 1
        self.most = max(self.most, self.inside)
        await asyncio.sleep(self.seconds)
        self.inside -= 1
        return self.most


class Caller:
    """A backend that sends `data` requests to "it" at once, and says how long each took."""

    def __init__(self) -> None:
        self.handle = headgate.connect().get_handle("it", sync=False)

    async def __call__(self, request: Any) -> list[tuple[int, float]]:
        async def one() -> tuple[int, float]:
            began = time.monotonic()
            return await self.handle.call(), time.monotonic() - began

        return list(await asyncio.gather(*(one() for _ in range(request.data))))


def from_all_sides(client: headgate.Client, handle: Any, each: int) -> dict[str, list[tuple[int, float]]]:
    """`each` requests at once from the proxy, this process and another backend's: (answer, seconds)."""
    client.create_backend("caller", Caller)
    client.create_endpoint("caller", backend="caller")
    caller = client.get_handle("caller")

    async def over_http() -> tuple[int, float]:
        began = time.monotonic()
        return (await get(address_of(client), "/it")).json(), time.monotonic() - began

    async def by_handle() -> tuple[int, float]:
        began = time.monotonic()
        return await asyncio.to_thread(handle.call), time.monotonic() - began

    async def main() -> dict[str, list[tuple[int, float]]]:
        other = asyncio.create_task(asyncio.to_thread(caller.call, each))
        http, own = await asyncio.gather(
            asyncio.gather(*(over_http() for _ in range(each))),
            asyncio.gather(*(by_handle() for _ in range(min(each, 4))), *(later() for _ in range(each - 4))),
        )
        return {"http": list(http), "own": list(own), "other": await other}

    async def later() -> tuple[int, float]:
        began = time.monotonic()
        return await client.get_handle("it", sync=False).call(), time.monotonic() - began

    return asyncio.run(main())


@pytest.mark.parametrize("limit", [1, 3])
def test_the_limit_of_a_replica_is_strict_over_all_callers(client: headgate.Client, limit: int) -> None:
    handle = serve(client, Crowd, 0.01, max_concurrent_queries=limit)
    answers = from_all_sides(client, handle, 40)
    assert max(most for each in answers.values() for most, _ in each) == limit


def test_nobody_starves_beside_others(client: headgate.Client) -> None:
    handle = serve(client, Crowd, 0.01, max_concurrent_queries=2)
    answers = from_all_sides(client, handle, 60)  # 180 requests: 0.9 s of work
    halves = {side: sorted(seconds for _, seconds in each)[len(each) // 2] for side, each in answers.items()}
    lasts = {side: max(seconds for _, seconds in each) for side, each in answers.items()}
    assert max(halves.values()) < 3 * min(halves.values()), halves
    assert max(lasts.values()) < 3 * min(lasts.values()), lasts


def test_a_trickle_gets_through_beside_a_flood(client: headgate.Client) -> None:
    """The proxy has hundreds waiting; a handle's single requests each take about a turn, not a queue."""
    handle = serve(client, Crowd, 0.005, max_concurrent_queries=2)

    async def main() -> list[float]:
        flood = asyncio.create_task(get_many(address_of(client), ["/it"] * 600))
        await asyncio.sleep(0.3)
        took = []
        for _ in range(10):
            began = time.monotonic()
            await asyncio.to_thread(handle.call)
            took.append(time.monotonic() - began)
        assert not flood.done()
        assert {answer.status for answer in await flood} == {200}
        return took

    assert max(asyncio.run(main())) < 0.5


def test_a_new_limit_holds_when_the_call_returns(client: headgate.Client) -> None:
    handle = serve(client, Crowd, 0.2, max_concurrent_queries=1)
    assert max(headgate.get([handle.remote() for _ in range(3)])) == 1
    client.update_backend_config("it", {"max_concurrent_queries": 3})
    assert max(headgate.get([handle.remote() for _ in range(6)])) == 3


def test_full_replicas_are_skipped_and_idle_ones_take_turns(client: headgate.Client) -> None:
    async def who(request: Any) -> str:
        await asyncio.sleep(float(request.query_params.get("s", "0")))
        return headgate.get_current_replica_tag()

    handle = serve(client, who, num_replicas=3, max_concurrent_queries=1)
    assert len({handle.call() for _ in range(3)}) == 3
    busy = [handle.remote(s="1.5"), handle.remote(s="1.5")]
    free = {handle.call() for _ in range(6)}
    assert len(free) == 1
    assert not free & set(headgate.get(busy))


# --- the queue ---


@pytest.fixture
def block(client: headgate.Client, tmp_path: Path) -> Callable[..., Block]:
    return lambda **config: Block(client, tmp_path, **config)


def test_too_many_waiting_requests_are_refused_with_a_time_to_retry(
    client: headgate.Client, block: Callable[..., Block]
) -> None:
    held = block(max_queued_requests=3)
    first = held.handle.remote(id="first")
    eventually(lambda: held.started)

    async def main() -> None:
        waiting = [asyncio.create_task(get(address_of(client), f"/it?id=http{n}")) for n in range(3)]
        await asyncio.sleep(0.2)
        began = time.monotonic()
        refused = await get_many(address_of(client), ["/it?id=refused"] * 5)
        assert time.monotonic() - began < 0.5
        assert {answer.status for answer in refused} == {503}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        assert all("max_concurrent_queries" in answer.text for answer in refused)
        held.release()
        assert [(await answer).status for answer in waiting] == [200] * 3

    asyncio.run(main())
    assert headgate.get(first) == "done"
    assert "refused" not in held.started


def test_a_handle_s_queue_is_its_own_and_overflows_as_backend_overloaded(
    client: headgate.Client, block: Callable[..., Block]
) -> None:
    held = block(max_queued_requests=2)
    outcomes: list[Any] = []

    def ask(number: int) -> None:
        try:
            outcomes.append(held.handle.call(id=str(number)))
        except headgate.BackendOverloaded as error:
            outcomes.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    eventually(lambda: len(outcomes) == 5)  # one runs, two wait
    assert all(isinstance(outcome, headgate.BackendOverloaded) for outcome in outcomes)
    assert all(outcome.retry_after_s >= 1 for outcome in outcomes)
    held.release()
    for thread in threads:
        thread.join()
    assert outcomes[5:] == ["done"] * 3


def test_without_a_queue_only_what_a_replica_takes_is_accepted(
    client: headgate.Client, block: Callable[..., Block]
) -> None:
    held = block(max_queued_requests=0, max_concurrent_queries=2)
    refs = [held.handle.remote(id="a"), held.handle.remote(id="b")]
    with pytest.raises(headgate.BackendOverloaded):
        held.handle.call(id="c")
    assert asyncio.run(get(address_of(client), "/it?id=d")).status == 503
    held.release()
    assert headgate.get(refs) == ["done"] * 2


def test_waiting_requests_start_in_the_order_in_which_they_came(
    client: headgate.Client, block: Callable[..., Block]
) -> None:
    held = block()

    async def main() -> None:
        connections = [await Connection(address_of(client)).open() for _ in range(10)]
        for number, connection in enumerate(connections):
            await connection.send(f"/it?id={number}")
            await asyncio.sleep(0.03)
        held.release()
        for connection in connections:
            assert (await connection.receive()).status == 200
            await connection.close()

    asyncio.run(main())
    assert held.started == [str(number) for number in range(10)]


# --- deadlines ---


def test_a_handle_s_timeout_counts_if_it_is_the_shorter_one(client: headgate.Client) -> None:
    async def slow(request: Any) -> None:
        await asyncio.sleep(60)

    handle = serve(client, slow, request_timeout_s=30)
    began = time.monotonic()
    with pytest.raises(headgate.RequestTimeout):
        handle.options(timeout_s=0.2).call()
    assert time.monotonic() - began < 2
