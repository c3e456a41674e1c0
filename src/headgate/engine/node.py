"""One node of a cluster: the supervisor there, which holds the listener and forks the proxy.

It is the supervisor of the local engine with an agent (agent.py) in the controller's place. It lives
as long as the node's raylet and the instance do, whatever becomes of the Ray actor that started it: so
the actor may be killed, and Ray starts another, which finds the supervisor at work.

What those on the node that are no part of Ray need to know, the address of the controller, stands in
the run directory (wire/home.py's FileHome).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from typing import TYPE_CHECKING

from headgate.engine import boot, directory, ignition, listener
from headgate.errors import InstanceError
from headgate.wire import home

if TYPE_CHECKING:
    import socket

    from headgate.engine.ray_records import Meeting, Origin

_MAIN = "headgate.processes:agent_supervisor_main"
#: How long a supervisor may take to end once it was told.
_END_S = 3.0
_LOOK_S = 0.02


class Node:
    """The supervisor of one instance on this node. Any thread may call; one does its work at a time.

    node      id of this node
    address   of this node in the cluster
    """

    def __init__(self, origin: Origin, node: str, address: str) -> None:
        self._origin = origin
        self._node = node
        self._address = address
        name = hashlib.sha256(f"{origin.scope}/{node}".encode()).hexdigest()[:8]
        self._path = os.path.join(directory.base(), name)
        self._follows = False
        self._turn = threading.RLock()

    @property
    def runs(self) -> bool:
        """Whether the supervisor lives."""
        return directory.is_alive(self._path)

    def open(self, port: int, meeting: Meeting, raylet: int) -> str:
        """Bind the listener and start the supervisor, unless it runs: the URL of the proxy to be.

        raylet   pid of the process with which everything on this node ends

        Raises InstanceError that names host:port, and leaves nothing then.
        """
        with self._turn:
            if not self.runs:
                self._start(port, meeting, raylet)
            self.follow(meeting)
            found = directory.read_address(self._path)
        assert found is not None
        return found

    def follow(self, meeting: Meeting) -> None:
        """The controller listens there from now on."""
        with self._turn:
            if self.runs:
                home.write_controller(self._path, meeting.unix, meeting.tcp, meeting.node)
                self._follows = True

    def catch_up(self, meeting: Meeting) -> None:
        """As `follow`, with what was stored; what somebody said meanwhile is newer."""
        with self._turn:
            if not self._follows:
                self.follow(meeting)

    def end(self) -> None:
        """End the supervisor and all its processes; returns when they are gone."""
        with self._turn:
            if self.runs:
                home.write_controller(self._path, "", "", "")
                give_up = time.monotonic() + _END_S
                while self.runs and time.monotonic() < give_up:
                    time.sleep(_LOOK_S)
        directory.sweep(os.path.dirname(self._path))

    def _start(self, port: int, meeting: Meeting, raylet: int) -> None:
        options = self._origin.http
        scheme = "https" if options.get("ssl_certfile") else "http"
        with contextlib.ExitStack() as copies:  # of what the supervisor inherits
            http = copies.enter_context(self._listen(port))
            root, name = os.path.split(self._path)
            _, lock = directory.create(root, name)
            copies.callback(os.close, lock)
            with contextlib.ExitStack() as undo:
                undo.callback(directory.remove, self._path)
                directory.write_address(self._path, listener.address_of(http, scheme))
                home.write_controller(self._path, meeting.unix, meeting.tcp, meeting.node)
                spark = ignition.strike(_MAIN, self._origin.instance, orphan=True)
                undo.callback(spark.quench)
                tls_fd = boot.tls_memory(options)
                if tls_fd >= 0:
                    copies.callback(os.close, tls_fd)
                boot.tell(spark, self._boot(http, lock, raylet, tls_fd))
                undo.pop_all()

    def _listen(self, port: int) -> socket.socket:
        host = self._origin.http.get("host")
        try:
            return listener.bind(self._address if host == "node" else host or "", port)
        except InstanceError as error:
            raise InstanceError(f"on node {self._address}: {error}") from None

    def _boot(self, http: socket.socket, lock: int, raylet: int, tls_fd: int) -> boot.Boot:
        return boot.Boot(
            instance=self._origin.instance,
            namespace=self._origin.namespace,
            directory=self._path,
            token=self._origin.token,
            detached=False,
            driver_pid=os.getpid(),
            watch_pid=raylet,
            node=self._node,
            lock_fd=lock,
            control_fd=-1,
            http_fd=http.fileno(),
            tls_fd=tls_fd,
            http=self._origin.http,
            middlewares=self._origin.middlewares,
        )
