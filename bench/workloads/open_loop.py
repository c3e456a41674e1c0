"""W9: requests that come when they come: latency at 50 % and 90 % of the capacity, by bench/open_loop.py."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

import processes
import servers
from figures import Figures

from .closed_loop import POSTED, VARIANTS
from .contest import Contender, contest, cpu_us, of_all_peers
from .program import run_client
from .session import Session
from .workload import Column, Curves, Table, Workload

CONNECTIONS = 64
CAPACITY = "closed loop"
LEVELS = {"50 % load": 0.5, "90 % load": 0.9}
#: The generator waits so long for the last answers, and it takes time to start.
SLACK_S = 30.0


def measure(session: Session) -> None:
    contenders = of_all_peers(session, "W9", VARIANTS, otherwise=POSTED)
    contest(session, "W9", contenders, {CAPACITY: at_rate(lambda server: 0.0)})
    known = [each for each in contenders if session.record.rounds("W9", CAPACITY, each.name)]
    levels = {case: at_rate(share_of_capacity(session, known, share)) for case, share in LEVELS.items()}
    contest(session, "W9", known, levels)


def share_of_capacity(
    session: Session, contenders: list[Contender], share: float
) -> Callable[[servers.Server], float]:
    """server -> that share of the median of its own closed loops in this run."""
    rates = {
        (each.peer, each.job): share
        * median(found["requests_per_s"] for found in session.fresh("W9", CAPACITY, each.name))
        for each in contenders
    }
    return lambda server: rates[server.name, server.job]


def at_rate(rate: Callable[[servers.Server], float]) -> Callable[[servers.Server, int], Figures]:
    """Measures under that many requests/s; 0: a closed loop. Every round has a schedule of its own."""
    seeds = iter(range(1, 1_000_000))

    def measure(server: servers.Server, seconds: int) -> Figures:
        before = cpu_us(server)
        schedule = (f"--rate={rate(server)}", f"--seconds={seconds}", f"--seed={next(seeds)}")
        pool = f"--connections={CONNECTIONS}"
        found = run_client("open_loop.py", server.url, server.request, seconds + SLACK_S, *schedule, pool)
        spent = processes.cpu_per_request(before, cpu_us(server), found["requests"])
        return {**found, "cpu_us": sum(spent.values()), "cpu_by_process": spent}

    return measure


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
connections by the same generator reaches. Latency counts from the moment at which a request was meant to be sent,
on 64 connections; one that finds none free waits, and that counts. The percentiles are exact, of all requests. The
generator is a Python process on the same cores: where its CPU is near 100 %, or its lag is near the latency, the
figures are its own.
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
