"""Calls as fast as they are answered: one after another, from threads, and awaited; and large arrays.

Whatever is called comes as a function, so that handles and Ray's actors are measured by the same lines.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Awaitable, Callable
from statistics import median
from typing import Any

import numpy
import processes

THREADS = 64
WARM_UP_S = 0.5
ARRAY_BYTES = 100_000_000
ARRAY_TIMES = 7

Call = Callable[[int], Any]
AsyncCall = Callable[[int], Awaitable[Any]]

ONE = "1 caller"
MANY = "64 threads"
ONE_AWAITED = "1 call in flight"
MANY_AWAITED = "64 calls in flight"


def figures_of(work: Callable[[float], int], seconds: float) -> dict[str, Any]:
    """`work(seconds)` returns how many calls it made."""
    work(WARM_UP_S)
    before, began = cpu_us(), time.perf_counter()
    calls = work(seconds)
    took = time.perf_counter() - began
    spent = processes.cpu_per_request(before, cpu_us(), calls)
    return {"calls_per_s": calls / took, "cpu_us": sum(spent.values()), "cpu_by_process": spent}


def cpu_us() -> dict[tuple[int, str], float]:
    return processes.cpu_us(processes.tree(os.getpid()))


def one_by_one(call: Call, seconds: float) -> int:
    end, calls = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        call(calls)
        calls += 1
    return calls


def in_threads(call: Call, seconds: float) -> int:
    counts = [0] * THREADS

    def caller(index: int) -> None:
        counts[index] = one_by_one(call, seconds)

    running = [threading.Thread(target=caller, args=(index,)) for index in range(THREADS)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return sum(counts)


async def awaited(call: AsyncCall, seconds: float, in_flight: int) -> int:
    end = time.perf_counter() + seconds

    async def caller() -> int:
        calls = 0
        while time.perf_counter() < end:
            await call(calls)
            calls += 1
        return calls

    return sum(await asyncio.gather(*(caller() for _ in range(in_flight))))


def sync_cases(call: Call, seconds: float) -> dict[str, dict[str, Any]]:
    return {
        ONE: figures_of(lambda s: one_by_one(call, s), seconds),
        MANY: figures_of(lambda s: in_threads(call, s), seconds),
    }


def async_cases(make: Callable[[], AsyncCall], seconds: float) -> dict[str, dict[str, Any]]:
    """What `make` returns on an event loop, called on that loop."""

    async def made() -> AsyncCall:
        return make()

    with asyncio.Runner() as runner:
        call = runner.run(made())
        return {
            ONE_AWAITED: figures_of(lambda s: runner.run(awaited(call, s, 1)), seconds),
            MANY_AWAITED: figures_of(lambda s: runner.run(awaited(call, s, THREADS)), seconds),
        }


def array() -> numpy.ndarray[Any, Any]:
    """100 MB, every page of it in memory."""
    return numpy.arange(ARRAY_BYTES // 4, dtype=numpy.float32)


def array_cases(
    send: Callable[[Any], int], fetch: Callable[[], Any], exchange: Callable[[Any], Any]
) -> dict[str, dict[str, Any]]:
    """100 MB there, back, and both ways: in ms, and in copies of the same bytes inside one process."""
    sent = array()
    assert send(sent) == sent.nbytes
    assert numpy.array_equal(fetch(), sent)
    assert numpy.array_equal(exchange(sent), sent)
    ways: dict[str, Callable[[], Any]] = {
        "100 MB in": lambda: send(sent),
        "100 MB out": fetch,
        "100 MB in and out": lambda: exchange(sent),
    }
    found = {}
    for case, way in ways.items():
        copy_ms = middle_ms(copier(sent))
        took_ms = middle_ms(way)
        found[case] = {"took_ms": took_ms, "memcpy_ms": copy_ms, "memcpys": took_ms / copy_ms}
    return found


def copier(source: numpy.ndarray[Any, Any]) -> Callable[[], object]:
    """One memcpy into memory that is there already: the fastest that there is."""
    target = numpy.empty_like(source)
    target[:] = 0
    return lambda: numpy.copyto(target, source)


def middle_ms(work: Callable[[], object]) -> float:
    times = []
    for _ in range(ARRAY_TIMES):
        began = time.perf_counter()
        kept = work()
        times.append((time.perf_counter() - began) * 1e3)
        del kept
    return median(times)
