"""The router's end of a link to one replica of this node: requests out, answers in.

Each request holds a slot of the link from CALL to its one final answer: a REPLY or ERROR, an END
after a streamed one, BUSY, or DRAINING. A caller that has given up leaves a stand-in in its slot,
so that the slot is free again only when the replica says so.

What a request lost with the link becomes is decided only after the link was read dry and the
process behind it is dead: then the slot page tells which requests had started.
"""

from __future__ import annotations

import asyncio
import os
import struct
from typing import TYPE_CHECKING, Protocol

from headgate.core import framing
from headgate.core.assignment import Replica
from headgate.errors import ProtocolError
from headgate.wire.borrowed import place_of
from headgate.wire.caller import NEVER as _NEVER
from headgate.wire.caller import Abandoned, Caller, Hub, Line
from headgate.wire.handshake import dial
from headgate.wire.link import PIECE_BYTES, TOGETHER, WINDOW_BYTES, Frame, Source, open_link
from headgate.wire.sharing import SharingLink
from headgate.wire.slots import SlotPage

if TYPE_CHECKING:
    from mmap import mmap

    from headgate.core.state import ReplicaAddress

__all__ = ["Caller", "ReplicaLink", "Slots"]

_pack = framing.HEADER.pack
#: As a header, with a CALL's argument in its parts: remaining ms, head length, want.
_pack_call = struct.Struct("<IBBHIIHH").pack
_unpack, _HEADER_BYTES = framing.HEADER.unpack_from, framing.HEADER_BYTES
_REPLY, _MORE, _CALL, _SEGMENT = framing.REPLY, framing.MORE, framing.CALL, framing.SEGMENT
_NOT_HERE = _MORE | _SEGMENT
_TOTAL = struct.Struct("<Q")
_MAX_MS = 0xFFFFFFFF
#: A body up to this size goes in its CALL; a larger one in pieces, so that it holds up nobody.
WHOLE_BYTES = 128 * 1024
_DEATH_S = 1.0


class Slots(Protocol):
    """Hands out slots. `free` is where a slot goes back to, `marks` has a byte for each (slots.SlotPage)."""

    fd: int | None
    free: list[int]
    marks: mmap

    def passed(self) -> None: ...
    def take(self) -> int: ...
    def started(self, slot: int) -> bool: ...
    def close(self) -> None: ...


class ReplicaLink(SharingLink):
    """A link to one replica of this node, connected by `open`. For other nodes: remote_link.py."""

    def __init__(self, router: Hub, backend: Line, replica: ReplicaAddress) -> None:
        super().__init__()
        self.replica = replica
        self._router = router
        self._backend = backend
        self._page: Slots = self._make_slots()
        self._free, self._marks = self._page.free, self._page.marks
        self._pending: dict[int, Caller] = {}
        self.counted = Replica(replica.id)  # until backend_route.py sets the one that counts
        self._uploads: list[tuple[int, memoryview]] = []
        self._pidfd = -1
        self._pong_at = router.loop.time()
        self._silent = False
        self._retired = False

    def _make_slots(self) -> Slots:
        return SlotPage()

    # --- sending ---

    def call(self, caller: Caller, want: int) -> None:
        """Send a request whose slot has been reserved; `want` more wait for this replica."""
        if caller.flags & _SEGMENT and not self._lend(caller):
            self._call_inline(caller, want)
            return
        slot = -1
        try:  # as SlotPage.take
            slot = self._free.pop()
            self._marks[slot] = 0
        except IndexError:  # none is free, or it has no byte
            if slot < 0:
                slot = self._page.take()
        pending = self._pending
        is_alone = not pending
        pending[slot] = caller
        caller.link = self
        caller.slot = slot
        meta, head, body = caller.meta, caller.head, caller.body
        meta_bytes, head_bytes = len(meta), len(head)
        size = meta_bytes + head_bytes + len(body)
        remaining = 0 if caller.deadline == _NEVER else self._remaining_ms(caller)
        if size <= WHOLE_BYTES:
            frame = _pack_call(size, _CALL, caller.flags, meta_bytes, slot, remaining, head_bytes, want)
            out = self._out
            out.append(b"".join((frame, meta, head, body)))
            if is_alone or len(out) >= TOGETHER:
                self.flush()
            elif not (self._scheduled or self.is_reading):
                self.schedule()
        else:
            self._upload(caller, remaining, want)
        caller.on_assigned()

    def _remaining_ms(self, caller: Caller) -> int:
        return min(_MAX_MS, max(1, int((caller.deadline - self._router.loop.time()) * 1000)))

    def _call_inline(self, caller: Caller, want: int) -> None:
        """As `call`, for a replica that cannot read the body where it lies; one it goes to later may."""
        kept = caller.flags, caller.body
        caller.flags, caller.body = caller.inline()
        try:
            self.call(caller, want)
        finally:
            caller.flags, caller.body = kept

    def _lend(self, caller: Caller) -> bool:
        """Let the replica read the request's segment, if it can."""
        if caller.segment is None or not self.peer or not self.lent.may(self._router.loop.time()):
            return False
        self.lent.add(caller.segment)
        return True

    def _upload(self, caller: Caller, remaining: int, want: int) -> None:
        meta, head, slot = caller.meta, caller.head, caller.slot
        size = len(meta) + len(head) + 8
        first = _pack_call(size, _CALL, caller.flags | _MORE, len(meta), slot, remaining, len(head), want)
        self.send(b"".join((first, meta, head, _TOTAL.pack(len(caller.body)))))
        self._uploads.append((slot, memoryview(caller.body)))
        if len(self._uploads) == 1:
            self._pump()

    def _pump(self) -> None:
        """One piece of each upload in turn, for as long as the replica keeps up."""
        while self._uploads and not self.paused and not self.closed:
            turn, self._uploads = self._uploads, []
            for slot, body in turn:
                piece, rest = body[:PIECE_BYTES], body[PIECE_BYTES:]
                self.send_with(_pack(len(piece), framing.DATA, 0, 0, slot, 0), piece)
                if rest:
                    self._uploads.append((slot, rest))
                else:
                    self.send(_pack(0, framing.END, 0, 0, slot, 0))

    def on_resume(self) -> None:
        self._pump()

    def abandon(self, caller: Caller, timed_out: bool) -> None:
        """Cancel a request that was sent: its answer, if any, is thrown away."""
        slot = caller.slot
        if self._pending.get(slot) is not caller:
            return
        stand_in = Abandoned(caller)
        self._pending[slot] = stand_in
        caller.link = None
        self._uploads = [upload for upload in self._uploads if upload[0] != slot]
        self.send(_pack(0, framing.CANCEL, 0, 0, slot, int(timed_out)))
        if caller.answering:  # what was sent without credit of the caller's is granted here
            stand_in.grant(WINDOW_BYTES)

    def ping(self, now: float, silent_s: float) -> None:
        """Ask for a sign of life; one that gave none for `silent_s` gets no new requests."""
        self.sweep_readings(now)
        if self.closed:
            return
        if now - self._pong_at > silent_s and not self._silent:
            self._silent = True
            self._suspend()
        self.send(_pack(0, framing.PING, 0, 0, 0, 0))

    # --- receiving ---

    def on_bytes(self, data: bytes) -> None:
        """What most links receive, answers that are whole, without a tuple for each frame.

        From the first frame on that is anything else, all goes the way of `on_frames`.
        """
        if not self._framer.is_between:
            super().on_bytes(data)
            return
        pending, free, counted = self._pending, self._free, self.counted
        position, start, size = 0, _HEADER_BYTES, len(data)
        answers = 0
        while start <= size:
            length, kind, flags, meta_len, slot, arg = _unpack(data, position)
            end = start + length
            if kind != _REPLY or flags & _NOT_HERE or end > size or meta_len > length:
                break
            caller = pending.pop(slot)
            free.append(slot)
            caller.link = None
            counted.load -= 1
            if caller.deadline != _NEVER:
                self._in_time(caller)
            caller.on_reply(arg, flags, meta_len, data, start, end)
            answers += 1
            position, start = end, end + _HEADER_BYTES
        if answers:
            self._backend.answered(answers)
        if position < size:
            super().on_bytes(data[position:] if position else data)
        elif self._retired and not pending:
            self.close()

    def on_frames(self, frames: list[Frame]) -> None:
        pending = self._pending
        answers = 0
        for kind, flags, meta_len, slot, arg, source, start, end in frames:
            if kind == _REPLY and not flags & _NOT_HERE:
                self._finish(slot).on_reply(arg, flags, meta_len, source, start, end)
                answers += 1
            elif kind == _REPLY and flags & _SEGMENT:
                self._on_segment(arg, flags, slot, source, start + meta_len)
            elif kind == _REPLY:
                caller = pending[slot]
                caller.answering = True
                caller.on_reply_start(arg, flags, meta_len, source, start, end)
            elif kind == framing.DATA:
                pending[slot].on_data(source, start, end)
            else:
                self._on_other(kind, flags, meta_len, slot, arg, source, start, end)
        if answers:
            self._backend.answered(answers)
        if self._retired and not pending:
            self.close()

    def _on_other(
        self, kind: int, flags: int, meta_len: int, slot: int, arg: int, source: Source, start: int, end: int
    ) -> None:
        backend = self._backend
        if kind == framing.END:
            self._finish(slot).on_reply_end()
            backend.answered(1)
        elif kind == framing.ERROR:
            self._finish(slot).on_error(arg, flags, meta_len, source, start, end)
            backend.answered(1)
        elif kind == framing.PONG:
            self._pong()
        elif kind == framing.BUSY:
            backend.replicas.refuse(self.replica.id)
            caller = self._returned(slot)
            if not caller.gone:
                backend.refused(caller)
        elif kind == framing.ROOM:
            self._room(arg)
        elif kind == framing.DRAINING:
            backend.replicas.release(self.replica.id)
            if not arg:
                self._suspend()
            self._elsewhere(slot, arg)
        elif kind == framing.FREE and flags & _SEGMENT:
            self.lent.back(arg, spoiled=bool(flags & _MORE))
        elif kind == framing.FREE:
            self._router.on_free(arg)
        elif kind == framing.TAKEN:
            if flags & _MORE:
                self._in_pieces(slot, arg)
        else:
            raise ProtocolError(f"frame type {kind} from a replica")

    # --- large values (segments.py) ---

    def _in_pieces(self, slot: int, inode: int) -> None:
        """The replica cannot open the segment of this request and waits for the body itself."""
        caller = self._pending[slot]
        if not caller.gone:  # else it has been told so
            self._uploads.append((slot, caller.inline()[1]))
            if len(self._uploads) == 1:
                self._pump()
        self.lent.refused(inode, self._router.loop.time())

    def _on_segment(self, arg: int, flags: int, slot: int, source: Source, start: int) -> None:
        """An answer is there to be read: it is complete once it is mapped here."""
        place = place_of(source, start)
        head, arg = arg >> 32, arg & 0xFFFFFFFF
        value = memoryview(b"")
        if self._pending[slot].gone:
            self.say_free(place[1])
        else:
            try:
                value = self.borrow(place) if flags & framing.VALUE else self.read(place)
            except OSError:
                self.ask_for_pieces(slot, place)
                return
            if head > len(value):
                raise ProtocolError(f"a head of {head} bytes in an answer of {len(value)}")
        self.say_taken(slot, place)
        self._finish(slot).on_reply(arg, flags, head, value, 0, len(value))
        self._backend.answered(1)

    def _room(self, count: int) -> None:
        """The replica keeps `count` slots for us: use them now or hand them back."""
        replicas = self._backend.replicas
        spare = replicas.room(self.replica.id, count)
        self._backend.dispatch()
        self._hand_back(spare + replicas.spare_grants(self.replica.id))

    def _suspend(self) -> None:
        self._hand_back(self._backend.replicas.suspend(self.replica.id))

    def _hand_back(self, grants: int) -> None:
        if grants:
            self.send(_pack(0, framing.ROOM, 0, 0, 0, grants))

    def _finish(self, slot: int) -> Caller:
        caller = self._pending.pop(slot)
        self._page.free.append(slot)
        caller.link = None
        self.counted.load -= 1
        if caller.deadline != _NEVER:
            self._in_time(caller)
        return caller

    def _in_time(self, caller: Caller) -> None:
        self._router.timed.discard(caller)
        caller.deadline = _NEVER

    def _forget(self, slot: int) -> Caller:
        caller = self._pending.pop(slot)
        self._page.free.append(slot)
        caller.link = None
        return caller

    def _returned(self, slot: int) -> Caller:
        """The replica did not take the request in this slot."""
        caller = self._forget(slot)
        self._uploads = [upload for upload in self._uploads if upload[0] != slot]
        if caller.segment is not None:
            self.lent.back(caller.segment.inode)
        caller.on_refused()
        return caller

    def _elsewhere(self, slot: int, version: int) -> None:
        """The replica drains, or knows of a snapshot that this process lacks."""
        caller = self._returned(slot)
        if not caller.gone:
            if version:
                self._router.hold(caller, version)
            else:
                self._backend.again(caller)
        self._backend.dispatch()

    def _pong(self) -> None:
        self._pong_at = self._router.loop.time()
        if self._silent:
            self._silent = False
            self._backend.replicas.resume(self.replica.id)
            self._backend.dispatch()

    # --- the end ---

    def retire(self) -> None:
        """The replica is not listed any more: close once every request has its answer."""
        self._retired = True
        if not self._pending:
            self.close()

    def keep(self) -> None:
        """The replica is listed, perhaps again."""
        self._retired = False

    def discard(self) -> None:
        """The router closes: nobody waits for answers any more."""
        self._pending.clear()
        super().discard()

    def on_end(self) -> None:
        self.lent.end()
        self._backend.lost(self)
        if not self._pending:
            self._release()
            return
        loop = self._router.loop
        if self._pidfd >= 0:
            timer = loop.call_later(_DEATH_S, self._recover, False)
            loop.add_reader(self._pidfd, self._recover, True, timer)
        else:
            self._recover(False)

    def _recover(self, dead: bool, timer: asyncio.TimerHandle | None = None) -> None:
        """Decide what becomes of the requests that were lost with the link, oldest first in line."""
        if timer is not None:
            timer.cancel()
        if self._pidfd >= 0:
            self._router.loop.remove_reader(self._pidfd)
        lost = [(slot, caller) for slot, caller in self._pending.items() if not caller.gone]
        for _ in self._pending:
            self._backend.replicas.release(self.replica.id)
        self._pending = {}
        for slot, caller in reversed(lost):
            caller.link = None
            self._backend.recover(caller, started=self._started(slot, dead))
        self._release()
        self._backend.dispatch()

    def _started(self, slot: int, dead: bool) -> bool:
        """Whether user code may have begun to run for the lost request in `slot`."""
        return not dead or self._page.started(slot)

    def _release(self) -> None:
        self._page.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    # --- opening ---

    async def open(self) -> None:
        """Dial the replica; raises OSError or ProtocolError."""
        try:
            fds = [self._page.fd] if self._page.fd is not None else []
            if self._router.arena_fd is not None:
                fds.append(self._router.arena_fd)
            sock, pid = await dial(self.replica.address, self._router.token, self._router.name, fds)
        except BaseException:
            self._page.close()
            raise
        self._page.passed()
        self.peer = pid
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError:  # it has died already: the link ends at once
            self._pidfd = -1
        try:
            await open_link(self, sock)
        except BaseException:
            self.discard()
            self._release()
            raise
