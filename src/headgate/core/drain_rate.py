"""How fast a waiting line moves, measured while there is one: when a refused request may come again.

While somebody waits, the replicas have all that they can take, and the answers of that time are
what they can do. Idle time says nothing and is left out. The newest measurements count, and all are
forgotten when there was no line for long: the backend may be another by then.

Each router measures its own share of the replicas and its own line, and these fit together. No
clock here: the caller passes `now` and the number of answers so far. The line is core/waiting.py,
the caller backend_route.py.
"""

from __future__ import annotations

import math

#: What is said at least and at most, in whole seconds.
SHORTEST_S, LONGEST_S = 1, 60
#: So much time with a line, and so many answers, are a measurement; the newest two are used.
WINDOW_S = 5.0
WINDOW_ANSWERS = 10
#: After so long without a line all is measured anew.
FORGET_S = 60.0
#: Where nobody may wait at all: refusals that follow each other so closely had no room in between.
CLOSE_S = 1.0


class DrainRate:
    """The answers per second of a line that moves.

    >>> drain = DrainRate()
    >>> drain.begin(now=10.0, answers=700)                     # somebody waits
    >>> drain.retry_after_s(now=12.0, answers=720, ahead=45)   # 10 a second
    5
    >>> drain.end(now=13.0, answers=730)                       # nobody any more
    """

    __slots__ = ("_answers", "_before", "_count", "_is_line", "_seconds", "_seen")

    def __init__(self) -> None:
        self._is_line = False
        self._seen = float("-inf")  # when this was told something
        self._answers = 0  # of that time
        self._seconds, self._count = 0.0, 0.0  # this measurement
        self._before = (0.0, 0.0)  # the one before

    def begin(self, now: float, answers: int) -> None:
        """Somebody waits from now on."""
        self._note(now, answers, counts=False)
        self._is_line = True

    def end(self, now: float, answers: int) -> None:
        """Nobody waits any more."""
        self._note(now, answers, counts=self._is_line)
        self._is_line = False

    def retry_after_s(self, now: float, answers: int, ahead: int) -> int:
        """In how many whole seconds `ahead` requests, those that wait and those that run, are done.

        As long as nothing was answered: as long again as it has taken so far.
        """
        self._note(now, answers, counts=self._is_line or now - self._seen <= CLOSE_S)
        seconds, count = self._seconds + self._before[0], self._count + self._before[1]
        wait_s = ahead * seconds / count if count else seconds
        return max(SHORTEST_S, min(LONGEST_S, math.ceil(wait_s)))

    def _note(self, now: float, answers: int, counts: bool) -> None:
        """The time since the last call belongs to the measurement if it `counts`."""
        if counts:
            self._seconds += now - self._seen
            self._count += answers - self._answers
        elif now - self._seen > FORGET_S:
            self._seconds = self._count = 0.0
            self._before = (0.0, 0.0)
        self._seen, self._answers = now, answers
        if self._seconds >= WINDOW_S and self._count >= WINDOW_ANSWERS:  # a long one counts as much as any other
            self._before = (WINDOW_S, self._count * WINDOW_S / self._seconds)
            self._seconds = self._count = 0.0
