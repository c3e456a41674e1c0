"""A request whose body lies in the arena: received there, read there by the replica.

A segment has two users: the request, until its answer is complete or nobody wants it any more,
and the replica it was sent to, until that says FREE or its link has ended. It is free when both
are done. So that this can be known, such a request is a Caller of its own that notes where it
was sent; its answers go to the connection. A replica of another node gets a copy, and is no user.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from headgate.core import framing
from headgate.errors import HeadgateError
from headgate.wire.arena import SMALLEST_BYTES, Arena
from headgate.wire.caller import Caller

if TYPE_CHECKING:
    from headgate.proxy.answer import Answering
    from headgate.wire.link import Source
    from headgate.wire.replica_link import ReplicaLink

_PLACE = struct.Struct("<QQ")


class Upload(Caller):
    """A body of `size` bytes in the arena, and later the request with that body."""

    def __init__(self, lender: Lender, owner: Answering, offset: int, size: int) -> None:
        self.offset = offset
        self.size = size
        self.view = lender.arena.view[offset : offset + size]
        self.body = _PLACE.pack(offset, size)
        self.flags = framing.ARENA
        self.over = False  # the request needs it no more
        self.reader: ReplicaLink | None = None  # where the replica is that may still read it
        self._lender = lender
        self._owner = owner

    def on_assigned(self) -> None:
        if self.flags & framing.ARENA:
            self.reader = self.link

    def on_refused(self) -> None:
        if self.reader is not None:
            self.reader = None
            self._lender.settle(self)

    def inline(self) -> tuple[int, bytes]:
        return self.flags & ~framing.ARENA, bytes(self.view)

    def end(self) -> None:
        """The request is over: answered, failed or given up."""
        if not self.over:
            self.over = True
            self._lender.settle(self)

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        self._owner.on_reply(arg, flags, meta_len, source, start, end)

    def on_reply_start(
        self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int
    ) -> None:
        self._owner.on_reply_start(arg, flags, meta_len, source, start, end)

    def on_data(self, source: Source, start: int, end: int) -> None:
        self._owner.on_data(source, start, end)

    def on_reply_end(self) -> None:
        self._owner.on_reply_end()

    def on_error(self, status: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        self._owner.on_error(status, flags, meta_len, source, start, end)

    def on_failure(self, error: HeadgateError) -> None:
        self._owner.on_failure(error)


class Lender:
    """All uploads of a proxy, by their offset in its arena."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena
        self.uploads: dict[int, Upload] = {}

    def take(self, owner: Answering, size: int) -> Upload | None:
        """Room for a body of `size` bytes, if it is large enough to pay and there is room."""
        offset = self.arena.take(size) if size >= SMALLEST_BYTES else None
        if offset is None:
            return None
        upload = self.uploads[offset] = Upload(self, owner, offset, size)
        return upload

    def on_free(self, offset: int) -> None:
        """A replica said FREE: it reads that segment no more."""
        upload = self.uploads.get(offset)
        if upload is not None:
            upload.reader = None
            self.settle(upload)

    def settle(self, upload: Upload) -> None:
        """Take the segment back if nobody uses it."""
        reader = upload.reader
        if upload.over and (reader is None or reader.closed) and upload.offset in self.uploads:
            del self.uploads[upload.offset]
            upload.view.release()
            self.arena.free(upload.offset)

    def sweep(self) -> None:
        """Take back what was lent to replicas that have gone."""
        for upload in list(self.uploads.values()):
            self.settle(upload)
