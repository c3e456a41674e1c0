"""Execute a supervisor before anything else is done or imported: it takes longest to get ready.

`strike` runs a fresh interpreter at once, which begins with its imports; what it is for, it hears
later, through a socket, from boot.py. Nothing of the driver's state, threads or `__main__` comes along.

An orphan is not the caller's child but adopted by init: what kills the caller's children misses it.
It has no file of the caller's but 0, 1 and 2 either, though foreign code may have opened some in such
a way that they outlive an exec, and whoever is at their other end would take the caller for alive.
This module imports what a bare interpreter has built in, and not `socket` and `signal`, which wrap it in enums:
so the supervisor is executed 11 ms earlier (CPU time of `python -c "import headgate.starting"`: 26 ms -> 15).
"""

from __future__ import annotations

import _socket
import os
import select
import sys

from headgate.errors import InstanceError

TYPE_CHECKING = False  # see headgate/__init__.py
if TYPE_CHECKING:
    import signal
    from typing import Any
else:
    import _signal as signal

#: In the environment of every process of an instance, so that leftovers can be found. Not a secret.
INSTANCE_VARIABLE = "HEADGATE_INSTANCE"
#: In the environment of what a replica executes: the replica's id.
REPLICA_VARIABLE = "HEADGATE_REPLICA"
#: How long a killed supervisor that is nobody's child may take to be gone.
_DYING_S = 2.0
_PID_BYTES = 4
_DEFAULTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD, signal.SIGQUIT)


class Spark:
    """A supervisor that waits to hear what it is for.

    pidfd   of an orphan, -1 for a child
    """

    def __init__(self, pid: int, sock: _socket.socket, instance: str, pidfd: int = -1) -> None:
        self.pid = pid
        self.instance = instance
        self._sock: _socket.socket | None = sock
        self._pidfd = pidfd

    def tell(self, record: bytes, fds: list[int]) -> None:
        """Say what it is for, once; `fds` go along."""
        from socket import send_fds

        assert self._sock is not None
        sock, self._sock = self._sock, None
        try:
            self._forget()
            send_fds(sock, [len(record).to_bytes(8, "little")], fds)  # type: ignore[arg-type]
            sock.sendall(record)
        except OSError as error:  # it ended before it could listen: a broken installation
            raise InstanceError(f"the supervisor ended at once ({error}); see its error above") from None
        finally:
            sock.close()

    def quench(self) -> None:
        """It is not needed: end it and wait for its end. Nothing happens once it was told."""
        if self._sock is None:
            return
        self._sock.close()
        self._sock = None
        try:
            if self._pidfd >= 0:
                _end(self._pidfd)
            else:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):  # somebody else's wait() took it
            pass
        finally:
            self._forget()

    def _forget(self) -> None:
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1


def strike(
    main: str = "headgate.processes:supervisor_main", instance: str | None = None, *, orphan: bool = False
) -> Spark:
    """Execute a supervisor.

    main       "module:function" of what to run there; it is called with the fd of the socket that it hears on
    instance   the id that all its processes carry; a new one by default
    orphan     it is to be no child of this process
    """
    if not sys.executable:
        raise InstanceError("this Python does not know its own executable (sys.executable is empty)")
    module, _, function = main.partition(":")
    instance = instance or os.urandom(4).hex()
    ours, theirs = _socket.socketpair()
    try:
        fd = theirs.fileno()
        # sys.path first: headgate itself may be importable only by way of the driver's. Whoever imports
        # a lot and keeps it all has nothing to collect; the supervisor turns collections on when it is done.
        start = f"import gc,sys;gc.disable();sys.path[:]={_sys_path()!a}"
        code = f"{start};from {module} import {function};{function}({fd})"
        if orphan:
            code = _LEAVE.format(fd=fd, size=_PID_BYTES) + code
        actions: list[Any] = [
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, fd, fd),  # to the same number: clears close-on-exec there only
        ]
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", code],
            {**_without_replica(), INSTANCE_VARIABLE: instance},
            file_actions=actions,
            setsid=True,  # Ctrl-C and a closed terminal reach the driver only
            setsigmask=(),
            setsigdef=_DEFAULTS,
        )
    finally:
        theirs.close()
    return _adopted(pid, ours, instance) if orphan else Spark(pid, ours, instance)


#: The first thing that the interpreter of an orphan does: it goes on as a child of itself, and says which.
_LEAVE = """import os
os.closerange(3, {fd})
os.closerange({fd} + 1, os.sysconf("SC_OPEN_MAX"))
if os.fork():
    os._exit(0)
os.setsid()
os.write({fd}, os.getpid().to_bytes({size}, "little"))
"""


def _adopted(pid: int, sock: _socket.socket, instance: str) -> Spark:
    """The spark of an orphan, which says which process it is; its parent `pid` ends at once."""
    try:
        said = sock.recv(_PID_BYTES)
        child = int.from_bytes(said, "little")
        try:
            os.waitpid(pid, 0)
        except ChildProcessError:  # somebody else's wait() took it
            pass
        if len(said) == _PID_BYTES:
            return Spark(child, sock, instance, os.pidfd_open(child))
    except ProcessLookupError:  # it is gone already
        pass
    except BaseException:
        sock.close()
        raise
    sock.close()
    raise InstanceError("the supervisor ended at once; see its error above")


def _end(pidfd: int) -> None:
    """Kill a process that is not our child, and wait for its end."""
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.poll(_DYING_S * 1000)


def _without_replica() -> dict[str, str]:
    """The environment; what a replica starts is an instance of its own and no part of the replica."""
    return {name: value for name, value in os.environ.items() if name != REPLICA_VARIABLE}


def _sys_path() -> list[str]:
    """This process's; "" is the working directory."""
    try:
        here = os.getcwd()
    except FileNotFoundError:  # it was deleted
        here = "/"
    return [os.path.join(here, entry) for entry in sys.path]
