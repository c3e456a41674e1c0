"""What a load's answers say: exact percentiles of all of them, and how late the load itself was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy

Array = numpy.ndarray[Any, numpy.dtype[numpy.float64]]

#: Where the latency curve is sampled, in percent.
CURVE = (0.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95, 99.99, 100.0)


class Outcome(NamedTuple):
    """What came of a load. `queued` is the share of requests that found no free connection."""

    requests: int
    failed: int
    offered_per_s: float
    requests_per_s: float
    p50_us: float
    p90_us: float
    p99_us: float
    p99_9_us: float
    max_us: float
    queued: float
    longest_gap_ms: float
    lag_p50_us: float
    lag_p99_us: float
    lag_max_us: float
    generator_cpu: float
    curve_us: dict[str, float]


class Answered(NamedTuple):
    """One answer, in seconds of the monotonic clock. `ready` is when a connection was free for it."""

    intended: float
    ready: float
    sent: float
    done: float


def percentile(ordered: Sequence[float] | Array, percent: float) -> float:
    """The smallest value of a sorted sequence that so many percent do not exceed; no interpolation, no buckets.

    >>> percentile([1.0, 2.0, 3.0, 4.0], 50), percentile(range(1, 1001), 99.9), percentile([7.0], 0)
    (2.0, 999.0, 7.0)
    """
    rank = math.ceil(round(len(ordered) * percent / 100.0, 6))
    return float(ordered[max(rank, 1) - 1])


def summary(answers: Sequence[Answered], failed: int, seconds: float, cpu_s: float, offered: float) -> Outcome:
    """The figures of a load that ran for `seconds`.

    >>> two = [Answered(0.0, 0.0, 0.001, 0.003), Answered(0.0, 0.002, 0.002, 0.008)]
    >>> outcome = summary(two, 1, 2.0, 0.5, offered=1.5)
    >>> outcome.requests, outcome.failed, outcome.requests_per_s, outcome.generator_cpu
    (2, 1, 1.0, 0.25)
    >>> round(outcome.p50_us), round(outcome.max_us), outcome.queued, round(outcome.longest_gap_ms)
    (3000, 8000, 0.5, 5)
    >>> round(outcome.lag_p50_us), round(outcome.lag_max_us)
    (0, 1000)
    """
    intended, ready, sent, done = (numpy.array(column) for column in zip(*answers, strict=True))
    latency_us = numpy.sort((done - intended) * 1e6)
    lag_us = numpy.sort((sent - numpy.maximum(intended, ready)) * 1e6)
    gaps_ms = numpy.diff(numpy.sort(done)) * 1e3
    curve = {f"{percent:g}": percentile(latency_us, percent) for percent in CURVE}
    return Outcome(
        requests=len(answers),
        failed=failed,
        offered_per_s=offered,
        requests_per_s=len(answers) / seconds,
        p50_us=curve["50"],
        p90_us=curve["90"],
        p99_us=curve["99"],
        p99_9_us=curve["99.9"],
        max_us=curve["100"],
        queued=float(numpy.mean(ready > intended)),
        longest_gap_ms=float(gaps_ms.max()) if len(gaps_ms) else 0.0,
        lag_p50_us=percentile(lag_us, 50),
        lag_p99_us=percentile(lag_us, 99),
        lag_max_us=float(lag_us.max()),
        generator_cpu=cpu_s / seconds,
        curve_us=curve,
    )
