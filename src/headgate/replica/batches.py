"""Batched requests of one worker: gathered, sent to user code when due, and their results shared out.

core/batching.py says which batch is due when. Plain handlers get one batch at a time, on the
plain thread, where the next one may wait already if it is full; async ones may have several under way.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import TYPE_CHECKING, Any

from headgate.core.batching import Batcher
from headgate.replica.callable import Method
from headgate.replica.job import Job, Outcome
from headgate.replica.response import check_batch_result

if TYPE_CHECKING:
    from headgate.core.state import Settings
    from headgate.replica.worker import Worker


class Batches:
    """The requests that wait to be batched, and the batches that run.

    changed    something was added since the last `pump`
    """

    def __init__(self, worker: Worker) -> None:
        self.changed = False
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        limits = worker.settings.max_batch_size, worker.settings.batch_wait_timeout_s
        self._plain: Batcher[Job] = Batcher(*limits)
        self._async: Batcher[Job] = Batcher(*limits)
        self._plain_given = 0  # batches that the plain thread has: one that runs, and a full one behind it
        self._timer: asyncio.TimerHandle | None = None

    def configure(self, settings: Settings) -> None:
        """Obey new limits from now on."""
        self._plain.configure(settings.max_batch_size, settings.batch_wait_timeout_s)
        self._async.configure(settings.max_batch_size, settings.batch_wait_timeout_s)
        self.pump()

    # --- waiting ---

    def add(self, jobs: list[Job]) -> None:
        """Requests for one method; `pump` follows once all that came with them are added."""
        method, now = jobs[0].method, monotonic()
        batches = self._async if method.is_async else self._plain
        for job in jobs:
            batches.add(job, now, method.name)
        self.changed = True

    def remove(self, job: Job) -> bool:
        """Take out one that waits; False if it does not, or no longer."""
        return self._plain.remove(job) or self._async.remove(job)

    def pump(self) -> None:
        """Send off the batches that are due, and sleep until the next one is."""
        self.changed = False
        now = monotonic()
        while batch := self._async.take(now):
            self._worker.start_task(self._run_async(batch, batch[0].method))
        if not self._plain_given:
            self._give_plain(self._plain.take(now))
        if self._plain_given == 1:
            self._give_plain(self._plain.take_full())
        self._set_timer(now)

    def _give_plain(self, batch: list[Job]) -> None:
        if batch:
            self._plain_given += 1
            self._worker.plain.put(partial(self._run_plain, batch, batch[0].method))

    def _set_timer(self, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = [self._async.next_deadline()]
        if not self._plain_given:
            due.append(self._plain.next_deadline())
        times = [at for at in due if at is not None]
        if times:
            self._timer = self._loop.call_later(max(0.0, min(times) - now), self.pump)

    # --- running ---

    def _start(
        self, batch: list[Job], done: Callable[[Job, Outcome], None], *, is_async: bool
    ) -> tuple[list[Job], list[Any]]:
        """Those of a batch that are still wanted and can be decoded, and their requests; the rest is answered."""
        jobs, requests = [], []
        now = monotonic()
        for job in batch:
            if job.cancelled or job.deadline < now:
                done(job, job.refusal())
                continue
            try:
                requests.append(job.begin(is_async))
            except BaseException as error:  # noqa: BLE001 - decoding a handle's value runs user code
                done(job, self._worker.outcomes.failure(job, error))
            else:
                jobs.append(job)
        return jobs, requests

    def _run_plain(self, batch: list[Job], method: Method) -> None:  # on the plain thread
        worker, done = self._worker, self._worker.plain.done
        worker.running = batch
        jobs, requests = self._start(batch, done, is_async=False)
        results: list[Any] = []
        problem: BaseException | None = None
        try:
            if jobs:
                results = check_batch_result(method.function(requests), len(jobs))
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            problem = error
        worker.running = None
        if worker.is_fork:
            os._exit(0)
        if problem is not None:
            self._fail(jobs, problem, done)
        else:
            of = worker.outcomes.of_item
            outcomes = [of(*one) for one in zip(jobs, requests, results, strict=True)]
            for job, outcome in zip(jobs, outcomes, strict=True):  # together: the first one wakes the loop
                done(job, outcome)
        done(None, self._plain_done)

    def _plain_done(self) -> None:
        self._plain_given -= 1
        self.pump()

    async def _run_async(self, batch: list[Job], method: Method) -> None:
        worker = self._worker
        jobs, requests = self._start(batch, worker.finish, is_async=True)
        if not jobs:
            return
        try:
            results = check_batch_result(await method.function(requests), len(jobs))
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self._fail(jobs, error, worker.finish)
            return
        for job, request, result in zip(jobs, requests, results, strict=True):
            worker.finish(job, worker.outcomes.of_item(job, request, result))

    def _fail(self, jobs: list[Job], error: BaseException, done: Callable[[Job, Outcome], None]) -> None:
        for job, outcome in zip(jobs, self._worker.outcomes.failures(jobs, error), strict=True):
            done(job, outcome)
