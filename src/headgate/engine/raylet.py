"""The raylet of this node, with which all that Ray has started here is to end.

Ray sees to that while the raylet ends in order. One that is killed leaves its workers behind: Ray holds them
for dead, and they go on. So each worker watches its raylet itself.
"""

from __future__ import annotations

import os
import select
import threading


def raylet_pid() -> int:
    """The process of Ray's on this node that started this worker."""
    return int(os.environ.get("RAY_RAYLET_PID") or os.getppid())


def end_with_raylet() -> None:
    """End this process when its node's raylet ends."""
    raylet = raylet_pid()
    try:
        fd = os.pidfd_open(raylet)
    except OSError:  # it has ended
        os._exit(1)
    if os.getppid() == 1 != raylet:  # so has it, and the pid may be another process's by now
        os._exit(1)

    def wait() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not poll.poll():
            pass
        os._exit(1)

    threading.Thread(target=wait, name="headgate-raylet", daemon=True).start()
