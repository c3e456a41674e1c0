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


def flush() -> None:
    """Write out what print() has gathered; a broken pipe is not worth a word."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
