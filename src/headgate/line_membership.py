"""A membership that makes calls only, without an event loop: of a script that started an instance and has no handle.

One thread holds the connection and whoever calls blocks: wire/line.py. What needs a loop is loop_membership.py's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from headgate.wire import messages
from headgate.wire.line import Line


class LineMembership:
    """A line to the controller that listens at `path`, as long as this process is a member.

    me        the first message of each connection
    on_gone   called once, on the line's thread, when the instance is over; it must not hold the Instance
    """

    def __init__(self, path: str, token: bytes, me: messages.Hello, on_gone: Callable[[], object]) -> None:
        self._line = Line(path, token, me, on_gone)
        self._pid = me.pid

    def begin(self) -> None:
        """Start the thread, which begins to connect."""
        self._line.start()

    def join(self, timeout_s: float | None) -> None:
        """Returns once it is connected. Raises InstanceError if nobody listens, and TimeoutError; then it was left."""
        try:
            self._line.wait_connected(timeout_s)
        except BaseException:
            self._line.close()
            raise

    def call(self, method: str, params: dict[str, Any], timeout_s: float | None) -> Any:
        """A call of the controller, from any thread but the line's own. Raises as Instance.call."""
        return self._line.call(method, params, timeout_s)

    def leave(self) -> None:
        """End the connection and the thread; the instance goes on. Idempotent."""
        if self._pid == os.getpid():  # a fork has none of these threads
            self._line.close()
