"""Which backend a request meets, whoever sends it: proxy connections, and handles in two processes."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from http_load import Connection, get
from running import eventually
from under_load import address_of

import headgate

START = {"http_options": {"port": 0}}
KEYS = [f"user-{number}" for number in range(40)]


def says(name: str) -> Callable[..., Any]:
    async def say(request: Any) -> str:
        return name

    return say


def serve_two(client: headgate.Client) -> Any:
    """A sync handle of "e" at /e, which is backend "a"; there is "b" too."""
    for tag in "ab":
        client.create_backend(tag, says(tag))
    client.create_endpoint("e", backend="a", route="/e")
    return client.get_handle("e")


class Relay:
    """A backend that asks "e" from its own process, by a sync and an async handle."""

    def __init__(self) -> None:
        client = headgate.connect()
        self.sync = client.get_handle("e")
        self.later = client.get_handle("e", sync=False)

    async def __call__(self, request: Any) -> list[str]:
        keys = request.data
        handles = [self.later.options(shard_key=key) for key in keys]
        answers = [await handle.call() for handle in handles]
        answers += await asyncio.to_thread(lambda: [self.sync.options(shard_key=key).call() for key in keys])
        return answers


def serve_relay(client: headgate.Client) -> Any:
    client.create_backend("relay", Relay)
    client.create_endpoint("relay", backend="relay")
    return client.get_handle("relay")


def log_from(path: Path) -> Callable[..., Any]:
    """A handler that notes each request's id with one write."""

    async def note(request: Any) -> str:
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{request.query_params['id']}\n".encode())
        os.close(fd)
        return "noted"

    return note


def noted(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


# --- set_traffic ---


def test_set_traffic_is_in_force_everywhere_when_it_returns(client: headgate.Client) -> None:
    handle = serve_two(client)
    relay = serve_relay(client)

    async def flip() -> None:
        connections = [await Connection(address_of(client)).open() for _ in range(4)]
        later = client.get_handle("e", sync=False)
        for number in range(20):
            tag = "ba"[number % 2]
            await asyncio.to_thread(client.set_traffic, "e", {tag: 1.0})
            over_http = await asyncio.gather(*(connection.get("/e") for connection in connections))
            assert [answer.text for answer in over_http] == [tag] * 4
            assert await later.call() == tag
            assert await asyncio.to_thread(handle.call) == tag
            assert await asyncio.to_thread(relay.call, [None]) == [tag, tag]
        for connection in connections:
            await connection.close()

    asyncio.run(flip())


def test_a_refused_policy_changes_nothing(client: headgate.Client) -> None:
    handle = serve_two(client)
    for bad in ({"a": 0.5}, {"a": 2.0, "b": -1.0}, {"missing": 1.0}, {}):
        with pytest.raises(ValueError):
            client.set_traffic("e", bad)
    assert [handle.call() for _ in range(20)] == ["a"] * 20


def test_shares_are_kept_within_what_chance_allows(client: headgate.Client) -> None:
    handle = serve_two(client)
    client.set_traffic("e", {"a": 0.7, "b": 0.3})
    assert 495 <= [handle.call() for _ in range(2000)].count("b") <= 705  # five standard deviations each way

    async def ask() -> list[str]:
        connection = await Connection(address_of(client)).open()
        answers = [(await connection.get("/e")).text for _ in range(1000)]
        await connection.close()
        return answers

    assert 225 <= asyncio.run(ask()).count("b") <= 375


def test_a_backend_of_weight_zero_is_never_chosen(client: headgate.Client) -> None:
    handle = serve_two(client)
    client.set_traffic("e", {"a": 1.0, "b": 0.0})
    assert {handle.options(shard_key=key).call() for key in KEYS} == {"a"}
    with pytest.raises(ValueError, match=r"'?b'?.*'?e'?"):
        client.delete_backend("b")


# --- shard keys ---


def test_a_shard_key_leads_to_the_same_backend_from_everywhere(client: headgate.Client) -> None:
    handle = serve_two(client)
    relay = serve_relay(client)
    client.set_traffic("e", {"a": 0.5, "b": 0.5})

    async def ask() -> tuple[list[str], list[str]]:
        connection = await Connection(address_of(client)).open()
        over_http = [(await connection.get("/e", {"X-Serve-Shard-Key": key})).text for key in KEYS]
        await connection.close()
        later = client.get_handle("e", sync=False)
        return over_http, [await later.options(shard_key=key).call() for key in KEYS]

    expected = [handle.options(shard_key=key).call() for key in KEYS]
    assert set(expected) == {"a", "b"}
    over_http, later = asyncio.run(ask())
    assert over_http == expected
    assert later == expected
    assert relay.call(KEYS) == expected * 2
    assert [handle.options(shard_key=key).call() for key in KEYS] == expected


def test_a_larger_share_takes_keys_along_and_gives_none_back(client: headgate.Client) -> None:
    handle = serve_two(client)
    client.set_traffic("e", {"a": 0.8, "b": 0.2})
    before = {key for key in KEYS if handle.options(shard_key=key).call() == "a"}
    client.set_traffic("e", {"a": 0.9, "b": 0.1})
    after = {key for key in KEYS if handle.options(shard_key=key).call() == "a"}
    assert before <= after


# --- shadows ---


def test_a_request_never_waits_for_its_shadow(client: headgate.Client) -> None:
    handle = serve_two(client)

    def stuck(request: Any) -> None:
        time.sleep(3600)

    client.create_backend("stuck", stuck, config={"max_concurrent_queries": 1})
    client.shadow_traffic("e", "stuck", 1.0)
    began = time.monotonic()
    assert [handle.call() for _ in range(50)] == ["a"] * 50
    assert [asyncio.run(get(address_of(client), "/e")).text for _ in range(10)] == ["a"] * 10
    assert time.monotonic() - began < 2


def test_a_shadow_s_errors_and_death_are_ignored(client: headgate.Client) -> None:
    handle = serve_two(client)

    def raises(request: Any) -> None:
        raise ValueError("on purpose")

    def dies(request: Any) -> None:
        os._exit(1)

    client.create_backend("raises", raises)
    client.create_backend("dies", dies)
    client.shadow_traffic("e", "raises", 1.0)
    client.shadow_traffic("e", "dies", 1.0)
    assert [handle.call() for _ in range(20)] == ["a"] * 20
    assert asyncio.run(get(address_of(client), "/e")).text == "a"


def test_shadows_get_their_share_and_outlive_set_traffic(client: headgate.Client, tmp_path: Path) -> None:
    handle = serve_two(client)
    log = tmp_path / "log"
    client.create_backend("shadow", log_from(log))
    client.shadow_traffic("e", "shadow", 0.25)
    client.set_traffic("e", {"a": 0.5, "b": 0.5})
    assert client.list_endpoints()["e"]["shadows"] == {"shadow": 0.25}
    answers = [handle.call(id=str(number)) for number in range(800)]
    time.sleep(0.3)
    first = noted(log)
    assert 139 <= len(first) <= 261  # five standard deviations each way
    assert len(set(first)) == len(first)
    on_b = sum(answers[int(id)] == "b" for id in first) / len(first)
    assert 0.3 <= on_b <= 0.7  # independent of which backend was chosen

    client.shadow_traffic("e", "shadow", 1.0)
    wanted = {f"handle{number}" for number in range(20)} | {f"http{number}" for number in range(20)}
    for number in range(20):
        handle.call(id=f"handle{number}")
        asyncio.run(get(address_of(client), f"/e?id=http{number}"))
    eventually(lambda: wanted <= set(noted(log)))

    client.shadow_traffic("e", "shadow", 0)
    assert client.list_endpoints()["e"]["shadows"] == {}
    before = len(noted(log))
    for _ in range(50):
        handle.call(id="none")
    client.delete_backend("shadow")
    assert len(noted(log)) == before


def test_a_shadow_goes_on_when_its_main_request_s_client_has_gone(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = log_from(log)

    async def hang(request: Any) -> None:
        await asyncio.sleep(3600)

    async def late(request: Any) -> None:
        await asyncio.sleep(0.5)
        await note(request)

    client.create_backend("hang", hang)
    client.create_backend("late", late)
    client.create_endpoint("e", backend="hang", route="/e")
    client.shadow_traffic("e", "late", 1.0)

    async def leave() -> None:
        connection = await Connection(address_of(client)).open()
        await connection.send("/e?id=1")
        await asyncio.sleep(0.2)
        connection.reset()

    asyncio.run(leave())
    eventually(lambda: noted(log) == ["1"])
