"""Bodies of known length that did not come with their head in one read.

A small one is collected; a large one is received straight into its place in the arena, `filling`
being where. Chunked ones are chunked.py's, with the same `take`, `done` and `filling`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headgate.proxy.upload import Upload


class Collected:
    """A body of `size` bytes in memory of its own, which grows as they come."""

    filling = None

    def __init__(self, size: int) -> None:
        self.body = bytearray()
        self._size = size

    @property
    def done(self) -> bool:
        """Whether the body is complete."""
        return len(self.body) == self._size

    def take(self, data: bytes) -> int:
        """How much of the data belongs to this body; all of it, unless it ends there."""
        count = min(self._size - len(self.body), len(data))
        self.body += memoryview(data)[:count]
        return count


class Placed:
    """A body in the arena."""

    def __init__(self, upload: Upload) -> None:
        self.body = upload.body  # where it is, as the router wants it
        self.filling: memoryview | None = upload.view

    @property
    def done(self) -> bool:
        """Whether the body is complete."""
        return self.filling is None

    def take(self, data: bytes) -> int:
        """How much of the data belongs to this body; all of it, unless it ends there."""
        assert self.filling is not None
        count = min(len(self.filling), len(data))
        self.filling[:count] = memoryview(data)[:count]
        self.received(count)
        return count

    def received(self, count: int) -> None:
        """So many bytes were received into `filling`."""
        assert self.filling is not None
        self.filling = self.filling[count:] if count < len(self.filling) else None
