"""What every peer's program is told: JOB PORT REPLICAS ROUTES, and arguments of its own after them."""

from __future__ import annotations

import sys
from typing import NamedTuple


class Asked(NamedTuple):
    """`port` is on 127.0.0.1; `rest` are the registry's `Peer.arguments`."""

    job: str
    port: int
    replicas: int
    routes: int
    rest: list[str]


def read() -> Asked:
    job, port, replicas, routes, *rest = sys.argv[1:]
    return Asked(job, int(port), int(replicas), int(routes), rest)


def patterns(wanted: str, routes: int) -> list[str]:
    """`routes` patterns with `wanted` in their middle, so that a search in order costs its average.

    >>> patterns("/api/{user_id:int}/{number:float}", 3)[1:]
    ['/api/{user_id:int}/{number:float}', '/area1/{user_id:int}/{number:float}']
    """
    others = [wanted.replace("/api/", f"/area{index}/") for index in range(routes - 1)]
    middle = len(others) // 2
    return [*others[:middle], wanted, *others[middle:]]
