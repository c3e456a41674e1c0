"""The FIFO of a router: requests that no replica has room for now.

Oldest first, whatever happened to a request in between: one that a replica refused goes back to
where it was. Any request can leave at once, because its caller gave up or its deadline came (the
router looks at deadlines, of those that wait and those that run alike).

Who takes from here is core/assignment.py.
"""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from operator import attrgetter
from typing import Generic, Protocol, TypeVar


class Waiter(Protocol):
    """What can wait: a request that knows when it came."""

    @property
    def order(self) -> int:
        """Its number in this router, growing with each arrival."""

    @property
    def deadline(self) -> float:
        """From when on it must not be sent any more; inf for never."""


T = TypeVar("T", bound=Waiter)
_by_order = attrgetter("order")


class Waiting(Generic[T]):
    """The requests that wait, in the order of their arrival.

    >>> from typing import NamedTuple
    >>> class Request(NamedTuple):
    ...     order: int
    ...     deadline: float = 9.0
    >>> waiting = Waiting()
    >>> waiting.push(Request(1), limit=1), waiting.push(Request(2), limit=1)
    (True, False)
    >>> waiting.push_front(Request(0))          # refused by a replica
    >>> waiting.pop().order
    0
    """

    __slots__ = ("_queue", "_returned")

    def __init__(self) -> None:
        self._queue: OrderedDict[int, T] = OrderedDict()
        self._returned: list[T] = []  # sent once and refused: all came before those in the queue

    def __len__(self) -> int:
        return len(self._queue) + len(self._returned)

    def push(self, item: T, limit: int | None = None) -> bool:
        """Queue a new request; False, and nothing changed, if `limit` requests wait already."""
        if limit is not None and len(self) >= limit:
            return False
        self._queue[item.order] = item
        return True

    def push_front(self, item: T) -> None:
        """Queue a request again that was sent in vain, before all that came after it; no limit applies."""
        insort(self._returned, item, key=_by_order)

    @property
    def oldest(self) -> T:
        """The request that `pop` would take; StopIteration if none waits."""
        return self._returned[0] if self._returned else next(iter(self._queue.values()))

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
