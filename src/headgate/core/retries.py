"""The retry budget of one backend in one router: how many requests may be tried again at one time.

A request that goes elsewhere because its replica was lost is a retry until it has its answer. At one
time at most 20 % of a backend's active requests (in flight and waiting) may be retries under way, and
always 3. So a request that kills its replicas, or replicas that all die, cannot drown those that are
left in repeated work. The figures are those of Envoy's retry budget (`budget_percent` 20,
`min_retry_concurrency` 3), which took the idea from Finagle's.

The budget delays and never refuses. Envoy and Finagle fail a retry that is over budget; but a
lost replica costs its started requests only, and one that dies with a hundred requests not
started yet must not cost any of them. So a retry over budget waits, and those that come after it
go first meanwhile: they are no retries. Each retry that ends lets the next one go, oldest first.
What ends a retry that waits in vain is what ends any request: its deadline, its caller, or
its third try (backend_route.py).
"""

from __future__ import annotations

from bisect import insort
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

SHARE_PERCENT = 20
ALWAYS = 3


class Retried(Protocol):
    """A request that may be tried again."""

    @property
    def order(self) -> int:
        """Its number in this router, growing with each arrival."""

    @property
    def retrying(self) -> bool:
        """Whether a replica has it now, and not the first one."""


T = TypeVar("T", bound=Retried)
_by_order = attrgetter("order")


def allowed(active: int) -> int:
    """How many of `active` requests may be retries under way."""
    return max(ALWAYS, active * SHARE_PERCENT // 100)


class Retries(Generic[T]):
    """The requests to be tried again that wait for the budget, and those that use it.

    >>> from types import SimpleNamespace as Request
    >>> retries = Retries()
    >>> for number in range(5):
    ...     retries.add(Request(order=number, retrying=True))
    >>> [retries.take().order for _ in range(retries.room(active=5))]
    [0, 1, 2]
    >>> retries.room(active=5), len(retries.waiting)
    (0, 2)

    waiting     those that wait, oldest first; always the same list
    under_way   those that use the budget, since the last `room`; always the same list
    """

    __slots__ = ("under_way", "waiting")

    def __init__(self) -> None:
        self.waiting: list[T] = []
        self.under_way: list[T] = []

    def add(self, request: T) -> None:
        """A request has lost its replica, or was refused as a retry: it waits."""
        insort(self.waiting, request, key=_by_order)

    def room(self, active: int) -> int:
        """How many of those that wait may go now, of `active` requests in all.

        Also lets those go that have their answer: to be asked after each answer while some are under way.
        """
        self.under_way[:] = [one for one in self.under_way if one.retrying]
        return max(0, min(len(self.waiting), allowed(active) - len(self.under_way)))

    def take(self) -> T:
        """The oldest one that waits, for which there is `room`: give it to a replica in the same step."""
        request = self.waiting.pop(0)
        self.under_way.append(request)
        return request

    def remove(self, request: T) -> bool:
        """Take out a request whose caller no longer waits; False if it does not wait here."""
        if request in self.waiting:
            self.waiting.remove(request)
            return True
        return False

    def clear(self) -> list[T]:
        """Take out all that wait."""
        waiting = self.waiting.copy()
        self.waiting.clear()
        return waiting
