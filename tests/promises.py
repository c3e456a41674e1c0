"""The promises of docs/reliability.md: how often each is tried, its time bounds, and a line for each.

    @pytest.mark.promise("replica kill -9: only what it had started is lost")
    def test_a_killed_replica(promise: Promise, ...) -> None:
        for _ in range(promise.size(50, 6)):            # 50 with --promises full, 6 otherwise
            victim = promise.random.choice(pids)        # by the run's seed
        promise.within(back_s, 0.5, "count back")       # seconds; five times as long without --promises full
        promise.none_of(sent, "requests lost")          # of so many; what was counted was 0
        promise.says("502 for 31 started ones")         # any other figure

A test of a promise must give at least one figure. At the end of the run there is a line for each
promise, kept or not; `scripts/faults` runs all of them in full.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

#: How many times longer things may take on a machine that runs other things too: in CI, and beside other tests.
SLACK = 5.0

_LINE = "promise"
_promises: dict[str, Promise] = {}
_lines: dict[str, str] = {}  # by node id


class Promise:
    """One promise while its test runs.

    full     whether this is the long run of scripts/faults
    random   seeded with the run's seed and the test's name: the same in each run with that seed
    """

    def __init__(self, row: str, full: bool, seed: str) -> None:
        self.row = row
        self.full = full
        self.random = random.Random(seed)
        self.figures: list[str] = []
        self.outcome = "not run"

    def size(self, full: int, small: int) -> int:
        """How often to try it."""
        found = full if self.full else small
        self.figures.append(f"N={found}")
        return found

    def within(self, seconds: float, bound_s: float, what: str) -> None:
        """`what` took so many seconds; AssertionError if that is too long."""
        self.figures.append(f"{what} {seconds:.3g} s (promised {bound_s:g})")
        assert seconds <= bound_s * (1.0 if self.full else SLACK), self.figures[-1]

    def none_of(self, count: int, what: str) -> None:
        """Of `count` tries none came out as `what` says: the test has made sure of it."""
        assert count > 0, f"nothing was counted for {what!r}"
        self.figures.append(f"0 of {count:,} {what} (a rate below {3 / count:.2g} at 95 %)")

    def says(self, figure: str) -> None:
        """Any other figure of the line."""
        self.figures.append(figure)


def add_options(parser: pytest.Parser) -> None:
    parser.addoption(
        "--promises",
        choices=("small", "full"),
        default="small",
        help="how often each promise is tried, and with which time bounds; full is what scripts/faults does",
    )
    parser.addoption(
        "--promise-seed",
        type=int,
        default=random.SystemRandom().randrange(10**6),
        help="of what the tests of promises choose at random",
    )


def configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "promise(row): shows that this promise is kept (tests/promises.py)")


def measured(request: pytest.FixtureRequest) -> Iterator[Promise]:
    """The body of the fixture `promise`."""
    marker = request.node.get_closest_marker("promise")
    assert marker is not None, "say which promise: @pytest.mark.promise(row)"
    full = request.config.getoption("--promises") == "full"
    seed = f"{request.config.getoption('--promise-seed')} {request.node.name}"
    promise = _promises[request.node.nodeid] = Promise(marker.args[0], full, seed)
    yield promise
    if promise.outcome == "kept":
        assert any(not figure.startswith("N=") for figure in promise.figures), "the promise gave no figure"


def note(item: pytest.Item, report: Any) -> None:
    """Of each phase of each test, where it runs."""
    promise = _promises.get(item.nodeid)
    if promise is None:
        return
    if report.failed:
        promise.outcome = "NOT KEPT"
    elif report.skipped:
        promise.outcome = "skipped"
        promise.figures.append(str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr))
    elif report.when == "call" and promise.outcome == "not run":
        promise.outcome = "kept"
    report.user_properties.append((_LINE, f"{promise.outcome:8}  {promise.row}: {'; '.join(promise.figures)}"))


def collect(report: Any) -> None:
    """Of each phase of each test, where the run is reported: another process, if tests run in several."""
    for name, line in report.user_properties:
        if name == _LINE:
            _lines[report.nodeid] = line


def summary(reporter: pytest.TerminalReporter) -> None:
    """A line for each promise of this run."""
    if _lines:
        option = reporter.config.getoption
        about = f"{option('--promises')}, --promise-seed {option('--promise-seed')}, {os.cpu_count()} cores"
        reporter.section(f"promises, {about}")
        for line in sorted(_lines.values(), key=lambda line: line[8:]):
            reporter.write_line(line)
