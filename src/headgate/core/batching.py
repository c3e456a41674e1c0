"""Collect requests into batches.

A batch holds requests of one key only (the method they call), oldest first. A key's batch is
due when `max_batch_size` of its requests wait, or when its oldest has waited
`batch_wait_timeout_s` seconds, whichever comes first; with 0 seconds that is whatever is there.
Of several keys that are due, the one with the oldest request goes first.

No clock, no task, no lock: the caller passes `now` in, takes a batch when the handler is free,
and sleeps until `next_deadline()`. What does so is replica/batches.py.
"""

from __future__ import annotations

from typing import Generic, TypeVar

T = TypeVar("T")


class _Group(Generic[T]):
    """The waiting requests of one key, and beside each its (number, arrival)."""

    __slots__ = ("items", "stamps")

    def __init__(self) -> None:
        self.items: list[T] = []  # a list: a replica holds few, and a batch is one slice
        self.stamps: list[tuple[int, float]] = []


class Batcher(Generic[T]):
    """A queue that hands out batches, oldest request first.

    >>> batcher = Batcher(max_batch_size=2, batch_wait_timeout_s=0.010)
    >>> batcher.add("a", now=5.0)
    >>> batcher.take(now=5.0)          # neither full nor late
    []
    >>> batcher.take(now=5.01)
    ['a']
    """

    __slots__ = ("_added", "_groups", "_max_batch_size", "_wait_s", "_waiting")

    def __init__(self, max_batch_size: int, batch_wait_timeout_s: float) -> None:
        self._groups: dict[str, _Group[T]] = {}  # none is empty
        self._added = 0
        self._waiting = 0
        self._max_batch_size = max_batch_size
        self._wait_s = batch_wait_timeout_s

    def __len__(self) -> int:
        return self._waiting

    def configure(self, max_batch_size: int, batch_wait_timeout_s: float) -> None:
        """New limits, also for those who wait already."""
        self._max_batch_size = max_batch_size
        self._wait_s = batch_wait_timeout_s

    def add(self, item: T, now: float, key: str = "") -> None:
        """Queue a request that arrived at `now`."""
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group()
        self._added += 1
        self._waiting += 1
        group.items.append(item)
        group.stamps.append((self._added, now))

    def take(self, now: float) -> list[T]:
        """The batch that is due now: 1..max_batch_size requests of one key, or [] if none is."""
        due = None
        for key, group in self._groups.items():
            if self._due_at(group) <= now and (due is None or group.stamps[0] < self._groups[due].stamps[0]):
                due = key
        return [] if due is None else self._cut(due)

    def take_full(self) -> list[T]:
        """A batch to which nothing can be added and before which no other can come, or []: it may be taken ahead."""
        (key, group), *others = self._groups.items() or [("", None)]
        return [] if others or group is None or len(group.items) < self._max_batch_size else self._cut(key)

    def next_deadline(self) -> float | None:
        """When `take` has a batch even if nothing more arrives; in the past if it has one already."""
        return min(map(self._due_at, self._groups.values()), default=None)

    def remove(self, item: T) -> bool:
        """Take one request out, whose caller no longer waits; False if it is not (or no longer) here."""
        for key, group in self._groups.items():
            if item in group.items:
                place = group.items.index(item)
                del group.items[place], group.stamps[place]
                self._waiting -= 1
                if not group.items:
                    del self._groups[key]
                return True
        return False

    def _due_at(self, group: _Group[T]) -> float:
        """When the group's batch is due; its oldest request's arrival if the batch is full."""
        arrived = group.stamps[0][1]
        return arrived if len(group.items) >= self._max_batch_size else arrived + self._wait_s

    def _cut(self, key: str) -> list[T]:
        group = self._groups[key]
        size = min(len(group.items), self._max_batch_size)
        self._waiting -= size
        if size == len(group.items):
            del self._groups[key]
            return group.items
        batch = group.items[:size]
        del group.items[:size], group.stamps[:size]
        return batch
