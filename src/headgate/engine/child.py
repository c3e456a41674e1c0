"""A child's life between its fork from the supervisor and its end.

Rule: the child never returns into the supervisor's code. Whatever happens, it ends in os._exit.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
from collections.abc import Iterable
from typing import NoReturn

from headgate import logs
from headgate.engine import ignition, leash
from headgate.engine.boot import ChildBoot
from headgate.engine.roles import Role

#: RLIMIT_LOCKS, which bounds nothing since Linux 2.4.25 but is handed down as every limit is.
_UNUSED_LIMIT = 10
_UNUSED_LIMIT_NAME = b"Max file locks "


def run(
    child: ChildBoot, role: Role, parent: int, pipe: int, not_mine: Iterable[int], ask: socket.socket | None
) -> NoReturn:
    """Be that child from here on. Called in the fork, with all signals blocked.

    pipe       the read end of the supervisor's leash
    not_mine   the supervisor's file descriptors, which die with this process's copy
    """
    status = 1
    try:
        leash.put_on(parent, pipe)
        _hand_over(child, {pipe, *not_mine}, ask)
        _reset_signals(child.role)
        leash.set_title(role.title)
        logs.never_fail()
        gc.enable()
        if child.role == "replica":
            os.environ[ignition.REPLICA_VARIABLE] = child.id
            _bear(mark(parent, child.id))
            # Not the supervisor's, and without a file that multiprocessing would run again.
            sys.modules["__main__"] = type(sys)("__main__")
        module, _, function = role.target.partition(":")
        status = getattr(importlib.import_module(module), function)(child) or 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - the outermost frame of a process
        sys.excepthook(*sys.exc_info())
    finally:
        flush()
        os._exit(status & 0xFF)


def _hand_over(child: ChildBoot, not_mine: set[int], ask: socket.socket | None) -> None:
    """Wrap the sockets that the child's role may hold and close everything else."""
    signal.set_wakeup_fd(-1)
    boot = child.boot
    not_mine |= {boot.lock_fd, boot.control_fd, boot.ready_fd, boot.http_fd, boot.tls_fd}
    if child.role == "controller":
        child.ask = ask
        if boot.control_fd >= 0:  # an agent has none: it dials
            child.control_listener = socket.socket(fileno=boot.control_fd)
        not_mine -= {boot.control_fd, boot.ready_fd}
    elif child.role == "proxy" and boot.http_fd >= 0:
        child.http_listener = socket.socket(fileno=boot.http_fd)
        not_mine -= {boot.http_fd, boot.tls_fd}
    for fd in not_mine - {-1}:
        os.close(fd)


def _reset_signals(role: str) -> None:
    for number in (signal.SIGTERM, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    if role == "replica":  # user code may expect Python's own; the others ignore it like the supervisor
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def mark(supervisor: int, id: str) -> int:
    """What tells the descendants of a replica from all other processes.

    >>> mark(4711, "iris#0007") == 4711 << 32 | 7
    True
    """
    return supervisor << 32 | int(id.rpartition("#")[2])


def _bear(mark: int) -> None:
    """Mark this process and all its descendants.

    The environment that /proc shows is that of the last exec: a fork without one carries its supervisor's. A limit
    is handed down by fork and exec alike, and stays when a daemon leaves its session, closes all files, changes its
    title or clears its environment.
    """
    import resource  # which what a replica begins with has imported already

    with contextlib.suppress(OSError, ValueError):  # somebody has lowered even this one for good
        resource.setrlimit(_UNUSED_LIMIT, (mark, resource.getrlimit(_UNUSED_LIMIT)[1]))


def mark_on(pid: int) -> int | None:
    """The mark that a process bears; None if it bears none, or is gone."""
    try:
        with open(f"/proc/{pid}/limits", "rb") as file:
            limits = file.read()
    except OSError:
        return None
    _, _, values = limits.partition(_UNUSED_LIMIT_NAME)
    soft = values.split(maxsplit=1)[:1]
    return int(soft[0]) if soft and soft[0].isdigit() else None


def flush() -> None:
    """Write out what print() has gathered; a broken pipe is not worth a word."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
