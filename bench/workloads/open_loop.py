"""W9: requests that come when they come: latency at 50 % and 90 % of the capacity, by bench/open_loop.py."""

from __future__ import annotations

from collections.abc import Mapping

import processes
import servers
from figures import Figures

from .closed_loop import POSTED, VARIANTS
from .contest import Measure, contest, cpu_us, fastest, of_all_peers
from .program import run_client
from .session import Session
from .workload import Column, Curves, Table, Workload

CONNECTIONS = 64
CAPACITY = "closed loop"
LEVELS = {"50 % load": 0.5, "90 % load": 0.9}
#: The generator waits so long for the last answers, and it takes time to start.
SLACK_S = 30.0


def measure(session: Session) -> None:
    variants = {"json": ""} if session.options.quick else VARIANTS
    contenders = fastest(of_all_peers(session, "W9", variants, otherwise=POSTED))
    capacity: dict[servers.Server, float] = {}
    levels = {case: at_share(share, capacity) for case, share in LEVELS.items()}
    contest(session, "W9", contenders, {CAPACITY: finds(capacity), **levels})


def finds(capacity: dict[servers.Server, float]) -> Measure:
    """A closed loop, whose rate is what the open loops of the same round go by."""

    def measure(server: servers.Server, seconds: int) -> Figures:
        found = loaded(server, seconds)
        capacity[server] = found["requests_per_s"]
        return found

    return measure


def at_share(share: float, capacity: Mapping[servers.Server, float]) -> Measure:
    """That share of the capacity, as far as it is known. Every round has a schedule of its own."""
    seeds = iter(range(1, 1_000_000))

    def measure(server: servers.Server, seconds: int) -> Figures:
        return loaded(server, seconds, f"--rate={share * capacity.get(server, 0.0)}", f"--seed={next(seeds)}")

    return measure


def loaded(server: servers.Server, seconds: int, *schedule: str) -> Figures:
    before = cpu_us(server)
    options = (f"--connections={CONNECTIONS}", f"--seconds={seconds}")
    found = run_client("open_loop.py", server.url, server.request, seconds + SLACK_S, *options, *schedule)
    spent = processes.cpu_per_request(before, cpu_us(server), found["requests"])
    return {**found, "cpu_us": sum(spent.values()), "cpu_by_process": spent}


def columns(level: str) -> tuple[Column, ...]:
    return (
        Column("requests/s asked", level, "offered_per_s"),
        Column("answered", level, "requests_per_s"),
        Column("p50 ms", level, "p50_us", ".2f", 1e3),
        Column("p90 ms", level, "p90_us", ".2f", 1e3),
        Column("p99 ms", level, "p99_us", ".2f", 1e3),
        Column("p99.9 ms", level, "p99_9_us", ".2f", 1e3),
        Column("longest ms", level, "max_us", ".1f", 1e3),
        Column("waited for a connection %", level, "queued", ".1f", 0.01),
        Column("generator's lag p99 ms", level, "lag_p99_us", ".2f", 1e3),
        Column("generator's CPU %", level, "generator_cpu", ".0f", 0.01),
    )


ABOUT = """
`GET /json` of W1 at the moments of a seeded Poisson process, at 50 % and 90 % of what a closed loop of 64
connections by the same generator reached in the same round. Latency counts from the moment at which a request was
meant to be sent, on 64 connections; one that finds none free waits, and that counts. The percentiles are exact, of
all requests. The generator is a Python process on the same cores: where its CPU is near 100 %, or its lag is near the
latency, the figures are its own. A peer whose plain handlers take threads of a pool is there with its `async def` ones.
"""

W9 = Workload(
    "W9",
    "open loop",
    ABOUT,
    measure,
    (
        Table(
            "capacity: closed loop of the same generator, 64 connections",
            (
                Column("requests/s", CAPACITY, "requests_per_s"),
                Column("p50 ms", CAPACITY, "p50_us", ".2f", 1e3),
                Column("p99.9 ms", CAPACITY, "p99_9_us", ".2f", 1e3),
                Column("generator's CPU %", CAPACITY, "generator_cpu", ".0f", 0.01),
            ),
        ),
        *(Table(level, columns(level)) for level in LEVELS),
    ),
    tuple(
        Curves(f"latency-{level[:2]}", f"Latency from the intended time, {level}", level)
        for level in LEVELS
    ),
)  # fmt: skip
