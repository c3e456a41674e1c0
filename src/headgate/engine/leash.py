"""What ties the processes of an instance together in the kernel, so that none outlives it.

Two lines, because each has a hole. PR_SET_PDEATHSIG: the kernel kills the child when the
supervisor ends; but user code may clear it, and what the child forks does not inherit it. A pipe
whose write end only the supervisor holds, with O_ASYNC and SIGKILL as its signal: when the pipe
breaks the kernel kills the child's whole process group. Neither needs a thread of the child,
which could be waiting for the interpreter's lock under a long C call.

What user code starts in a session of its own is in neither. The supervisor adopts it when its parent
ends, and kills it when its replica is gone, as far as strays.py can tell whose it is, and all of it at
its own orderly end. If it is killed itself, its driver or the next start kills what carries the
instance's id in its environment; only what has cleared that goes on.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import select
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15
_PR_SET_CHILD_SUBREAPER = 36

_prctl = ctypes.CDLL(None, use_errno=True).prctl


def _control(option: int, value: int | bytes) -> None:
    argument = ctypes.c_char_p(value) if isinstance(value, bytes) else ctypes.c_ulong(value)
    if _prctl(option, argument, ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {os.strerror(number)}")


def set_title(title: str) -> None:
    """The process's name in ps and top; 15 bytes count."""
    _control(_PR_SET_NAME, title.encode())


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends, so that they can be found and killed."""
    _control(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Have the kernel kill this process when the thread that forked it ends."""
    _control(_PR_SET_PDEATHSIG, signal.SIGKILL)


def put_on(parent: int, pipe: int) -> None:
    """First act of a child of process `parent`: own process group, and death with the parent.

    pipe   the read end of a pipe whose write end `parent` alone will hold
    """
    os.setpgid(0, 0)
    die_with_parent()
    if os.getppid() != parent:  # it ended between the fork and the line above
        os._exit(1)
    # A new open file description: the owner and the signal belong to it, and each child needs its own.
    own = os.open(f"/proc/self/fd/{pipe}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    fcntl.fcntl(own, fcntl.F_SETOWN, -os.getpid())  # negative: the process group
    fcntl.fcntl(own, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(own, fcntl.F_SETFL, fcntl.fcntl(own, fcntl.F_GETFL) | os.O_ASYNC)
    watch = select.poll()
    watch.register(own, select.POLLIN)
    if watch.poll(0):  # it broke before anybody was told
        os._exit(1)


def kill_children_of(parent: int) -> None:
    """SIGKILL to every living child of process `parent`, whatever group it is in."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            if int(fields[1]) == parent:
                os.kill(int(name), signal.SIGKILL)
        except OSError:  # ended meanwhile
            continue
