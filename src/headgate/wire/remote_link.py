"""The router's end of a link to a replica of another node; and which kind of link leads to a replica.

No memory is shared with another machine. So every body travels in frames, and once the link has
ended nobody can say what had started: whatever was sent whole counts as started.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from headgate.core import framing
from headgate.wire.handshake import dial
from headgate.wire.link import open_link
from headgate.wire.replica_link import ReplicaLink, Slots
from headgate.wire.slots import SLOTS

if TYPE_CHECKING:
    from headgate.core.state import ReplicaAddress
    from headgate.wire.caller import Caller, Hub, Line


class _Numbers:
    """Hands out slots that nobody else looks at."""

    fd: int | None = None

    def __init__(self) -> None:
        self.free: list[int] = []
        self.marks = mmap.mmap(-1, SLOTS)  # which nobody reads
        self._next = 0

    def passed(self) -> None:
        """There is nothing to pass."""

    def take(self) -> int:
        """A free slot."""
        if self.free:
            return self.free.pop()
        self._next += 1
        return self._next - 1

    def started(self, slot: int) -> bool:
        """Nobody here knows better."""
        return True

    def close(self) -> None:
        self.marks.close()


class RemoteReplicaLink(ReplicaLink):
    """A link over TCP."""

    def _make_slots(self) -> Slots:
        return _Numbers()

    def call(self, caller: Caller, want: int) -> None:
        if caller.flags & framing.ARENA:
            self._call_inline(caller, want)
        else:
            super().call(caller, want)

    def _started(self, slot: int, dead: bool) -> bool:
        return all(upload[0] != slot for upload in self._uploads)

    async def open(self) -> None:
        sock, _ = await dial(self.replica.remote, self._router.token, self._router.name)
        await open_link(self, sock)


async def open_replica_link(router: Hub, backend: Line, replica: ReplicaAddress) -> ReplicaLink:
    """A link to a replica, ready for calls. Raises OSError or ProtocolError while it does not listen."""
    kind = ReplicaLink if replica.node == router.node else RemoteReplicaLink
    link = kind(router, backend, replica)
    await link.open()
    return link
