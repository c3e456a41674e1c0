"""How worn this replica is: the requests that it has served, and its memory.

Requests are counted on the worker's loop and compared with one number. Memory is looked at once a
second, from the headgate thread: however busy user code is, and without a system call per request.
What counts as worn out is core/recycling.py; `tell` gets the reason, once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import Callable
from typing import TYPE_CHECKING

from headgate.core import recycling

if TYPE_CHECKING:
    from headgate.core.state import Settings
    from headgate.replica.worker import Worker

log = logging.getLogger("headgate.replica")

PERIOD_S = 1.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def rss_bytes() -> int:
    """The resident memory of this process."""
    with open("/proc/self/statm", "rb") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


class Wear:
    """Watches `worker` from `start` on.

    spread   in [0, 1): how much later than others this one has had enough
    """

    def __init__(
        self,
        worker: Worker,
        tell: Callable[[str], None],
        *,
        spread: float | None = None,
        rss: Callable[[], int] = rss_bytes,
    ) -> None:
        self._worker = worker
        self._tell = tell
        self._spread = random.random() if spread is None else spread
        self._rss = rss
        self._first_rss = 0  # when it started: before the first request
        self._warned_of: int | None = None
        self._is_told = False
        self._looking: asyncio.AbstractEventLoop

    def start(self, looking: asyncio.AbstractEventLoop) -> None:
        """Look from now on: with each last request, and at memory on the loop `looking` of another thread.

        What it takes now is what it takes before its first request. May tell at once.
        """
        self._first_rss = self._rss()
        self._looking = looking
        self._worker.wear = self
        self.configure(self._worker.settings)
        looking.call_soon_threadsafe(self._look_again)

    def configure(self, settings: Settings) -> None:
        """New limits."""
        self._worker.last_request = recycling.last_request(settings.max_requests, self._spread)
        if recycling.is_too_low(settings, self._first_rss) and self._warned_of != settings.max_rss_bytes:
            self._warned_of = settings.max_rss_bytes
            log.warning(
                "max_rss_bytes = %d is less than the %d bytes that a replica takes before its first request; "
                "it is ignored, since a new one would be no better",
                settings.max_rss_bytes, self._first_rss,
            )  # fmt: skip
        self.look()

    def look(self) -> None:
        """Tell if this replica is worn out. On any thread."""
        settings = self._worker.settings
        if self._is_told or (settings.max_requests is None and settings.max_rss_bytes is None):
            return
        rss = self._rss() if settings.max_rss_bytes is not None else 0
        reason = recycling.worn(settings, self._worker.served, rss, self._first_rss, self._spread)
        if reason:
            self._is_told = True
            self._tell(reason)

    def _look_again(self) -> None:
        self.look()
        self._looking.call_later(PERIOD_S, self._look_again)
