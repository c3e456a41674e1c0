"""Read many streams at once: when does each one's first token come, and how evenly the others.

Each connection asks again when its stream has ended, until the time is over; the streams that run then are read
to their end. A token ends in one byte that occurs nowhere else in a body (jobs.TOKEN_END). Prints one JSON
object, an Outcome:

    python bench/streams.py http://127.0.0.1:8000/stream --streams 32 --seconds 5 --tokens 256
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import uvloop
from connection import request_of
from latency import percentile
from peers.jobs import TOKEN_END, TOKENS

PATIENCE_S = 30.0


class Outcome(NamedTuple):
    """`failed` counts streams that broke off, or brought another number of tokens. Gaps are between tokens."""

    tokens: int
    streams: int
    failed: int
    tokens_per_s: float
    first_p50_ms: float
    first_p99_ms: float
    gap_p50_ms: float
    gap_p99_ms: float
    gap_max_ms: float
    client_cpu: float


class Stream(asyncio.Protocol):
    """One connection, one stream after another; `arrivals` has a list of the tokens' times for each."""

    def __init__(self, request: bytes, tokens: int, end: float) -> None:
        self._request = request
        self._tokens = tokens
        self._end = end
        self.done = asyncio.get_running_loop().create_future()
        self.asked: list[float] = []
        self.arrivals: list[list[float]] = []
        self.failed = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name
        self._ask()

    def _ask(self) -> None:
        self._head = b""
        self._in_body = False
        self._last = b""
        self._times: list[float] = []
        self.asked.append(time.monotonic())
        self.arrivals.append(self._times)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self._in_body:
            self._head, end, data = (self._head + data).partition(b"\r\n\r\n")
            if not end:
                return
            self._in_body = True
        self._times += [now] * data.count(TOKEN_END)
        self._last = (self._last + data)[-5:]
        if self._last == b"0\r\n\r\n":
            self._ended()

    def _ended(self) -> None:
        if len(self._times) != self._tokens or not self._head.startswith(b"HTTP/1.1 200 "):
            self.failed += 1
        if b"connection: close" in self._head.lower() or time.monotonic() >= self._end:
            self._transport.close()
        else:
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if self._last != b"0\r\n\r\n" and len(self._times) != self._tokens:  # a body may end with its connection
            self.failed += 1
        if not self.done.done():
            self.done.set_result(None)


async def read(host: str, port: int, request: bytes, streams: int, seconds: float, tokens: int) -> Outcome:
    """Keep so many streams running for so long."""
    began, cpu = time.monotonic(), time.process_time()
    end = began + seconds
    found: list[Stream] = []

    async def keep_one() -> None:
        while time.monotonic() < end:
            _, stream = await asyncio.get_running_loop().create_connection(
                lambda: Stream(request, tokens, end), host, port
            )
            found.append(stream)
            await stream.done

    async with asyncio.timeout(seconds + PATIENCE_S):
        await asyncio.gather(*(keep_one() for _ in range(streams)))
    took, cpu = time.monotonic() - began, time.process_time() - cpu
    asked = [when for stream in found for when in stream.asked]
    times = [each for stream in found for each in stream.arrivals]
    return summary(asked, times, sum(stream.failed for stream in found), took, cpu)


def summary(asked: list[float], times: list[list[float]], failed: int, took: float, cpu_s: float) -> Outcome:
    """
    >>> outcome = summary([0.0, 0.0], [[0.010, 0.020, 0.040], [0.020]], 0, took=2.0, cpu_s=0.5)
    >>> outcome.tokens_per_s, outcome.first_p50_ms, outcome.first_p99_ms, outcome.gap_p50_ms, outcome.gap_max_ms
    (2.0, 10.0, 20.0, 10.0, 20.0)
    """
    firsts = sorted(each[0] - start for start, each in zip(asked, times, strict=True) if each)
    gaps = sorted(after - before for each in times for before, after in pairwise(each))
    if not gaps:
        raise SystemExit(f"no token came ({failed} streams failed)")
    tokens = sum(map(len, times))

    def ms(ordered: list[float], percent: float) -> float:
        return round(percentile(ordered, percent) * 1e3, 4)

    return Outcome(
        tokens=tokens,
        streams=len(times),
        failed=failed,
        tokens_per_s=tokens / took,
        first_p50_ms=ms(firsts, 50),
        first_p99_ms=ms(firsts, 99),
        gap_p50_ms=ms(gaps, 50),
        gap_p99_ms=ms(gaps, 99),
        gap_max_ms=ms(gaps, 100),
        client_cpu=cpu_s / took,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("url")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="that each stream has")
    parser.add_argument("--method", default="GET")
    parser.add_argument("--body", type=Path, help="a file")
    parser.add_argument("--content-type", default="application/octet-stream")
    options = parser.parse_args()
    body = options.body.read_bytes() if options.body else b""
    host, port, request = request_of(options.url, options.method, options.content_type, body)
    gc.disable()
    outcome: dict[str, Any] = uvloop.run(
        read(host, port, request, options.streams, options.seconds, options.tokens)
    )._asdict()
    print(json.dumps(outcome))


if __name__ == "__main__":
    main()
