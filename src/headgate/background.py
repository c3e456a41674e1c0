"""One thread for what must not run on an event loop because it may be code of the user's.

Values that are rebuilt to be passed on, call-backs of futures: neither may hold up the answers of
other calls. It starts with the first job, and takes the signals that the headgate thread does not.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

from headgate.signals import take_signals

log = logging.getLogger("headgate.handle")

_jobs: SimpleQueue[Callable[[], object]] = SimpleQueue()
_worker: threading.Thread | None = None
_worker_lock = threading.Lock()


def in_background(job: Callable[[], object]) -> None:
    """Run `job` on a thread that is nobody's loop: it may run code of the user's."""
    global _worker
    _jobs.put(job)
    if _worker is None or not _worker.is_alive():  # not alive: this process was forked
        with _worker_lock:
            if _worker is None or not _worker.is_alive():
                _worker = threading.Thread(target=_work, name="headgate-refs", daemon=True)
                _worker.start()


def _work() -> None:
    take_signals()
    while True:
        job = _jobs.get()
        try:
            job()
        except Exception:
            log.exception("a call-back raised")
        del job
