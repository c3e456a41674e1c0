"""How much of request bodies a proxy holds at once; beyond the limit it stops reading them.

What is held comes free when requests are answered. Only when nothing but half-received bodies is
held would all wait for each other for ever: then one of them goes on, so that the limit is
exceeded by one body at most.
"""

from __future__ import annotations

from typing import Protocol


class Reader(Protocol):
    """A connection that receives bodies."""

    def pause(self) -> None:
        """Stop reading."""

    def resume(self) -> None:
        """Read on."""


class Budget:
    """Bytes held, by reader, and the readers that wait until there are fewer."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self.full = False  # whether more is held than should be
        self._receiving: dict[Reader, int] = {}
        self._complete: dict[Reader, int] = {}
        self._first: Reader | None = None  # goes on whatever the limit
        self._waiting: dict[Reader, None] = {}  # in order

    def add(self, reader: Reader, count: int) -> None:
        """The reader received `count` bytes more of a body; may pause it."""
        self.held += count
        self.full = self.held > self.limit
        self._receiving[reader] = self._receiving.get(reader, 0) + count
        if self.held <= self.limit or reader is self._first or reader in self._waiting:
            return
        if self._first is None and not self._complete:
            self._first = reader
        else:
            self._waiting[reader] = None
            reader.pause()

    def complete(self, reader: Reader) -> None:
        """The reader's body is complete; it is held until `release`."""
        self._complete[reader] = self._receiving.pop(reader, 0)
        self._stop_waiting(reader)

    def release(self, reader: Reader) -> None:
        """Nothing of the reader is held any more."""
        self.held -= self._complete.pop(reader, 0) + self._receiving.pop(reader, 0)
        self.full = self.held > self.limit
        self._stop_waiting(reader)
        while self._waiting and (self.held <= self.limit or (self._first is None and not self._complete)):
            next_one = next(iter(self._waiting))
            if self.held > self.limit:
                self._first = next_one
            self._stop_waiting(next_one, is_first=True)

    def _stop_waiting(self, reader: Reader, is_first: bool = False) -> None:
        if reader is self._first and not is_first:
            self._first = None
        if reader in self._waiting:
            del self._waiting[reader]
            reader.resume()
