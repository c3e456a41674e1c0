"""Large values and answers between processes of one machine: written once, read where they lie.

The sender writes a value into a memory of its own, a segment, and tells the receiver where that is.
The receiver maps it privately: what it changes is its own copy, page by page, so that a value may be
given to several receivers, or to another one after the first has died. A proxy changes nothing, and keeps
what it has mapped for the next answers.

    sender    CALL or REPLY with SEGMENT   its body is `place`: descriptor, inode, size
    receiver  TAKEN                        it has mapped it; with MORE: it cannot, send it in pieces
    receiver  FREE with SEGMENT            nothing refers to it any more; with MORE: do not write into it again

A segment is needed by its request until that is over, and read by receivers until they say FREE. Then it
is kept for the next value (core/spares.py). A receiver that went without a word - its link has ended, or
it has forked - may still read it: then it is let go, and never written again. A memory without a name
lives for as long as it is mapped somewhere, so that whoever keeps an array keeps it.

Other than the arena (arena.py), in which a proxy lends memory that it wants back, this memory may
outlive the link, and its sender.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from headgate.core import lending, spares
from headgate.wire.borrowed import NAME, PLACE, copy, map_memory, write
from headgate.wire.slots import make_memory

#: What a process keeps for its next values, and for how long.
KEPT_BYTES = 512 << 20
IDLE_S = 3.0
#: So many segments that receivers have kept beyond their request are waited for; further ones are let go.
MOST_LENT = 32
#: A receiver that could not open a segment is not lent another for so long.
AGAIN_S = 10.0

Later = Callable[[float, Callable[[], object]], object]
Lends = Callable[[int, int, int], bool]


class Segment:
    """A memory with one value in it, as its sender holds it. Made by `Store.write`, for a request."""

    def __init__(self, store: Store, fd: int, capacity: int) -> None:
        self.fd = fd
        self.inode = os.fstat(fd).st_ino
        self.capacity = capacity
        self.size = 0
        self.is_out = False  # counted by its store
        self.is_needed = False  # by the request that it belongs to, which may send it once more
        self.readers = 0
        self.is_spoiled = False  # somebody may read it for ever
        self._store = store
        self._written = 0  # so many bytes are there in memory
        self._mapped: mmap.mmap | None = None

    def fill(self, parts: Sequence[memoryview], size: int) -> None:
        """Put a value of that size in, of these parts. Raises OSError.

        Fresh memory is best written by the kernel, which can also say that there is none; memory that
        is there through a mapping. Other threads run meanwhile.
        """
        if size > self._written:
            write(self.fd, parts)
            self._written, self._mapped = size, None
        else:
            if self._mapped is None:
                self._mapped = map_memory(self.fd, self._written, mmap.MAP_SHARED | mmap.MAP_POPULATE)
            copy(parts, ctypes.addressof(ctypes.c_char.from_buffer(self._mapped)))
        self.size = size

    @property
    def place(self) -> bytes:
        """What a receiver needs to find it."""
        return PLACE.pack(self.fd, self.inode, self.size)

    def lend(self) -> None:
        """It has one reader more."""
        self._store.lend(self)

    def give_back(self, spoiled: bool = False) -> None:
        """A reader has gone. `spoiled`: nobody can say whether it still reads."""
        self._store.give_back(self, spoiled)

    def end(self) -> None:
        """The request that it belongs to is over."""
        self._store.end(self)

    def view(self) -> memoryview:
        """The value, to be sent in pieces; a reader until nothing refers to it."""
        try:
            mapped = map_memory(self.fd, self.size, mmap.MAP_PRIVATE)
        except OSError:  # too many mappings
            with open(self.fd, "rb", closefd=False) as file:
                file.seek(0)
                return memoryview(file.read(self.size))
        self.lend()
        weakref.finalize(mapped, self._store.view_ended, self).atexit = False
        return memoryview(mapped)[: self.size]

    def close(self) -> None:
        """Let it go: it lives for as long as somebody has it mapped."""
        self._mapped = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class Store:
    """The segments that are written for one event loop, and those kept for the next values.

    later   calls a function on that loop after so many seconds, from any thread; RuntimeError if
            the loop has ended
    clock   the loop's
    lends   whether something is to be lent, of core/lending.py
    most_lent   so many may be read at a time after their requests; what is beyond is not used again

    Its methods may be called on any thread.
    """

    def __init__(
        self,
        later: Later,
        clock: Callable[[], float],
        lends: Lends = lending.lends_value,
        most_lent: int = MOST_LENT,
    ) -> None:
        self._later = later
        self._clock = clock
        self._lends = lends
        self._most_lent = most_lent
        self._lock = threading.Lock()
        self._spares = spares.Spares(KEPT_BYTES, IDLE_S)
        self._free: dict[int, Segment] = {}  # inode -> one that nobody uses
        self._lent: set[Segment] = set()  # the request is over, a receiver still reads
        self._out = self._out_bytes = 0  # segments whose request is not over, or that are read
        self._is_sweeping = False
        self._closed = False
        _stores.add(self)

    def write(self, parts: Sequence[Any]) -> Segment | None:
        """A segment with these `parts`, one after the other; None: it is not to be lent, or there is no memory."""
        parts = [memoryview(part) for part in parts]  # whose sizes are those of the memory, whatever `len` says
        size = sum(part.nbytes for part in parts)
        if not self._lends(size, self._out_bytes, self._out):  # of two threads at once both may be the last
            return None
        with self._lock:
            number = self._spares.take(size)
            segment = None if number is None else self._free.pop(number)
            self._out += 1
            self._out_bytes += size
        try:
            if segment is None:
                capacity = spares.capacity(size)
                segment = Segment(self, make_memory(NAME, capacity), capacity)
            segment.fill(parts, size)
        except BaseException as error:
            with self._lock:
                self._out -= 1
                self._out_bytes -= size
            if segment is not None:
                segment.close()
            if not isinstance(error, OSError):
                raise
            return None  # no descriptor or no memory is left
        segment.is_out = segment.is_needed = True
        return segment

    def lend(self, segment: Segment) -> None:
        """One reader more."""
        with self._lock:
            segment.readers += 1

    def give_back(self, segment: Segment, spoiled: bool = False) -> None:
        """One reader less."""
        with self._lock:
            segment.readers -= 1
            segment.is_spoiled |= spoiled
            closing = self._settle(segment)
        self._close(closing)

    def end(self, segment: Segment) -> None:
        """Its request is over; whoever reads it may do so for as long as it likes."""
        with self._lock:
            segment.is_needed = False
            segment.is_spoiled |= segment.readers > 0 and len(self._lent) >= self._most_lent
            closing = self._settle(segment)
        self._close(closing)

    def view_ended(self, segment: Segment) -> None:
        """A view of it is gone; may be called wherever a finalizer runs, with any lock held."""
        if not self._closed:  # else it ends with its last reference
            with contextlib.suppress(RuntimeError):
                self._later(0.0, partial(self.give_back, segment))

    def close(self) -> None:
        """The loop ends: nothing is kept any more."""
        with self._lock:
            self._closed = True
            closing = [self._free.pop(number) for number in self._spares.clear()]
            closing += self._lent
            self._lent.clear()
        self._close(closing)

    def _settle(self, segment: Segment) -> list[Segment]:
        """With the lock: keep it for its readers or for the next value; those to be closed."""
        if segment.is_needed:
            return []
        self._lent.discard(segment)
        if segment.readers and not (segment.is_spoiled or self._closed):
            self._lent.add(segment)
            return []
        if segment.is_out and not segment.readers:
            segment.is_out = False
            self._out -= 1
            self._out_bytes -= segment.size
        if segment.is_spoiled or self._closed:
            return [segment]
        self._free[segment.inode] = segment
        dropped = self._spares.put(segment.inode, segment.capacity, self._clock())
        return [self._free.pop(number) for number in dropped]

    def _close(self, closing: list[Segment]) -> None:
        for segment in closing:
            segment.close()
        if self._free and not self._is_sweeping:
            self._is_sweeping = True
            self._sweep_later()

    def _sweep_later(self) -> None:
        try:
            self._later(IDLE_S, self._sweep)
        except RuntimeError:
            self.close()

    def _sweep(self) -> None:
        with self._lock:
            closing = [self._free.pop(number) for number in self._spares.late(self._clock())]
            self._is_sweeping = False
        self._close(closing)

    def forked(self) -> None:
        """In a fork: these are the parent's."""
        self._lock = threading.Lock()
        for segment in (*self._free.values(), *self._lent):
            segment.close()
        self._free.clear()
        self._lent.clear()
        self._spares.clear()
        self._closed = True


class Lent:
    """What one link has lent to its peer, by inode."""

    def __init__(self) -> None:
        self.segments: dict[int, Segment] = {}
        self._again_at = 0.0

    def may(self, now: float) -> bool:
        """Whether the peer can open segments, as far as is known."""
        return now >= self._again_at

    def add(self, segment: Segment) -> None:
        """The peer is told where it is."""
        segment.lend()
        self.segments[segment.inode] = segment

    def back(self, inode: int, spoiled: bool = False) -> None:
        """The peer reads it no more, or never has."""
        segment = self.segments.pop(inode, None)
        if segment is not None:
            segment.give_back(spoiled)

    def refused(self, inode: int, now: float) -> None:
        """The peer could not open it."""
        self._again_at = now + AGAIN_S
        self.back(inode)

    def end(self) -> None:
        """The link has ended: the peer may live on, and read."""
        for inode in list(self.segments):
            self.back(inode, spoiled=True)


_stores: weakref.WeakSet[Store] = weakref.WeakSet()


def _after_fork() -> None:
    for store in list(_stores):
        store.forked()


os.register_at_fork(after_in_child=_after_fork)
