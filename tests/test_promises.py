"""The frame of the tests of promises: what a line says, and what counts as kept."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

TESTS = """
import pytest

@pytest.mark.promise("one: it holds")
def test_kept(promise):
    for _ in range(promise.size(50, 3)):
        pass
    promise.none_of(1_000, "requests lost")
    promise.within(0.2, 0.1, "back")

@pytest.mark.promise("two: it takes too long")
def test_too_long(promise):
    promise.within(0.6, 0.1, "back")

@pytest.mark.promise("three: it needs what is not there")
def test_skipped(promise):
    promise.size(50, 3)
    pytest.skip("no root")

@pytest.mark.promise("four: nobody knows")
def test_without_a_figure(promise):
    promise.size(50, 3)

def test_without_a_row(promise):
    pass
"""

#: Tests that come to an end before their first line.
EARLY = """
import pytest

@pytest.fixture
def mounts():
    pytest.skip("no mounts")

@pytest.fixture
def disk(mounts):
    pass

@pytest.fixture
def broken():
    raise LookupError("no disk\\nand no room for one")

@pytest.fixture
def leaves_something():
    yield
    pytest.fail("a process is left", pytrace=False)

@pytest.mark.promise("1: a fixture before `promise` skips")
def test_skipped_early(disk, promise): ...

@pytest.mark.promise("2: a fixture before `promise` fails")
def test_broken_early(broken, promise): ...

@pytest.mark.promise("3: a fixture after it skips")
def test_skipped_late(promise, disk): ...

@pytest.mark.skip(reason="by a mark")
@pytest.mark.promise("4: it is marked so")
def test_skipped_by_a_mark(promise): ...

@pytest.mark.promise("5: the end fails")
def test_end(leaves_something, promise):
    promise.none_of(10, "tries failed")

@pytest.mark.promise("6: nobody measures")
def test_without_the_fixture(): ...

@pytest.mark.parametrize("kind", [pytest.param(kind, marks=pytest.mark.promise(f"7: {kind}")) for kind in "ab"])
def test_kinds(kind, promise):
    promise.says(kind)
"""

DIES = """
import os
import pytest

@pytest.mark.promise("1: its process dies")
def test_dies(promise):
    os._exit(1)

@pytest.mark.promise("2: others do not")
def test_lives(promise):
    promise.says("42")
"""


def lines(folder: Path, text: str, *arguments: str) -> list[str]:
    """What a run of these tests says of promises, one line each, by their rows."""
    (folder / "test_rows.py").write_text(text)
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "--rootdir", "."]
    here = Path(__file__).parent
    run = subprocess.run(
        [*command, "-c", here.parent / "pyproject.toml", "--confcutdir", here, "-p", "conftest", *arguments, folder],
        cwd=here,
        capture_output=True,
        text=True,
    )
    _, title, rest = run.stdout.partition("= promises, ")
    assert title, run.stdout + run.stderr
    return [line for line in rest.splitlines() if re.match(r"(kept|NOT KEPT|not tried) +\w+: ", line)]


def test_each_promise_has_a_line_and_small_runs_have_slack(tmp_path: Path) -> None:
    four, one, three, two = lines(tmp_path, TESTS)
    assert one == (
        "kept       one: it holds: N=3; "
        "0 of 1,000 requests lost (a rate below 0.003 at 95 %); back 0.2 s (promised 0.1)"
    )
    assert two == "NOT KEPT   two: it takes too long: back 0.6 s (promised 0.1)"
    assert three.startswith("not tried  three: it needs what is not there: N=3; ")
    assert "no root" in three
    assert four.startswith("NOT KEPT   four: nobody knows: N=3")


def test_the_full_run_tries_more_often_and_has_no_slack(tmp_path: Path) -> None:
    _, one, _, _ = lines(tmp_path, TESTS, "--promises", "full")
    assert one.startswith("NOT KEPT   one: it holds: N=50;")


def test_whatever_comes_before_the_test_or_after_it_there_is_a_line(tmp_path: Path) -> None:
    found = lines(tmp_path, EARLY)
    assert found[:5] == [
        "not tried  1: a fixture before `promise` skips: no mounts",
        "not tried  2: a fixture before `promise` fails: setting up failed: LookupError: no disk",
        "not tried  3: a fixture after it skips: no mounts",
        "not tried  4: it is marked so: by a mark",
        "NOT KEPT   5: the end fails: 0 of 10 tries failed (a rate below 0.3 at 95 %)",
    ]
    assert found[5].startswith("not tried  6: nobody measures: setting up failed: AssertionError: a test of a promise")
    assert found[6:] == ["kept       7: a: a", "kept       7: b: b"]


def test_a_run_that_ends_early_has_a_line_for_each_promise_all_the_same(tmp_path: Path) -> None:
    _, tried, *rest = lines(tmp_path, EARLY, "-x")
    assert tried.startswith("not tried  2: a fixture before `promise` fails: setting up")
    assert len(rest) == 6
    assert rest[-1] == "not tried  7: b: the run ended before it"


def test_a_promise_whose_process_dies_has_a_line(tmp_path: Path) -> None:
    dead, living = lines(tmp_path, DIES, "-n", "1")
    assert dead.startswith("NOT KEPT   1: its process dies: worker 'gw0' crashed while running ")
    assert living == "kept       2: others do not: 42"


def test_what_is_not_chosen_has_none(tmp_path: Path) -> None:
    assert lines(tmp_path, EARLY, "-k", "by_a_mark") == ["not tried  4: it is marked so: by a mark"]
