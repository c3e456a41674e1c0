"""An endpoint under load, and a log of what was started: for the tests of what is lost when something goes wrong.

The load is that of every promise: `async def` handlers that take 20 ms, 200 requests/s on a fixed schedule.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from http_load import Answer, Load, load

import headgate


def address_of(client: headgate.Client) -> str:
    assert client.http_address
    return client.http_address


def worker(log: Path, said: str = "done", seconds: float = 0.02) -> Callable[..., Any]:
    """Notes each request's id as it starts, then takes 20 ms."""

    async def work(request: Any) -> str:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{request.query_params.get('id')}\n".encode())
        os.close(fd)
        await asyncio.sleep(seconds)
        return said

    return work


def serve(client: headgate.Client, code: Any, *init_args: Any, **config: Any) -> Any:
    """A sync handle of the endpoint "it", also at /it."""
    client.create_backend("it", code, *init_args, config=config)
    client.create_endpoint("it", backend="it", route="/it")
    return client.get_handle("it")


def replica_pids(client: headgate.Client, tag: str = "it") -> list[int]:
    return [one.pid for one in client.status().replicas if one.backend == tag and one.state == "ready"]


def proxy_pid(client: headgate.Client) -> int:
    (proxy,) = client.status().proxies
    return proxy.pid


def starts(log: Path) -> Counter[str]:
    return Counter(log.read_text().split())


def described(answers: dict[str, Answer]) -> list[tuple[str, int, str]]:
    return [(id, answer.status, answer.text[:80]) for id, answer in answers.items()]


def under_load(client: headgate.Client, change: Callable[[Load], Any], *, proxy_dies: bool = False) -> Load:
    """The load during which `await change(load)` ran; a quarter second of it before and after."""

    async def main() -> Load:
        async with load(address_of(client), "/it", 200, proxy_dies=proxy_dies) as running:
            await asyncio.sleep(0.25)
            await change(running)
            await asyncio.sleep(0.25)
        return running

    return asyncio.run(main())


def under_both_loads(
    client: headgate.Client,
    change: Callable[[], Awaitable[Any]],
    fresh_per_s: float = 200,
    *,
    proxy_dies: bool = False,
) -> tuple[Load, Load]:
    """As `under_load`, beside it so many requests/s each on a connection of its own: (kept, fresh)."""
    address = address_of(client)

    async def main() -> tuple[Load, Load]:
        async with (
            load(address, "/it", 200, proxy_dies=proxy_dies) as kept,
            load(address, "/it", fresh_per_s, True, "f", proxy_dies=proxy_dies) as fresh,
        ):
            await asyncio.sleep(0.25)
            await change()
            await asyncio.sleep(0.25)
        return kept, fresh

    return asyncio.run(main())
