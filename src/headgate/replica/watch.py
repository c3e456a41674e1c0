"""Whether the replica's loop still turns, seen from the headgate thread.

An async handler that blocks holds up every other request of its replica, and nothing on the loop
can tell. A loop that does not turn for a second is logged, with the line that it is in. Slow is
not dead: only when a request is health_check_timeout_s past its deadline, and the loop has not
turned for as long, does the process end, to be replaced.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import traceback
from time import monotonic
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headgate.replica.worker import Worker

log = logging.getLogger("headgate.replica")

PERIOD_S = 0.5
LAG_S = 1.0
STUCK_EXIT = 70


class LoopWatch:
    """Watches the loop on which it is made; `start` names the loop that looks."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
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
