"""No request costs much more than it did: counts of instructions, which no busy machine changes.

They are taken in a process of its own, without whatever else traces this one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import work_per_request
from work_per_request import CASES, PYTHON, STORED, Counts, grown

LOOK = """{case!r} costs more than it did:
    {found}
Which functions: python tests/work_per_request.py --functions, here and before the change.
If it is worth it: python tests/work_per_request.py --store, and say why beside the change of tests/{stored}."""


def counts() -> dict[str, Counts]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTEST"))}
    program = [sys.executable, work_per_request.__file__, "--json"]
    done = subprocess.run(program, env=kept, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found: dict[str, Counts] = json.loads(done.stdout)
    return found


def before() -> dict[str, Counts]:
    if PYTHON not in work_per_request.stored():
        pytest.skip(f"no counts of Python {PYTHON} are stored: python tests/work_per_request.py --store")
    return work_per_request.stored()[PYTHON]


def test_no_request_costs_a_tenth_more_than_it_did() -> None:
    stored, now = before(), counts()
    for case in CASES:
        if found := grown(stored[case], now[case]):
            pytest.fail(LOOK.format(case=case, found="\n    ".join(found), stored=STORED.name), pytrace=False)


def test_the_counts_are_the_same_each_time() -> None:
    assert counts() == counts()


def test_more_than_a_tenth_more_is_noticed() -> None:
    assert grown({"instructions": 1000.0}, {"instructions": 1100.0}) == []
    assert grown({"instructions": 1000.0}, {"instructions": 1101.0}) == [
        "instructions: 1101 per request, 1000 are stored (+10 %)"
    ]
