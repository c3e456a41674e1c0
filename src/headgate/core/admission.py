"""How many requests a replica holds, over all routers together: the replica's side.

The limit is strict: held + reserved never exceeds it, but for what was there when it was lowered.
A call beyond it is refused (BUSY), and from then on the replica owes that link one grant. As
slots come free they are reserved, one each in turn, for the links that are owed (ROOM); a
reserved slot waits for a call of its link or is handed back.

A link is owed one grant for each refusal and for each further request that it said, with a
call, to have waiting (`want`). Both ends count the same, so no grant is lost and none is waited for
in vain. Nobody overtakes: while a link is owed, a call without a reservation is refused.

The router's side is core/assignment.py; replica/worker.py sends what is returned here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Link = TypeVar("Link", bound=Hashable)


class Admission(Generic[Link]):
    """The slots of one replica.

    >>> slots = Admission(limit=1)
    >>> slots.offer("proxy"), slots.offer("notebook")
    (True, False)
    >>> slots.free()                     # the proxy's call ended: ROOM(1) goes to the notebook
    ['notebook']
    >>> slots.offer("proxy"), slots.offer("notebook")
    (False, True)
    """

    __slots__ = ("_held", "_kept", "_limit", "_owed", "_reserved")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._reserved: dict[Link, int] = {}
        self._kept = 0  # the sum of _reserved
        self._owed: OrderedDict[Link, int] = OrderedDict()  # whose turn is next comes first

    @property
    def held(self) -> int:
        """Calls that were accepted and have not ended."""
        return self._held

    @property
    def reserved(self) -> int:
        """Free slots that are kept for links with a grant."""
        return self._kept

    @property
    def owes(self) -> bool:
        """Whether a link waits for a slot."""
        return bool(self._owed)

    @property
    def room(self) -> int:
        """How many calls of any link would be accepted, without a grant."""
        return 0 if self._owed else max(0, self._limit - self._held - self._kept)

    def offer(self, link: Link, want: int = 0) -> bool:
        """A call came in on `link`: True takes a slot, False means BUSY.

        want   how many more requests its router has waiting for this replica; send the links
               of `rooms()` their ROOM after an offer with one
        """
        if not (want or self._kept or self._owed) and self._held < self._limit:  # most
            self._held += 1
            return True
        if self._kept and link in self._reserved:
            self._unreserve(link, 1)
            accepted = True
        else:
            accepted = self._held + self._kept < self._limit and not self._owed
        if accepted:
            self._held += 1
        else:
            want += 1
        if want:
            self._owed[link] = self._owed.get(link, 0) + want
        return accepted

    def take(self, link: Link, count: int) -> None:
        """`count` calls came in on `link`, no more than there is `room` for: they are accepted."""
        self._held += count
        if self._kept:
            self._unreserve(link, count)

    def free(self, count: int = 1) -> list[Link]:
        """So many accepted calls ended; the links that get ROOM(1) each for their slots, in turn."""
        self._held -= count
        return self.rooms() if self._owed else []

    def rooms(self) -> list[Link]:
        """Reserve the free slots for those who are owed: the links that get ROOM(1) each, in turn."""
        links = []
        while (link := self._next()) is not None:
            links.append(link)
        return links

    def hand_back(self, link: Link, count: int) -> list[Link]:
        """`link` does not need `count` of its grants; the links that get ROOM(1) each instead."""
        self._unreserve(link, count)
        return self.rooms()

    def forget(self, link: Link) -> list[Link]:
        """`link` has ended, and its grants with it; the links that get ROOM(1) each instead.

        Its accepted calls keep their slots until `free` is called for each.
        """
        self._owed.pop(link, None)
        self._unreserve(link, self._kept)
        return self.rooms()

    def set_limit(self, limit: int) -> list[Link]:
        """A new limit; the links that get ROOM(1) each. Nothing accepted or granted is taken back."""
        self._limit = limit
        return self.rooms()

    def _next(self) -> Link | None:
        if not self._owed or self._held + self._kept >= self._limit:
            return None
        link, owed = self._owed.popitem(last=False)
        if owed > 1:
            self._owed[link] = owed - 1
        self._reserved[link] = self._reserved.get(link, 0) + 1
        self._kept += 1
        return link

    def _unreserve(self, link: Link, count: int) -> None:
        """Fewer may be there than `count`: a call that was under way before the grant used one."""
        there = self._reserved.pop(link, 0)
        left = max(0, there - count)
        self._kept -= there - left
        if left:
            self._reserved[link] = left
