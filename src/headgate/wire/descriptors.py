"""Whether this process may open more file descriptors, asked before it has none left.

A listening socket that is watched while no connection can be taken from it wakes its process up
without end. So whoever accepts asks first, and looks again later; who comes waits in the socket's
queue meanwhile, and is neither refused nor reset.
"""

from __future__ import annotations

import logging
import os
import resource
import time

#: So many are left to links, files and whatever else goes on, or an eighth of all if that is less.
RESERVE = 32
#: How long whoever found none waits before looking again.
LOOK_AGAIN_S = 0.1
_SAY_AGAIN_S = 60.0


def are_left(fd: int) -> bool:
    """Whether more than the reserve can still be opened. `fd` is any that is open.

    The kernel hands out the lowest number that is free: at least that many are open.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return True
    try:
        lowest = os.dup(fd)
    except OSError:
        return False
    os.close(lowest)
    return limit - lowest > min(RESERVE, limit // 8)


def raise_limit() -> None:
    """Allow this process as many as it may allow itself."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # then it is what it was
        pass


class Shortage:
    """Says in the log that there are none left, once in a while."""

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._said_at = float("-inf")

    def say(self) -> None:
        """It is so now."""
        now = time.monotonic()
        if now - self._said_at >= _SAY_AGAIN_S:
            self._said_at = now
            limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            self._log.error(
                "nearly all of the %d files that this process may have open are open: %s wait until some are "
                "closed; raise the limit (ulimit -n)", limit, self._what,
            )  # fmt: skip
