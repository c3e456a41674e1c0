"""Slots that are reserved over a link while the arguments come, and the result goes, another way.

A caller reserves a slot as any other request takes one and is given a token. Whoever brings the
arguments claims the slot with it: from then on it is a job like any other, whose result is a Python
object in a future and not a frame. The link only hears that the slot is free again: END, or ERROR
for what was refused, cancelled or too late.

A reservation whose link has ended waits for its arguments a little longer, they may be under way; a
claim does not need the link at all. All of this is on the worker's loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
from collections import Counter
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

from headgate.core import framing
from headgate.errors import BackendError, HeadgateError, RequestCancelled, RequestError, RequestTimeout
from headgate.replica.job import Job, Outcome
from headgate.wire.payload import error_text

if TYPE_CHECKING:
    from headgate.replica.worker import Worker

#: How long an unclaimed reservation outlives its link.
RESERVATION_S = 10.0
#: How long an answer needs to leave the process after its consumer has it.
HANDOVER_S = 0.05

_pack = framing.HEADER.pack
_TOKEN_BYTES = 8
#: So many cancelled reservations are remembered for claims that are under way.
_MISSED = 1000


class ReservedJob(Job):
    """A request whose arguments and result are Python objects."""

    data: Any = None
    kwargs: dict[str, Any] | None = None
    token: int = 0
    _future: Future[Any] | None = None  # from its claim until it is answered

    def claimed(self, data: Any, kwargs: dict[str, Any] | None, future: Future[Any]) -> None:
        """Its arguments are here, and where its result goes."""
        self.data, self.kwargs, self._future = data, kwargs, future

    def _arguments(self, has_kwargs: bool) -> tuple[Any, dict[str, Any] | None]:
        return self.data, self.kwargs

    def on_cancel(self) -> None:
        """Answer now, whatever still runs."""
        self._answer(None, self.given_up())

    def value(self, result: Any) -> Outcome:
        return partial(self._end, result, None)

    def failure(self, error: BaseException, traceback_text: str, expose: bool) -> Outcome:
        return partial(self._end, None, raisable(error, traceback_text))

    def error(self, error: HeadgateError) -> Outcome:
        return partial(self._end, None, error, error)

    def given_up(self) -> HeadgateError:
        """The error of one that was cancelled."""
        if self.timed_out:
            return RequestTimeout("the request passed its deadline")
        return RequestCancelled("the caller cancelled the request")

    def _answer(self, result: Any, error: BaseException | None) -> None:
        future, self._future = self._future, None
        if future is None:
            return
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)

    def _end(self, result: Any, error: BaseException | None, refused: HeadgateError | None = None) -> None:
        self._answer(result, error)
        self.data = self.kwargs = None
        self.link.worker.reservations.ended(self)
        if self.cancelled:
            refused = self.given_up()
        end = _pack(0, framing.END, 0, 0, self.slot, 0)
        self.link.finish(self, end if refused is None else self.error_frame(refused))


class Reservations:
    """The reservations of one worker: who has a slot, who has claimed it, who has its answer.

    Each `claim` is followed by one `answered`, once its consumer is about to send the answer on.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._next_token = int.from_bytes(os.urandom(_TOKEN_BYTES))
        self._waiting: dict[int, ReservedJob] = {}
        self._claimed: dict[int, ReservedJob] = {}
        self._missed: dict[int, HeadgateError] = {}  # those cancelled last, and why
        self._consumers: Counter[int] = Counter()
        self._gone_at = 0.0  # when the last answer has surely left

    # --- for links ---

    def reserve(self, job: ReservedJob) -> None:
        """A slot was admitted: keep it, and tell its token."""
        job.token = token = self._next_token
        self._next_token = (token + 1) % (1 << 8 * _TOKEN_BYTES)
        self._waiting[token] = job
        head = _pack(_TOKEN_BYTES, framing.REPLY, framing.MORE, 0, job.slot, 200)
        job.link.send(head + token.to_bytes(_TOKEN_BYTES, "little"))

    def link_ended(self, job: ReservedJob) -> None:
        """Nobody is there any more to cancel it."""
        if job.token in self._waiting:
            self._loop.call_later(RESERVATION_S, self._expire, job)

    def _expire(self, job: ReservedJob) -> None:
        if self.withdraw(job):
            self._worker.finish(job, job.error(RequestCancelled("nobody claimed the reservation")))

    def withdraw(self, job: Job) -> bool:
        """Take back a reservation that nobody has claimed; False if it is none."""
        if not isinstance(job, ReservedJob) or self._waiting.pop(job.token, None) is None:
            return False
        if job.cancelled:
            self._missed[job.token] = job.given_up()
            if len(self._missed) > _MISSED:
                del self._missed[next(iter(self._missed))]
        return True

    # --- for whoever brings the arguments ---

    def claim(self, token: int, data: Any, kwargs: dict[str, Any] | None, future: Future[Any]) -> None:
        """The arguments for a reserved slot; `future` gets the result, the user's exception or a HeadgateError."""
        self._consumers[token] += 1
        job = self._waiting.pop(token, None)
        if job is None:
            future.set_exception(self._missed.pop(token, None) or RequestError("the reservation has expired"))
            return
        self._claimed[token] = job
        job.claimed(data, kwargs, future)
        self._worker.take(job)
        self._worker.read_done()

    def give_up(self, token: int) -> None:
        """Whoever claimed it does not wait any more."""
        job = self._claimed.get(token)
        if job is not None:
            self._worker.cancel(job)

    def answered(self, token: int) -> None:
        """The consumer of a claim's answer has it and sends it on now."""
        if self._consumers[token] > 1:
            self._consumers[token] -= 1
        elif self._consumers.pop(token, 0):
            self._gone_at = self._loop.time() + HANDOVER_S
            self._worker.check_drained()

    def ended(self, job: ReservedJob) -> None:
        """Nothing of it runs any more."""
        self._claimed.pop(job.token, None)

    # --- for a drain ---

    @property
    def has_consumers(self) -> bool:
        """Whether an answer is not on its way yet."""
        return bool(self._consumers)

    @property
    def is_handing_over(self) -> bool:
        """Whether the last answer may still be in this process."""
        return self._loop.time() < self._gone_at


def raisable(error: BaseException, traceback_text: str) -> Exception:
    """The exception itself; as a BackendError if it would mean "stop" to whoever awaits it."""
    cause = error.__cause__
    if isinstance(error, BackendError) and isinstance(cause, Exception) and type(cause) in type(error).__mro__:
        error = cause  # a call of another backend failed: its user's error, not our wrapping
    stops = StopIteration | StopAsyncIteration | concurrent.futures.CancelledError
    if isinstance(error, Exception) and not isinstance(error, stops):
        return error
    wrapped = BackendError(error_text(error))
    wrapped.told(traceback_text)
    return wrapped.with_traceback(error.__traceback__)
