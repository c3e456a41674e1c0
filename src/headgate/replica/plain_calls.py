"""Calls of plain handlers, one at a time: to the plain thread by the read, and their answers straight from there.

What one read of a link brought goes to the thread as one list. The thread writes the answers itself, those of
quick handlers several at a time, so that a busy replica's loop is not woken for answers. What a request held
(its slot, its job) is freed before the next call is admitted, or by the loop a moment later.

An answer is held back while the next calls of its list run, but only if all so far were quick. Should one be
slow then, the loop writes what was held back, within `TICK_S`.

Both sides look after they have written: the loop frees what is sent after it has told that a slot is owed or that
it drains, and the thread reads that after it has told what is sent. So one of them always sees the other.
"""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import Iterator
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING

from headgate.core import framing
from headgate.replica.job import NEVER
from headgate.replica.lead import Lead

if TYPE_CHECKING:
    from headgate.replica.job import Job, Outcome
    from headgate.replica.links import CallerLink
    from headgate.replica.worker import Worker

TICK_S = 0.001
_LONGEST_TICK_S = 16 * TICK_S
#: A handler that takes no longer is quick.
QUICK_S = 0.0002


class PlainCalls:
    """The calls of a worker's plain handlers that take one request each."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._taken: deque[Job] = deque()  # since the last `pump`
        self._unsent: deque[tuple[Job, bytes]] = deque()
        self._sent: deque[Job] = deque()  # not freed yet
        self._given = self._finished = 0  # lists: counted on the loop, and on the thread
        self._has_freed = False  # since the last tick
        self._tick_s = TICK_S
        self._ticking = False
        self._timer: asyncio.TimerHandle | None = None
        method = worker.default
        self.lead: Lead | None = None
        if method is not None and not (method.is_async or method.accepts_batch) and worker.plain.reads_links:
            self.lead = Lead(worker, self)

    # --- on the loop ---

    def add(self, jobs: list[Job]) -> None:
        """Calls for the next `pump`."""
        self._taken.extend(jobs)

    @property
    def changed(self) -> bool:
        """Whether `pump` has anything to do."""
        return bool(self._taken)

    @property
    def is_busy(self) -> bool:
        """Whether the thread may still have to make a call, or to write an answer."""
        return self._given != self._finished

    def pump(self) -> None:
        """Hand the thread what was added."""
        taken, self._taken = self._taken, deque()
        link = taken[0].link
        self.given()
        if len(taken) > 1 and not self._ticking:
            self._ticking = True
            self._set_timer()
        if self.lead is not None:
            self.lead.consider(link)
        self._give(taken)

    def given(self) -> None:
        """The thread has calls to make: `run` follows."""
        with self._worker.lock:  # who reads a link counts here too
            self._given += 1

    @property
    def _is_led(self) -> bool:
        """Whether the thread reads a link itself; then it settles itself, and lead.py looks instead of ticks."""
        return self.lead is not None and self.lead.link is not None

    def _give(self, calls: deque[Job]) -> None:
        self._worker.plain.put(partial(self.run, calls))

    def settle(self) -> None:
        """Free what answered requests held; under the worker's lock."""
        sent = self._sent
        if sent:
            self._worker.end([sent.popleft() for _ in range(len(sent))])
            self._has_freed = True

    def _tick(self) -> None:
        """While answers come: free what they held, and write those that were held back."""
        was_busy = self.is_busy  # looked at first: if it was not, all that is to be freed is there
        self.answer()
        self._worker.settle()
        if self._is_led or not (self._has_freed or was_busy):
            self._ticking = False
            self._tick_s = TICK_S
            return
        self._tick_s = TICK_S if self._has_freed else min(2 * self._tick_s, _LONGEST_TICK_S)
        self._has_freed = False
        self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_later(self._tick_s, self._tick)

    # --- on the plain thread ---

    def run(self, calls: deque[Job]) -> None:
        """Make the calls of one read and answer them; says how long they took to whoever may lend the link."""
        began = monotonic()
        try:
            for _ in self.steps(calls):
                pass
        except BaseException:  # a signal handler of the user's raised between two calls: the others are made
            self._worker.plain.put(partial(self.run, calls))
            raise
        if self.lead is not None:
            self.lead.have_run(monotonic() - began)

    def steps(self, calls: deque[Job]) -> Iterator[None]:
        """Make the calls and answer them; pauses between what a call does and its answer."""
        is_quick = True
        before = monotonic()
        while calls:
            job = calls.popleft()
            outcome = self._outcome(job, before)
            yield
            if type(outcome) is bytes:
                self._unsent.append((job, outcome))
            else:
                self._worker.plain.done(job, outcome)
            now = monotonic()
            is_quick = is_quick and now - before <= QUICK_S
            before = now
            if not is_quick or self._tick_s > TICK_S:  # the next tick may be far
                self._answer()
        self._answer()
        self._finished += 1

    def _outcome(self, job: Job, now: float) -> Outcome:
        if job.cancelled or job.deadline < now:
            return job.refusal()
        worker, method = self._worker, job.method
        worker.running = job
        try:
            request = job.begin(False)
            result = method.function(request) if method.takes_request else method.function()
            outcome = worker.outcomes.of(job, request, result)
            del request, result
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            outcome = worker.outcomes.failure(job, error)
        worker.running = None
        if worker.is_fork:
            os._exit(0)
        return outcome

    # --- on either ---

    def answer(self) -> None:
        """Write the answers that were held back."""
        if self._unsent:
            self._answer()

    def _answer(self) -> None:
        """Write the answers that are there, those of one link together."""
        worker, unsent, sent = self._worker, self._unsent, self._sent
        frames: list[bytes] = []
        link: CallerLink | None = None
        flags = 0
        while unsent:
            try:
                job, frame = unsent.popleft()
            except IndexError:  # the other thread took it
                break
            if job.link is not link:
                if link is not None:
                    link.send_from_any_thread(b"".join(frames))
                    frames.clear()
                link = job.link
            frames.append(frame)
            flags |= job.flags
            if job.deadline is not NEVER:
                job.deadline = NEVER  # is met: watch.py looks at it until the job is freed
            sent.append(job)  # before it is: the router may use its slot as soon as it has the answer
        if link is not None:
            link.send_from_any_thread(b"".join(frames))
        if not sent:
            return
        if flags & framing.ARENA or worker.draining or worker.admission.owes:
            worker.from_any_thread(worker.settle)
        elif not (self._ticking or self._is_led):
            self._ticking = True
            worker.from_any_thread(self._tick)
