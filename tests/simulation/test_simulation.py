"""Some seeds of `scripts/simulate` in every run of the tests, and that a seed always means the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation import sim_history

#: Those that every run plays, in portions of ten.
SEEDS = 120

_DIGEST = """
import hashlib, sys
sys.path.insert(0, sys.argv[1])
from simulation import sim_history
text = "".join(repr(sim_history.perform(sim_history.history(seed))) for seed in range(900, 905))
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_no_rule_is_broken_whatever_fails(first: int) -> None:
    for seed in range(first, first + 10):
        played = sim_history.perform(sim_history.history(seed))
        assert not played.broken, f"scripts/simulate --seed {seed} tells more: {played.broken[0]}"
        assert played.answers, f"seed {seed} asked nothing"


def test_the_same_seed_gives_the_same_history_twice() -> None:
    for seed in (1, 2, 3):
        first, second = (sim_history.perform(sim_history.history(seed)) for _ in range(2))
        assert first == second
        assert first.said


def test_a_seed_means_the_same_in_every_process() -> None:
    digests = set()
    for hash_seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", _DIGEST, str(Path(__file__).parents[1])],
            env=os.environ | {"PYTHONHASHSEED": hash_seed}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        digests.add(done.stdout)
    assert len(digests) == 1


def test_different_seeds_are_different_histories() -> None:
    assert len({tuple(sim_history.history(seed)) for seed in range(50)}) == 50
