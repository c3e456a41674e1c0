"""The first moments of a controller: what it found running, and who of that has said how it is.

Connections may be there, and events come, before the engine has told what runs; until then
nothing is planned. The goals are looked at when all that was found has spoken, or had its time.
"""

from __future__ import annotations


class Takeover:
    """`looked`: what runs is known. `over`: whoever was to speak has, or is not waited for any longer."""

    def __init__(self) -> None:
        self.looked = False
        self.over = False
        self._said: set[str] = set()
        self._unsaid: set[str] = set()

    def found(self, id: str) -> None:
        """A process was running already."""
        if id not in self._said:
            self._unsaid.add(id)

    def said(self, id: str) -> None:
        """A process said how it is, or has ended; it may have been found, or be about to be."""
        if not self.over:
            self._said.add(id)
            self._unsaid.discard(id)

    @property
    def is_complete(self) -> bool:
        """Whether all that was found has spoken."""
        return self.looked and not self._unsaid

    def end(self) -> None:
        """Wait no longer."""
        self.over = True
        self._said.clear()
        self._unsaid.clear()
