"""`await handle.call()` from this process to a replica in another. Arguments: seconds, calls in flight.

Prints one JSON object: calls per second and the CPU time per call of each process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from typing import Any

import processes

import headgate


async def echo(request: Any) -> Any:
    return request.data


async def call_for(handle: Any, seconds: float, in_flight: int) -> tuple[int, float]:
    """(calls answered, seconds it took)"""
    end = time.perf_counter() + seconds

    async def caller() -> int:
        calls = 0
        while time.perf_counter() < end:
            await handle.call(calls)
            calls += 1
        return calls

    began = time.perf_counter()
    calls = sum(await asyncio.gather(*(caller() for _ in range(in_flight))))
    return calls, time.perf_counter() - began


async def measure(client: headgate.Client, seconds: float, in_flight: int) -> dict[str, Any]:
    handle = client.get_handle("echo", sync=False)
    await call_for(handle, 0.5, in_flight)
    before = processes.cpu_us(os.getpid())
    calls, took = await call_for(handle, seconds, in_flight)
    cpu = processes.cpu_per_request(before, processes.cpu_us(os.getpid()), calls)
    return {"calls_per_s": calls / took, "cpu_us": cpu}


def main() -> None:
    seconds, in_flight = float(sys.argv[1]), int(sys.argv[2])
    with headgate.start(http_options={"location": "NoServer"}) as client:
        client.create_backend("echo", echo, config={"max_concurrent_queries": 100})
        client.create_endpoint("echo", backend="echo")
        print(json.dumps(asyncio.run(measure(client, seconds, in_flight))))


if __name__ == "__main__":
    main()
