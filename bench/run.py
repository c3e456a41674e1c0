"""headgate beside its peers, in one run: requests/s, latency, CPU time per request, ratios.

Each job runs on both sides in turn (A B A B ...); the figures are medians over the rounds, and
a ratio is the median of each round's ratio, so that a slow minute of the machine hits both
sides. Requests per second swing with the machine; CPU time per request repeats.

    scripts/bench --rounds 5 --seconds 5 --only json,json-1
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import model
import processes
import servers
import wrk

RESULTS = Path(__file__).parent / "results"
IN_FLIGHT = 64
CALLS_GOAL = 40_000


class Job(NamedTuple):
    """One comparison. `goal` is for the requests/s ratio, or for the p50 ratio if `of` says so."""

    title: str
    headgate: str
    peer: str
    peer_job: str
    connections: int
    body_bytes: int = 0
    of: str = "requests_per_s"
    goal: float = 0.0
    side: str = "headgate"


MIB = 1 << 20
JOBS = {
    "json": Job("small JSON, plain handler", "json", "starlette", "json", 64, goal=3.0),
    "json-async": Job("small JSON, async def", "json_async", "starlette", "json", 64, goal=3.0),
    "json-1": Job("small JSON, plain handler", "json", "starlette", "json", 1, of="p50_us", goal=1.5),
    "json-async-1": Job("small JSON, async def", "json_async", "starlette", "json", 1, of="p50_us", goal=1.5),
    "batch": Job(
        "numpy, 5 ms per batch of up to 32", "batch", "batcher", "batch", 64, model.ROW_BYTES, goal=0.9
    ),
    "upload": Job(
        "1 MiB in, length of request.view out", "length_view", "starlette", "length", 8, MIB, goal=1.2
    ),
    "ray": Job("small JSON, plain handler, on Ray", "json", "headgate", "json", 64, goal=0.9, side="headgate-ray"),
    "ray-async": Job(
        "small JSON, async def, on Ray", "json_async", "headgate", "json_async", 64, goal=0.9, side="headgate-ray"
    ),
    "upload-data": Job("1 MiB in, length of request.data out", "length", "starlette", "length", 8, MIB),
}
HANDLES = ("handle", "ray-handle")


class Sample(NamedTuple):
    """One side's run of one round."""

    requests_per_s: float
    p50_us: float
    p99_us: float
    failed: int
    cpu_us: dict[str, float]


def sample(server: servers.Server, job: Job, seconds: int) -> Sample:
    before = processes.cpu_us(server.pid)
    load = wrk.run(server.url, job.connections, seconds, job.body_bytes)
    cpu = processes.cpu_per_request(before, processes.cpu_us(server.pid), load.requests)
    return Sample(load.requests_per_s, load.p50_us, load.p99_us, load.failed, cpu)


def middle(samples: Sequence[Sample]) -> Sample:
    """The medians of each figure; failures are added up."""
    names = sorted({name for each in samples for name in each.cpu_us})
    return Sample(
        median(each.requests_per_s for each in samples),
        median(each.p50_us for each in samples),
        median(each.p99_us for each in samples),
        sum(each.failed for each in samples),
        {name: median(each.cpu_us.get(name, 0.0) for each in samples) for name in names},
    )


def ratio(ours: Sequence[Sample], theirs: Sequence[Sample], of: str) -> float:
    """The median over the rounds of ours / theirs.

    >>> slow, fast = Sample(100, 9, 9, 0, {}), Sample(300, 3, 3, 0, {})
    >>> ratio([fast, fast, slow], [slow, slow, slow], "requests_per_s")
    3.0
    """
    return median(getattr(a, of) / getattr(b, of) for a, b in zip(ours, theirs, strict=True))


def compare(job: Job, rounds: int, seconds: int) -> dict[str, Any]:
    ours: list[Sample] = []
    theirs: list[Sample] = []
    with (
        servers.running(job.side, job.headgate, job.body_bytes) as headgate,
        servers.running(job.peer, job.peer_job, job.body_bytes) as peer,
    ):
        for server in (headgate, peer):
            wrk.run(server.url, job.connections, 1, job.body_bytes)
        for _ in range(rounds):
            ours.append(sample(headgate, job, seconds))
            theirs.append(sample(peer, job, seconds))
    return {
        "job": job._asdict(),
        "headgate": [each._asdict() for each in ours],
        "peer": [each._asdict() for each in theirs],
        "ratio": {of: ratio(ours, theirs, of) for of in ("requests_per_s", "p50_us", "p99_us")},
    }


def show(result: dict[str, Any]) -> None:
    job = Job(**result["job"])
    print(f"\n{job.title}, {job.connections} connection{'s' if job.connections > 1 else ''}")
    print(f"  {'':12} {'requests/s':>11} {'p50 ms':>8} {'p99 ms':>8} {'CPU us/request':>15}")
    for name, key in ((job.side, "headgate"), (job.peer, "peer")):
        show_side(name, middle([Sample(**each) for each in result[key]]))
    ratios = result["ratio"]
    figures = f"{ratios['requests_per_s']:11.2f} {ratios['p50_us']:8.2f} {ratios['p99_us']:8.2f}"
    print(f"  {'ratio':12} {figures}   {verdict(ratios[job.of], job)}")


def show_side(name: str, side: Sample) -> None:
    each = ", ".join(f"{process} {us:.1f}" for process, us in sorted(side.cpu_us.items()))
    print(
        f"  {name:12} {side.requests_per_s:11,.0f} {side.p50_us / 1e3:8.3f} {side.p99_us / 1e3:8.3f} "
        f"{sum(side.cpu_us.values()):15.1f}   {each}"
    )
    if side.failed:
        print(f"  {name}: {side.failed} requests FAILED; its figures mean nothing")


def verdict(reached: float, job: Job) -> str:
    """Whether a ratio meets its goal; for a latency less is better.

    >>> verdict(2.0, Job("", "", "", "", 1, of="p50_us", goal=1.5))
    'goal: p50 <= 1.5: missed'
    """
    if not job.goal:
        return ""
    if job.of == "requests_per_s":
        return f"goal: requests/s >= {job.goal:g}: {'met' if reached >= job.goal else 'missed'}"
    return f"goal: p50 <= {job.goal:g}: {'met' if reached <= job.goal else 'missed'}"


def handle_calls(rounds: int, seconds: int) -> dict[str, Any]:
    command = [sys.executable, "handle_calls.py", str(seconds), str(IN_FLIGHT)]
    runs = []
    for _ in range(rounds):
        printed = subprocess.check_output(command, cwd=servers.HERE, timeout=seconds + 60)
        runs.append(json.loads(printed))
    return {"in_flight": IN_FLIGHT, "runs": runs, "calls_per_s": median(run["calls_per_s"] for run in runs)}


def show_calls(result: dict[str, Any]) -> None:
    reached = result["calls_per_s"]
    print(f"\nawait handle.call() from another process, {IN_FLIGHT} in flight")
    print(f"  {reached:,.0f} calls/s   goal: {CALLS_GOAL:,}: {'met' if reached >= CALLS_GOAL else 'missed'}")
    for process, us in sorted(result["runs"][-1]["cpu_us"].items()):
        print(f"  {process:16} {us:6.1f} us CPU per call")


def ray_calls(rounds: int) -> dict[str, Any]:
    printed = subprocess.check_output(
        [sys.executable, "ray_calls.py", str(rounds)], cwd=servers.HERE, timeout=120 + 60 * rounds,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )  # fmt: skip
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def show_ray_calls(result: dict[str, Any]) -> None:
    print("\nhandles on a one-node Ray, us per call: a bare Ray actor call, handle.remote(), handle.call()")
    for name, sides in result.items():
        bare, remote, call = (median(sides[side]) for side in ("bare", "remote", "call"))
        over = median(a / b for a, b in zip(sides["remote"], sides["bare"], strict=True))
        faster = median(a / b for a, b in zip(sides["remote"], sides["call"], strict=True))
        print(f"  {name:16} {bare:8.0f} {remote:8.0f} {call:8.0f}")
        print(f"  {'':16} remote / bare {over:.2f}   goal: <= 1.3: {'met' if over <= 1.3 else 'missed'}")
        print(f"  {'':16} remote / call {faster:.1f}   goal: >= 20: {'met' if faster >= 20 else 'missed'}")


def machine() -> dict[str, Any]:
    names = ("headgate", "uvloop", "httptools", "starlette", "uvicorn", "numpy")
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpus": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
    }


def store(name: str, result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side (3)")
    parser.add_argument("--seconds", type=int, default=5, help="length of a run (5)")
    parser.add_argument("--only", default="", help=f"comma-separated: {','.join([*JOBS, *HANDLES])}")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else [*JOBS, *HANDLES]
    if unknown := set(chosen) - {*JOBS, *HANDLES}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    wrk.find()

    result: dict[str, Any] = {"machine": machine(), "rounds": options.rounds, "seconds": options.seconds}
    print("  ".join(f"{name} {value}" for name, value in result["machine"].items()))
    for name in chosen:
        if name == "handle":
            result[name] = handle_calls(options.rounds, options.seconds)
            show_calls(result[name])
        elif name == "ray-handle":
            result[name] = ray_calls(options.rounds)
            show_ray_calls(result[name])
        else:
            result[name] = compare(JOBS[name], options.rounds, options.seconds)
            show(result[name])
    print(f"\nstored in {store('run', result)}")


if __name__ == "__main__":
    main()
