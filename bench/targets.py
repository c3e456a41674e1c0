"""What the benchmark is to show, as data: which figures, above which others, within which bounds.

A target without a bound is there to be reported.
"""

from __future__ import annotations

from typing import NamedTuple

import figures
from record import Record


class Of(NamedTuple):
    """One figure of a record."""

    workload: str
    case: str
    contender: str
    figure: str


class Target(NamedTuple):
    """`figure`, or its ratio to the largest of `over` in the same rounds, and what is wanted of it."""

    text: str
    figure: Of
    over: tuple[Of, ...] = ()
    at_least: float | None = None
    at_most: float | None = None
    stretch: float | None = None
    per: float = 1.0
    unit: str = ""

    @property
    def wanted(self) -> str:
        """
        >>> Target("", Of("W1", "", "", ""), (Of("W1", "", "", ""),), at_least=0.42, stretch=0.55).wanted
        '≥ 0.42 × (stretch 0.55)'
        """
        bounds = {"≥": self.at_least, "≤": self.at_most}
        found = " ".join(f"{sign} {bound:g}{self.suffix}" for sign, bound in bounds.items() if bound is not None)
        return found + (f" (stretch {self.stretch:g})" if self.stretch is not None else "")

    @property
    def suffix(self) -> str:
        return " ×" if self.over else f" {self.unit}".rstrip()


def reached(record: Record, target: Target) -> float | None:
    """What the record has of it; None if it was not measured, or not in the same rounds."""
    ours = record.rounds(*target.figure[:3])
    if not target.over:
        found = figures.middle(ours.values()).get(target.figure.figure)
        return None if found is None else found / target.per
    theirs = [rounds for of in target.over if (rounds := record.rounds(*of[:3]))]
    return figures.ratio(ours, theirs, target.figure.figure, target.over[0].figure) if theirs else None


def verdict(target: Target, value: float | None) -> str:
    """In a word.

    >>> target = Target("", Of("W1", "", "", ""), at_most=18.0, stretch=14.0)
    >>> [verdict(target, value) for value in (13.0, 18.0, 19.0, None)]
    ['reached, stretch too', 'reached', 'missed', 'not measured']
    >>> verdict(target._replace(at_most=None, at_least=2.0, stretch=None), 1.9)
    'missed'
    """
    if value is None:
        return "not measured"
    if target.at_least is None and target.at_most is None:
        return "reported"
    if (target.at_least is not None and value < target.at_least) or (
        target.at_most is not None and value > target.at_most
    ):
        return "missed"
    if target.stretch is None:
        return "reached"
    beyond = value >= target.stretch if target.at_least is not None else value <= target.stretch
    return "reached, stretch too" if beyond else "reached"


def w1(contender: str, figure: str = "requests_per_s", connections: str = "64 connections") -> Of:
    return Of("W1", connections, contender, figure)


def first_p50(contender: str) -> Of:
    return w1(contender, "p50_us", "1 connection")


def w5(contender: str, case: str) -> Of:
    return Of("W5", case, contender, "calls_per_s")


def rate(workload: str, case: str, contender: str = "headgate") -> Of:
    return Of(workload, case, contender, "requests_per_s")


MODEL = "64 connections"
IN, ECHO = "1 MiB in", "1 MiB in and out"
AWAITED, THREADS = "64 calls in flight", "64 threads"
ENDPOINTS = "1,000 endpoints"
#: Starlette runs plain handlers in a thread pool: `async def` ones are the faster ones.
STARLETTE = (w1("starlette"), w1("starlette (async def)"))
THROUGHPUT = (w1("ray-serve-throughput"), w1("ray-serve-throughput (async def)"))
RAY_ACTORS = ("Ray actor", "Ray async actor", "Ray actor, ray.get of 64", "Ray async actor, ray.get of 64")

TARGETS = (
    Target("plain handler, to Starlette", w1("headgate"), STARLETTE, at_least=4.0),
    Target("… to the floor", w1("headgate"), (w1("floor"),), at_least=0.42, stretch=0.55),
    Target("… to Mosec", w1("headgate"), (w1("mosec (POST)"),), at_least=6.0),
    Target("… to Ray Serve's throughput mode, GET", w1("headgate"), THROUGHPUT, at_least=12.0),
    Target("… the same, a POST that reads its body", w1("headgate (POST)"), (w1("ray-serve-throughput (POST)"),)),
    Target("… to Ray Serve's default, GET", w1("headgate"), (w1("ray-serve"), w1("ray-serve (async def)"))),
    Target("… the same, a POST that reads its body", w1("headgate (POST)"), (w1("ray-serve (POST)"),)),
    Target("… to Granian RSGI", w1("headgate"), (w1("granian"),), at_least=1.5),
    Target(
        "… CPU of all processes, per request", w1("headgate", "cpu_us"), at_most=18.0, stretch=14.0, unit="µs"
    ),
    Target("max_concurrent_queries 8, to Starlette", w1("headgate-8"), STARLETTE),
    Target("`async def` handler, to Starlette", w1("headgate (async def)"), STARLETTE, at_least=4.5),
    Target(
        "p50 of 1 connection, to Starlette", first_p50("headgate"), (first_p50("starlette (async def)"),), at_most=1.3
    ),
    Target("… to Mosec", first_p50("headgate"), (first_p50("mosec (POST)"),), at_most=1.0),
    Target("model, to a batcher in one process", rate("W3", MODEL), (rate("W3", MODEL, "inprocess"),), at_least=0.95),
    Target("… to Mosec", rate("W3", MODEL), (rate("W3", MODEL, "mosec"),), at_least=1.0),
    Target(
        "… p99 to p50", Of("W3", MODEL, "headgate", "p99_us"), (Of("W3", MODEL, "headgate", "p50_us"),), at_most=1.3
    ),
    Target(
        "1 MiB in by the arena (`request.view`), to Starlette",
        rate("W4", IN, "headgate (view)"), (rate("W4", IN, "starlette"),), at_least=2.0,
    ),
    Target("… by `request.data`, to Starlette", rate("W4", IN), (rate("W4", IN, "starlette"),)),
    Target("1 MiB in and out, to Starlette", rate("W4", ECHO), (rate("W4", ECHO, "starlette"),), at_least=1.2),
    Target(
        "handles awaited, 64 in flight, to the fastest Ray actor",
        w5("handle.call()", AWAITED), tuple(w5(name, AWAITED) for name in RAY_ACTORS), at_least=40.0,
    ),
    Target(
        "… 64 threads, to the fastest Ray actor",
        w5("handle.call()", THREADS), tuple(w5(name, THREADS) for name in RAY_ACTORS), at_least=15.0,
    ),
    Target("100 MB array in, to memcpy", Of("W5", "100 MB in", "handle.call()", "memcpys"), at_most=2.0, unit="copies"),
    Target("… out", Of("W5", "100 MB out", "handle.call()", "memcpys"), at_most=2.0, unit="copies"),
    Target("first answer", Of("W6", "one start", "headgate", "first_answer_s"), at_most=0.15, unit="s"),
    Target(
        "… to Mosec", Of("W6", "one start", "headgate", "first_answer_s"),
        (Of("W6", "one start", "mosec (POST)", "first_answer_s"),), at_most=0.5,
    ),
    Target("memory of all processes (PSS)", Of("W6", "one start", "headgate", "pss_mb"), at_most=45.0, unit="MB"),
    Target("stop", Of("W6", "one start", "headgate", "stop_s"), at_most=0.1, unit="s"),
    Target("requests/s of 1 route to 1,000 routes", rate("W7", "1 route"), (rate("W7", "1,000 routes"),), at_most=1.1),
    Target(
        "CPU of 1,000 routes to 1 route",
        Of("W7", "1,000 routes", "headgate", "cpu_us"), (Of("W7", "1 route", "headgate", "cpu_us"),), at_most=1.1,
    ),
    Target(
        "p99.9 to p50 at 50 % load",
        Of("W9", "50 % load", "headgate", "p99_9_us"), (Of("W9", "50 % load", "headgate", "p50_us"),), at_most=10.0,
    ),
    Target(
        "… at 90 % load",
        Of("W9", "90 % load", "headgate", "p99_9_us"), (Of("W9", "90 % load", "headgate", "p50_us"),),
    ),
    Target("16 replicas to one", rate("W10", "16 replicas"), (rate("W10", "1 replica"),), at_least=0.9 * 16),
    Target(
        "a publish of 1,000 endpoints is in force", Of("W10", ENDPOINTS, "headgate", "publish_ms"),
        at_most=50.0, unit="ms",
    ),
    Target("… requests that fail meanwhile", Of("W10", ENDPOINTS, "headgate", "failed"), at_most=0.0),
    Target("… longest gap between answers meanwhile", Of("W10", ENDPOINTS, "headgate", "gap_ms"), unit="ms"),
    Target("… while nothing changes", Of("W10", ENDPOINTS, "headgate", "calm_gap_ms"), unit="ms"),
)  # fmt: skip
