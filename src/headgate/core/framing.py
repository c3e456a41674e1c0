"""Cut a stream of bytes into frames.

A frame is a header of 20 bytes and `length` bytes after it: `meta length` bytes of meta, then
the payload's own bytes. What a type means for the two ends is said by the subclasses of wire/link.py.

A frame comes out as one plain tuple that points into the bytes that were fed; nothing is copied
and no object is made per frame. Only a frame that arrives in pieces is put together: a small
one by joining the pieces once, one over `BIG` in a buffer of its own that the caller may receive
into (`expected`, `big_buffer`, `big_filled`).

No sockets here. The end of the stream inside a frame is an error: `finish`.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

from ..errors import ProtocolError

#: length (of what follows the header), type, flags, meta length, id, argument
HEADER = struct.Struct("<IBBHIQ")
HEADER_BYTES = HEADER.size

#: Types.
CALL, REPLY, DATA, END, CREDIT, CANCEL, ERROR = 1, 2, 3, 4, 5, 6, 7
BUSY, ROOM, DRAINING, FREE, TAKEN, PING, PONG, CONTROL = 8, 9, 10, 11, 12, 13, 14, 15
#: Flags. RESERVE: a CALL for a slot only; its arguments come another way. SEGMENT: the body is
#: where a memory of the sender's is (wire/segments.py).
MORE, ARENA, HEAD, STREAM, VALUE, RESERVE, SEGMENT = 1, 2, 4, 8, 16, 32, 64

#: No frame is longer; a header that says so is not one of ours.
MAX_FRAME_BYTES = 256 * 1024 * 1024
#: A frame longer than this that arrives in pieces gets a buffer of its own.
BIG = 64 * 1024

#: (type, flags, meta length, id, argument, source, start, end); the content is source[start:end].
Frame: TypeAlias = "tuple[int, int, int, int, int, bytes | bytearray, int, int]"


def pack(kind: int, flags: int, meta_bytes: int, slot: int, argument: int, length: int) -> bytes:
    """The header of a frame with `length` bytes after it."""
    return HEADER.pack(length, kind, flags, meta_bytes, slot, argument)


class Framer:
    """Bytes in, whole frames out, however the stream was cut.

    >>> framer = Framer()
    >>> framer.feed(pack(PING, 0, 0, 0, 7, 0)[:5])
    []
    >>> framer.feed(pack(PING, 0, 0, 0, 7, 0)[5:])[0][:5]
    (13, 0, 0, 0, 7)

    ProtocolError ends it: close the link, feed it nothing more.
    """

    __slots__ = ("_big", "_filled", "_head", "_missing", "_pieces")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []  # of a header or of a small frame
        self._missing = 0  # bytes without which joining the pieces is no use
        self._big: bytearray | None = None
        self._filled = 0
        self._head = (0, 0, 0, 0, 0)  # type ... argument of the big frame

    def feed(self, data: bytes) -> list[Frame]:
        """The frames that `data` completes, in order.

        Raises ProtocolError (unknown type, a length that cannot be).
        """
        if self._pieces:
            if len(data) < self._missing:
                self._missing -= len(data)
                self._pieces.append(data)
                return []
            data = b"".join((*self._pieces, data))
            self._pieces.clear()
        elif self._big is not None:
            return self._feed_big(data)
        return self._cut(data)

    def _cut(self, data: bytes) -> list[Frame]:
        frames: list[Frame] = []
        found, unpack = frames.append, HEADER.unpack_from
        size, position = len(data), 0
        start = HEADER_BYTES
        while start <= size:
            length, kind, flags, meta, slot, argument = unpack(data, position)
            if kind > CONTROL or not kind or meta > length:
                raise _broken(kind, meta, length)
            end = start + length
            if end > size:
                self._begin(data, position, (kind, flags, meta, slot, argument), length)
                return frames
            found((kind, flags, meta, slot, argument, data, start, end))
            position, start = end, end + HEADER_BYTES
        if position < size:
            self._keep(data, position, start - size)
        return frames

    def _begin(self, data: bytes, position: int, head: tuple[int, int, int, int, int], length: int) -> None:
        """Remember a frame whose header is there and whose end is not."""
        start = position + HEADER_BYTES
        if length > MAX_FRAME_BYTES:
            raise _broken(head[0], head[2], length)
        if length <= BIG:
            self._keep(data, position, start + length - len(data))
            return
        self._big = bytearray(length)
        self._filled = len(data) - start
        self._big[: self._filled] = memoryview(data)[start:]
        self._head = head

    def _keep(self, data: bytes, position: int, missing: int) -> None:
        self._pieces.append(data[position:])
        self._missing = missing

    @property
    def is_between(self) -> bool:
        """Whether the next byte begins a frame."""
        return not self._pieces and self._big is None

    @property
    def expected(self) -> int:
        """How many bytes of a frame over BIG are missing; 0 if the stream is not inside one."""
        return 0 if self._big is None else len(self._big) - self._filled

    def big_buffer(self) -> memoryview:
        """Where the missing bytes of the big frame go: `expected` bytes, which is at least 1.

        To be asked for only while `expected` is not 0.
        """
        assert self._big is not None, "big_buffer() outside a big frame"
        return memoryview(self._big)[self._filled :]

    def big_filled(self, count: int) -> list[Frame]:
        """`count` bytes were received into `big_buffer()`: the frame if it is whole now, else []."""
        assert self._big is not None, "big_filled() outside a big frame"
        big = self._big
        self._filled += count
        if self._filled < len(big):
            return []
        self._big = None
        return [(*self._head, big, 0, len(big))]

    def _feed_big(self, data: bytes) -> list[Frame]:
        """For a caller that did not receive into the buffer, e.g. one that reads a dead link dry."""
        taken = min(self.expected, len(data))
        self.big_buffer()[:taken] = memoryview(data)[:taken]
        frames = self.big_filled(taken)
        if taken < len(data):
            frames += self._cut(data[taken:])
        return frames

    def finish(self) -> None:
        """The stream has ended. Raises ProtocolError if it did so inside a frame."""
        if self._big is not None:
            raise ProtocolError(
                f"the link ended inside a frame: {self._filled} of {len(self._big)} bytes had come; "
                "the peer died or was closed while it wrote"
            )
        if self._pieces:
            raise ProtocolError(
                f"the link ended inside a frame: {self._missing} bytes or more were missing; "
                "the peer died or was closed while it wrote"
            )


def _broken(kind: int, meta: int, length: int) -> ProtocolError:
    if not CALL <= kind <= CONTROL:
        what = f"type {kind}, but types are {CALL} to {CONTROL}"
    elif length > MAX_FRAME_BYTES:
        what = f"a length of {length} bytes, but the limit is {MAX_FRAME_BYTES}"
    else:
        what = f"{meta} bytes of meta in {length} bytes"
    return ProtocolError(
        f"a frame's header says {what}; both ends of a link must be the same version of headgate"
    )
