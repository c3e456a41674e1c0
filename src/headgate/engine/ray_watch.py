"""A process's look at its instance's controller: is it gone for good, or does Ray make it anew?

A call of the controller that never returns fails when its actor is gone. Finding the actor asks the
cluster's head, which may be away: so that is done on a thread of its own, and nobody waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from headgate.engine import cluster

_AGAIN_S = 0.2  # how soon it asks again whether a controller that Ray cannot reach is gone for good


class ControllerWatch:
    """Calls `then()` on some thread once a controller is gone for good; never while it is only restarted."""

    def __init__(self, scope: str, then: Callable[[], None]) -> None:
        self._scope = scope
        self._then = then
        self._call: Any = None
        self._over = False
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Look at the controller from now on. Returns at once."""
        if not self._over and cluster.is_initialized():
            cluster.beside(cluster.find, self._scope, cluster.CONTROLLER).add_done_callback(self._found)

    def _found(self, answer: Future[Any]) -> None:
        if self._over:
            return
        if answer.exception() is not None:  # the head is away
            self._again()
        elif answer.result() is None:
            self._then()
        else:
            self._follow(answer.result())

    def _follow(self, controller: Any) -> None:
        with self._lock:
            if self._over:
                return
            self._call = controller.forever.remote()
        cluster.when_over(self._call, self._look)

    def _look(self, why: str, for_good: bool) -> None:
        if self._over:
            return
        if for_good:
            self._then()
        else:
            self._again()

    def _again(self) -> None:
        timer = threading.Timer(_AGAIN_S, self.begin)
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        """Stop looking."""
        with self._lock:
            self._over = True
        if self._call is not None:
            cluster.cancel(self._call)
