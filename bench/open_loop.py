"""Load on a schedule: latency counts from when a request was meant to be sent, whoever was late.

A closed loop (wrk, or `--rate 0` here) sends the next request when the last one is answered, so that a
server that stalls is asked less while it stalls: coordinated omission. Here requests arrive as
a Poisson process of a seeded rate. One that finds no free connection waits for one, and that
wait is part of its latency. What this process itself was late by is reported beside it (`lag`), and
how busy it was (`generator_cpu`): near 1 the figures are the generator's, not the server's.

Prints one JSON object, a latency.Outcome:

    python bench/open_loop.py http://127.0.0.1:8000/json --rate 5000 --connections 64 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import uvloop
from connection import Connection, request_of
from latency import Answered, Outcome, summary

#: How long answers may take after the last request was due; those that are missing then have failed.
PATIENCE_S = 10.0
def poisson(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests arrive, in seconds from the start.

    >>> times = poisson(1000.0, 2.0, seed=1)
    >>> times == poisson(1000.0, 2.0, seed=1), times == sorted(times), times[-1] < 2.0
    (True, True, True)
    >>> 1850 < len(times) < 2150
    True
    """
    expected = rate * seconds
    count = int(expected + 10 * math.sqrt(expected) + 10)  # more than ever arrive in that time
    times = numpy.cumsum(numpy.random.default_rng(seed).exponential(1.0 / rate, count))
    found: list[float] = times[times < seconds].tolist()
    return found


class Alarm:
    """A timer of the kernel's precision; those of uvloop go by milliseconds."""

    ABSOLUTE = 1

    def __init__(self, rang: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._rang = rang
        self._spec = (ctypes.c_long * 4)()  # struct itimerspec: no interval; seconds, nanoseconds
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._ring)

    def set(self, when: float) -> None:
        """Ring once at `when`, or at once if that has passed."""
        self._spec[2], self._spec[3] = int(when), int(when % 1.0 * 1e9)
        self._libc.timerfd_settime(self._fd, self.ABSOLUTE, self._spec, None)

    def _ring(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:
            return  # it was set again meanwhile
        self._rang()

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


class Load:
    """Requests over a pool of connections, by a schedule (`open`) or one after another (`closed`)."""

    def __init__(self, host: str, port: int, request: bytes) -> None:
        self._address = host, port
        self._request = request
        self._free: deque[Connection] = deque()
        self._all: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._due: list[float] = []
        self._next = 0
        self._end = 0.0
        self._alarm: Alarm | None = None
        self._over = asyncio.Event()
        self.answers: list[Answered] = []
        self.failed = 0

    async def connect(self, connections: int) -> None:
        for _ in range(connections):
            await self._connect()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(lambda: Connection(self._answered, self._lost), *self._address)
        self._all.add(connection)
        self._free_again(connection, time.monotonic())

    async def open(self, offsets: Sequence[float]) -> None:
        """Send one request at each of the offsets, in seconds from now, and wait for the answers."""
        self._over.clear()
        start = time.monotonic() + 0.01
        self._due = [start + offset for offset in offsets]
        self._alarm = Alarm(self._release)
        self._release()
        await self._wait_until(self._due[-1] + PATIENCE_S)
        self._alarm.close()
        self.failed = len(self._due) - len(self.answers)

    async def closed(self, seconds: float) -> None:
        """Keep one request on each connection for so long."""
        self._over.clear()
        now = time.monotonic()
        self._end = now + seconds
        while self._free:
            self._free.popleft().send(self._request, now, now)
        await self._wait_until(self._end + PATIENCE_S)

    async def _wait_until(self, when: float) -> None:
        try:
            async with asyncio.timeout(when - time.monotonic()):
                await self._over.wait()
        except TimeoutError:
            self.failed += sum(connection not in self._free for connection in self._all)

    def _release(self) -> None:
        """Send what is due, oldest first, as far as connections are free."""
        now = time.monotonic()
        while self._next < len(self._due) and self._free:
            intended = self._due[self._next]
            if intended > now:
                now = time.monotonic()
                if intended > now:
                    assert self._alarm is not None
                    self._alarm.set(intended)
                    return
            self._next += 1
            self._free.popleft().send(self._request, intended, now)

    def _answered(self, connection: Connection, ok: bool) -> None:
        now = time.monotonic()
        if ok:
            self.answers.append(Answered(connection.intended, connection.freed, connection.sent, now))
        else:
            self.failed += 1
        self._free_again(connection, now)

    def _free_again(self, connection: Connection, now: float) -> None:
        connection.freed = now
        if now < self._end:
            connection.send(self._request, now, now)
            return
        self._free.append(connection)
        if self._next < len(self._due):
            self._release()
        elif len(self._free) == len(self._all):
            self._over.set()

    def _lost(self, connection: Connection, busy: bool) -> None:
        """Put another connection in its place: servers may close theirs when they like."""
        self._all.discard(connection)
        if busy:
            self.failed += 1
        else:
            self._free.remove(connection)
        task = asyncio.get_running_loop().create_task(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def close(self) -> None:
        for connection in self._all:
            connection.close()


async def measure(options: argparse.Namespace) -> Outcome:
    body = options.body.read_bytes() if options.body else b""
    load = Load(*request_of(options.url, options.method, options.content_type, body))
    await load.connect(options.connections)
    offsets = poisson(options.rate, options.seconds, options.seed) if options.rate else []
    gc.collect()
    gc.disable()  # a pause here would be taken for one of the server
    began, cpu = time.monotonic(), time.process_time()
    if options.rate:
        await load.open(offsets)
    else:
        await load.closed(options.seconds)
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    load.close()
    if not load.answers:
        raise SystemExit(f"not one request was answered in {took:.1f} s ({load.failed} failed)")
    return summary(load.answers, load.failed, took, cpu, options.rate)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--rate", type=float, default=0.0, help="requests/s; 0: a closed loop (0)")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--method", default="GET")
    parser.add_argument("--body", type=Path, help="a file")
    parser.add_argument("--content-type", default="application/octet-stream")
    outcome: dict[str, Any] = uvloop.run(measure(parser.parse_args()))._asdict()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
