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
    pytest.skip("no root")

@pytest.mark.promise("four: nobody knows")
def test_without_a_figure(promise):
    promise.size(50, 3)

def test_without_a_row(promise):
    pass
"""


def lines(tmp_path: Path, *arguments: str) -> list[str]:
    (tmp_path / "test_rows.py").write_text(TESTS)
    command = [sys.executable, "-m", "pytest", "-p", "no:randomly", "-p", "no:cacheprovider", "--rootdir", "."]
    here = Path(__file__).parent
    run = subprocess.run(
        [*command, "-c", here.parent / "pyproject.toml", "--confcutdir", here, "-p", "conftest", *arguments, tmp_path],
        cwd=here,
        capture_output=True,
        text=True,
    )
    found = [line for line in run.stdout.splitlines() if re.match(r"(kept|NOT KEPT|skipped) +\w+: ", line)]
    assert len(found) == 4, run.stdout + run.stderr
    return found


def test_each_promise_has_a_line_and_small_runs_have_slack(tmp_path: Path) -> None:
    four, one, three, two = lines(tmp_path)
    assert one == (
        "kept      one: it holds: N=3; 0 of 1,000 requests lost (a rate below 0.003 at 95 %); back 0.2 s (promised 0.1)"
    )
    assert two == "NOT KEPT  two: it takes too long: back 0.6 s (promised 0.1)"
    assert three.startswith("skipped   three: it needs what is not there: ")
    assert "no root" in three
    assert four.startswith("NOT KEPT  four: nobody knows: N=3")


def test_the_full_run_tries_more_often_and_has_no_slack(tmp_path: Path) -> None:
    _, one, _, _ = lines(tmp_path, "--promises", "full")
    assert one.startswith("NOT KEPT  one: it holds: N=50;")
