"""Run wrk and read what it prints."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 60e6, "h": 3600e6}
POST = Path(__file__).parent / "post.lua"


class Load(NamedTuple):
    """One run of wrk. `failed` counts answers other than 2xx and 3xx, and socket errors."""

    requests: int
    requests_per_s: float
    p50_us: float
    p99_us: float
    failed: int


def find() -> str:
    path = shutil.which("wrk")
    if path is None:
        sys.exit("wrk is not in PATH; install it (Debian, Ubuntu: apt-get install wrk)")
    return path


def run(url: str, connections: int, seconds: int, body_bytes: int = 0) -> Load:
    """Load `url` from one thread of wrk: GET, or POST with a body of that size.

    wrk takes whole seconds only.
    """
    command = [find(), "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "--timeout", "10s"]
    command += ["-s", str(POST), url, "--", str(body_bytes)] if body_bytes else [url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if done.returncode:
        sys.exit(f"wrk failed on {url}: {done.stdout}{done.stderr}")
    return parse(done.stdout)


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
        raise ValueError(f"wrk printed nothing like {pattern!r}:\n{text}")
    return match[1]
