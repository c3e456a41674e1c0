"""Listening: connections come in, and those that prove themselves (handshake.py) are handed on."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

from headgate.errors import ProtocolError
from headgate.wire import descriptors
from headgate.wire.handshake import accept

log = logging.getLogger("headgate.control")


class Acceptor:
    """Accepts connections on listening sockets, greets them, and hands over those that prove themselves."""

    def __init__(
        self,
        listeners: socket.socket | Sequence[socket.socket],
        token: bytes,
        admit: Callable[[socket.socket, str, list[int]], Any],
    ) -> None:
        self._listeners = [listeners] if isinstance(listeners, socket.socket) else list(listeners)
        self._token = token
        self._admit = admit
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._shortage = descriptors.Shortage(log, "connections of this instance's processes")

    def open(self) -> None:
        """Accept on the running loop from now on."""
        self._loop = asyncio.get_running_loop()
        for listener in self._listeners:
            listener.setblocking(False)
            self._watch(listener)

    def _watch(self, listener: socket.socket) -> None:
        if self._loop is not None and listener.fileno() >= 0:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        assert self._loop is not None
        for _ in range(100):
            if not descriptors.are_left(listener.fileno()):  # a handshake needs several
                self._pause(listener)
                return
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError:  # no file descriptors left in the whole system
                self._pause(listener)
                return
            task = self._loop.create_task(self._greet(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _pause(self, listener: socket.socket) -> None:
        assert self._loop is not None
        self._shortage.say()
        self._loop.remove_reader(listener.fileno())
        self._loop.call_later(descriptors.LOOK_AGAIN_S, self._watch, listener)

    async def _greet(self, sock: socket.socket) -> None:
        try:
            name, fds = await accept(sock, self._token)
        except (OSError, ProtocolError) as error:
            log.warning("refused a connection: %s", error)
            sock.close()
            return
        try:
            await self._admit(sock, name, fds)
        except OSError as error:
            log.warning("cannot take a connection of %s: %s", name, error)
            sock.close()

    def close(self) -> None:
        """Stop accepting; the listening sockets themselves are closed too."""
        for listener in self._listeners:
            if self._loop is not None and listener.fileno() >= 0:
                self._loop.remove_reader(listener.fileno())
            listener.close()
