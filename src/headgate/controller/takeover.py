"""The first moments of a controller: what it found running, and who of that has said how it is.

Connections may be there, and events come, before the engine has told what runs; until then
nothing is planned. The goals are looked at when all that was found has spoken, or had its time.
That time is counted in ticks of this loop: while it is held up nobody is heard, so that none passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_TICK_S = 0.1


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


class Listening:
    """Calls `then` once this loop has listened to others for `seconds`."""

    def __init__(self, seconds: float, then: Callable[[], object]) -> None:
        self._left = round(seconds / _TICK_S)
        self._then = then
        self._next()

    def _next(self) -> None:
        loop = asyncio.get_running_loop()
        self._due = loop.time() + _TICK_S
        loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        was_held_up = asyncio.get_running_loop().time() > self._due + _TICK_S
        # What was said meanwhile may not be read yet: such a tick is never the last.
        self._left = max(self._left - 1, 1 if was_held_up else 0)
        if self._left:
            self._next()
        else:
            self._then()
