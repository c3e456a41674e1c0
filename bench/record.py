"""What a run measured: a JSON file that is written anew after each round, and can be put together with others.

    {"code": "...", "runs": {RUN: {"machine": ..., "options": ..., "versions": ...}},
     "measured": {"W1": {"64 connections": {"starlette": {"RUN/0": {"requests_per_s": 14400.0, ...}}}}},
     "absent":   {"W1": {"starlette": "why there are no figures of it"}}}

A workload has cases; a case compares contenders, each with one set of figures per round. The key of a round
tells which figures were taken beside each other, so that a ratio never mixes runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
import timeit
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import figures

SOURCES = Path(__file__).parent.parent / "src" / "headgate"
RESULTS = Path(__file__).parent / "results"


class Record:
    """Figures by workload, case, contender and round."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def add(self, workload: str, case: str, contender: str, round_key: str, found: figures.Figures) -> None:
        cases = self.data["measured"].setdefault(workload, {})
        cases.setdefault(case, {}).setdefault(contender, {})[round_key] = dict(found)

    def add_absent(self, workload: str, contender: str, why: str) -> None:
        self.data["absent"].setdefault(workload, {})[contender] = why

    def absent(self, workload: str) -> Mapping[str, str]:
        found: dict[str, str] = self.data["absent"].get(workload, {})
        return found

    def cases(self, workload: str) -> list[str]:
        return list(self.data["measured"].get(workload, {}))

    def contenders(self, workload: str, cases: Iterable[str]) -> list[str]:
        """Who has figures in any of the cases, in the order in which they came."""
        found = self.data["measured"].get(workload, {})
        return list(dict.fromkeys(name for case in cases for name in found.get(case, {})))

    def rounds(self, workload: str, case: str, contender: str) -> dict[str, figures.Figures]:
        found: dict[str, figures.Figures] = (
            self.data["measured"].get(workload, {}).get(case, {}).get(contender, {})
        )
        return found

    def middle(self, workload: str, case: str, contender: str) -> dict[str, Any]:
        """The medians over the rounds; {} if there are none."""
        return figures.middle(self.rounds(workload, case, contender).values())

    def write(self, path: Path) -> None:
        """In one step, so that whoever interrupts keeps what was there."""
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(path)


def begun(run: str, about: Mapping[str, Any]) -> Record:
    sources = code()
    return Record({"code": sources, "runs": {run: {**about, "code": sources}}, "measured": {}, "absent": {}})


def read(path: Path) -> Record:
    return Record(json.loads(path.read_text()))


def merged(records: Iterable[Record]) -> Record:
    """All of them as one. Of a case that several have, rounds of other code than the last one's are dropped.

    >>> def one(code, run, rate):
    ...     rounds = {f"{run}/0": {"rate": rate}}
    ...     return Record({"code": code, "runs": {run: {}}, "measured": {"W1": {"c": {"h": rounds}}}, "absent": {}})
    >>> list(merged([one("x", "a", 1.0), one("x", "b", 3.0)]).rounds("W1", "c", "h"))
    ['a/0', 'b/0']
    >>> list(merged([one("x", "a", 1.0), one("y", "b", 3.0)]).rounds("W1", "c", "h"))
    ['b/0']
    """
    whole = Record({"code": "", "runs": {}, "measured": {}, "absent": {}})
    origin: dict[tuple[str, str], str] = {}
    for record in records:
        whole.data["code"] = record.data["code"]
        whole.data["runs"] |= record.data["runs"]
        for workload, cases in record.data["measured"].items():
            for case, contenders in cases.items():
                if origin.setdefault((workload, case), record.data["code"]) != record.data["code"]:
                    whole.data["measured"][workload][case] = {}
                    origin[workload, case] = record.data["code"]
                for contender, rounds in contenders.items():
                    for key, found in rounds.items():
                        whole.add(workload, case, contender, key, found)
        for workload, absent in record.data["absent"].items():
            for contender, why in absent.items():
                whole.add_absent(workload, contender, why)
    _forget_absent(whole)
    return whole


def _forget_absent(record: Record) -> None:
    """Who failed in one run and has figures of another is not absent."""
    for workload, absent in record.data["absent"].items():
        for contender in record.contenders(workload, record.cases(workload)):
            absent.pop(contender, None)


def code() -> str:
    """What tells one state of headgate's sources from another."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*.py")):
        digest.update(path.relative_to(SOURCES).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def yardstick_us() -> float:
    """CPU time of a fixed piece of pure Python, the best of many: how fast interpreter and machine are just now."""

    class Point:
        __slots__ = ("x", "y")

        def __init__(self, x: int, y: int) -> None:
            self.x, self.y = x, y

        def sum(self) -> int:
            return self.x + self.y

    def work() -> tuple[bytes, int]:
        texts = {number: (number, str(number)) for number in range(1000)}
        total = sum(Point(number, number).sum() for number in texts)
        return b"".join(text.encode() for _, text in texts.values()), total

    return round(min(timeit.repeat(work, timer=time.process_time, number=20, repeat=20)) / 20 * 1e6, 0)


def machine() -> dict[str, Any]:
    """What its figures depend on; no names of it or its user."""
    text = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    memory = next(line.split()[1] for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line)
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 2**20, 1),
        "kernel": ".".join(platform.release().split(".")[:2]),
        "python": platform.python_version(),
        "yardstick_us": yardstick_us(),
        "load_before": round(os.getloadavg()[0], 2),
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }
