"""One HTTP connection from accept to close, and what happens between two requests.

Requests come in by intake.py and leave by dispatch.py, answers go out by answer.py; this is the
transport's side of them.
A connection ends after an answer that says so, when its client goes (the end of its stream counts,
and whoever works on its request may stop), and when it is too slow: time-outs have no timers of
their own, the server's one sweep finds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import select
import socket
import struct
import sys
import termios
from typing import TYPE_CHECKING, Any

from headgate.core import http11
from headgate.core.http11 import BODY, IDLE, RUNNING, Reject
from headgate.proxy import admin
from headgate.proxy.answer import NOTHING
from headgate.proxy.dispatch import meta_tail
from headgate.proxy.intake import Intake

if TYPE_CHECKING:
    from headgate.proxy.server import Server

#: Beyond the states of core/http11.py. LINGER: the last answer is out, and what the client still sends is
#: thrown away, so that it gets to read the answer (RFC 9112 §9.6). CLOSING: the rest is being written.
LINGER, CLOSING = 5, 6
_LINGER_S = 1.0
_LITTLE_BYTES = 8 * 1024
_RESET = struct.pack("ii", 1, 0)
_NEVER = float("inf")


class Connection(Intake, asyncio.BufferedProtocol):
    """One client's connection, from accept to close."""

    __slots__ = ("_untaken",)

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self._untaken = 0  # bytes the client had not taken when the sweep last looked

    # --- the transport's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.client = _address(transport.get_extra_info("peername"))
        self.local = _address(transport.get_extra_info("sockname"))
        self._tail = meta_tail(self.client, self.local, self.server.scheme)
        self.server.connections.add(self)
        limit = self.server.options.max_connections
        if len(self.server.connections) > limit:
            self.refuse(Reject(503, f"{limit} connections are open already (max_connections)"))

    def get_buffer(self, sizehint: int) -> memoryview:
        buffer, server = self._filling, self.server
        if buffer is None:  # of a large body little is to come with its head: what does is copied to its place
            buffer = server.view if self.state == BODY else server.head_view
        # A connection is paused only after it has read: with no room left none may read much.
        return buffer[:_LITTLE_BYTES] if server.budget.full else buffer

    def eof_received(self) -> bool:
        self._leave()
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._leave()
        self.server.connections.discard(self)

    def pause_writing(self) -> None:
        super().pause_writing()
        self.since, self._untaken = self.server.now, -1

    def resume_writing(self) -> None:
        super().resume_writing()
        if self.exchange is not None:
            self.exchange.resumed()
        self._proceed()

    # --- after an answer ---

    def answered(self) -> None:
        self.state = IDLE
        self.since = self.server.now
        self.body = b""
        self.deadline = _NEVER
        if self.untidy:
            self._clear()
        if self.last:
            self._end()
        elif self._rest and not self._busy:
            self._proceed()

    def _clear(self) -> None:
        """Let go of what the request held."""
        self.started = self.untidy = False
        self.flags = 0
        self._special = self.exchange = self._incoming = self._filling = None
        self._lent = NOTHING
        self.server.budget.release(self)
        if self.upload is not None:
            self.upload.end()
            self.upload = None

    def refuse(self, reject: Reject) -> None:
        """Answer what is no request, or comes too slowly, and end the connection."""
        if self.state != BODY:
            self.method, self.http10, self.head = "GET", False, b""
            self.request_id = self.server.new_id()
        self._rest = b""
        self.last = self.lingers = True
        self.answer(admin.error(reject.status, reject.reason))

    def _end(self) -> None:
        """The last answer is out."""
        self._filling = None
        if (self.lingers or self._rest) and self.transport.can_write_eof():
            self.state = LINGER
            self.transport.write_eof()
            if self._unread:
                self.resume(self._unread)
        else:
            self.close()

    # --- the end ---

    def close(self) -> None:
        """End the connection once all is written."""
        self.closed = True
        self.state, self.since, self._untaken = CLOSING, self.server.now, -1
        self.transport.close()

    def abort(self) -> None:
        """End the connection now; whoever works on its request may stop.

        With a reset: what the client has not taken would stay in the kernel for as long as it pleases.
        """
        self._leave()
        sock = self.transport.get_extra_info("socket")
        if sock is not None:
            with contextlib.suppress(OSError):  # it is closed
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def break_off(self) -> None:
        self._clear()
        if self.http10:  # its client takes the end of the connection for the end of the answer
            self.closed = True
            self.transport.abort()
        else:
            self.close()

    def abandon(self) -> None:
        if self.exchange is not None:
            self.exchange.leave()
        else:
            self.server.router.cancel(self.upload or self)

    def _leave(self) -> None:
        """The client has gone."""
        if not self.closed:
            self.closed = True
            if self.state == RUNNING:
                self.gone = True
                self.abandon()
        self._clear()

    def leave_if_idle(self) -> None:
        """The server stops: a connection has no use any more, unless there is a request that was not read yet."""
        if self.state == IDLE and not self.closed:
            self._close_if_idle()

    def _close_if_idle(self) -> None:
        """Close a connection without a request, unless bytes of one have arrived that were not read yet.

        Its client hears of it in the same step: the loop closes the socket a while later, and what
        the client sends until then would be lost.
        """
        sock = self.transport.get_extra_info("socket")
        if sock is None:
            self.close()
            return
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        if poll.poll(0):
            return
        if self.server.scheme == "http" and not self.transport.get_write_buffer_size():
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(sock.fileno())) as same:
                same.shutdown(socket.SHUT_WR)
        self.close()

    # --- time-outs ---

    def sweep(self, now: float) -> None:
        """Called a few times a second; `server.tick_s` is how often."""
        state = self.state
        if self.paused or state == CLOSING:
            self._check_writing(now)
        elif state == RUNNING:
            return
        elif state == LINGER:
            if now >= self.since + _LINGER_S:
                self.close()
        elif not self._unread and now >= self._deadline():
            if state in http11.ANSWERED:
                what = "head" if state == http11.HEAD else "body"
                self.refuse(Reject(408, f"the rest of the request's {what} did not come in time"))
            else:
                self._close_if_idle()

    def _deadline(self) -> float:
        return http11.next_deadline(self.state, self.since, self.server.limits) + self.server.tick_s

    def _check_writing(self, now: float) -> None:
        before, untaken = self._untaken, self._unsent()
        self._untaken = untaken
        if before < 0 or (before and not untaken):
            self.since = now
        elif untaken < before:
            self.since = http11.progressed(self.since, now, before - untaken)
        if now >= self.since + (self.server.limits.write_timeout_s if untaken else _LINGER_S):
            self.abort()

    def _unsent(self) -> int:
        """What the client has not taken. Under TLS the transport counts only what is not encrypted yet."""
        size = self.transport.get_write_buffer_size()
        sock = self.transport.get_extra_info("socket") if self.server.scheme == "https" else None
        if sock is not None:
            with contextlib.suppress(OSError):  # it is closed
                size += int.from_bytes(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return size


def _address(given: Any) -> tuple[str, int]:
    return (str(given[0]), int(given[1])) if isinstance(given, tuple) else ("", 0)
