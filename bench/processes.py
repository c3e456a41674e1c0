"""What /proc says of processes: who descends from whom, CPU time, memory, names."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

TICK_US = 1e6 / os.sysconf("SC_CLK_TCK")


def stat(pid: int) -> tuple[str, list[str]]:
    """(name, the fields from the state on) of /proc/PID/stat."""
    head, _, rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
    return head.partition("(")[2], rest.split()


def tree(root: int) -> list[int]:
    """`root` and everything below it, as far as it lives."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                _, fields = stat(int(entry))
            except OSError:
                continue
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry))
    found, todo = [], [root]
    while todo:
        pid = todo.pop()
        found.append(pid)
        todo += children.get(pid, [])
    return sorted(found)


def cpu_us(pids: Iterable[int]) -> dict[tuple[int, str], float]:
    """(pid, name) -> user and system time so far, with that of children already waited for."""
    times = {}
    for pid in pids:
        try:
            name, fields = stat(pid)
        except OSError:
            continue
        times[pid, name] = sum(map(int, fields[11:15])) * TICK_US
    return times


def cpu_per_request(
    before: Mapping[tuple[int, str], float], after: Mapping[tuple[int, str], float], requests: int
) -> dict[str, float]:
    """Name -> microseconds per request of the processes of that name; those that did nothing are left out.

    >>> cpu_per_request({(7, "proxy"): 100.0}, {(7, "proxy"): 400.0, (8, "replica"): 50.0, (9, "replica"): 50.0}, 10)
    {'proxy': 30.0, 'replica': 10.0}
    """
    spent: dict[str, float] = {}
    for key, total in after.items():
        delta = total - before.get(key, 0.0)
        if delta > 0 and requests:
            spent[key[1]] = spent.get(key[1], 0.0) + delta / requests
    return spent


def pss_mb(pids: Iterable[int]) -> dict[tuple[int, str], float]:
    """(pid, name) -> proportional set size in MB (10^6 bytes)."""
    sizes = {}
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            name, _ = stat(pid)
        except OSError:
            continue
        kib = next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:"))
        sizes[pid, name] = kib * 1024 / 1e6
    return sizes


def available_mb() -> float:
    """Memory that new processes can have without swapping, in MB (10^6 bytes)."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024 / 1e6
