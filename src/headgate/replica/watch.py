"""Whether the replica's loop still turns and its check_health returns, seen from the headgate thread.

An async handler that blocks holds up every other request of its replica, and nothing on the loop
can tell. A loop that does not turn for a second is logged, with the line that it is in. Slow is
not dead: only when a request is health_check_timeout_s past its deadline, and the loop has not
turned for as long, does the process end, to be replaced.

A check_health is timed from when it begins, not while it queues behind calls. One that does not return
within health_check_timeout_s is told to the controller, which replaces the replica.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headgate.replica.worker import Worker

log = logging.getLogger("headgate.replica")

PERIOD_S = 0.5
LAG_S = 1.0
STUCK_EXIT = 70


class LoopWatch:
    """Watches the loop on which it is made, and `health`; `start` names the loop that looks."""

    def __init__(self, worker: Worker, health: HealthWatch) -> None:
        self._worker = worker
        self._health = health
        self._thread = threading.get_ident()
        self._asked_at: float | None = None  # when the loop was asked to turn; None: it has
        self._looked_at = monotonic()
        self._is_told = False
        self._looking: asyncio.AbstractEventLoop

    def start(self, looking: asyncio.AbstractEventLoop) -> None:
        """Look from now on, on the loop `looking` of another thread."""
        self._looking = looking
        looking.call_soon_threadsafe(self._look)

    def _turned(self) -> None:
        self._asked_at = None
        self._is_told = False

    def _look(self) -> None:
        now = monotonic()
        was_away = now - self._looked_at > 2 * PERIOD_S  # the whole process was stopped, or starved
        self._looked_at = now
        self._health.look(now, was_held_up=self._asked_at is not None, was_away=was_away)
        if self._asked_at is None:
            self._asked_at = now
            self._worker.from_any_thread(self._turned)
        elif was_away:
            self._asked_at = now
        else:
            self._judge(now, now - self._asked_at)
        self._looking.call_later(PERIOD_S, self._look)

    def _judge(self, now: float, held_up_s: float) -> None:
        if held_up_s < LAG_S:
            return
        if not self._is_told:
            self._is_told = True
            frame = sys._current_frames().get(self._thread)
            lines = "".join(traceback.format_stack(frame)[-5:])
            log.warning("the event loop has not turned for %.1f s; await what takes long\n%s", held_up_s, lines)
        patience_s = self._worker.settings.health_check_timeout_s
        if held_up_s >= patience_s and self._is_overdue(now - patience_s):
            log.critical("a handler blocks the event loop long after its request's deadline; the replica is replaced")
            os._exit(STUCK_EXIT)

    def _is_overdue(self, since: float) -> bool:
        try:
            return any(job.deadline < since for link in self._worker.links for job in link.jobs.values())
        except RuntimeError:  # changed while we looked: then the loop turns
            return False


class _Check:
    """One check_health on its way. Its own time: what passed while it could not run is not its fault."""

    def __init__(self, is_inside: Callable[[], bool]) -> None:
        self.is_inside = is_inside
        self.since = monotonic()
        self.looked_at = self.since


class HealthWatch:
    """Notices a check_health that does not return; `say` gets the text, and again after as long.

    `running` surrounds the hook where it runs, `look` comes from another thread.
    """

    def __init__(self, worker: Worker, say: Callable[[str], None]) -> None:
        self._worker = worker
        self._say = say
        self._check: _Check | None = None

    @contextlib.contextmanager
    def running(self, is_inside: Callable[[], bool]) -> Iterator[None]:
        """A hook runs. `is_inside` says whether its thread is in it at this moment, and not elsewhere."""
        self._check = _Check(is_inside)
        try:
            yield
        finally:
            self._check = None

    def look(self, now: float, *, was_held_up: bool, was_away: bool) -> None:
        """Time has passed: did the loop not turn meanwhile, and was the whole process away?"""
        check = self._check
        if check is None:
            return
        passed, check.looked_at = now - check.looked_at, now
        if was_away or (was_held_up and not check.is_inside()):
            check.since += passed
            return
        patience_s = self._worker.settings.health_check_timeout_s
        if now - check.since >= patience_s:
            check.since = now
            text = f"check_health did not return in {patience_s:g} s"
            log.warning("%s; the replica is replaced", text)
            self._say(text)
