"""Shared memory for large request bodies: a proxy receives into it, replicas read in place.

One anonymous memory for each proxy, passed to replicas in the handshake of each link. `Segments`
hands out pieces of it by the buddy method: sizes are powers of two, a free piece and its twin
melt into one twice as large. Pages take memory when they are first written, so a piece that is
larger than its body costs nothing, and `trim` gives back those that were not needed lately.

Who holds a segment, and when it is free, is proxy/upload.py's business.
"""

from __future__ import annotations

import mmap
from bisect import bisect_left, insort

from headgate.wire.slots import make_memory

#: The smallest segment. A body that is smaller goes through the socket.
SMALLEST_BYTES = 64 * 1024


class Segments:
    """Hands out offsets in a range of `size` bytes, a power of two, lowest first.

    >>> segments = Segments(1 << 20)
    >>> segments.take(100_000), segments.take(300_000), segments.take(1_000_000)
    (0, 524288, None)
    >>> segments.free(0); segments.free(524288); segments.take(1_000_000)
    0
    """

    def __init__(self, size: int) -> None:
        if size < SMALLEST_BYTES or size & (size - 1):
            raise ValueError(f"an arena's size must be a power of two >= {SMALLEST_BYTES}, got {size}")
        self.size = size
        self.taken = 0  # bytes, as handed out
        self._free: dict[int, list[int]] = {size: [0]}  # size -> offsets, ascending
        self._sizes: dict[int, int] = {}  # of what is taken
        self._peak = 0  # end of the highest segment since the last trim
        self._touched = 0  # beyond this no page was written

    def take(self, count: int) -> int | None:
        """The offset of `count` bytes that nobody else has; None if no such piece is free."""
        size = max(SMALLEST_BYTES, 1 << max(count - 1, 0).bit_length())
        fits = [(offsets[0], have) for have, offsets in self._free.items() if have >= size and offsets]
        if not fits:
            return None
        offset, have = min(fits)
        del self._free[have][0]
        while have > size:
            have //= 2
            insort(self._free.setdefault(have, []), offset + have)
        self._sizes[offset] = size
        self.taken += size
        self._peak = max(self._peak, offset + size)
        return offset

    def free(self, offset: int) -> None:
        """Take a segment back. KeyError if it is not taken."""
        size = self._sizes.pop(offset)
        self.taken -= size
        while size < self.size:
            twin = offset ^ size
            offsets = self._free.setdefault(size, [])
            at = bisect_left(offsets, twin)
            if at == len(offsets) or offsets[at] != twin:
                break
            del offsets[at]
            offset = min(offset, twin)
            size *= 2
        insort(self._free.setdefault(size, []), offset)

    def trim(self) -> tuple[int, int] | None:
        """The part (start, end) that was used once but not since the last call, or None."""
        touched = max(self._touched, self._peak)
        self._touched, unused = self._peak, (self._peak, touched)
        self._peak = max((offset + size for offset, size in self._sizes.items()), default=0)
        return unused if unused[0] < unused[1] else None


class Arena:
    """Segments in memory that can be shared; at most `limit` bytes, at least SMALLEST_BYTES.

    fd     to be passed to replicas
    view   all of the memory
    """

    def __init__(self, limit: int) -> None:
        size = max(SMALLEST_BYTES, 1 << (limit.bit_length() - 1))
        self.segments = Segments(size)
        self.fd = make_memory("headgate-arena", size)
        self._map = mmap.mmap(self.fd, size)
        self.view = memoryview(self._map)

    def take(self, count: int) -> int | None:
        """The offset of a segment of at least `count` bytes, or None: use other memory."""
        return self.segments.take(count)

    def free(self, offset: int) -> None:
        """Nobody reads or writes this segment any more."""
        self.segments.free(offset)

    def trim(self) -> None:
        """Give memory back that was not used since the last call."""
        unused = self.segments.trim()
        if unused is not None:
            self._map.madvise(mmap.MADV_REMOVE, unused[0], unused[1] - unused[0])
