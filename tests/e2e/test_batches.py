"""Batches of real processes, over HTTP and handles together: what is in one, when it leaves, how it fails."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import pytest
from http_load import Connection, get, get_many
from running import cancel, cancelled, died, eventually, on_ray
from under_load import address_of, serve

import headgate

START = {"http_options": {"port": 0}}


def batches_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


class Gated:
    """Plain: each batch is one line of the log; the n-th stays until the gate file says n."""

    def __init__(self, log: Path, gate: Path) -> None:
        self.log, self.gate = log, gate
        self.count = 0

    def note(self, requests: list[Any], name: str) -> list[str]:
        ids = [request.query_params["id"] for request in requests]
        with self.log.open("a") as file:
            file.write(" ".join(ids) + "\n")
        self.count += 1
        while int(self.gate.read_text()) < self.count:
            time.sleep(0.005)
        return [f"{name}:{id}" for id in ids]

    @headgate.accept_batch
    def __call__(self, requests: list[Any]) -> list[str]:
        return self.note(requests, "call")

    @headgate.accept_batch
    def other(self, requests: list[Any]) -> list[str]:
        return self.note(requests, "other")


class Gate:
    """A closed gate and the log behind it."""

    def __init__(self, folder: Path) -> None:
        self.log, self.gate = folder / "log", folder / "gate"
        self.log.touch()
        self.let(0)

    def let(self, count: int) -> None:
        """Let so many batches through in all."""
        new = self.gate.with_suffix(".new")
        new.write_text(str(count))
        new.rename(self.gate)

    def open(self) -> None:
        self.let(1000)

    @property
    def batches(self) -> list[list[str]]:
        return batches_of(self.log)

    def entered(self) -> bool:
        """Whether the handler is in its first batch."""
        return bool(self.batches)


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path)


def serve_gated(client: headgate.Client, gate: Gate, **config: Any) -> Any:
    config = {"max_batch_size": 4, "max_concurrent_queries": 50, **config}
    return serve(client, Gated, gate.log, gate.gate, **config)


def test_what_gathers_while_the_handler_is_busy_leaves_in_order_and_full(client: headgate.Client, gate: Gate) -> None:
    handle = serve_gated(client, gate)
    first = handle.remote(id="first")
    eventually(gate.entered)

    async def ask() -> list[str]:
        connections = [await Connection(address_of(client)).open() for _ in range(5)]
        refs = []
        for number, connection in enumerate(connections):  # in turn over HTTP and the handle
            await connection.send(f"/it?id=http{number}")
            await asyncio.sleep(0.05)
            refs.append(handle.remote(id=f"handle{number}"))
            await asyncio.sleep(0.05)
        gate.open()
        texts = [(await connection.receive()).text for connection in connections]
        for connection in connections:
            await connection.close()
        return texts + headgate.get(refs)

    answers = asyncio.run(ask())
    assert headgate.get(first) == "call:first"
    assert answers == [f"call:{kind}{number}" for kind in ("http", "handle") for number in range(5)]
    assert gate.batches == [
        ["first"],
        ["http0", "handle0", "http1", "handle1"],
        ["http2", "handle2", "http3", "handle3"],
        ["http4", "handle4"],
    ]


def test_a_batch_holds_one_method_only(client: headgate.Client, gate: Gate) -> None:
    handle = serve_gated(client, gate)
    first = handle.remote(id="first")
    eventually(gate.entered)
    other = handle.options(method_name="other")
    refs = [(other if number % 2 else handle).remote(id=str(number)) for number in range(6)]

    async def ask() -> str:
        connection = await Connection(address_of(client)).open()
        await connection.send("/it?id=http", {"X-Serve-Call-Method": "other"})
        await asyncio.sleep(0.1)
        gate.open()
        text = (await connection.receive()).text
        await connection.close()
        return text

    assert asyncio.run(ask()) == "other:http"
    assert headgate.get([first, *refs]) == [
        "call:first", "call:0", "other:1", "call:2", "other:3", "call:4", "other:5",
    ]  # fmt: skip
    batches = [[call for call in batch if call != "http"] for batch in gate.batches]  # whose sender is another
    expected = [["first"], ["0", "2", "4"], ["1", "3", "5"]]
    if on_ray():  # which promises no order among the calls of an actor
        assert sorted(map(sorted, batches)) == sorted(expected)
    else:
        assert batches == expected


def test_what_was_cancelled_or_expired_in_the_queue_is_in_no_batch(client: headgate.Client, gate: Gate) -> None:
    handle = serve_gated(client, gate)
    first = handle.remote(id="first")
    eventually(gate.entered)

    async def ask() -> None:
        leaving = await Connection(address_of(client)).open()
        await leaving.send("/it?id=left")
        staying = await Connection(address_of(client)).open()
        await staying.send("/it?id=stayed")
        await asyncio.sleep(0.1)
        refs = [handle.remote(id="cancelled"), handle.remote(id="kept")]
        leaving.reset()
        cancel(refs[0])
        with pytest.raises(headgate.RequestTimeout):
            await asyncio.to_thread(handle.options(timeout_s=0.2).call, id="expired")
        with pytest.raises(cancelled()):
            headgate.get(refs[0], timeout=5)
        gate.open()
        assert (await staying.receive()).text == "call:stayed"
        assert headgate.get(refs[1], timeout=5) == "call:kept"
        await staying.close()

    asyncio.run(ask())
    assert headgate.get(first) == "call:first"
    if on_ray():  # where "kept" may still have been on its way
        assert [call for batch in gate.batches for call in batch] == ["first", "stayed", "kept"]
    else:
        assert gate.batches == [["first"], ["stayed", "kept"]]


def test_the_siblings_of_one_that_leaves_a_running_batch_are_unaffected(client: headgate.Client, gate: Gate) -> None:
    handle = serve_gated(client, gate)
    first = handle.remote(id="first")
    eventually(gate.entered)

    async def ask() -> None:
        leaving, staying = [await Connection(address_of(client)).open() for _ in range(2)]
        await leaving.send("/it?id=leaving")
        await staying.send("/it?id=staying")
        await asyncio.sleep(0.1)
        gate.let(1)
        eventually(lambda: len(gate.batches) > 1)
        leaving.reset()
        await asyncio.sleep(0.1)
        gate.open()
        assert (await staying.receive()).text == "call:staying"
        await staying.close()

    asyncio.run(ask())
    assert headgate.get(first) == "call:first"
    assert sorted(gate.batches[1]) == ["leaving", "staying"]


@headgate.accept_batch
def size_of(requests: list[Any]) -> list[int]:
    return [len(requests)] * len(requests)


@headgate.accept_batch
async def size_of_later(requests: list[Any]) -> list[int]:
    return [len(requests)] * len(requests)


@pytest.mark.parametrize("code", [size_of, size_of_later])
def test_a_batch_leaves_when_it_is_full(client: headgate.Client, code: Any) -> None:
    handle = serve(client, code, max_batch_size=3, batch_wait_timeout=30.0)
    began = time.monotonic()
    refs = [handle.remote() for _ in range(2)]
    answer = asyncio.run(get(address_of(client), "/it"))
    assert [*headgate.get(refs), answer.json()] == [3, 3, 3]
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("code", [size_of, size_of_later])
def test_a_batch_leaves_when_its_oldest_request_has_waited(client: headgate.Client, code: Any) -> None:
    handle = serve(client, code, max_batch_size=10, batch_wait_timeout=0.5)
    began = time.monotonic()
    refs = [handle.remote() for _ in range(2)]
    time.sleep(0.2)
    refs.append(handle.remote())
    assert headgate.get(refs) == [3, 3, 3]
    assert 0.45 <= time.monotonic() - began < 2.5
    assert handle.call() == 1


def test_new_limits_hold_for_those_who_wait_already(client: headgate.Client) -> None:
    handle = serve(client, size_of, max_batch_size=10, batch_wait_timeout=30.0)
    refs = [handle.remote() for _ in range(4)]
    client.update_backend_config("it", {"max_batch_size": 2})
    assert headgate.get(refs, timeout=5) == [2, 2, 2, 2]


def test_async_batches_overlap(client: headgate.Client) -> None:
    class Slow:
        def __init__(self) -> None:
            self.running = self.most = 0

        @headgate.accept_batch
        async def __call__(self, requests: list[Any]) -> list[int]:
            self.running += 1
            self.most = max(self.most, self.running)
            await asyncio.sleep(0.4)
            self.running -= 1
            return [self.most] * len(requests)

    handle = serve(client, Slow, max_batch_size=2, max_concurrent_queries=20)
    refs = [handle.remote() for _ in range(6)]
    began = time.monotonic()
    assert max(headgate.get(refs)) >= 3
    assert time.monotonic() - began < 1.5


def test_plain_batches_do_not_overlap(client: headgate.Client) -> None:
    class Slow:
        def __init__(self) -> None:
            self.running = 0

        @headgate.accept_batch
        def __call__(self, requests: list[Any]) -> list[int]:
            self.running += 1
            time.sleep(0.05)
            seen, self.running = self.running, self.running - 1
            return [seen] * len(requests)

    handle = serve(client, Slow, max_batch_size=2, max_concurrent_queries=20)
    assert set(headgate.get([handle.remote() for _ in range(8)])) == {1}


def test_a_batch_that_raises_fails_all_its_requests_and_no_other(client: headgate.Client) -> None:
    def fussy(requests: list[Any]) -> Any:
        if any("bad" in request.query_params for request in requests):
            raise LookupError(f"{len(requests)} spoiled")
        return ["good"] * len(requests)

    handle = serve(client, headgate.accept_batch(fussy), max_batch_size=2, batch_wait_timeout=1.0)
    ref = handle.remote(bad=1)
    answer = asyncio.run(get(address_of(client), "/it"))
    assert (answer.status, "LookupError: 2 spoiled" in answer.text) == (500, True)
    with pytest.raises(LookupError, match="2 spoiled"):
        headgate.get(ref, timeout=5)
    assert asyncio.run(get(address_of(client), "/it")).text == "good"


def test_an_exception_among_the_results_fails_its_own_request_only(client: headgate.Client) -> None:
    def some(requests: list[Any]) -> Any:
        bad = [request.query_params.get("bad") for request in requests]
        return [ValueError(f"no {each}") if each else len(requests) for each in bad]

    handle = serve(client, headgate.accept_batch(some), max_batch_size=4, batch_wait_timeout=5.0)
    refs = [handle.remote(bad="one"), handle.remote()]
    bad, good = asyncio.run(get_many(address_of(client), ["/it?bad=two", "/it"]))
    assert (bad.status, "ValueError: no two" in bad.text) == (500, True)
    assert good.json() == 4
    with pytest.raises(ValueError, match="no one"):
        headgate.get(refs[0], timeout=5)
    assert headgate.get(refs[1], timeout=5) == 4


def test_items_may_be_of_any_kind(client: headgate.Client) -> None:
    from starlette.responses import PlainTextResponse

    def kinds(requests: list[Any]) -> Any:
        made = {"r": PlainTextResponse("response", 201), "n": None, "b": b"bytes", "j": {"a": 1}}
        return tuple(made[request.query_params["kind"]] for request in requests)

    serve(client, headgate.accept_batch(kinds), max_batch_size=4, batch_wait_timeout=5.0)
    answers = asyncio.run(get_many(address_of(client), [f"/it?kind={kind}" for kind in "rnbj"]))
    assert [(answer.status, answer.body) for answer in answers] == [
        (201, b"response"), (200, b""), (200, b"bytes"), (200, b'{"a":1}'),
    ]  # fmt: skip


def test_a_batch_shares_a_replica_s_fate_but_later_ones_do_not(client: headgate.Client, tmp_path: Path) -> None:
    def fatal(requests: list[Any]) -> Any:
        if any("die" in request.query_params for request in requests):
            os._exit(1)
        return ["alive"] * len(requests)

    handle = serve(client, headgate.accept_batch(fatal), max_batch_size=2, batch_wait_timeout=5.0)
    ref = handle.remote(die=1)
    answer = asyncio.run(get(address_of(client), "/it"))
    assert (answer.status, answer.headers.get("x-headgate-started")) == (502, "1")
    with pytest.raises(died()):
        headgate.get(ref, timeout=5)
    client.update_backend_config("it", {"batch_wait_timeout": 0})
    assert handle.call() == "alive"
