"""Where connections come in: open, except while the process has hardly any file descriptors left.

The event loop would reset those for which it has none. With the door shut they wait in the
listening socket's queue, which is not this process's alone, and whoever is inside is served.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any

from headgate.wire import descriptors
from headgate.wire.address import BACKLOG

log = logging.getLogger("headgate.proxy")


class Door:
    """Accepts on `listener`, which stays the caller's; `greet` makes the protocol of each connection.

    options   further arguments of create_server
    """

    def __init__(
        self, listener: socket.socket, greet: Callable[[], asyncio.BaseProtocol], **options: Any
    ) -> None:
        self._listener = listener
        self._greet = greet
        self._options = options
        self._server: asyncio.Server | None = None
        self._closed = False
        self._shortage = descriptors.Shortage(log, "new connections")
        self._opening: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Accept from now on. Raises OSError."""
        # The loop closes the socket that it was given, so it gets one of its own each time. It calls listen()
        # again: asyncio's own 100 would shrink the queue for all who share it.
        self._server = await asyncio.get_running_loop().create_server(
            self._arrived, sock=self._listener.dup(), backlog=BACKLOG, **self._options
        )

    def look(self) -> None:
        """Shut it if there are hardly any file descriptors left, for as long as that is so."""
        if self._server is not None and not descriptors.are_left(self._listener.fileno()):
            self._shortage.say()
            self._server.close()
            self._server = None
            asyncio.get_running_loop().call_later(descriptors.LOOK_AGAIN_S, self._look_again)

    def close(self) -> None:
        """Accept nobody any more."""
        self._closed = True
        if self._server is not None:
            self._server.close()
            self._server = None

    def _arrived(self) -> asyncio.BaseProtocol:
        asyncio.get_running_loop().call_soon(self.look)  # not now: the loop is about to accept
        return self._greet()

    def _look_again(self) -> None:
        if self._closed:
            return
        if descriptors.are_left(self._listener.fileno()):
            self._opening = asyncio.get_running_loop().create_task(self._reopen())
        else:
            asyncio.get_running_loop().call_later(descriptors.LOOK_AGAIN_S, self._look_again)

    async def _reopen(self) -> None:
        try:
            await self.open()
        except OSError:  # the last ones were taken meanwhile
            asyncio.get_running_loop().call_later(descriptors.LOOK_AGAIN_S, self._look_again)
        if self._closed:
            self.close()
