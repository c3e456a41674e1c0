"""Which replica gets a request: the router's side.

A choice that takes a slot takes it in the same step. A replica's limit counts the requests of all
routers, a router knows its own only: it sends while its own count allows, and the replica
(core/admission.py) has the last word. What passes between them:

    CALL            router: a request; with `want` = n it has n more waiting and is owed n grants
    BUSY            replica: refused; the request goes back to where it was in the FIFO, and the
                    router is owed one grant
    ROOM(n)         replica: n grants, each a slot that is kept for this router
    ROOM(n) back    router: n grants that it does not need
    DRAINING        replica: it goes elsewhere, or the router has to catch up first; then ROOM(want) follows

While a router is owed grants by a replica, or has some, it sends there with a grant only. So under
contention a request travels once, and each router gets its turn.

Of replicas that are equally busy, one that is near goes first: it is on the router's node.

backend_route.py calls `assign` after `release`, `refuse`, `room`, `resume`, `configure`, and if nothing
waits then, hands back `spare_grants`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from operator import attrgetter
from typing import TypeVar

from .waiting import Waiter, Waiting

__all__ = ["Replica", "ReplicaSet", "Waiter", "Waiting", "assign"]

_CLOSED = 1 << 40  # added to the load of a replica that gets nothing without a grant
_COUNT = _CLOSED - 1
_FAR = 1 << 40  # added to the turn of a replica that comes after those that are near
_FEW = 4  # replicas; beyond, looking at two of them is as good as looking at all


T = TypeVar("T", bound=Waiter)
_by_load = attrgetter("load")


class Replica:
    """One replica as this router counts it: `load` are the requests that it has of ours.

    Who holds it may count without its name: `load` grows when a request takes a slot, if it was below the limit, and
    falls when one ends.
    """

    __slots__ = ("asked", "far", "grants", "load", "name", "plain", "suspended", "turn")

    def __init__(self, name: str) -> None:
        self.name = name
        self.plain = (name, 0)  # what reserve() returns when nothing is wanted
        self.load = 0  # requests in flight, plus _CLOSED
        self.turn = 0  # when it was chosen last, plus `far`
        self.far = 0  # or _FAR
        self.asked = 0  # grants that the replica owes us
        self.grants = 0  # grants to be used or handed back; none while suspended
        self.suspended = False


class ReplicaSet:
    """The replicas of one backend, as one router sees them.

    >>> replicas = ReplicaSet(chance=lambda: 0.5)
    >>> replicas.configure(["iris#0001", "iris#0002"], limit=1)
    >>> replicas.reserve(), replicas.reserve(), replicas.reserve()
    (('iris#0001', 0), ('iris#0002', 0), None)
    >>> replicas.release("iris#0002")
    >>> replicas.reserve()
    ('iris#0002', 0)

    chance   a random number in [0, 1); asked for where there are more than four replicas, and again
             where some of them are near
    only     the one replica, where there is one
    """

    __slots__ = ("_chance", "_granted", "_known", "_leaving", "_limit", "_near", "_replicas", "_turn", "only")

    def __init__(self, chance: Callable[[], float]) -> None:
        self._chance = chance
        self._limit = 0
        self._known: dict[str, Replica] = {}
        self._leaving: dict[str, Replica] = {}  # removed, with requests in flight or grants owed
        self._replicas: tuple[Replica, ...] = ()
        self._near: tuple[Replica, ...] = ()  # none if all are
        self.only: Replica | None = None
        self._granted: dict[str, Replica] = {}  # those with grants
        self._turn = 0

    def configure(self, names: Iterable[str], limit: int, near: Collection[str] = ()) -> None:
        """Follow these replicas, each of which holds at most `limit` requests; some may be `near`.

        Known ones keep their counts; `suspend` a new one until it has a link. One that is left
        out gets nothing more, and is remembered while it has requests in flight or owes grants.
        """
        before = self._leaving | self._known
        self._known = {name: before[name] if name in before else Replica(name) for name in names}
        self._leaving = {name: gone for name, gone in before.items() if gone.load and name not in self._known}
        for gone in tuple(self._leaving.values()):
            gone.suspended, gone.grants = False, 0
            self._settle(gone)
        self._replicas = tuple(self._known.values())
        self.only = self._replicas[0] if len(self._replicas) == 1 else None
        self._limit = limit
        self._prefer(near)

    def reserve(self, behind: int = 0) -> tuple[str, int] | None:
        """Take a slot for one request: (replica, want), or None if there is none.

        behind   how many requests wait behind this one
        want     tell the replica with the CALL that so many more wait for it
        """
        if self._granted:
            return self._use_grant(behind)
        replica = self.only
        if replica is None:
            replica = self._least_busy()
            if replica is None:
                return None
        elif replica.load >= self._limit:
            return None
        replica.load += 1
        return replica.plain

    def release(self, name: str) -> None:
        """A request that had a slot has ended. Exactly once for each `reserve`."""
        self._find(name).load -= 1

    def replica(self, name: str) -> Replica:
        """The counts of a replica that was configured; another object only after it was left out."""
        return self._known[name]

    def refuse(self, name: str) -> None:
        """BUSY came for a request: its slot is given back, and the replica owes us a grant."""
        replica = self._find(name)
        replica.load -= 1
        replica.asked += 1
        self._settle(replica)

    def room(self, name: str, count: int) -> int:
        """ROOM(count) came. How many to hand back at once: all, if nothing may be sent there."""
        replica = self._known.get(name) or self._leaving.get(name)
        if replica is None:
            return count
        replica.asked -= min(count, replica.asked)
        useful = name in self._known and not replica.suspended
        if useful:
            replica.grants += count
        self._settle(replica)
        return 0 if useful else count

    def spare_grants(self, name: str) -> int:
        """How many grants to hand back, because nothing waits; they are no longer ours."""
        replica = self._granted.get(name)
        if replica is None:
            return 0
        spare, replica.grants = replica.grants, 0
        self._settle(replica)
        return spare

    def suspend(self, name: str) -> int:
        """Send nothing there until `resume`: it is silent. How many grants to hand back."""
        spare = self.spare_grants(name)
        if replica := self._known.get(name):
            replica.suspended = True
            self._settle(replica)
        return spare

    def resume(self, name: str) -> None:
        """It answers again, or has a link again."""
        if replica := self._known.get(name):
            replica.suspended = False
            self._settle(replica)

    def lost(self, name: str) -> None:
        """The link has ended, and what was granted or owed with it: send nothing until `resume`.

        Its requests keep their slots until `release` is called for each.
        """
        if replica := self._known.get(name) or self._leaving.get(name):
            replica.asked = replica.grants = 0
            replica.suspended = name in self._known
            self._settle(replica)

    def in_flight(self, name: str) -> int:
        """How many requests this router has there."""
        replica = self._known.get(name) or self._leaving.get(name)
        return replica.load & _COUNT if replica else 0

    def idle(self, name: str) -> bool:
        """Whether this router has no request there, so that the link may be closed."""
        return self.in_flight(name) == 0

    def _find(self, name: str) -> Replica:
        return self._known.get(name) or self._leaving[name]

    def _prefer(self, names: Collection[str]) -> None:
        """Of equally busy replicas, one of `names` goes first. All or none: as if they were not given."""
        near = tuple(replica for replica in self._replicas if replica.name in names)
        self._near = near if len(near) < len(self._replicas) else ()
        for replica in self._replicas:
            replica.far = _FAR if self._near and replica not in near else 0
            replica.turn = replica.turn % _FAR + replica.far

    def _least_busy(self) -> Replica | None:
        """The replica with the fewest of our requests; of equals, a near one; the one not chosen for longest."""
        among: tuple[Replica, ...] = self._replicas
        least = self._limit
        if (size := len(among)) > _FEW:  # "power of two choices": Mitzenmacher 1996
            first, second = divmod(int(self._chance() * size * (size - 1)), size - 1)
            pair = among[first], among[second + (second >= first)]
            if pair[0].load < least or pair[1].load < least:
                among = pair + self._near_pair() if self._near else pair
        best: Replica | None = None
        for replica in among:
            load = replica.load
            if load < least or (best is not None and load == least and replica.turn < best.turn):
                best, least = replica, load
        if best is not None:
            self._turn = turn = self._turn + 1
            best.turn = turn + best.far if self._near else turn
        return best

    def _near_pair(self) -> tuple[Replica, Replica]:
        """Two neighbours; one twice where only one is near."""
        at = int(self._chance() * len(self._near))
        return self._near[at - 1], self._near[at]

    def _use_grant(self, behind: int) -> tuple[str, int]:
        replica = min(self._granted.values(), key=_by_load)
        replica.grants -= 1
        replica.load += 1
        share = -(-behind // len(self._replicas))
        most = max(1, self._limit - (replica.load & _COUNT))
        want = max(0, min(share, most) - replica.asked - replica.grants)
        replica.asked += want
        self._settle(replica)
        return replica.name, want

    def _settle(self, replica: Replica) -> None:
        """Bring what is derived from the counts up to date."""
        closed = replica.suspended or replica.asked or replica.grants
        replica.load = (replica.load & _COUNT) + (_CLOSED if closed else 0)
        if replica.grants:
            self._granted[replica.name] = replica
        else:
            self._granted.pop(replica.name, None)


def assign(
    waiting: Waiting[T], replicas: ReplicaSet, now: float
) -> tuple[list[tuple[T, str, int]], list[T]]:
    """The waiting requests that leave now, oldest first: (request, replica, want); and those that are late.

    Each that leaves has its slot already. Late is whose deadline had come when its turn did: it must not run.
    """
    leaving: list[tuple[T, str, int]] = []
    late: list[T] = []
    while waiting:
        if waiting.oldest.deadline <= now:
            late.append(waiting.pop())
            continue
        slot = replicas.reserve(len(waiting) - 1)
        if slot is None:
            break
        leaving.append((waiting.pop(), *slot))
    return leaving, late
