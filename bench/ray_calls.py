"""Calls of one async backend on a one-node Ray, beside calls of a bare Ray actor; JSON on the last line of stdout.

Argument: how many rounds. Each round does each kind of call in turn: one after another, and with 64 in flight.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import ray

import headgate

ONE_BY_ONE = 300
IN_FLIGHT = 64
TIMES = 20


async def echo(request: Any) -> Any:
    return request.data


class Echo:
    async def call(self, data: Any) -> Any:
        return data


def one_by_one(call: Callable[[int], Any]) -> float:
    """Microseconds per call."""
    begun = time.perf_counter()
    for number in range(ONE_BY_ONE):
        call(number)
    return (time.perf_counter() - begun) / ONE_BY_ONE * 1e6


def together(send: Callable[[int], Any]) -> float:
    """Microseconds per call, with IN_FLIGHT at a time."""
    begun = time.perf_counter()
    for _ in range(TIMES):
        ray.get([send(number) for number in range(IN_FLIGHT)])
    return (time.perf_counter() - begun) / TIMES / IN_FLIGHT * 1e6


async def together_called(handle: Any) -> float:
    """As `together`, with `await handle.call()`."""
    begun = time.perf_counter()
    for _ in range(TIMES):
        await asyncio.gather(*(handle.call(number) for number in range(IN_FLIGHT)))
    return (time.perf_counter() - begun) / TIMES / IN_FLIGHT * 1e6


def measure(client: Any, actor: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    handle = client.get_handle("echo")
    calls = client.get_handle("echo", sync=False)
    found: dict[str, dict[str, list[float]]] = {
        name: {"bare": [], "remote": [], "call": []} for name in ("one by one", f"{IN_FLIGHT} in flight")
    }
    alone, many = found.values()
    for _ in range(rounds + 1):
        alone["bare"].append(one_by_one(lambda n: ray.get(actor.call.remote(n))))
        alone["remote"].append(one_by_one(lambda n: ray.get(handle.remote(n))))
        alone["call"].append(one_by_one(handle.call))
        many["bare"].append(together(actor.call.remote))
        many["remote"].append(together(handle.remote))
        many["call"].append(asyncio.run(together_called(calls)))
    return {name: {side: runs[1:] for side, runs in sides.items()} for name, sides in found.items()}


def main() -> None:
    client = headgate.start(engine="ray", http_options={"location": None})
    client.create_backend("echo", echo)
    client.create_endpoint("echo", backend="echo")
    actor = ray.remote(Echo).options(max_concurrency=1000).remote()
    ray.get(actor.call.remote(0))
    found = measure(client, actor, int(sys.argv[1]))
    client.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
