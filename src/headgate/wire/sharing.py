"""A link between two processes that may share memory: large values travel as segments (segments.py).

Both ends lend and both borrow. What is common to them is here; that a request or an answer is in a
segment, and what becomes of one that cannot be opened, is replica_link.py and replica/links.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

from headgate.core import framing
from headgate.wire.borrowed import Readings, borrow
from headgate.wire.link import Link
from headgate.wire.segments import Lent

if TYPE_CHECKING:
    from headgate.wire.borrowed import Place

_pack = framing.HEADER.pack


class SharingLink(Link):
    """A link with what it has lent.

    peer   the process at its other end; 0 while it is not known, or on another machine: then nothing is shared
    """

    def __init__(self) -> None:
        super().__init__()
        self.peer = 0
        self.lent = Lent()
        self._readings = Readings()
        self._loop: asyncio.AbstractEventLoop | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._loop = asyncio.get_running_loop()
        super().connection_made(transport)

    def borrow(self, place: Place) -> memoryview:
        """The peer's value at `place`, to be read here; the peer is told when nothing refers to it. Raises OSError."""
        return borrow(self.peer, place, self._on_freed)

    def read(self, place: Place) -> memoryview:
        """As `borrow`, but read-only, and quicker for a segment that was read before."""
        return self._readings.view(self.peer, place, self._on_read)

    def sweep_readings(self, now: float) -> None:
        """Let go of what is not read any more; to be called about once a second, with the loop's time."""
        self._readings.sweep(now)

    def say_taken(self, slot: int, place: Place) -> None:
        """The value of this request was mapped, or need not be."""
        self.send(_pack(0, framing.TAKEN, 0, 0, slot, place[1]))

    def ask_for_pieces(self, slot: int, place: Place) -> None:
        """The value of this request cannot be opened here."""
        self.send(_pack(0, framing.TAKEN, framing.MORE, 0, slot, place[1]))

    def say_free(self, inode: int, spoiled: bool = False) -> None:
        """Nothing refers to the value any more; `spoiled`: not here, but perhaps in a copy of this process."""
        if not self.closed:
            flags = framing.SEGMENT | (framing.MORE if spoiled else 0)
            self.send(_pack(0, framing.FREE, flags, 0, 0, inode))

    def _on_freed(self, inode: int, spoiled: bool) -> None:
        # Runs on whichever thread dropped the last reference.
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed, and the link has ended
                self._loop.call_soon_threadsafe(self.say_free, inode, spoiled)

    def _on_read(self, inode: int, spoiled: bool) -> None:
        loop = self._loop
        if loop is not None:  # on the loop's own thread too it may be in the middle of a write, as any finalizer
            is_here = asyncio._get_running_loop() is loop
            with contextlib.suppress(RuntimeError):
                (loop.call_soon if is_here else loop.call_soon_threadsafe)(self._say_read, inode, spoiled)

    def _say_read(self, inode: int, spoiled: bool) -> None:
        assert self._loop is not None
        self._readings.ended(inode, self._loop.time())  # first: the peer may use it again as soon as it hears
        self.say_free(inode, spoiled)
