"""The receiver's side of a segment: open it, check that it is one, map it; and how such memory is mapped and filled.

Only who is at the other end of an authenticated link can name a segment, and nothing but a segment of
the size that was said is opened: whoever reads beyond the end of a memory that has shrunk is killed.
What a segment is stands in segments.py.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from headgate.core import lending
from headgate.core.spares import Spares
from headgate.errors import ProtocolError

#: What a process keeps mapped of a peer's segments that it only reads, and for how long.
KEPT_BYTES = 64 << 20
IDLE_S = 3.0
#: Of every segment, as /proc shows it.
NAME = "headgate-segment"
#: descriptor, inode, size
PLACE = struct.Struct("<IQQ")
Place: TypeAlias = tuple[int, int, int]

_LINK = f"/memfd:{NAME}"
_MOST_PARTS = 1024  # of one pwritev
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 0x0002
_MAP_FIXED, _MAP_NORESERVE = 0x10, 0x4000

_libc: Any = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_forks = 0


def place_of(source: Any, start: int) -> Place:
    """What stands in a frame: descriptor, inode and size. ProtocolError if that cannot be."""
    try:
        fd, inode, size = PLACE.unpack_from(source, start)
    except struct.error as error:
        raise ProtocolError(f"a segment's place is cut short: {error}") from None
    if not lending.SMALLEST_ANSWER_BYTES <= size <= sys.maxsize:
        least = lending.SMALLEST_ANSWER_BYTES
        raise ProtocolError(f"a segment of {size} bytes; smaller ones than {least} travel in frames")
    return fd, inode, size


def borrow(pid: int, place: Place, free: Callable[[int, bool], None]) -> memoryview:
    """The value in a segment of the process `pid`, writable: what is written is the receiver's alone.

    free   a method, called with the inode when nothing refers to it any more, on whichever thread that was; and
           whether a copy of this process may still refer to it

    Raises OSError if it cannot be opened or mapped here; then `free` is not called.
    """
    _, inode, size = place
    opened = _open(pid, place)
    try:
        mapped = map_memory(opened, size, mmap.MAP_PRIVATE)
    finally:
        os.close(opened)
    method = weakref.WeakMethod(free)
    weakref.finalize(mapped, _freed, method, inode, _forks, os.getpid()).atexit = False
    return memoryview(mapped)[:size]


class Readings:
    """Segments of one peer that are read only, each mapped once for as long as it comes again (core/spares.py)."""

    def __init__(self) -> None:
        self._mapped: dict[int, mmap.mmap] = {}  # by inode, which is nobody else's while it is mapped
        self._unread = Spares(KEPT_BYTES, IDLE_S)

    def view(self, pid: int, place: Place, free: Callable[[int, bool], None]) -> memoryview:
        """As `borrow`, but read-only. `ended` is to be called before the segment may come again."""
        _, inode, size = place
        mapped = self._mapped.pop(inode, None) if self._unread.pick(inode) else None
        if mapped is None or len(mapped) < size:
            mapped = self._map(pid, place)
        self._mapped[inode] = mapped
        view = (ctypes.c_char * size).from_buffer(mapped)
        method = weakref.WeakMethod(free)
        weakref.finalize(view, _freed, method, inode, _forks, os.getpid()).atexit = False
        return memoryview(view).cast("B").toreadonly()

    def ended(self, inode: int, now: float) -> None:
        """Nothing refers to the view of that segment any more."""
        if inode in self._mapped:
            self._forget(self._unread.put(inode, len(self._mapped[inode]), now))

    def sweep(self, now: float) -> None:
        """Let go of what did not come again; to be called about once a second."""
        self._forget(self._unread.late(now))

    def _map(self, pid: int, place: Place) -> mmap.mmap:
        opened = _open(pid, place)
        try:
            return map_memory(opened, os.fstat(opened).st_size, mmap.MAP_SHARED, mmap.PROT_READ)
        finally:
            os.close(opened)

    def _forget(self, inodes: list[int]) -> None:
        for inode in inodes:
            del self._mapped[inode]


def _open(pid: int, place: Place) -> int:
    """A descriptor of the segment at `place`. Raises OSError if it cannot be opened, or is none."""
    fd, inode, size = place
    path = f"/proc/{pid}/fd/{fd}"
    if not os.readlink(path).startswith(_LINK):  # looked at before it is opened: it might be a device
        raise FileNotFoundError(errno.ENOENT, "not a segment", path)
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        check(opened, inode, size)
    except BaseException:
        os.close(opened)
        raise
    return opened


def check(fd: int, inode: int, size: int) -> None:
    """Whether it is the segment that was said, as large as was said, and will remain so. Raises OSError."""
    found = os.fstat(fd)
    is_ours = os.readlink(f"/proc/self/fd/{fd}").startswith(_LINK)
    if not is_ours or not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_ino != inode:
        raise FileNotFoundError(errno.ENOENT, "not the segment that was sent")
    # Else the peer could shrink it, and whoever reads beyond its end gets a SIGBUS.
    if not fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK or found.st_size < size:
        raise PermissionError(errno.EPERM, "a segment that is too small or may be shrunk")


def _freed(method: weakref.WeakMethod[Callable[[int, bool], None]], inode: int, forks: int, pid: int) -> None:
    free = method()
    if free is not None and os.getpid() == pid:
        free(inode, forks != _forks)


def _count_fork() -> None:
    global _forks
    _forks += 1


os.register_at_fork(before=_count_fork, after_in_parent=_count_fork)  # twice: other threads map meanwhile


# --- memory ---


def map_memory(fd: int, size: int, flags: int, access: int = mmap.PROT_READ | mmap.PROT_WRITE) -> mmap.mmap:
    """Map a memory; it keeps no descriptor, as mmap.mmap would. Raises OSError."""
    mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    flags |= _MAP_FIXED | _MAP_NORESERVE
    if _libc.mmap(address, size, access, flags, fd, 0) != address:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return mapped


def write(fd: int, parts: Sequence[memoryview]) -> None:
    """All parts, each of bytes, one after the other. Raises OSError."""
    left = [part for part in parts if part.nbytes]
    at = 0
    while left:
        written = os.pwritev(fd, left[:_MOST_PARTS], at)
        at += written
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if written:
            left[0] = left[0][written:]


class _PyBuffer(ctypes.Structure):
    """CPython's Py_buffer: ctypes alone gives no address of memory that is read-only."""

    _fields_ = (
        ("buf", ctypes.c_void_p), ("obj", ctypes.py_object), ("len", ctypes.c_ssize_t), ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int), ("ndim", ctypes.c_int), ("format", ctypes.c_char_p), ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p), ("suboffsets", ctypes.c_void_p), ("internal", ctypes.c_void_p),
    )  # fmt: skip


def copy(parts: Sequence[memoryview], to: int) -> None:
    """All parts, one after the other, to an address; other than by an assignment to a slice, other threads run on."""
    buffer = _PyBuffer()
    for part in parts:
        ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(part), ctypes.byref(buffer), 0)
        try:
            ctypes.memmove(to, buffer.buf, buffer.len)
            to += buffer.len
        finally:
            ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
