"""Which requests of a link have started: one byte per slot in a page that two processes share.

The router makes the page, passes it in the handshake and clears a slot's byte when it gives the
slot to a request. The replica's thread that is about to call user code sets the byte. When the
link has ended, the router reads it: a page of shared memory survives a kill -9 of the process
that wrote it, and costs no system call.
"""

from __future__ import annotations

import fcntl
import mmap
import os

SLOTS = 65536  # pages that nobody touches take no memory

_F_ADD_SEALS = 1033
_F_SEAL_SHRINK = 0x0002
_F_SEAL_GROW = 0x0004


def make_memory(name: str, size: int) -> int:
    """The fd of a fresh anonymous shared memory of `size` bytes that nobody can shrink or grow."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
    return fd


def map_memory(fd: int) -> mmap.mmap:
    """Map all of a shared memory and close `fd`."""
    try:
        return mmap.mmap(fd, os.fstat(fd).st_size)
    finally:
        os.close(fd)


class SlotPage:
    """The router's side: hands out slots, those used last first.

    free    where a slot goes back to once its request has had its last answer
    marks   a byte for each slot, 0: not started
    """

    def __init__(self) -> None:
        fd = make_memory("headgate-slots", SLOTS)
        self.fd: int | None = fd
        self.marks = mmap.mmap(fd, SLOTS)
        self.free: list[int] = []
        self._next = 0

    def passed(self) -> None:
        """The handshake has passed the fd on; the mapping stays."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None

    def take(self) -> int:
        """A free slot, marked "not started". Beyond SLOTS a slot has no byte and counts as started."""
        if self.free:
            slot = self.free.pop()
        else:
            slot = self._next
            self._next += 1
        if slot < SLOTS:
            self.marks[slot] = 0
        return slot

    def started(self, slot: int) -> bool:
        """Whether user code may have begun to run for the request in `slot`."""
        return slot >= SLOTS or self.marks[slot] != 0

    def close(self) -> None:
        """Unmap; no other call may follow."""
        self.passed()
        self.marks.close()
