"""The promises of docs/reliability.md: how often each is tried, its time bounds, and a line for each.

    @pytest.mark.promise("replica kill -9: only what it had started is lost")
    def test_a_killed_replica(promise: Promise, ...) -> None:
        for _ in range(promise.size(50, 6)):            # 50 with --promises full, 6 otherwise
            victim = promise.random.choice(pids)        # by the run's seed
        promise.within(back_s, 0.5, "count back")       # seconds; five times as long without --promises full
        promise.none_of(sent, "requests lost")          # of so many; what was counted was 0
        promise.says("502 for 31 started ones")         # any other figure

A test of a promise must give at least one figure. At the end of the run there is a line for each
promise that was chosen for it: kept, NOT KEPT, or not tried, and then why; a fixture that skips or
fails is no way to go without one. `scripts/faults` runs all of them in full.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest

#: How many times longer things may take on a machine that runs other things too: in CI, and beside other tests.
SLACK = 5.0

KEPT, NOT_KEPT, NOT_TRIED = "kept", "NOT KEPT", "not tried"
_WIDTH = len(NOT_TRIED)

_LINE = "promise"
#: All by node id. What this process tries:
_promises: dict[str, Promise] = {}
#: In the process that reports the run: all that there are, what was said of each, whose process died.
_rows: dict[str, str] = {}
_lines: dict[str, str] = {}
_died: dict[str, str] = {}


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
        self.outcome = ""

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


def choose(items: Iterable[pytest.Item], config: pytest.Config) -> None:
    """The tests of this run are chosen: each of a promise has a line from now on, whatever happens before it."""
    for item in items:
        if marker := item.get_closest_marker("promise"):
            seed = f"{config.getoption('--promise-seed')} {item.name}"
            _promises[item.nodeid] = Promise(marker.args[0], config.getoption("--promises") == "full", seed)
    expect({id: promise.row for id, promise in _promises.items()})
    if hasattr(config, "workeroutput"):  # a process of pytest-xdist: another one reports the run
        config.workeroutput["promises"] = _rows


def expect(rows: Mapping[str, str]) -> None:
    """The run has these promises."""
    _rows.update(rows)


def begin(item: pytest.Item) -> None:
    """Before the fixtures of each test."""
    assert (item.nodeid in _promises) == ("promise" in getattr(item, "fixturenames", ())), (
        "a test of a promise has both: the mark that says which, @pytest.mark.promise(row), and the fixture `promise`"
    )


def measured(request: pytest.FixtureRequest) -> Iterator[Promise]:
    """The body of the fixture `promise`."""
    promise = _promises[request.node.nodeid]
    yield promise
    if promise.outcome == KEPT:
        assert any(not figure.startswith("N=") for figure in promise.figures), "the promise gave no figure"


def note(item: pytest.Item, report: Any) -> None:
    """Of each phase of each test, where it runs."""
    promise = _promises.get(item.nodeid)
    if promise is None:
        return
    if report.skipped or (report.failed and report.when == "setup"):
        promise.outcome = NOT_TRIED
        promise.figures.append(_reason(report))
    elif report.failed:
        promise.outcome = NOT_KEPT if promise.outcome != NOT_TRIED else NOT_TRIED
    elif report.when == "call":
        promise.outcome = KEPT
    if promise.outcome:
        report.user_properties.append((_LINE, _line(promise.outcome, promise.row, promise.figures)))


def _reason(report: Any) -> str:
    """Why a test was skipped or its fixtures failed, in one line."""
    if isinstance(report.longrepr, tuple):  # skipped: file, line, reason
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    return f"setting up failed: {(crash.message if crash else report.longreprtext).strip().splitlines()[0]}"


def _line(outcome: str, row: str, figures: Iterable[str]) -> str:
    return f"{outcome:{_WIDTH}}  {row}: {'; '.join(figures)}"


def collect(report: Any) -> None:
    """Of each phase of each test, where the run is reported: another process, if tests run in several."""
    if report.when not in ("setup", "call", "teardown"):
        _died[report.nodeid] = str(report.longrepr)
    for name, line in report.user_properties:
        if name == _LINE:
            _lines[report.nodeid] = line


def _said(id: str) -> str:
    if id in _died:
        return _line(NOT_KEPT, _rows[id], [_died[id]])
    return _lines.get(id) or _line(NOT_TRIED, _rows[id], ["the run ended before it"])


def summary(reporter: pytest.TerminalReporter) -> None:
    """A line for each promise of this run."""
    option = reporter.config.getoption
    if _rows and not option("collectonly"):
        about = f"{option('--promises')}, --promise-seed {option('--promise-seed')}, {os.cpu_count()} cores"
        reporter.section(f"promises, {about}")
        for line in sorted(map(_said, _rows), key=lambda line: line[_WIDTH:]):
            reporter.write_line(line)
