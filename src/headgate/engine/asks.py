"""What the controller asks of the supervisor, and what it hears: one msgpack map in each datagram.

They talk over a SOCK_SEQPACKET socket pair of their own, a fresh one for each incarnation of the
controller, or of the agent that hands the datagrams on (engine/agent.py). Answers come in the order
of what was asked. Children are named by their id ("iris#0007"), whose number the supervisor never
gives twice. `note` is whatever the asker wants to find again in `Child` after the controller's end;
the supervisor does not look into it.
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
from msgspec import Struct

if TYPE_CHECKING:
    import asyncio

#: Longer datagrams than this are refused by the kernel's default socket buffer.
MAX_ASK_BYTES = 131_072


class Fork(Struct, frozen=True, tag_field="op", tag="fork"):
    """Fork a child; answered by the Forked with the same `n`."""

    n: int
    role: str
    name: str
    note: bytes = b""


class Kill(Struct, frozen=True, tag_field="op", tag="kill"):
    """SIGKILL to the child's process group; its Exited follows. Nothing happens if it is gone."""

    id: str


class List(Struct, frozen=True, tag_field="op", tag="list"):
    """Tell each living child; answered by one Child for each, then the Listed with the same `n`."""

    n: int = 0


class CloseListener(Struct, frozen=True, tag_field="op", tag="close_listener"):
    """Close the supervisor's copy of the HTTP listener: with the proxies' own, the port is free."""


class Forked(Struct, frozen=True, tag_field="op", tag="forked"):
    """The child runs, or `error` says why it could not be forked."""

    n: int
    id: str = ""
    pid: int = 0
    started: float = 0.0
    error: str = ""


class Child(Struct, frozen=True, tag_field="op", tag="child"):
    """A living child. `started` is on the clock of time.monotonic(), which all processes share."""

    id: str
    role: str
    name: str
    pid: int
    started: float
    note: bytes = b""


class Listed(Struct, frozen=True, tag_field="op", tag="children"):
    """The end of the answer to List."""

    count: int
    n: int = 0


class Exited(Struct, frozen=True, tag_field="op", tag="exited"):
    """A child has ended and was reaped; `status` is what waitpid() said."""

    id: str
    pid: int
    status: int


Ask = Fork | Kill | List | CloseListener
Answer = Forked | Child | Listed | Exited

encode = msgspec.msgpack.Encoder().encode
decode_ask = msgspec.msgpack.Decoder(Ask).decode
decode_answer = msgspec.msgpack.Decoder(Answer).decode


class Line:
    """One end of the socket pair: never waits, and keeps what the other end has no room for."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._outbox: deque[bytes] = deque()

    def fileno(self) -> int:
        """The socket's; -1 when closed."""
        return self._sock.fileno()

    def send(self, data: bytes) -> bool:
        """Send a datagram, after those that wait; whether all are sent."""
        self._outbox.append(data)
        return self.flush()

    def flush(self) -> bool:
        """Send what there is room for; whether nothing is left. What is for nobody any more is dropped."""
        while self._outbox:
            try:
                self._sock.send(self._outbox[0])
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                    raise
                self._outbox.clear()
                return True
            self._outbox.popleft()
        return True

    def receive(self) -> bytes | None:
        """The next datagram; None if there is none now, empty when the other end is closed."""
        try:
            return self._sock.recv(MAX_ASK_BYTES * 2)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()


class LoopLine:
    """A Line on an event loop: hears by itself, and sends what waited when there is room."""

    def __init__(self, sock: socket.socket, hear: Callable[[bytes], None]) -> None:
        self._line = Line(sock)
        self._hear = hear
        self._loop: asyncio.AbstractEventLoop | None = None

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Hear from now on."""
        self._loop = loop
        loop.add_reader(self._line.fileno(), self._read)

    def send(self, data: bytes) -> None:
        """Send a datagram, now or when there is room for it."""
        if self._loop is not None and not self._line.send(data):
            self._loop.add_writer(self._line.fileno(), self._flush)

    def _flush(self) -> None:
        if self._line.flush() and self._loop is not None:
            self._loop.remove_writer(self._line.fileno())

    def _read(self) -> None:
        while self._loop is not None and (data := self._line.receive()) is not None:
            if not data:
                self.close()
                return
            self._hear(data)

    def close(self) -> None:
        """Neither hear nor send any more; the socket stays open."""
        if self._loop is not None:
            self._loop.remove_reader(self._line.fileno())
            self._loop.remove_writer(self._line.fileno())
            self._loop = None
