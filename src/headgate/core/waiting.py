"""The FIFO of a router: requests that no replica has room for now.

Oldest first, whatever happened to a request in between: one that a replica refused goes back to
where it was. Any request can leave at once, because its caller gave up or its deadline came.

No clock: the caller passes `now` in. Who takes from here is core/assignment.py.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from math import inf
from operator import attrgetter
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What can wait: a request that knows when it came and how long it may stay."""

    @property
    def order(self) -> int:
        """Its number in this router, growing with each arrival."""

    @property
    def deadline(self) -> float:
        """When it gives up, on the clock of `expire`; inf for never."""


T = TypeVar("T", bound=Waiter)
_by_order = attrgetter("order")


class Waiting(Generic[T]):
    """The requests that wait, in the order of their arrival.

    >>> from typing import NamedTuple
    >>> class Request(NamedTuple):
    ...     order: int
    ...     deadline: float
    >>> waiting = Waiting()
    >>> waiting.push(Request(1, 9.0), limit=1), waiting.push(Request(2, 9.5), limit=1)
    (True, False)
    >>> waiting.push_front(Request(0, 8.0))          # refused by a replica
    >>> waiting.pop().order
    0
    >>> waiting.expire(now=9.0)
    [Request(order=1, deadline=9.0)]
    """

    __slots__ = ("_earliest", "_queue", "_returned")

    def __init__(self) -> None:
        self._queue: OrderedDict[int, T] = OrderedDict()
        self._returned: list[T] = []  # sent once and refused: all came before those in the queue
        self._earliest = inf  # no deadline is before this

    def __len__(self) -> int:
        return len(self._queue) + len(self._returned)

    def push(self, item: T, limit: int | None = None) -> bool:
        """Queue a new request; False, and nothing changed, if `limit` requests wait already."""
        if limit is not None and len(self) >= limit:
            return False
        self._queue[item.order] = item
        self._earliest = min(self._earliest, item.deadline)
        return True

    def push_front(self, item: T) -> None:
        """Queue a request again that was sent in vain, before all that came after it; no limit applies."""
        insort(self._returned, item, key=_by_order)
        self._earliest = min(self._earliest, item.deadline)

    def pop(self) -> T:
        """The oldest request; KeyError if none waits."""
        return self._returned.pop(0) if self._returned else self._queue.popitem(last=False)[1]

    def pop_newest(self) -> T:
        """The request that came last; KeyError if none waits."""
        return self._returned.pop() if self._returned and not self._queue else self._queue.popitem()[1]

    def remove(self, item: T) -> bool:
        """Take out a request whose caller no longer waits; False if it is not here."""
        if self._queue.pop(item.order, None) is not None:
            return True
        if item in self._returned:
            self._returned.remove(item)
            return True
        return False

    def expire(self, now: float) -> list[T]:
        """Take out the requests whose deadline has come, oldest first."""
        if now < self._earliest:
            return []
        late = [item for item in (*self._returned, *self._queue.values()) if item.deadline <= now]
        for item in late:
            self.remove(item)
        rest = (item.deadline for item in (*self._returned, *self._queue.values()))
        self._earliest = min(rest, default=inf)
        return late
