"""What a supervisor and its children are told.

The supervisor was executed by ignition.py; what it has to know travels through a socket, with the
file descriptors it holds from then on, and not on the command line or in the environment, because
it includes the instance's token.
"""

from __future__ import annotations

import contextlib
import os
import socket
from typing import Any

import msgspec
from msgspec import Struct

from headgate.engine import directory
from headgate.engine.ignition import INSTANCE_VARIABLE, Spark, strike
from headgate.errors import HeadgateError
from headgate.wire.greeting import receive_fds

__all__ = ["INSTANCE_VARIABLE", "Boot", "ChildBoot", "read", "spawn", "tell"]

#: Where the processes of a detached instance write, in its run directory.
LOG = "headgate.log"


_FDS = ("lock_fd", "control_fd", "http_fd", "ready_fd", "tls_fd")


class Boot(Struct, frozen=True):
    """What the driver tells the supervisor; fds are numbers that are valid in the supervisor.

    control_fd, http_fd   listening sockets; -1 without one: no HTTP server, no controller on this node
    ready_fd              -1, or a pipe's end for the controller to write on; the supervisor only
                          holds it open, so that its other end reads empty when the instance is over
    tls_fd                -1, or memory in which the proxies keep the certificate in force (proxy/tls.py)
    watch_pid             on a node of a cluster: everything ends with this process; 0: with the driver, which is
                          the supervisor's parent, or with nobody if detached
    node                  "local", or the id of the node
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
    node: str = "local"
    watch_pid: int = 0
    tls_fd: int = -1

    def fds(self) -> list[int]:
        """The file descriptors that go along with the record."""
        return [getattr(self, name) for name in _FDS if getattr(self, name) >= 0]

    def with_fds(self, fds: list[int]) -> Boot:
        """The record with the numbers that its file descriptors have in this process."""
        names = [name for name in _FDS if getattr(self, name) >= 0]
        return msgspec.structs.replace(self, **dict(zip(names, fds, strict=True)))


class ChildBoot:
    """What the supervisor tells a child: who it is, and the sockets that its role may hold.

    ask                controller, agent: to the supervisor (engine/asks.py)
    memory_fd          controller: a file in memory that outlives it and ends with the supervisor
    control_listener   controller: where the others dial; an agent has none
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
        self.memory_fd = -1
        self.control_listener: socket.socket | None = None
        self.http_listener: socket.socket | None = None


def tls_memory(http: dict[str, Any]) -> int:
    """A new `tls_fd` for a supervisor with these HTTPOptions; -1 without HTTPS. The caller closes its own copy."""
    return os.memfd_create("headgate-tls") if http.get("ssl_certfile") else -1


def spawn(boot: Boot, main: str = "headgate.processes:supervisor_main") -> int:
    """Start the supervisor of an instance: its pid. The caller closes its own copies of the fds."""
    spark = strike(main, boot.instance)
    try:
        tell(spark, boot)
    except BaseException:
        spark.quench()
        raise
    return spark.pid


def tell(spark: Spark, boot: Boot) -> None:
    """Tell a supervisor that was executed already what it is for."""
    spark.tell(msgspec.msgpack.encode(boot), boot.fds())


def read(fd: int) -> Boot:
    """The boot record, in the supervisor; closes the fd. Exits if there comes none: it is not needed.

    A driver that was killed before it could say what it wants may have made the run directory already.
    """
    import headgate.wire.control  # noqa: F401 - beside the driver, which has yet to make up what it says

    with socket.socket(fileno=fd) as sock:
        size, fds, _ = receive_fds(sock, 8, len(_FDS), socket.MSG_WAITALL)
        expected = int.from_bytes(size, "little")
        record = sock.recv(expected, socket.MSG_WAITALL) if size else b""
    if not record or len(record) < expected:
        for inherited in fds:  # the lock among them
            os.close(inherited)
        with contextlib.suppress(OSError, HeadgateError):
            directory.sweep(directory.base())
        os._exit(0)
    boot = msgspec.msgpack.decode(record, type=Boot).with_fds(fds)
    if boot.detached:  # must not keep the terminal or pipe of whoever started it
        log = os.open(os.path.join(boot.directory, LOG), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
    return boot
