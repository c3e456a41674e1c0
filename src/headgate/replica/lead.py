"""The plain thread reads a link itself, while its handlers are quick: the loop lends the link out.

When the loop takes it back, and for how long, is core/leading.py's. One round on the plain thread is: free what
the last answers held, receive, admit; then run the calls and answer. The first half happens under the worker's
lock, which the loop holds too while it changes what a worker and its links keep. Whoever finds itself the reader
under the lock is alone with the link; so the loop may take it back whenever user code runs. A read that brought fewer
calls than routers write together has emptied the link: then the thread waits before it receives again.

What is no ordinary call goes back to the loop together with the link, in the order in which it came. The link goes
back too before the thread does anything else that is queued for it: that may take as long as it likes.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from headgate.core import framing
from headgate.core.leading import LOOK_S, QUICK_S, REST, SLOW_S, TAKE_BACK, Leading
from headgate.wire.link import TOGETHER

if TYPE_CHECKING:
    from headgate.replica.job import Job
    from headgate.replica.links import CallerLink
    from headgate.replica.plain_calls import PlainCalls
    from headgate.replica.worker import Worker
    from headgate.wire.link import Frame

_pack = framing.HEADER.pack


class Lead:
    """Who reads: the loop, or the plain thread. For calls of the method that needs no name.

    link   the one that is lent out
    """

    def __init__(self, worker: Worker, calls: PlainCalls) -> None:
        self.link: CallerLink | None = None
        self._worker = worker
        self._calls = calls
        self._loop = asyncio.get_running_loop()
        self._leading = Leading()
        self._term = 0  # counts how often the reader changed
        self._candidate: CallerLink | None = None
        self._took = 0.0
        self._rounds = 0
        self._looking = False
        worker.plain.prepare()
        self._reading = False  # the plain thread may have frames, or what is to be freed, that nobody else knows of

    # --- on the loop, under the worker's lock ---

    def consider(self, link: CallerLink) -> None:
        """Calls came by this link: if they prove to be quick, the plain thread is to read it."""
        if self.link is None and self._leading.may_lend(self._loop.time()):
            self._candidate = link

    def _lend(self, link: CallerLink) -> None:
        worker = self._worker
        with worker.lock:
            if self.link is not None or worker.draining or worker.fenced or not link.lend():
                return
            self.link = link
            self._term += 1
            self._look_soon()
            worker.plain.put(partial(self._lead, link, self._term))

    def forget(self, link: CallerLink) -> None:
        """A link has ended."""
        if link is self.link:
            self.link = None
            self._term += 1
            self._worker.plain.wake()

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            self._leading.begin()
            self._loop.call_later(LOOK_S, self._look)

    def _look(self) -> None:
        with self._worker.lock:
            if self.link is None:
                self._looking = False
                return
            found = self._leading.look(self._worker.running, self._rounds)
            if found == TAKE_BACK:
                self._take_back(is_slow=True)
            if found in (TAKE_BACK, REST):
                self._looking = False
            else:
                self._loop.call_later(LOOK_S, self._look)
        self._calls.answer()

    def _returned(self, term: int, is_slow: bool, frames: list[Frame]) -> None:
        """The plain thread gives it back, with what it has not looked at."""
        with self._worker.lock:
            if term != self._term:
                return
            assert self.link is not None
            if frames:
                self.link.on_frames(frames)
            self._take_back(is_slow)

    def _take_back(self, is_slow: bool) -> None:
        link, self.link = self.link, None
        assert link is not None
        self._term += 1
        self._leading.taken_back(self._loop.time(), is_slow)
        self._calls.settle()
        link.take_back()

    # --- on the plain thread ---

    def have_run(self, seconds: float) -> None:
        """The calls of one read are answered; they took so long."""
        self._took = seconds
        candidate, self._candidate = self._candidate, None
        if candidate is not None and seconds <= QUICK_S:
            self._worker.from_any_thread(self._lend, candidate)

    def _lead(self, link: CallerLink, term: int) -> None:
        try:
            while self._go_round(link, term):
                pass
        except BaseException:  # a signal handler of the user's raised, between two calls or while it read
            if self._reading:
                self._worker.from_any_thread(link.abort)  # nobody knows what was received
            else:
                self._give_back(term)
            raise

    def _go_round(self, link: CallerLink, term: int) -> bool:
        """Read, run and answer once; False: this thread reads no longer."""
        worker, plain, calls = self._worker, self._worker.plain, self._calls
        self._reading = True
        with worker.lock:
            if term != self._term:
                self._reading = False
                return False
            if not (worker.draining or worker.admission.owes):
                calls.settle()
            frames = link.receive()
            taken, rest = self._admit(link, frames or [])
            if taken:
                calls.given()
        self._reading = False
        goes_on = frames is not None and not rest
        if not goes_on:
            self._give_back(term, rest)  # before user code runs
        if taken:
            self._rounds += 1
            if not self._looking:
                worker.from_any_thread(self._look_soon)
            calls.run(taken)
            if self._took > SLOW_S and goes_on:
                self._give_back(term, is_slow=True)
                return False
        if goes_on and len(frames or ()) < TOGETHER:
            self._wait(link, term)
        if goes_on and plain.is_wanted:
            self._give_back(term)
            return False
        return goes_on

    def _wait(self, link: CallerLink, term: int) -> None:
        """Free what the last answers held, then wait until there is something to read."""
        worker = self._worker
        self._reading = True
        with worker.lock:
            is_reader = term == self._term
            if is_reader and not (worker.draining or worker.admission.owes):
                self._calls.settle()
            fd = link.fileno()
        self._reading = False
        if is_reader:
            worker.plain.poll(fd)

    def _give_back(self, term: int, frames: Sequence[Frame] = (), *, is_slow: bool = False) -> None:
        self._worker.from_any_thread(self._returned, term, is_slow, list(frames))

    def _admit(self, link: CallerLink, frames: list[Frame]) -> tuple[deque[Job], list[Frame]]:
        """The ordinary calls that come first, and the other frames."""
        worker = self._worker
        taken: deque[Job] = deque()
        if worker.draining or worker.fenced:
            return taken, frames
        while frames:
            jobs = link.admit(frames)
            taken.extend(jobs)
            frames = frames[len(jobs) :]
            if not frames or frames[0][0] != framing.PING:
                break
            link.send_from_any_thread(_pack(0, framing.PONG, 0, 0, 0, frames[0][4]))
            frames = frames[1:]
        return taken, frames
