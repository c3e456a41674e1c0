"""Frames on a socket: one connection between two of headgate's processes.

Writes of one turn of the event loop are joined and written once; reads go into one reusable
buffer, a large frame straight into memory of its own. When the connection ends, whatever the
kernel still holds is read before anybody decides what was lost: a failing write makes the event
loop drop all unread input, so a duplicate of the file descriptor is kept for that last look.

A subclass says what frames mean: control.py, replica_link.py, remote_link.py, replica/links.py.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import socket
from typing import TYPE_CHECKING, Any, cast

from headgate.core import framing
from headgate.errors import ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

Frame = framing.Frame
Source = bytes | bytearray | memoryview

#: Bytes waiting in the transport beyond which streams pause.
HIGH_WATER_BYTES = 1 << 20
#: So many frames are written at once; more of one turn go in several writes, so that the peer
#: begins with the first while the last are still being made.
TOGETHER = 16
#: A body that does not go in one frame goes in pieces of this size, so that it holds up nobody.
PIECE_BYTES = 64 * 1024
#: How much of a streamed answer may be under way before its reader grants more.
WINDOW_BYTES = 256 * 1024
_READ_BYTES = 256 * 1024

log = logging.getLogger("headgate.wire")


def receive_buffer() -> memoryview:
    """Memory to receive into, for whoever copies out of it: of a link 250 KiB of 256 are never written and take none.

    A bytearray would write zeros into all of it: 2 MB in an instance with one replica.
    """
    return memoryview(mmap.mmap(-1, _READ_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


class Link(asyncio.BufferedProtocol):
    """A framed connection; made by `open_link` on an authenticated socket."""

    closed = False  # the connection ended or was closed here: writes go nowhere
    paused = False  # the peer does not keep up: streams wait for on_resume

    def __init__(self) -> None:
        self._framer = framing.Framer()
        self._view = receive_buffer()
        self._out: list[Any] = []
        self._scheduled = False
        self.is_reading = False
        self._transport: asyncio.Transport | None = None
        self._raw: socket.socket | None = None
        self._call_soon: Callable[..., object] | None = None

    @property
    def unsent(self) -> bool:
        """Whether something sent is still in this process."""
        if self.closed or self._transport is None:
            return False
        return bool(self._out) or self._transport.get_write_buffer_size() > 0

    # --- what a subclass fills in ---

    def on_frames(self, frames: list[Frame]) -> None:
        """Frames arrived, in order."""
        raise NotImplementedError

    def on_bytes(self, data: bytes) -> None:
        """Bytes arrived, none of which belong to a frame with a buffer of its own."""
        frames = self._framer.feed(data)
        if frames:
            self.on_frames(frames)

    def on_end(self) -> None:
        """The connection has ended and was read dry. Called exactly once."""

    def on_resume(self) -> None:
        """The peer keeps up again."""

    # --- sending ---

    def send(self, data: bytes) -> None:
        """Write `data`, whole frames, with all else of this turn of the loop."""
        self._out.append(data)
        if len(self._out) >= TOGETHER:
            self.flush()
        elif not self._scheduled and not self.is_reading:
            self.schedule()

    def schedule(self) -> None:
        """Have what was sent written at the end of this turn of the loop."""
        self._scheduled = True
        assert self._call_soon is not None
        self._call_soon(self.flush)

    def send_at_once(self, data: bytes) -> None:
        """Write `data`, whole frames, now: for what nothing else of this turn would join."""
        self._out.append(data)
        self.flush()

    def send_with(self, head: bytes, body: bytes | memoryview) -> None:
        """Write a frame whose body is large, without joining it to its head."""
        self.flush()
        if not self.closed:
            assert self._transport is not None
            self._transport.writelines((head, body))

    def flush(self) -> None:
        """Write what was sent so far."""
        self._scheduled = False
        out = self._out
        if out and not self.closed:
            assert self._transport is not None
            self._transport.write(out[0] if len(out) == 1 else b"".join(out))
        out.clear()

    def close(self) -> None:
        """End the connection now; the peer reads what was flushed. on_end follows in a later turn."""
        if self.closed:
            return
        self.flush()
        self.closed = True
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection without waiting for the peer to read."""
        if not self.closed:
            self.closed = True
            if self._raw is not None:  # the duplicate would keep the connection alive
                try:
                    self._raw.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass
            if self._transport is not None:
                self._transport.abort()

    def duplicate(self, sock: socket.socket) -> None:
        """Keep a second way to the connection, before the loop has it. Raises OSError."""
        self._raw = sock.dup()
        self._raw.setblocking(False)

    def discard(self) -> None:
        """End the connection now, and read nothing more of it."""
        self.abort()
        if self._raw is not None:
            self._raw.close()
            self._raw = None

    # --- asyncio's side ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport = cast(asyncio.Transport, transport)  # uvloop's is no subclass
        transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self._call_soon = asyncio.get_running_loop().call_soon

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._framer.big_buffer() if self._framer.expected else self._view

    def buffer_updated(self, nbytes: int) -> None:
        self.is_reading = True
        try:
            if self._framer.expected:
                frames = self._framer.big_filled(nbytes)
                if frames:
                    self.on_frames(frames)
            else:
                self.on_bytes(self._view[:nbytes].tobytes())
        except ProtocolError as error:
            log.error("a link broke the protocol and was closed: %s", error)
            self.abort()
        except Exception:
            log.exception("a frame could not be handled; the link is closed")
            self.abort()
        finally:
            self.is_reading = False
            if self._out:
                self.flush()

    def eof_received(self) -> bool:
        return False

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        self.on_resume()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        try:
            self._read_dry()
        finally:
            if self._raw is not None:
                self._raw.close()
            self.on_end()

    def _read_dry(self) -> None:
        if self._raw is None:
            return
        try:
            while data := self._raw.recv(_READ_BYTES):
                frames = self._framer.feed(data)
                if frames:
                    self.on_frames(frames)
        except (OSError, ProtocolError):  # dry (BlockingIOError), reset, or cut inside a frame
            pass


async def open_link(link: Link, sock: socket.socket) -> None:
    """Give an authenticated, connected socket to `link` on the running loop.

    Raises OSError when no file descriptor is left for it; then, and when it is cancelled, the socket is closed.
    """
    loop = asyncio.get_running_loop()
    try:
        link.duplicate(sock)
        if sock.family == socket.AF_UNIX:
            await loop.create_unix_connection(lambda: link, sock=sock)
        else:
            await loop.create_connection(lambda: link, sock=sock)
    except BaseException:
        sock.close()
        raise
