"""How much of request bodies a proxy holds at once; beyond the limit it stops reading.

One connection is always allowed to go on, so that bodies that all arrive at once get done one
after the other instead of all waiting for each other.
"""

from __future__ import annotations

from typing import Protocol


class Reader(Protocol):
    """A connection in the middle of a body."""

    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read on."""


class Budget:
    """Bytes held, and the readers that wait until there are fewer."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._first: Reader | None = None  # goes on whatever the limit
        self._waiting: dict[Reader, None] = {}  # in order

    def add(self, reader: Reader, count: int) -> None:
        """The reader received `count` bytes of a body that is not complete; may pause it."""
        self.held += count
        if self.held > self.limit and reader is not self._first and reader not in self._waiting:
            if self._first is None:
                self._first = reader
            else:
                self._waiting[reader] = None
                reader.pause()

    def complete(self, reader: Reader) -> None:
        """The reader's body is complete, or it has gone: another one may go on."""
        self._waiting.pop(reader, None)
        if reader is self._first:
            self._first = None
            self._resume()

    def release(self, count: int) -> None:
        """So many bytes are not held any more."""
        self.held -= count
        if self._waiting:
            self._resume()

    def _resume(self) -> None:
        while self._waiting and (self.held <= self.limit or self._first is None):
            reader = next(iter(self._waiting))
            del self._waiting[reader]
            if self.held > self.limit:
                self._first = reader
            reader.resume()
