"""How a supervisor is started, and what it and its children are told.

`spawn` executes a fresh interpreter: nothing of the driver's state, threads or `__main__` comes
along. What it has to know travels in an anonymous file, not on the command line or in the
environment, because it holds the instance's token.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct

from headgate.errors import InstanceError

#: In the environment of every process of an instance, so that leftovers can be found. Not a secret.
INSTANCE_VARIABLE = "HEADGATE_INSTANCE"
#: Where the processes of a detached instance write, in its run directory.
LOG = "headgate.log"


class Boot(Struct, frozen=True):
    """What the driver tells the supervisor; fds are numbers that are valid in the supervisor.

    control_fd, http_fd   listening sockets; http_fd is -1 without an HTTP server
    ready_fd              -1, or a pipe's end for the controller to write on; the supervisor only
                          holds it open, so that its other end reads empty when the instance is over
    http                  fields of HTTPOptions without the middlewares, which cloudpickle packed
    """

    instance: str
    namespace: str
    directory: str
    token: bytes
    detached: bool
    driver_pid: int
    lock_fd: int
    control_fd: int
    http_fd: int = -1
    ready_fd: int = -1
    http: dict[str, Any] = {}
    middlewares: bytes = b""
    sys_path: list[str] = []
    cwd: str = "/"

    def fds(self) -> list[int]:
        """The file descriptors that the supervisor inherits."""
        return [fd for fd in (self.lock_fd, self.control_fd, self.http_fd, self.ready_fd) if fd >= 0]


class ChildBoot:
    """What the supervisor tells a child: who it is, and the sockets that its role may hold.

    ask                controller: to the supervisor (engine/asks.py)
    control_listener   controller: where the others dial
    http_listener      proxy: where clients connect
    incarnation        controller: 1, and one more with each restart
    """

    def __init__(self, boot: Boot, id: str, role: str, name: str, incarnation: int = 0) -> None:
        self.boot = boot
        self.id = id
        self.role = role
        self.name = name
        self.incarnation = incarnation
        self.ask: socket.socket | None = None
        self.control_listener: socket.socket | None = None
        self.http_listener: socket.socket | None = None


def spawn(boot: Boot, main: str = "headgate.processes:supervisor_main") -> int:
    """Start the supervisor of an instance: its pid. The caller closes its own copies of the fds.

    main   "module:function" of what to run there; it is called with the fd of the boot record
    """
    if not sys.executable:
        raise InstanceError("this Python does not know its own executable (sys.executable is empty)")
    record = os.memfd_create("headgate-boot", os.MFD_CLOEXEC)
    try:
        with open(record, "wb", closefd=False) as file:
            file.write(msgspec.msgpack.encode(boot))
        os.lseek(record, 0, os.SEEK_SET)
        return _execute(boot, record, main)
    finally:
        os.close(record)


def _execute(boot: Boot, record: int, main: str) -> int:
    module, _, function = main.partition(":")
    # sys.path first: headgate itself may be importable only by way of the driver's
    code = f"import sys;sys.path[:]={boot.sys_path!a};from {module} import {function};{function}({record})"
    # Dup to the same number clears close-on-exec in the new process only.
    inherit: list[Any] = [(os.POSIX_SPAWN_DUP2, fd, fd) for fd in (record, *boot.fds())]
    environment: Mapping[str, str] = {**os.environ, INSTANCE_VARIABLE: boot.instance}
    defaults: Sequence[int] = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT)
    return os.posix_spawn(
        sys.executable,
        [sys.executable, "-c", code],
        environment,
        file_actions=[*_standard_streams(boot), *inherit],
        setsid=True,  # Ctrl-C and a closed terminal reach the driver only
        setsigmask=(),
        setsigdef=defaults,
    )


def _standard_streams(boot: Boot) -> list[Any]:
    actions: list[Any] = [(os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0)]
    if boot.detached:  # must not keep the terminal or pipe of whoever started it
        log = os.path.join(boot.directory, LOG)
        actions.append((os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        actions.append((os.POSIX_SPAWN_DUP2, 1, 2))
    return actions


def read(fd: int) -> Boot:
    """The boot record that `spawn` passed; closes the fd."""
    with open(fd, "rb") as file:
        return msgspec.msgpack.decode(file.read(), type=Boot)
