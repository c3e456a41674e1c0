"""Calls of bare Ray actors, plain and async, and of headgate on the same Ray. Argument: seconds per case.

Prints {contender: {case: figures}} on the last line.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import ray

import headgate

from . import calling
from .handle_calls import echo


class Plain:
    """A plain actor runs one call at a time."""

    def __init__(self) -> None:
        self.array = calling.array()

    def echo(self, data: Any) -> Any:
        return data

    def nbytes(self, data: Any) -> int:
        return int(data.nbytes)

    def give(self) -> Any:
        return self.array


class Async:
    async def echo(self, data: Any) -> Any:
        return data


def together(send: Callable[[int], Any], seconds: float) -> int:
    """64 calls at a time, waited for by one `ray.get`."""
    return calling.THREADS * calling.one_by_one(
        lambda _: ray.get([send(number) for number in range(calling.THREADS)]), seconds
    )


def of_actor(actor: Any, seconds: float) -> dict[str, Any]:
    send = actor.echo.remote
    return {
        **calling.sync_cases(lambda number: ray.get(send(number)), seconds),
        **calling.async_cases(lambda: send, seconds),
    }


def measure(client: Any, seconds: float) -> dict[str, dict[str, Any]]:
    plain = ray.remote(Plain).options(num_cpus=0).remote()
    waiting = ray.remote(Async).options(num_cpus=0, max_concurrency=1000).remote()
    arrays = calling.array_cases(
        lambda sent: ray.get(plain.nbytes.remote(sent)),
        lambda: ray.get(plain.give.remote()),
        lambda sent: ray.get(plain.echo.remote(sent)),
    )
    handle = client.get_handle("echo")
    found = {
        "Ray actor": {**of_actor(plain, seconds), **arrays},
        "Ray async actor": of_actor(waiting, seconds),
        "headgate on Ray, remote()": calling.sync_cases(lambda number: ray.get(handle.remote(number)), seconds),
        "headgate on Ray, call()": {
            **calling.sync_cases(handle.call, seconds),
            **calling.async_cases(lambda: client.get_handle("echo", sync=False).call, seconds),
        },
    }
    for name, actor in {"Ray actor, ray.get of 64": plain, "Ray async actor, ray.get of 64": waiting}.items():
        send = actor.echo.remote
        found[name] = {
            calling.MANY_AWAITED: calling.figures_of(lambda s, send=send: together(send, s), seconds)  # type: ignore[misc]
        }
    return found


def main() -> None:
    client = headgate.start(engine="ray", http_options={"location": None})
    try:
        client.create_backend("echo", echo, config={"max_concurrent_queries": 100})
        client.create_endpoint("echo", backend="echo")
        found = measure(client, float(sys.argv[1]))
    finally:
        client.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
