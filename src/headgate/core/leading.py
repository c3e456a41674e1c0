"""When the thread that runs plain handlers reads their requests itself: only while they are quick.

A thread that reads, runs and answers saves each request two hand-overs between threads. But while user
code runs, nobody reads: cancellations, pings and what else comes by that link would wait. So the event
loop lends the link out, looks every `LOOK_S` whether it has to take it back, and does so

- when one call is running at two looks in turn: it takes long,
- when the calls of one read took longer than `SLOW_S` together,
- when something comes that is no ordinary call: a cancellation, a body in pieces, one call too many.

This is the leader/followers pattern (Schmidt et al., "Leader/Followers", PLoP 2000) with two threads of
which one never runs user code.
"""

from __future__ import annotations

LOOK_S = 0.005
SLOW_S = 0.01
#: The calls of one read that took no longer together have the link lent out.
QUICK_S = 0.002
#: How long the loop keeps what it had to take back.
AFTER_SLOW_S = 0.5
AFTER_OTHER_S = 0.05
#: Without a call for so many looks, nobody looks any more until one comes.
_IDLE_LOOKS = 100

LEND, REST, TAKE_BACK = "lend", "rest", "take back"


class Leading:
    """The loop's decisions. No clock: `now` is passed.

    >>> leading = Leading()
    >>> leading.may_lend(now=0.0), leading.look("call 1", 1), leading.look("call 1", 1)
    (True, 'lend', 'take back')
    """

    __slots__ = ("_count", "_idle", "_not_before", "_running")

    def __init__(self) -> None:
        self._not_before = 0.0
        self._running: object = None
        self._count = 0
        self._idle = 0

    def may_lend(self, now: float) -> bool:
        """Whether the link may be lent out."""
        return now >= self._not_before

    def taken_back(self, now: float, is_slow: bool) -> None:
        """It was taken back: because handlers were slow, or because of something else."""
        self._not_before = now + (AFTER_SLOW_S if is_slow else AFTER_OTHER_S)
        self.begin()

    def begin(self) -> None:
        """Looks begin."""
        self._running = None
        self._idle = 0

    def look(self, running: object, count: int) -> str:
        """What a look at the other thread leads to: TAKE_BACK, go on to LEND it, or that and REST from looking.

        running   the call that user code is in; None: it is in none
        count     how often the other thread has read calls so far
        """
        if running is not None and running is self._running:
            return TAKE_BACK
        self._running = running
        self._idle = self._idle + 1 if count == self._count and running is None else 0
        self._count = count
        return REST if self._idle >= _IDLE_LOOKS else LEND
