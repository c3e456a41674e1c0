"""`handle.call()` and `handle.remote().result()` of a sync handle, from threads. Arguments: seconds, threads.

Prints one JSON object: calls per second and the CPU time per call of each process, for both ways.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import processes

import headgate


async def echo(request: Any) -> Any:
    return request.data


def call_for(call: Callable[[int], Any], seconds: float, threads: int) -> tuple[int, float]:
    """(calls answered, seconds it took)"""
    end = time.perf_counter() + seconds
    counts = [0] * threads

    def caller(index: int) -> None:
        calls = 0
        while time.perf_counter() < end:
            call(calls)
            calls += 1
        counts[index] = calls

    began = time.perf_counter()
    running = [threading.Thread(target=caller, args=(index,)) for index in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts), time.perf_counter() - began


def measure(call: Callable[[int], Any], seconds: float, threads: int) -> dict[str, Any]:
    call_for(call, 0.5, threads)
    before = processes.cpu_us(os.getpid())
    calls, took = call_for(call, seconds, threads)
    cpu = processes.cpu_per_request(before, processes.cpu_us(os.getpid()), calls)
    return {"calls_per_s": calls / took, "cpu_us": cpu}


def main() -> None:
    seconds, threads = float(sys.argv[1]), int(sys.argv[2])
    with headgate.start(http_options={"location": "NoServer"}) as client:
        client.create_backend("echo", echo, config={"max_concurrent_queries": 200})
        client.create_endpoint("echo", backend="echo")
        handle = client.get_handle("echo")
        ways = {"call": handle.call, "remote": lambda value: handle.remote(value).result()}
        print(json.dumps({name: measure(call, seconds, threads) for name, call in ways.items()}))


if __name__ == "__main__":
    main()
