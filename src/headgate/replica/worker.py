"""The replica's work: requests from all links to user code, and its results back.

    links.py → Worker.take → batches.py, plain_calls.py or async_calls.py → user code → outcome.py → links.py

The worker lives on the replica's loop, where links are read and `async def` handlers run; plain
handlers run on the plain thread (plain.py), which writes what plain_calls.py is to answer itself and
hands the rest back. Whatever user code raises, SystemExit included, fails its own requests only.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Set
from typing import TYPE_CHECKING, Any

from headgate.core import framing, lending, spares
from headgate.core.admission import Admission
from headgate.core.state import Settings
from headgate.errors import HeadgateError
from headgate.replica.async_calls import AsyncCalls
from headgate.replica.batches import Batches
from headgate.replica.callable import LoadedCallable
from headgate.replica.job import Job, Outcome
from headgate.replica.links import CallerLink
from headgate.replica.outcome import Outcomes
from headgate.replica.plain import PlainThread
from headgate.replica.plain_calls import PlainCalls
from headgate.replica.reservation import Reservations
from headgate.replica.watch import STUCK_EXIT
from headgate.wire.greeting import wire_name
from headgate.wire.segments import Store

if TYPE_CHECKING:
    from headgate.replica.wear import Wear

log = logging.getLogger("headgate.replica")

_ROOM = framing.HEADER.pack(0, framing.ROOM, 0, 0, 0, 1)
#: How often a drained replica looks whether its last answers have left it.
_FLUSH_S = 0.002


class Worker:
    """Runs a loaded callable for the requests of all links.

    expose       whether tracebacks go to HTTP clients
    on_drained   called once, when a draining replica has nothing left to do
    on_linked    called when the first link of a process opens (True) and when its last has ended, with its wire name
    """

    def __init__(
        self,
        loaded: LoadedCallable,
        settings: Settings,
        plain: PlainThread,
        *,
        expose: bool = False,
        on_drained: Callable[[], None] = lambda: None,
        on_linked: Callable[[str, bool], None] = lambda name, is_linked: None,
    ) -> None:
        #: Held by the loop while it changes what this worker and its links keep, and by the plain thread while it
        #: reads a link (lead.py).
        self.lock = threading.RLock()
        self.loaded = loaded
        self.settings = settings
        self.plain = plain
        self.admission: Admission[CallerLink] = Admission(settings.max_concurrent_queries)
        self.draining = False
        self.fenced: dict[str, int] = {}
        self._to_fence = self.fenced  # as the controller said last
        self.links: set[CallerLink] = set()
        self.running: object = None  # the Job or batch that the plain thread is in
        self.is_fork = False  # user code forked, and this is the copy
        self.served = 0
        self.last_request = 0  # after which `wear` is to look; 0: none
        self.wear: Wear | None = None
        self.outcomes = Outcomes(self, expose)
        self.reservations = Reservations(self)
        self.default = loaded.method() if loaded.is_callable else None  # the method that needs no name
        self._on_drained = on_drained
        self._on_linked = on_linked
        self._routers: Counter[str] = Counter()  # how many links each process has: one for each of its loops
        self.plain_calls = PlainCalls(self)
        self.async_calls = AsyncCalls(self)
        self._batches = Batches(self)
        self._tasks: set[asyncio.Task[None]] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._loop = asyncio.get_running_loop()
        self.segments = Store(self._later, self._loop.time)
        self.answers = Store(self._later, self._loop.time, lending.lends_answer, spares.MOST)
        self._drained_told = False
        plain.connect(self._wake, self.finish)

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

    def linked(self, link: CallerLink) -> None:
        """A link is about to open."""
        self.links.add(link)
        self._routers[link.name] += 1
        if self._routers[link.name] == 1:
            self._on_linked(link.name, True)

    def lost(self, link: CallerLink) -> None:
        """A link has ended."""
        if self.plain_calls.lead is not None:
            self.plain_calls.lead.forget(link)
        self.links.discard(link)
        self._routers[link.name] -= 1
        if not self._routers[link.name]:
            del self._routers[link.name]
            self._on_linked(link.name, False)
        with self.lock:
            self.tell_room(self.admission.forget(link))

    def freed(self, count: int = 1) -> None:
        """So many requests have ended: their slots go to whoever is next. Under the lock."""
        before = self.served
        self.served = served = before + count
        if before < self.last_request <= served and self.wear is not None:
            self.from_any_thread(self.wear.look)
        links = self.admission.free(count)
        if links:
            self.tell_room(links)
        if self.draining:
            self.check_drained()

    def end(self, jobs: list[Job]) -> None:
        """Free what requests that have their answers held. Under the lock."""
        self.freed(len(jobs))  # first: should a signal handler of the user's raise in here, no slot is lost
        for job in jobs:
            job.link.ended(job)

    # --- from request to user code ---

    def take(self, job: Job) -> None:
        """A whole request arrived."""
        method = self.default
        if job.flags & framing.HEAD or method is None:
            try:
                method = self.loaded.method(job.method_name)
            except HeadgateError as error:
                self.finish(job, job.error(error))
                return
        job.method = method
        self.begin([job])

    def begin(self, jobs: list[Job]) -> None:
        """Whole requests for one method arrived."""
        method = jobs[0].method
        if method.accepts_batch:
            self._batches.add(jobs)
        elif method.is_async:
            self.async_calls.add(jobs)
        else:
            self.plain_calls.add(jobs)

    def read_done(self) -> None:
        """Everything that one read brought has been taken."""
        if self.plain_calls.changed:
            self.plain_calls.pump()
        if self._batches.changed:
            self._batches.pump()
        if self.admission.owes:  # the thread does not know yet, perhaps, that slots are waited for
            self.settle()

    def settle(self) -> None:
        """Free what answered requests held; before others are admitted."""
        with self.lock:
            self.plain_calls.settle()

    def cancel(self, job: Job) -> None:
        """The caller does not wait any more: what has not started is dropped, async code is cancelled."""
        if job.cancelled:
            return
        job.cancelled = True
        job.on_cancel()
        if job.flow is not None:
            job.flow.cancel()
        elif job.task is not None:
            job.task.cancel()
        elif self._batches.remove(job) or self.reservations.withdraw(job):
            self.finish(job, job.refusal())
        elif job.timed_out:
            self._loop.call_later(self.settings.health_check_timeout_s, self._check_stuck, job)

    def _check_stuck(self, job: Job) -> None:
        running = self.running
        if running is job or (isinstance(running, list) and job in running):
            log.critical(
                "a plain handler has not returned %g s after its request's deadline; the replica ends and is replaced",
                self.settings.health_check_timeout_s,
                extra={"request_id": job.request_id},
            )
            os._exit(STUCK_EXIT)

    # --- on the loop ---

    def finish(self, job: Job | None, outcome: Outcome) -> None:
        """An outcome, on the loop."""
        if self.is_fork:
            os._exit(0)
        if type(outcome) is bytes:
            assert job is not None
            job.link.finish(job, outcome)
        else:
            assert callable(outcome)
            outcome()

    # --- the worker itself ---

    def start_task(self, coroutine: Any) -> asyncio.Task[None]:
        """Run a coroutine on the loop; a draining replica waits for it."""
        task: asyncio.Task[None] = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def start_background(self, coroutine: Any) -> None:
        """Run a coroutine on the loop that a draining replica does not wait for."""
        task = self._loop.create_task(coroutine)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if self.draining:
            self.check_drained()

    def _wake(self, function: Callable[[], None]) -> None:
        self._loop.call_soon_threadsafe(function)

    def from_any_thread(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call `function(*arguments)` on the loop."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed: the process ends
            pass

    def _later(self, seconds: float, function: Callable[[], object]) -> None:
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, function)

    def configure(self, settings: Settings) -> None:
        """Obey new limits from now on."""
        with self.lock:
            self.settings = settings
            self.tell_room(self.admission.set_limit(settings.max_concurrent_queries))
        if self.wear is not None:
            self.wear.configure(settings)
        self._batches.configure(settings)

    def forked(self) -> None:
        """This process is a copy that user code forked: it answers nobody, and ends where user code returns."""
        self.is_fork = True
        self.lock = threading.RLock()  # whoever holds the other is not in this process
        null = os.open(os.devnull, os.O_RDWR)
        for link in self.links:
            link.cut(null)
        os.close(null)
        self._loop.call_soon(os._exit, 0)  # user code that awaits does not come back

    def fence(self, peers: dict[str, int]) -> None:
        """Refuse calls of these processes until they follow the snapshot named. On any thread.

        Who is not named any more is let in a turn later: what it sent before it followed is read first, and refused.
        """
        with self.lock:
            self._to_fence = {wire_name(peer): version for peer, version in peers.items()}
            lifted = self.fenced.keys() - self._to_fence.keys()
            self.fenced = self.fenced | self._to_fence
        if lifted:
            self.from_any_thread(self._loop.call_soon, self._lift, lifted)

    def _lift(self, names: Set[str]) -> None:
        with self.lock:
            let_in = names - self._to_fence.keys()
            self.fenced = {name: version for name, version in self.fenced.items() if name not in let_in}

    def drain(self) -> None:
        """Take nothing new; on_drained is called when nothing is left."""
        with self.lock:
            self.draining = True
            self.settle()
        self.check_drained()

    def check_drained(self) -> None:
        """Something ended: call on_drained if that was the last of a draining replica."""
        if not self.draining or self._drained_told:
            return
        if self.admission.held or self._tasks or self.async_calls.is_busy or self.reservations.has_consumers:
            return
        # Whoever is drained may be killed at once.
        is_sent = not self.plain_calls.is_busy and not any(link.unsent for link in self.links)
        if self.reservations.is_handing_over or not is_sent:
            self._loop.call_later(_FLUSH_S, self.check_drained)
            return
        self._drained_told = True
        self._on_drained()
