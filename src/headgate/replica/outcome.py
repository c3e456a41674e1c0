"""From what user code returned or raised to the outcome of its request.

An outcome is what `Worker.finish` takes: a final frame, or something to be done on the loop, for
answers that stream and for those that do not travel over the link. How a value or an error
becomes either is the Job's own; here is decided which of them it is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

from headgate.errors import HeadgateError, RequestCancelled
from headgate.replica.callable import user_traceback
from headgate.replica.job import VALUE
from headgate.replica.response import WHOLE, Asgi, Stream, encode, runs_on_loop
from headgate.replica.stream import GeneratorFlow, TaskFlow

if TYPE_CHECKING:
    from headgate.replica.job import Job, Outcome
    from headgate.replica.worker import Worker

log = logging.getLogger("headgate.replica")

#: As response.WHOLE, with status 200 and the code as they travel.
_WHOLE = {kind: (200 | code << 16, encoder) for kind, (code, encoder) in WHOLE.items()}


class Outcomes:
    """Makes the outcomes of a worker's requests, on whichever thread user code ran.

    expose    whether tracebacks go to HTTP clients
    """

    def __init__(self, worker: Worker, expose: bool) -> None:
        self._worker = worker
        self._expose = expose

    # --- of what was returned ---

    def of(self, job: Job, request: Any, result: Any) -> Outcome:
        """The outcome of a result."""
        if not job.flags & VALUE:
            whole = _WHOLE.get(type(result))
            if whole is not None:
                arg, encode_whole = whole
                return job.whole(arg, encode_whole(result))
        else:
            if type(result) in WHOLE:
                pass
            elif isinstance(result, Generator):
                result = list(result)
            elif isinstance(result, AsyncGenerator):
                return partial(self._start_collecting, job, result)
            return job.value(result)
        encoded = encode(result)
        if type(encoded) is tuple:
            return job.reply(encoded)
        if isinstance(encoded, Stream) and isinstance(encoded.items, Generator):
            return partial(GeneratorFlow, self._worker, job, encoded.items)
        assert isinstance(encoded, Stream | Asgi)
        return partial(self._start_flow, job, request, encoded)

    def of_item(self, job: Job, request: Any, result: Any) -> Outcome:
        """The outcome of one item of a batch's result."""
        try:
            if isinstance(result, Exception):
                return self.failure(job, result)
            return self.of(job, request, result)
        except BaseException as error:  # noqa: BLE001 - a generator or a model's encoder is user code
            return self.failure(job, error)

    async def of_async(self, job: Job, request: Any, result: Any) -> Outcome | None:
        """As `of`, in the request's own task; None once a streamed answer is complete."""
        if job.is_value and isinstance(result, AsyncGenerator):
            return job.value([item async for item in result])
        if not job.is_value and runs_on_loop(result):
            encoded = encode(result)
            if not isinstance(encoded, tuple):
                await self._run_flow(job, request, encoded)
                return None
        return self.of(job, request, result)

    # --- streams ---

    def _start_flow(self, job: Job, request: Any, encoded: Stream | Asgi) -> None:
        job.task = self._worker.start_task(self._run_flow_alone(job, request, encoded))

    async def _run_flow_alone(self, job: Job, request: Any, encoded: Stream | Asgi) -> None:
        try:
            await self._run_flow(job, request, encoded)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self._worker.finish(job, self.failure(job, error))

    async def _run_flow(self, job: Job, request: Any, encoded: Stream | Asgi) -> None:
        if job.cancelled:  # while the handler ran: nothing of an answer that may be endless is begun
            raise asyncio.CancelledError
        flow = TaskFlow(self._worker, job)
        try:
            if isinstance(encoded, Asgi):
                await flow.run_response(encoded.response, request)
            else:
                assert isinstance(encoded.items, AsyncGenerator)
                await flow.run_generator(encoded.items)
        except BaseException as error:
            if job.link.jobs.get(job.slot) is job:
                raise
            self.failure(job, error)  # logs it: a background task may raise after its request has been answered

    def _start_collecting(self, job: Job, items: AsyncGenerator[Any, Any]) -> None:
        job.task = self._worker.start_task(self._collect(job, items))

    async def _collect(self, job: Job, items: AsyncGenerator[Any, Any]) -> None:
        outcome: Outcome
        try:
            if job.cancelled:
                raise asyncio.CancelledError
            outcome = job.value([item async for item in items])
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            outcome = self.failure(job, error)
        self._worker.finish(job, outcome)

    # --- of what was raised ---

    def failure(self, job: Job, error: BaseException) -> Outcome:
        """The outcome of a request whose user code raised; logs the traceback, unless it was cancelled."""
        if isinstance(error, asyncio.CancelledError) and job.cancelled:
            return job.error(RequestCancelled("the caller had gone; the handler was cancelled"))
        return self.failures([job], error)[0]

    def failures(self, jobs: list[Job], error: BaseException) -> list[Outcome]:
        """The outcomes of the requests of one call that raised."""
        text = "" if isinstance(error, HeadgateError) and error.__traceback__ is None else user_traceback(error)
        ids = ",".join(job.request_id for job in jobs)
        log.error("user code raised\n%s", text or error, extra={"request_id": ids})
        return [job.failure(error, text, self._expose) for job in jobs]
