"""Which pieces of memory to keep for the next large body, and which to give back.

Memory that was written before is three times as fast to write as fresh memory, which the kernel has to
find page by page. So what is free again is kept for a while: at most so many bytes and pieces, and each
for a few seconds; the one that was used last is taken first.

No memory and no clock here: a piece is its number and its size. Who holds it is wire/segments.py, and
wire/borrowed.py what a proxy has mapped.
"""

from __future__ import annotations

#: A piece may be so much larger than what is put into it, unless it is of the smallest; the rest of it would lie idle.
ROOMY = 4
#: So many pieces are kept at most: each is a file descriptor.
MOST = 64
_STEP = 1 << 20


def capacity(size: int) -> int:
    """How large a piece to make for `size` bytes, so that it also fits others of about that size.

    A quarter more at most, and whole MiB.

    >>> capacity(1), capacity(100_000_200) >> 20
    (1048576, 96)
    """
    step = max(_STEP, 1 << max(0, size.bit_length() - 3))
    return -(-max(size, 1) // step) * step


class Spares:
    """Pieces that nobody uses: `limit_bytes` in all at most, each for `idle_s` seconds.

    >>> spares = Spares(limit_bytes=300, idle_s=5.0)
    >>> spares.put(7, 100, now=0.0), spares.put(8, 200, now=1.0), spares.put(9, 50, now=2.0)
    ([], [], [7])
    >>> spares.take(60), spares.take(60)
    (8, None)
    >>> spares.late(now=7.0)
    [9]
    """

    def __init__(self, limit_bytes: int, idle_s: float) -> None:
        self.idle_s = idle_s
        self.held = 0  # bytes
        self._limit = limit_bytes
        self._kept: dict[int, tuple[int, float]] = {}  # number -> size, since when; oldest first

    def __len__(self) -> int:
        return len(self._kept)

    def take(self, size: int) -> int | None:
        """The smallest piece that fits `size` bytes and is not far too large, the one used last; or None."""
        most = max(ROOMY * size, _STEP)
        fits = [(have, -since, number) for number, (have, since) in self._kept.items() if size <= have <= most]
        if not fits:
            return None
        number = min(fits)[2]
        self._drop(number)
        return number

    def pick(self, number: int) -> bool:
        """Take this very piece; False if it is not kept."""
        is_kept = number in self._kept
        if is_kept:
            self._drop(number)
        return is_kept

    def put(self, number: int, size: int, now: float) -> list[int]:
        """Keep a piece; those to be given back instead, the oldest first."""
        self._kept[number] = size, now
        self.held += size
        dropped = []
        while self.held > self._limit or len(self._kept) > MOST:
            dropped.append(next(iter(self._kept)))
            self._drop(dropped[-1])
        return dropped

    def late(self, now: float) -> list[int]:
        """Those that nobody needed for `idle_s` seconds: they are to be given back."""
        late = [number for number, (_, since) in self._kept.items() if since + self.idle_s <= now]
        for number in late:
            self._drop(number)
        return late

    def clear(self) -> list[int]:
        """All of them: they are to be given back."""
        numbers = list(self._kept)
        self._kept.clear()
        self.held = 0
        return numbers

    def _drop(self, number: int) -> None:
        self.held -= self._kept.pop(number)[0]
