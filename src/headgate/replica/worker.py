"""The replica's work: requests from all links to user code, and its results back.

    links.py → Worker.take → core/batching.py or straight on → user code → Worker.finish → links.py

The worker lives on the replica's loop, where links are read and `async def` handlers run; plain
handlers run on the plain thread (plain.py), which hands frames that are ready to be written
back. Whatever user code raises, SystemExit included, fails its own requests only.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Generator
from functools import partial
from time import monotonic
from typing import Any

from headgate.core import framing
from headgate.core.admission import Admission
from headgate.core.batching import Batcher
from headgate.core.state import Settings
from headgate.errors import HeadgateError, RequestCancelled
from headgate.replica.callable import LoadedCallable, Method, user_traceback
from headgate.replica.job import Job
from headgate.replica.links import CallerLink
from headgate.replica.plain import PlainThread
from headgate.replica.response import Asgi, Stream, check_batch_result, encode, runs_on_loop
from headgate.replica.stream import BodyFlow, GeneratorFlow, TaskFlow
from headgate.replica.watch import STUCK_EXIT
from headgate.wire import payload
from headgate.wire.handshake import wire_name

log = logging.getLogger("headgate.replica")

#: The frame that ends a request, or what to do on the loop to begin a streamed answer.
Outcome = bytes | Callable[[], object]

_ROOM = framing.HEADER.pack(0, framing.ROOM, 0, 0, 0, 1)
#: How often a drained replica looks whether its last answers have left it.
_FLUSH_S = 0.002


class Worker:
    """Runs a loaded callable for the requests of all links.

    expose       whether tracebacks go to HTTP clients
    on_drained   called once, when a draining replica has nothing left to do
    """

    def __init__(
        self,
        loaded: LoadedCallable,
        settings: Settings,
        plain: PlainThread,
        *,
        expose: bool = False,
        on_drained: Callable[[], None] = lambda: None,
    ) -> None:
        self.loaded = loaded
        self.settings = settings
        self.plain = plain
        self.admission: Admission[CallerLink] = Admission(settings.max_concurrent_queries)
        self.draining = False
        self.fenced: dict[str, int] = {}
        self.links: set[CallerLink] = set()
        self._default = loaded.method() if loaded.is_callable else None
        self._expose = expose
        self._on_drained = on_drained
        self._plain_batches: Batcher[Job] = self._batcher()
        self._async_batches: Batcher[Job] = self._batcher()
        self._plain_busy = False
        self._batches_changed = False
        self._batch_timer: asyncio.TimerHandle | None = None
        self._running: object = None  # the Job or batch that the plain thread is in
        self._tasks: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self._drained_told = False
        self._is_fork = False
        plain.connect(self._run_plain, self._wake, self._finish)

    def _batcher(self) -> Batcher[Job]:
        return Batcher(self.settings.max_batch_size, self.settings.batch_wait_timeout_s)

    # --- admission, called by links ---

    def refuses(self, link: CallerLink) -> int | None:
        """None to go on; else 0 (draining), or the snapshot version that the link's process lacks.

        To be asked only while the worker is `draining` or somebody is `fenced`.
        """
        return 0 if self.draining else self.fenced.get(link.name)

    def tell_room(self, links: list[CallerLink]) -> None:
        """A slot is kept for each of `links`."""
        for link in links:
            link.send(_ROOM)

    def lost(self, link: CallerLink) -> None:
        """A link has ended."""
        self.links.discard(link)
        self.tell_room(self.admission.forget(link))

    def freed(self) -> None:
        """A request has ended: its slot goes to whoever is next."""
        link = self.admission.free()
        if link is not None:
            link.send(_ROOM)
        if self.draining:
            self._check_drained()

    # --- from request to user code ---

    def take(self, job: Job) -> None:
        """A whole request arrived."""
        method = self._default
        if job.flags & framing.HEAD or method is None:
            try:
                method = self.loaded.method(job.method_name)
            except HeadgateError as error:
                job.link.finish(job, job.error(error))
                return
        if method.accepts_batch:
            batches = self._async_batches if method.is_async else self._plain_batches
            batches.add(job, monotonic(), method.name)
            self._batches_changed = True
        elif method.is_async:
            job.task = self._loop.create_task(self._run_async(job, method))
        else:
            self.plain.put((job, method))

    def read_done(self) -> None:
        """Everything that one read brought has been taken."""
        if self._batches_changed:
            self._pump()

    def _pump(self) -> None:
        """Send off the batches that are due, and sleep until the next one is."""
        self._batches_changed = False
        now = monotonic()
        while batch := self._async_batches.take(now):
            self.start_task(self._run_async_batch(batch, self._method_of(batch)))
        if not self._plain_busy and (batch := self._plain_batches.take(now)):
            self._plain_busy = True
            self.plain.put(partial(self._run_plain_batch, batch, self._method_of(batch)))
        self._set_batch_timer(now)

    def _method_of(self, batch: list[Job]) -> Method:
        return self.loaded.method(batch[0].method_name)

    def _set_batch_timer(self, now: float) -> None:
        if self._batch_timer is not None:
            self._batch_timer.cancel()
            self._batch_timer = None
        due = [self._async_batches.next_deadline()]
        if not self._plain_busy:
            due.append(self._plain_batches.next_deadline())
        times = [at for at in due if at is not None]
        if times:
            self._batch_timer = self._loop.call_later(max(0.0, min(times) - now), self._pump)

    def cancel(self, job: Job) -> None:
        """The caller does not wait any more: what has not started is dropped, async code is cancelled."""
        if job.cancelled:
            return
        job.cancelled = True
        if job.flow is not None:
            job.flow.cancel()
        elif job.task is not None:
            job.task.cancel()
            if not _has_begun(job.task):  # then nothing of it will ever run
                job.link.finish(job, job.refusal() or b"")
        elif self._plain_batches.remove(job) or self._async_batches.remove(job):
            job.link.finish(job, job.refusal() or b"")
        elif job.timed_out:
            self._loop.call_later(self.settings.health_check_timeout_s, self._check_stuck, job)

    def _check_stuck(self, job: Job) -> None:
        running = self._running
        if running is job or (isinstance(running, list) and job in running):
            log.critical(
                "a plain handler has not returned %g s after its request's deadline; the replica ends and is replaced",
                self.settings.health_check_timeout_s,
                extra={"request_id": job.request_id},
            )
            os._exit(STUCK_EXIT)

    # --- on the plain thread ---

    def _run_plain(self, job: Job, method: Method) -> None:
        outcome: Outcome | None = job.refusal()
        if outcome is None:
            self._running = job
            request = None
            try:
                job.mark_started()  # decoding a handle's value runs user code already
                request = job.request(False)
                result = method.function(request) if method.takes_request else method.function()
                outcome = self._outcome(job, request, result)
                del result
            except BaseException as error:  # noqa: BLE001 - user code may raise anything
                outcome = self.failure(job, error)
            self._running = None
            if self._is_fork:
                os._exit(0)
        if type(outcome) is bytes and self._is_alone() and job.link.send_now(outcome):
            outcome = b""
        self.plain.done(job, outcome)

    def _is_alone(self) -> bool:
        """Nothing would be joined with this answer, and the router may use its slot before it is freed here."""
        return self.plain.idle and self.admission.held < self.settings.max_concurrent_queries

    def _run_plain_batch(self, batch: list[Job], method: Method) -> None:
        self._running = batch
        jobs, requests = self._start_batch(batch, self.plain.done, is_async=False)
        results: list[Any] = []
        problem: BaseException | None = None
        try:
            if jobs:
                results = check_batch_result(method.function(requests), len(jobs))
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            problem = error
        self._running = None
        if self._is_fork:
            os._exit(0)
        # A full batch may be taken while these answers are encoded; otherwise whoever they make ask
        # again shall have the time to come along.
        is_next_full = len(self._plain_batches) >= self.settings.max_batch_size
        if is_next_full:
            self.plain.done(None, self._plain_batch_done)
        if problem is not None:
            self._fail_batch(jobs, problem)
        else:
            for job, request, result in zip(jobs, requests, results, strict=True):
                self.plain.done(job, self._item(job, request, result))
        if not is_next_full:
            self.plain.done(None, self._plain_batch_done)

    def _start_batch(
        self, batch: list[Job], done: Callable[[Job, Outcome], None], *, is_async: bool
    ) -> tuple[list[Job], list[Any]]:
        """Those of a batch that are still wanted and can be decoded, and their requests; the rest is answered."""
        jobs, requests = [], []
        for job in batch:
            refusal = job.refusal()
            if refusal is not None:
                done(job, refusal)
                continue
            try:
                job.mark_started()
                requests.append(job.request(is_async))
            except BaseException as error:  # noqa: BLE001 - decoding a handle's value runs user code
                done(job, self.failure(job, error))
            else:
                jobs.append(job)
        return jobs, requests

    def _fail_batch(self, jobs: list[Job], error: BaseException) -> None:
        for job, frame in zip(jobs, self._failures(jobs, error), strict=True):
            self.plain.done(job, frame)

    def _plain_batch_done(self) -> None:
        self._plain_busy = False
        self._pump()

    # --- on the loop ---

    async def _run_async(self, job: Job, method: Method) -> None:
        outcome: Outcome | None = job.refusal()
        if outcome is None:
            try:
                job.mark_started()
                request = job.request(True)
                call = method.function(request) if method.takes_request else method.function()
                outcome = await self._outcome_async(job, request, await call)
            except BaseException as error:  # noqa: BLE001 - user code may raise anything
                outcome = self.failure(job, error)
        if outcome is not None:
            self._finish(job, outcome)

    async def _run_async_batch(self, batch: list[Job], method: Method) -> None:
        jobs, requests = self._start_batch(batch, self._finish, is_async=True)
        if not jobs:
            return
        try:
            results = check_batch_result(await method.function(requests), len(jobs))
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            for job, frame in zip(jobs, self._failures(jobs, error), strict=True):
                self._finish(job, frame)
            return
        for job, request, result in zip(jobs, requests, results, strict=True):
            self._finish(job, self._item(job, request, result))

    def _finish(self, job: Job | None, outcome: Outcome) -> None:
        """An outcome, on the loop."""
        if self._is_fork:
            os._exit(0)
        if type(outcome) is bytes:
            assert job is not None
            job.link.finish(job, outcome)
        else:
            assert callable(outcome)
            outcome()

    # --- from result to outcome ---

    def _outcome(self, job: Job, request: Any, result: Any) -> Outcome:
        """The outcome of a result, on whichever thread user code ran."""
        if job.is_value:
            return self._value(job, result)
        encoded = encode(result)
        if isinstance(encoded, Stream) and isinstance(encoded.items, Generator):
            return partial(GeneratorFlow, self, job, encoded.items)
        if isinstance(encoded, Stream | Asgi):
            return partial(self._start_flow, job, request, encoded)
        frame = job.reply(encoded)
        if frame is not None:
            return frame
        status, kind, block, body = encoded
        flags = framing.HEAD if block else 0
        return partial(BodyFlow, self, job, flags, status | kind << 16, block or b"", memoryview(body))

    def _value(self, job: Job, result: Any) -> Outcome:
        if isinstance(result, Generator):
            result = list(result)
        elif isinstance(result, AsyncGenerator):
            return partial(self._start_collecting, job, result)
        buffers = payload.encode(result)
        body = b"".join(buffers)
        if len(body) <= framing.BIG:
            return framing.HEADER.pack(len(body), framing.REPLY, framing.VALUE, 0, job.slot, 200) + body
        return partial(BodyFlow, self, job, framing.VALUE, 200, b"", memoryview(body))

    def _item(self, job: Job, request: Any, result: Any) -> Outcome:
        """The outcome of one item of a batch's result."""
        try:
            if isinstance(result, Exception):
                return self.failure(job, result)
            return self._outcome(job, request, result)
        except BaseException as error:  # noqa: BLE001 - a generator or a model's encoder is user code
            return self.failure(job, error)

    async def _outcome_async(self, job: Job, request: Any, result: Any) -> Outcome | None:
        """As `_outcome`, in the request's own task; None once a streamed answer is complete."""
        if job.is_value and isinstance(result, AsyncGenerator):
            return self._value(job, [item async for item in result])
        if not job.is_value and runs_on_loop(result):
            encoded = encode(result)
            if not isinstance(encoded, tuple):
                self._watch(job.task)
                await self._run_flow(job, request, encoded)
                return None
        return self._outcome(job, request, result)

    def _start_flow(self, job: Job, request: Any, encoded: Stream | Asgi) -> None:
        job.task = self.start_task(self._run_flow_alone(job, request, encoded))

    async def _run_flow_alone(self, job: Job, request: Any, encoded: Stream | Asgi) -> None:
        try:
            await self._run_flow(job, request, encoded)
        except BaseException as error:  # noqa: BLE001 - user code may raise anything
            self._finish(job, self.failure(job, error))

    async def _run_flow(self, job: Job, request: Any, encoded: Stream | Asgi) -> None:
        if job.cancelled:  # while the handler ran: nothing of an answer that may be endless is begun
            raise asyncio.CancelledError
        flow = TaskFlow(self, job)
        if isinstance(encoded, Asgi):
            await flow.run_response(encoded.response, request)
        else:
            assert isinstance(encoded.items, AsyncGenerator)
            await flow.run_generator(encoded.items)

    def _start_collecting(self, job: Job, items: AsyncGenerator[Any, Any]) -> None:
        async def collect() -> None:
            outcome: Outcome
            try:
                if job.cancelled:
                    raise asyncio.CancelledError
                outcome = self._value(job, [item async for item in items])
            except BaseException as error:  # noqa: BLE001 - user code may raise anything
                outcome = self.failure(job, error)
            self._finish(job, outcome)

        job.task = self.start_task(collect())

    def failure(self, job: Job, error: BaseException) -> bytes:
        """The final frame of a request whose user code raised; logs the traceback, unless it was cancelled."""
        if isinstance(error, asyncio.CancelledError) and job.cancelled:
            return job.error(RequestCancelled("the caller had gone; the handler was cancelled"))
        return self._failures([job], error)[0]

    def _failures(self, jobs: list[Job], error: BaseException) -> list[bytes]:
        text = "" if isinstance(error, HeadgateError) and error.__traceback__ is None else user_traceback(error)
        ids = ",".join(job.request_id for job in jobs)
        log.error("user code raised\n%s", text or error, extra={"request_id": ids})
        return [job.failure(error, text, self._expose) for job in jobs]

    # --- the worker itself ---

    def start_task(self, coroutine: Any) -> asyncio.Task[None]:
        """Run a coroutine on the loop; a draining replica waits for it."""
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._watch(task)
        return task

    def _watch(self, task: asyncio.Task[None] | None) -> None:
        """Have a draining replica wait for a task that may outlast its request."""
        if task is not None:
            self._tasks.add(task)
            task.add_done_callback(self._task_done)

    def start_background(self, coroutine: Any) -> None:
        """Run a coroutine on the loop that a draining replica does not wait for."""
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self.draining:
            self._check_drained()

    def _wake(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    def from_any_thread(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call `function(*arguments)` on the loop."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the process ends
            pass

    def configure(self, settings: Settings) -> None:
        """Obey new limits from now on."""
        self.settings = settings
        self._plain_batches.configure(settings.max_batch_size, settings.batch_wait_timeout_s)
        self._async_batches.configure(settings.max_batch_size, settings.batch_wait_timeout_s)
        self.tell_room(self.admission.set_limit(settings.max_concurrent_queries))
        self._pump()

    def forked(self) -> None:
        """This process is a copy that user code forked: it answers nobody, and ends where user code returns."""
        self._is_fork = True
        null = os.open(os.devnull, os.O_RDWR)
        for link in self.links:
            link.cut(null)
        os.close(null)
        self._loop.call_soon(os._exit, 0)  # user code that awaits does not come back

    def fence(self, peers: dict[str, int]) -> None:
        """Refuse calls of these processes until they follow the snapshot named."""
        self.fenced = {wire_name(peer): version for peer, version in peers.items()}

    def drain(self) -> None:
        """Take nothing new; on_drained is called when nothing is left."""
        self.draining = True
        self._check_drained()

    def _check_drained(self) -> None:
        if self._drained_told or self.admission.held or self._tasks:
            return
        if any(link.unsent for link in self.links):  # whoever is drained may be killed at once
            self._loop.call_later(_FLUSH_S, self._check_drained)
            return
        self._drained_told = True
        self._on_drained()


def _has_begun(task: asyncio.Task[None]) -> bool:
    """Whether a task has run its first step."""
    coroutine: Any = task.get_coro()
    return bool(coroutine.cr_suspended or coroutine.cr_running or coroutine.cr_frame is None)
