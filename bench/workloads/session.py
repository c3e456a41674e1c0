"""One run of the benchmark: what was asked for, and where its figures go."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

from figures import Figures
from peers import PEERS, environments
from record import Record

#: Of these a quick run takes figures, which is two minutes' worth: workload -> peers.
QUICK = {
    "W1": ("headgate", "floor", "starlette", "granian", "mosec"),
    "W3": ("headgate", "mosec", "inprocess"),
    "W4": ("headgate", "starlette"),
    "W6": ("headgate", "mosec"),
    "W7": ("headgate",),
    "W9": ("headgate",),
    "W10": ("headgate",),
}


class Options(NamedTuple):
    """What the command line says. `peers` None: all, or what a quick run has time for."""

    rounds: int = 3
    seconds: int = 5
    peers: tuple[str, ...] | None = None
    quick: bool = False


class Session:
    """Takes figures, round by round, and stores each as it comes."""

    def __init__(self, run: str, options: Options, record: Record, path: Path) -> None:
        self.options = options
        self.record = record
        self._run = run
        self._path = path

    def wants(self, workload: str, peer: str) -> bool:
        """Whether a peer takes part."""
        if self.options.peers is not None:
            return peer in self.options.peers
        return not self.options.quick or peer in QUICK.get(workload, ())

    def add(self, workload: str, case: str, contender: str, number: int, found: Figures) -> None:
        """Keep what a contender did in a round."""
        self.record.add(workload, case, contender, f"{self._run}/{number}", found)
        self.record.write(self._path)
        shown = "  ".join(f"{name} {value:,.4g}" for name, value in list(found.items())[:4] if _is_number(value))
        self.say(f"{workload} round {number + 1}  {contender:24} {case:28} {shown}")

    def add_absent(self, workload: str, contender: str, why: str) -> None:
        """Say why a contender has no figures."""
        self.record.add_absent(workload, contender, why)
        self.record.write(self._path)
        self.say(f"{workload} {contender} is absent: {why}")

    def note_versions(self, peer: str) -> None:
        """Keep which versions a peer was made of; called when one of its servers runs."""
        versions = self.record.data["runs"][self._run]["versions"]
        if peer not in versions:
            versions[peer] = environments.versions(PEERS[peer].environment, PEERS[peer].distributions)

    def say(self, line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)
