"""Play thousands of seeds, on all cores; `scripts/simulate` runs this. Ends with 1 if any rule was broken."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation import sim_history

#: Failing seeds that are cut down and shown; of each the first broken rule is.
SHOWN = 3
#: Processes begin anew after so many seeds: what is left over of one is not to slow down the others.
LIFE = 250


def _play(seed: int) -> tuple[int, list[str], dict[str, int], int, float]:
    try:
        played = sim_history.perform(sim_history.history(seed))
    except Exception as error:  # noqa: BLE001 - the seed is what is wanted
        return seed, [f"0.0000 no bugs: the simulation itself failed: {type(error).__name__}: {error}"], {}, 0, 0.0
    return seed, played.broken, played.answers, played.steps, played.virtual_s


def _all(seeds: range, jobs: int) -> Iterator[tuple[int, list[str], dict[str, int], int, float]]:
    if jobs == 1:
        yield from map(_play, seeds)
        return
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=LIFE) as pool:
        yield from pool.imap_unordered(_play, seeds, chunksize=1 if len(seeds) < 100 else 10)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5000, metavar="N", help="how many; the default is 5000")
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="SEED", help="the first; the default is 0")
    parser.add_argument("--seed", type=int, help="play this one only, and tell all that happens as a scenario file")
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("--jobs", type=int, default=cores, help="processes; the default is all cores")
    parser.add_argument("--first-failure", action="store_true", help="stop at the first seed that fails")
    given = parser.parse_args()
    if given.seed is not None:
        return _one(given.seed)
    began = time.perf_counter()
    answers: Counter[str] = Counter()
    failed: dict[int, list[str]] = {}
    steps, virtual_s, played = 0, 0.0, 0
    for seed, broken, ended, taken, lasted in _all(range(given.first, given.first + given.seeds), given.jobs):
        played += 1
        answers.update(ended)
        steps += taken
        virtual_s += lasted
        if broken:
            failed[seed] = broken
            print(f"seed {seed}: {broken[0]}", flush=True)
            if given.first_failure:
                break
    for seed in sorted(failed)[:SHOWN]:
        _show(seed)
    ends = ", ".join(f"{what} {count}" for what, count in sorted(answers.items()))
    requests = f"{sum(answers.values())} requests ({ends})"
    print(
        f"{played} seeds from {given.first}, {requests}, {virtual_s / 3600:.1f} simulated hours, {steps} steps in "
        f"{time.perf_counter() - began:.0f} s: {len(failed)} seeds broke a rule"
    )
    return 1 if failed else 0


def _one(seed: int) -> int:
    lines = sim_history.history(seed)
    print(sim_history.scenario(lines, []))
    broken = sim_history.perform(lines).broken
    if broken:
        _show(seed)
    return 1 if broken else 0


def _show(seed: int) -> None:
    """A failing seed as a file for tests/scenarios."""
    lines = sim_history.history(seed)
    played = sim_history.perform(lines)
    print(f"# seed {seed} broke a rule:")
    for line in played.broken[:5]:
        print(f"#     {line}")
    print("# cut down, as a file for tests/scenarios/:")
    short = sim_history.shrink(lines, played.rules())
    print(sim_history.scenario(short, [f"scripts/simulate --seed {seed}"]), flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
