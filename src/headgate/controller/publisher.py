"""Who follows which snapshot: every change goes to all followers, and each says when it is in force.

A process that follows may use the snapshot that it acknowledged last, or any newer one that was
sent to it. So a replica counts as `routed` until no follower may use a snapshot that lists it.
Whoever does not acknowledge in time is dealt with, never ignored: a proxy is reported as
silent (the controller replaces it); any other process is fenced: replicas refuse its requests until
it has caught up. A process that has links to replicas (linked.py) but does not follow, as one that has
been frozen since before the controller's restart, is a stranger: it counts as a follower that is behind.

A connection carries the whole snapshot once, and from then on what changes (core/deltas.py).

What a snapshot holds is core/goals.py; the messages are wire/messages.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
from msgspec.structs import replace

from headgate import logs
from headgate.controller.failpoints import reach
from headgate.controller.linked import Linked
from headgate.core import deltas
from headgate.core.state import Snapshot
from headgate.wire import messages
from headgate.wire.greeting import wire_name

log = logs.get("publisher")

#: How long a process may take to acknowledge a snapshot.
PATIENCE_S = 2.0
#: When this loop comes so late it was held up: what others have said meanwhile is read before they are judged.
HELD_UP_S = 0.25
PROXY = "proxy"
REPLICA = "replica"
STRANGER = "process"


class PeerLike(Protocol):
    """What is needed of a wire.control.Peer."""

    role: str
    id: str
    pid: int

    def tell(self, message: messages.FromController) -> None: ...


class _Stranger:
    """A process that is not connected, as a peer: all that is known is its wire name."""

    role = STRANGER
    pid = 0

    def __init__(self, name: str) -> None:
        self.id = name

    def tell(self, message: messages.FromController) -> None:
        """It cannot be told anything."""


class _Follower:
    """One process that follows; `floor` is the oldest snapshot that it may still use."""

    def __init__(self, peer: PeerLike, floor: int) -> None:
        self.peer = peer
        self.floor = floor
        self.sent = 0  # the newest version that its connection carried
        self.pending: deque[tuple[int, float]] = deque()  # version sent, when it is overdue
        self.fence = 0  # the version it must follow before replicas listen to it again
        self.reported = False  # as silent

    @property
    def name(self) -> str:
        return f"{self.peer.role} {self.peer.id}"


class Publisher:
    """The snapshots of one controller.

    first       the version before the first snapshot
    on_silent   called with a proxy that did not acknowledge in time, once
    on_change   called when `routed` may answer differently than before
    """

    def __init__(
        self, first: int, *, on_silent: Callable[[PeerLike], None], on_change: Callable[[], None]
    ) -> None:
        self.snapshot = Snapshot(version=first)
        self._first = first
        self._on_silent = on_silent
        self._on_change = on_change
        self._is_empty = True  # nothing was published yet
        self._whole: messages.Publish | None = None  # the snapshot, once somebody needs all of it
        self._change: messages.PublishChange | None = None  # from the one before
        self._listed: deque[tuple[int, frozenset[str]]] = deque([(first, frozenset())])
        self._followers: dict[PeerLike, _Follower] = {}  # strangers among them
        self._names: Counter[str] = Counter()  # of those that are connected, as replicas know them
        self._strangers: dict[str, _Stranger] = {}
        self._linked: Linked[PeerLike] = Linked()
        self._replicas: set[PeerLike] = set()
        self._fence_number = 0
        self._unfenced: dict[PeerLike, int] = {}  # replicas that have not said that the newest fence is in force
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._look_at = 0.0

    # --- snapshots ---

    def publish(self, content: Snapshot) -> int:
        """Send `content` to every follower, if it says anything new: the version that says it."""
        version = self.snapshot.version
        if not self._is_empty and replace(content, version=version) == self.snapshot:
            return version
        version += 1
        reach("publish.before")
        before, self.snapshot = self.snapshot, replace(content, version=version)
        delta = None if self._is_empty else deltas.between(before, self.snapshot)
        self._change = None
        if delta is not None:
            self._change = messages.PublishChange(version, msgspec.Raw(msgspec.msgpack.encode(delta)))
        self._whole, self._is_empty = None, False
        self._listed.append((version, frozenset(one.id for view in content.backends for one in view.replicas)))
        for follower in self._followers.values():
            self._send(follower)
            reach("publish.one")
        reach("publish.all")
        self._settle()
        return version

    async def in_force(self, version: int) -> None:
        """Wait until each follower has acknowledged `version`, was fenced, or is gone."""
        if self._is_behind(version):
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((version, waiter))
            await waiter

    def follows(self, peer: PeerLike) -> bool:
        """Whether `peer` has the newest snapshot in force."""
        follower = self._followers.get(peer)
        return follower is not None and not self._is_empty and not follower.pending

    def routed(self, replicas: Iterable[str]) -> set[str]:
        """Those of `replicas` to which some process may still send."""
        oldest = self._listed[0][0]
        if any(follower.floor < oldest and not follower.fence for follower in self._followers.values()):
            return set(replicas)  # it follows a snapshot of before the controller's restart
        return set().union(*(ids for _, ids in self._listed)).intersection(replicas)

    # --- processes ---

    def join(self, peer: PeerLike, has: int = 0) -> None:
        """`peer` follows from now on; `has` is the version that it follows already, 0 for none."""
        if peer in self._followers:
            return
        follower = self._followers[peer] = _Follower(peer, has or self.snapshot.version)
        name = wire_name(peer.id)
        self._names[name] += 1
        stranger = self._strangers.pop(name, None)
        if stranger is not None:
            follower.fence = self._followers.pop(stranger).fence
        if not self._is_empty:
            self._send(follower)
        if stranger is not None:
            self._settle()
            self._on_change()

    def join_replica(self, peer: PeerLike, routers: Iterable[str] = ()) -> None:
        """`peer` is a replica with links of these processes: it is to hear which processes are fenced."""
        self._replicas.add(peer)
        self._tell_fence(peer)
        for name in routers:
            self.linked(peer, name, True)

    def linked(self, replica: PeerLike, name: str, is_linked: bool) -> None:
        """The process of that wire name has links to `replica`, or has none any more."""
        if is_linked:
            self._linked.add(replica, name)
            self._meet(name, 0)
        elif self._linked.remove(replica, name):
            self._forget(name)

    def _meet(self, name: str, floor: int) -> _Follower | None:
        """A process has links: unless it follows, it is a stranger, who may use any snapshot from `floor` on."""
        if self._names[name] or name in self._strangers:
            return None
        stranger = self._strangers[name] = _Stranger(name)
        follower = self._followers[stranger] = _Follower(stranger, floor)
        if not self._is_empty and floor < self.snapshot.version:
            self._send(follower)
        return follower

    def _forget(self, name: str) -> None:
        """A process has no links any more, with which a stranger is nobody."""
        stranger = self._strangers.pop(name, None)
        if stranger is not None:
            self._drop(stranger)

    def leave(self, peer: PeerLike) -> None:
        """The connection of `peer` has ended."""
        self._replicas.discard(peer)
        if self._unfenced.pop(peer, 0):
            self._settle()
        for name in self._linked.gone(peer):
            self._forget(name)
        follower = self._followers.get(peer)
        if follower is None:
            return
        name = wire_name(peer.id)
        self._names[name] -= 1
        if not self._names[name]:
            del self._names[name]
        if name in self._linked and (stranger := self._meet(name, follower.floor)):
            stranger.fence = follower.fence
        self._drop(peer)

    def _drop(self, peer: PeerLike) -> None:
        """It follows no more."""
        if self._followers.pop(peer).fence:
            self._tell_fences()
        self._settle()
        self._on_change()

    def acked(self, peer: PeerLike, version: int) -> None:
        """`peer` says that `version` is in force in it."""
        follower = self._followers.get(peer)
        if follower is None:
            return
        follower.floor = max(follower.floor, version)
        while follower.pending and follower.pending[0][0] <= version:
            follower.pending.popleft()
        if follower.fence and follower.floor >= follower.fence:
            follower.fence = 0
            log.info("%s has caught up", follower.name)
            self._tell_fences()
        self._settle()
        self._on_change()

    def fenced(self, peer: PeerLike, number: int) -> None:
        """The fence of that number is in force in the replica `peer`, or it has had time enough to say so."""
        if number >= self._unfenced.get(peer, number + 1):
            del self._unfenced[peer]
            self._settle()

    def close(self) -> None:
        """Stop watching; whoever waits is let go."""
        self._unfenced.clear()
        self._followers.clear()
        self._strangers.clear()
        self._settle()

    # --- details ---

    def _send(self, follower: _Follower) -> None:
        if follower.pending and follower.peer.role == STRANGER:
            return  # the first says how long it has been behind, and none of them is ever acknowledged
        due = asyncio.get_running_loop().time() + PATIENCE_S
        follower.pending.append((self.snapshot.version, due))
        follower.peer.tell(self._message(follower))
        follower.sent = self.snapshot.version
        self._look_again(due)

    def _message(self, follower: _Follower) -> messages.Publish | messages.PublishChange:
        """The newest snapshot, as shortly as `follower` will understand it."""
        if self._change is not None and follower.sent == self.snapshot.version - 1:
            return self._change
        if self._whole is None:
            packed = msgspec.Raw(msgspec.msgpack.encode(self.snapshot))
            self._whole = messages.Publish(self.snapshot.version, packed)
        return self._whole

    def _look_again(self, moment: float) -> None:
        if self._timer is None:
            self._look_at = moment
            self._timer = asyncio.get_running_loop().call_at(moment, self._check)

    def _settle(self) -> None:
        """Forget snapshots that nobody can use any more; let go whoever has waited for that."""
        floors = [one.floor for one in self._followers.values() if not one.fence]
        lowest = min(floors, default=self.snapshot.version)
        while len(self._listed) > 1 and self._listed[0][0] < lowest:
            self._listed.popleft()
        waiting, self._waiting = self._waiting, []
        for version, waiter in waiting:
            if self._is_behind(version):
                self._waiting.append((version, waiter))
            elif not waiter.done():
                waiter.set_result(None)

    def _is_behind(self, version: int) -> bool:
        return bool(self._unfenced) or any(
            one.pending and one.pending[0][0] <= version and not one.fence for one in self._followers.values()
        )

    def _check(self) -> None:
        """Deal with those that are overdue; look again when the next one will be."""
        loop = asyncio.get_running_loop()
        self._timer = None
        if loop.time() > self._look_at + HELD_UP_S:
            self._look_again(loop.time() + HELD_UP_S)
            return
        for one in list(self._followers.values()):
            if one.pending and one.pending[0][1] <= loop.time() and not (one.fence or one.reported):
                self._give_up(one)
        due = [one.pending[0][1] for one in self._followers.values() if one.pending and not one.reported]
        upcoming = [moment for moment in due if moment > loop.time()]
        if upcoming:
            self._look_again(min(upcoming))
        self._settle()
        self._on_change()

    def _give_up(self, follower: _Follower) -> None:
        version = self.snapshot.version
        if follower.peer.role == PROXY:
            follower.reported = True
            log.warning("%s did not take snapshot %d in %g s", follower.name, version, PATIENCE_S)
            self._on_silent(follower.peer)
            return
        follower.fence = version
        log.warning("%s did not take snapshot %d in %g s: fenced", follower.name, version, PATIENCE_S)
        self._tell_fences()

    def _fences(self) -> dict[str, int]:
        return {one.peer.id: one.fence for one in self._followers.values() if one.fence}

    def _tell_fences(self) -> None:
        self._fence_number += 1
        for peer in self._replicas:
            self._tell_fence(peer)

    def _tell_fence(self, peer: PeerLike) -> None:
        fences, number = self._fences(), self._fence_number
        peer.tell(messages.Fence(fences, number))
        if fences:  # where it is lifted nobody waits
            self._unfenced[peer] = number
            asyncio.get_running_loop().call_later(PATIENCE_S, self.fenced, peer, number)
