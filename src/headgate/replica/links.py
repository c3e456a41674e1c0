"""The replica's end of a link to one router: requests in, answers out.

It admits or refuses what comes in (core/admission.py has the count over all links), puts bodies
that come in pieces together, and hands whole requests to the worker. When the router goes away,
its requests are cancelled.
"""

from __future__ import annotations

import ctypes
import logging
import os
import struct
import threading
import weakref
from mmap import mmap
from time import monotonic
from typing import TYPE_CHECKING

from headgate.core import framing
from headgate.core.lending import SMALLEST_BYTES
from headgate.errors import ProtocolError
from headgate.replica.job import NEVER, Job
from headgate.replica.reservation import ReservedJob
from headgate.replica.stream import SegmentFlow
from headgate.wire.borrowed import place_of
from headgate.wire.link import Frame, Source
from headgate.wire.sharing import SharingLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from headgate.replica.worker import Worker
    from headgate.wire.payload import Buffer
    from headgate.wire.segments import Segment

log = logging.getLogger("headgate.replica")

_CALL = framing.CALL
_pack = framing.HEADER.pack
#: A call with any of these flags takes more than a slot, or names its method.
_SPECIAL = 0xFF & ~framing.VALUE
#: The body is in memory of the router's.
_SHARED = framing.ARENA | framing.SEGMENT
_TOTAL = struct.Struct("<Q")


class CallerLink(SharingLink):
    """A connection from a router.

    page    one byte for each slot, set when its request starts
    arena   memory that the router receives large bodies into, if it has such
    peer    the router's process; 0: it is not on this machine
    """

    def __init__(self, worker: Worker, name: str, page: mmap, arena: mmap | None, peer: int = 0) -> None:
        super().__init__()
        self.worker = worker
        self.name = name
        self.page = page
        self.jobs: dict[int, Job] = {}
        self.peer = peer
        self._arena = arena
        self._writing = threading.RLock()  # flush is part of send_with
        worker.linked(self)

    def buffer_updated(self, nbytes: int) -> None:
        with self.worker.lock:
            super().buffer_updated(nbytes)
        self.worker.async_calls.begin()

    def on_frames(self, frames: list[Frame]) -> None:
        self.worker.plain_calls.settle()  # under the lock, as each read is
        jobs = self.admit(frames)
        if jobs:
            self.worker.begin(jobs)
        for frame in frames[len(jobs) :] if jobs else frames:
            kind, flags, _, slot, arg, source, start, end = frame
            if kind == framing.CALL:
                self._call(frame)
            elif kind == framing.DATA:
                self._piece(slot, source, start, end)
            elif kind == framing.END:
                self._whole(slot)
            elif kind == framing.CANCEL:
                self._cancel(slot, timed_out=arg == 1)
            elif kind == framing.CREDIT:
                job = self.jobs.get(slot)
                if job is not None and job.flow is not None:
                    job.flow.credit(arg)
            elif kind == framing.ROOM:
                self.worker.tell_room(self.worker.admission.hand_back(self, arg))
            elif kind == framing.FREE:
                self.lent.back(arg, spoiled=bool(flags & framing.MORE))
            elif kind == framing.TAKEN:
                self._taken(slot, arg, bool(flags & framing.MORE))
            elif kind == framing.PING:
                self.send(_pack(0, framing.PONG, 0, 0, 0, arg))
            else:
                raise ProtocolError(f"frame type {kind} from a router")
        self.worker.read_done()

    def admit(self, frames: list[Frame]) -> list[Job]:
        """Accept the ordinary calls that `frames` begin with, as far as there is room."""
        worker, jobs, method = self.worker, self.jobs, self.worker.default
        if worker.draining or worker.fenced or method is None:
            return []
        now = monotonic()
        admitted: list[Job] = []
        for frame in frames[: worker.admission.room]:
            kind, flags, _, slot, arg, _, _, _ = frame
            if kind != _CALL or flags & _SPECIAL or arg >> 48:
                break
            remaining_ms = arg & 0xFFFFFFFF
            deadline = now + remaining_ms / 1000 if remaining_ms else NEVER
            jobs[slot] = job = Job(self, slot, flags, frame, deadline, method)
            admitted.append(job)
        worker.admission.take(self, len(admitted))
        return admitted

    def _call(self, frame: Frame) -> None:
        """A call that `admit` left."""
        _, flags, _, slot, arg, _, _, _ = frame
        worker = self.worker
        if worker.draining or worker.fenced:
            needed = worker.refuses(self)
            if needed is not None:
                self.send(_pack(0, framing.DRAINING, 0, 0, slot, needed))
                if needed and arg >> 48:  # the router counts on these, and goes on once it has caught up
                    self.send(_pack(0, framing.ROOM, 0, 0, 0, arg >> 48))
                return
        want = arg >> 48
        if not worker.admission.offer(self, want):
            self.send(_pack(0, framing.BUSY, 0, 0, slot, 0))
            return
        if want:
            worker.tell_room(worker.admission.rooms())
        remaining_ms = arg & 0xFFFFFFFF
        deadline = monotonic() + remaining_ms / 1000 if remaining_ms else NEVER
        make = ReservedJob if flags & framing.RESERVE else Job
        self.jobs[slot] = job = make(self, slot, flags, frame, deadline)
        if isinstance(job, ReservedJob):
            worker.reservations.reserve(job)
        elif flags & framing.MORE:
            (total,) = _TOTAL.unpack_from(job.source, job.body_start)
            job.upload = bytearray(total)
        elif not flags & framing.SEGMENT or self._map(job):
            worker.take(job)

    # --- reading by the plain thread (lead.py), under the worker's lock ---

    def lend(self) -> bool:
        """Let another thread `receive`; False if that cannot be now."""
        if self.closed or self._raw is None or self._transport is None or self._transport.is_closing():
            return False
        self._transport.pause_reading()
        return True

    def take_back(self) -> None:
        """Read on the loop again."""
        if not self.closed and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def fileno(self) -> int:
        """What has something to read when `receive` finds something; -1: the connection has ended."""
        return -1 if self._raw is None else self._raw.fileno()

    def receive(self) -> list[Frame] | None:
        """The frames that are whole now, without waiting; None: the connection has ended."""
        if self.closed or self._raw is None:
            return None
        try:
            size = self._raw.recv_into(self._view)  # recv() would make, and cut, an object of that size each time
        except BlockingIOError:
            return []
        except OSError:
            return None
        return self._framer.feed(self._view[:size].tobytes()) if size else None

    # --- requests ---

    def _piece(self, slot: int, source: Source, start: int, end: int) -> None:
        job = self.jobs.get(slot)
        if job is None or job.upload is None:  # refused or cancelled while pieces were under way
            return
        at = job.uploaded
        if at + end - start > len(job.upload):
            raise ProtocolError("a request's body is larger than announced")
        job.upload[at : at + end - start] = memoryview(source)[start:end]
        job.uploaded = at + end - start

    def _whole(self, slot: int) -> None:
        job = self.jobs.get(slot)
        if job is not None and job.upload is not None:
            if job.uploaded != len(job.upload):
                raise ProtocolError("a request's body is smaller than announced")
            self.worker.take(job)

    def _cancel(self, slot: int, timed_out: bool) -> None:
        job = self.jobs.get(slot)
        if job is None:
            return
        job.timed_out = timed_out
        complete = job.upload is None or job.uploaded == len(job.upload)
        self.worker.cancel(job)
        if not complete:
            self.worker.finish(job, job.refusal())

    def finish(self, job: Job, frame: bytes) -> None:
        """Send a request's final frame (empty: it was sent already) and free what it held. Once for each."""
        with self.worker.lock:
            self.ended(job)
            if frame and not self.closed:
                if self.jobs or self.is_reading:
                    self.send(frame)
                else:
                    self.send_at_once(frame)
            self.worker.freed()

    def ended(self, job: Job) -> None:
        """Forget a request that has its final frame; `Worker.freed` follows."""
        there = self.jobs.pop(job.slot, None)
        if there is not job and there is not None:  # the router has used the slot again
            self.jobs[job.slot] = there
        if job.flags & _SHARED:
            job.mapped = None
            if job.flags & framing.ARENA and not job.borrowed:
                self._free(job.segment[0])

    def flush(self) -> None:
        with self._writing:
            super().flush()

    def send_with(self, head: bytes, body: bytes | memoryview) -> None:
        with self._writing:
            super().send_with(head, body)

    def cut(self, null: int) -> None:
        """In a fork: have the connection's descriptors lead to `null`, so that the parent alone uses it."""
        self._writing = threading.RLock()  # whoever holds the other is not in this process
        if not self.closed and self._raw is not None and self._transport is not None:
            for fd in (self._raw.fileno(), self._transport.get_extra_info("socket").fileno()):
                os.dup2(null, fd, inheritable=False)

    def send_from_any_thread(self, data: bytes) -> None:
        """Write whole frames now, after what waits to be written; what the kernel does not take the loop writes."""
        with self._writing:
            if self.closed or self._raw is None:
                return
            if self.unsent:
                self._out.append(data)
            else:
                sent = 0
                try:
                    sent = self._raw.send(data)
                except OSError:  # full, or gone: the loop finds out which
                    pass
                if sent == len(data):
                    return
                self._out.insert(0, data[sent:])  # before what the loop has sent meanwhile: a frame goes on here
            self.worker.from_any_thread(self.flush)

    def connection_lost(self, exc: Exception | None) -> None:
        with self.worker.lock, self._writing:  # no other thread may use a descriptor that may be another's by then
            super().connection_lost(exc)

    def from_arena(self, offset: int, size: int) -> memoryview:
        """A read-only view of `size` bytes of the arena; the router is told when nothing refers to it."""
        if self._arena is None:
            raise ProtocolError("a body in an arena that was never passed")
        segment = (ctypes.c_char * size).from_buffer(self._arena, offset)
        weakref.finalize(segment, self._free, offset).atexit = False
        return memoryview(segment).cast("B").toreadonly()

    def _free(self, offset: int) -> None:
        # Runs on whichever thread dropped the last reference.
        self.worker.from_any_thread(self._send_free, offset)

    def _send_free(self, offset: int) -> None:
        if not self.closed:
            self.send(_pack(0, framing.FREE, 0, 0, 0, offset))

    # --- large values and answers (segments.py) ---

    def _map(self, job: Job) -> bool:
        """Map a request's body; False: it comes in pieces, since it cannot be mapped."""
        place = place_of(job.source, job.body_start)
        try:
            job.mapped = self.borrow(place)
        except OSError as error:
            log.debug("a segment of %s cannot be opened: %s", self.name, error)
            job.upload = bytearray(place[2])
            self.ask_for_pieces(job.slot, place)
            return False
        return True

    def write_answer(self, block: bytes, body: Buffer) -> Segment | None:
        """As `write_segment`, for an HTTP answer: its header lines, then its body."""
        if not self.peer or not self.lent.may(monotonic()):
            return None
        return self.worker.answers.write((block, body) if block else (body,))

    def write_segment(self, parts: Sequence[Buffer]) -> Segment | None:
        """A value for the router to be read where it lies; None: send it in frames. On any thread."""
        if not self.peer or sum(map(len, parts)) < SMALLEST_BYTES or not self.lent.may(monotonic()):
            return None
        return self.worker.segments.write(parts)

    def _taken(self, slot: int, inode: int, refused: bool) -> None:
        """The router has an answer, or cannot open it."""
        job = self.jobs.get(slot)
        flow = None if job is None else job.flow
        if isinstance(flow, SegmentFlow) and flow.segment.inode == inode:
            (flow.refused if refused else flow.taken)()
        if refused:
            self.lent.refused(inode, monotonic())

    def on_end(self) -> None:
        self.lent.end()
        self.worker.lost(self)
        for job in list(self.jobs.values()):
            if isinstance(job, ReservedJob):
                self.worker.reservations.link_ended(job)
                continue
            self.worker.cancel(job)
            if job.upload is not None and job.uploaded != len(job.upload):
                self.finish(job, b"")
        self.worker.read_done()  # of a read that broke off in the middle

    def on_resume(self) -> None:
        for job in list(self.jobs.values()):
            if job.flow is not None:
                job.flow.credit(0)
