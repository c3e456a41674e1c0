"""Which processes have links to replicas, as replicas say: by the names that replicas know them by.

A process of which only this is known may still send requests: publisher.py deals with it.
"""

from __future__ import annotations

from collections import Counter
from typing import Generic, TypeVar

R = TypeVar("R")


class Linked(Generic[R]):
    """The links of all replicas, told apart by process and not by link."""

    def __init__(self) -> None:
        self._of: dict[R, set[str]] = {}
        self._replicas: Counter[str] = Counter()  # that each name has links to

    def __contains__(self, name: str) -> bool:
        return name in self._replicas

    def add(self, replica: R, name: str) -> None:
        """A process has links to `replica`."""
        names = self._of.setdefault(replica, set())
        if name not in names:
            names.add(name)
            self._replicas[name] += 1

    def remove(self, replica: R, name: str) -> bool:
        """It has none to `replica` any more: whether it has none at all."""
        names = self._of.get(replica, set())
        if name not in names:
            return False
        names.remove(name)
        self._replicas[name] -= 1
        if not self._replicas[name]:
            del self._replicas[name]
        return name not in self

    def gone(self, replica: R) -> list[str]:
        """`replica` says nothing any more: those that have no links to any other."""
        names = sorted(self._of.get(replica, ()))
        lost = [name for name in names if self.remove(replica, name)]
        self._of.pop(replica, None)
        return lost
