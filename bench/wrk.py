"""Run wrk, a closed loop of requests, and read what it prints."""

from __future__ import annotations

import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from peers.jobs import Request

UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6, "h": 3600e6}
POST = Path(__file__).parent / "post.lua"


class WrkFailed(Exception):
    """wrk is not there, or ended with an error."""


class Load(NamedTuple):
    """One run. `failed` counts answers other than 2xx and 3xx, and socket errors."""

    requests: int
    requests_per_s: float
    p50_us: float
    p99_us: float
    failed: int


class Run(NamedTuple):
    """What wrk said, and how much of one core it took itself."""

    load: Load
    wrk_cpu: float


def find() -> str:
    path = shutil.which("wrk")
    if path is None:
        raise WrkFailed("wrk is not in PATH; install it (Debian, Ubuntu: apt-get install wrk)")
    return path


def run(url: str, request: Request, connections: int, seconds: int) -> Run:
    """Load `url` with one request after another on each connection. One thread; whole seconds only.

    Raises WrkFailed.
    """
    before = own_cpu_s()
    with script_of(request) as (options, arguments):
        command = [find(), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "10s"]
        done = subprocess.run(
            [*command, *options, url, *arguments], capture_output=True, text=True, timeout=seconds + 60
        )
    if done.returncode:
        raise WrkFailed(f"wrk failed on {url}: {done.stdout}{done.stderr}")
    return Run(parse(done.stdout), (own_cpu_s() - before) / seconds)


def own_cpu_s() -> float:
    """CPU time of the children that were waited for so far: of wrk, if nothing else ends meanwhile."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@contextmanager
def script_of(request: Request) -> Iterator[tuple[list[str], list[str]]]:
    """What to say before and after the URL; a plain GET needs no script, which costs wrk time."""
    if request.method == "GET":
        yield [], []
        return
    with tempfile.NamedTemporaryFile() as body:
        body.write(request.body)
        body.flush()
        yield ["-s", str(POST)], ["--", request.method, request.content_type, body.name]


def parse(text: str) -> Load:
    """The figures in wrk's report.

    >>> parse('''  Latency Distribution
    ...      50%  579.00us
    ...      99%    1.20ms
    ...   12345 requests in 5.00s, 17MB read
    ...   Socket errors: connect 0, read 2, write 0, timeout 1
    ...   Non-2xx or 3xx responses: 5
    ... Requests/sec:   2469.00''')
    Load(requests=12345, requests_per_s=2469.0, p50_us=579.0, p99_us=1200.0, failed=8)
    """
    lines = re.findall(r"(50|99)%\s+([\d.]+)([a-z]+)", text)
    percentiles = {int(percent): float(number) * UNITS_US[unit] for percent, number, unit in lines}
    failed = sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", text)))
    if errors := re.search(r"Socket errors: (.*)", text):
        failed += sum(map(int, re.findall(r"\d+", errors[1])))
    return Load(
        int(found(r"(\d+) requests in", text)),
        float(found(r"Requests/sec:\s+([\d.]+)", text)),
        percentiles[50],
        percentiles[99],
        failed,
    )


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise WrkFailed(f"wrk printed nothing like {pattern!r}:\n{text}")
    return match[1]
