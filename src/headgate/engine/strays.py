"""What user code started in a session of its own: found by its environment, ended with its instance or replica.

The kernel ends a child of the supervisor, and what is in its process group, with the supervisor
(leash.py). A process that has left its group, as a daemon does, is tied to nobody. It still carries
the id of its instance, and that of its replica, in the environment that it was executed with, and a
replica's mark among its limits, which forks inherit too (child.py). So it is ended by whoever sees the
end of what it belongs to:

    its replica ended           the supervisor, which has adopted it
    the instance ended          the supervisor, last of all
    the supervisor was killed   the driver that started it; the next start, if that driver is gone too

What has cleared its environment besides is ended by the supervisor only, by the mark. Nothing here
is imported before it is needed.
"""

from __future__ import annotations

import os
import signal
import time

from headgate.engine.ignition import INSTANCE_VARIABLE

#: How long killed processes may take to be gone.
_DYING_S = 1.0


def value_in(environment: bytes, name: str) -> str | None:
    """The value of a variable in the content of /proc/<pid>/environ; of two, the first, as getenv has it.

    >>> value_in(b"HOME=/root\\0HEADGATE_REPLICA=iris#0001\\0", "HEADGATE_REPLICA")
    'iris#0001'
    """
    wanted = os.fsencode(name) + b"="
    for entry in environment.split(b"\0"):
        if entry.startswith(wanted):
            return os.fsdecode(entry[len(wanted) :])
    return None


def variable_of(pid: int, name: str) -> str | None:
    """The variable in the environment that the process was executed with; None if it is not ours to see."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            return value_in(file.read(), name)
    except OSError:  # another user's, or gone
        return None


def kill_all_of(instance: str) -> None:
    """SIGKILL to every process of that instance but this one, until none is left.

    Only for an instance whose supervisor is gone: a living one ends its own.
    """
    give_up = time.monotonic() + _DYING_S
    while (found := _living(instance) - {os.getpid()}) and time.monotonic() < give_up:
        for pid in found:
            _kill(pid, instance)
        time.sleep(0.002)


def _living(instance: str) -> set[int]:
    """A zombie's environment is empty: it is gone already."""
    pids = (int(name) for name in os.listdir("/proc") if name.isdigit())
    return {pid for pid in pids if variable_of(pid, INSTANCE_VARIABLE) == instance}


def _kill(pid: int, instance: str) -> None:
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # gone
        return
    try:
        if variable_of(pid, INSTANCE_VARIABLE) == instance:  # still it, and not another with its number
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:  # gone, or another user's by now
        pass
    finally:
        os.close(pidfd)


def adopted(children: set[int]) -> set[int]:
    """The children of this thread that are not in `children`: what their own parents left behind."""
    try:
        with open("/proc/thread-self/children", encoding="ascii") as file:
            return {int(pid) for pid in file.read().split()} - children
    except OSError:  # a kernel without that file
        return set()
