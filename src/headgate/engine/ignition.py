"""Execute a supervisor before anything else is done or imported: it takes longest to get ready.

`strike` runs a fresh interpreter at once, which begins with its imports; what it is for, it hears
later, through a socket, from boot.py. Nothing of the driver's state, threads or `__main__` comes along.
This module imports nothing that a bare interpreter has not imported soon anyway.
"""

from __future__ import annotations

import os
import signal
import socket
import sys

from headgate.errors import InstanceError

TYPE_CHECKING = False  # see headgate/__init__.py
if TYPE_CHECKING:
    from typing import Any

#: In the environment of every process of an instance, so that leftovers can be found. Not a secret.
INSTANCE_VARIABLE = "HEADGATE_INSTANCE"
_DEFAULTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT)


class Spark:
    """A supervisor that waits to hear what it is for."""

    def __init__(self, pid: int, sock: socket.socket, instance: str) -> None:
        self.pid = pid
        self.instance = instance
        self._sock: socket.socket | None = sock

    def tell(self, record: bytes, fds: list[int]) -> None:
        """Say what it is for, once; `fds` go along."""
        assert self._sock is not None
        with self._sock as sock:
            self._sock = None
            try:
                socket.send_fds(sock, [len(record).to_bytes(8, "little")], fds)
                sock.sendall(record)
            except OSError as error:  # it ended before it could listen: a broken installation
                raise InstanceError(f"the supervisor ended at once ({error}); see its error above") from None

    def quench(self) -> None:
        """It is not needed: end it and wait for its end. Nothing happens once it was told."""
        if self._sock is None:
            return
        self._sock.close()
        self._sock = None
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):  # somebody else's wait() took it
            pass


def strike(main: str = "headgate.processes:supervisor_main", instance: str | None = None) -> Spark:
    """Execute a supervisor.

    main       "module:function" of what to run there; it is called with the fd of the socket that it hears on
    instance   the id that all its processes carry; a new one by default
    """
    if not sys.executable:
        raise InstanceError("this Python does not know its own executable (sys.executable is empty)")
    module, _, function = main.partition(":")
    instance = instance or os.urandom(4).hex()
    ours, theirs = socket.socketpair()
    with theirs:
        fd = theirs.fileno()
        # sys.path first: headgate itself may be importable only by way of the driver's. Whoever imports
        # a lot and keeps it all has nothing to collect; the supervisor turns collections on when it is done.
        start = f"import gc,sys;gc.disable();sys.path[:]={_sys_path()!a}"
        code = f"{start};from {module} import {function};{function}({fd})"
        actions: list[Any] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, fd, fd),  # to the same number: clears close-on-exec there only
        ]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", code],
            {**os.environ, INSTANCE_VARIABLE: instance},
            file_actions=actions,
            setsid=True,  # Ctrl-C and a closed terminal reach the driver only
            setsigmask=(),
            setsigdef=_DEFAULTS,
        )
    return Spark(pid, ours, instance)


def _sys_path() -> list[str]:
    """This process's; "" is the working directory."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was deleted
        here = "/"
    return [os.path.join(here, entry) for entry in sys.path]
