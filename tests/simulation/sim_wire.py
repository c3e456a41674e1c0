"""Connections between simulated processes: bytes that take a while, links that break, listeners that are gone.

The product's own links (wire/link.py and what is built on it) run here with nothing replaced but what
reaches the kernel: `dial`, `open_link`, the acceptor, the shared page of slots, and the pidfd. `Network.installed`
puts these in their place for the time of a simulation.

As on a unix socket, what a process wrote before it died arrives, and then the end of the stream; a write
to a dead peer ends the connection at once, and what is unread is read dry. A link that is `cut` loses what
was under way.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

from simulation.sim_loop import ProcessLoop

import headgate.backend_route
import headgate.controller.health
import headgate.replica.async_calls
import headgate.replica.batches
import headgate.replica.links
import headgate.replica.plain_calls
import headgate.wire.control
import headgate.wire.remote_link
import headgate.wire.replica_link
import headgate.wire.slots
from headgate.errors import ProtocolError
from headgate.wire import handshake
from headgate.wire.caller import Caller
from headgate.wire.control import Hub
from headgate.wire.link import Link

#: In the simulation bodies larger than this travel in pieces.
WHOLE_BYTES = 300
PIECE_BYTES = 128
_SLOTS = 2048
_SLOWEST = 10.0


class Page(bytearray):
    """A shared page."""

    def close(self) -> None:
        """Unmapped."""


class MemorySlots(headgate.wire.slots.SlotPage):
    """The real one, on memory that needs no system call."""

    def __init__(self) -> None:
        self.marks: Any = Page(_SLOTS)
        self.fd: Any = self.marks
        self.free: list[int] = []
        self._next = 0

    def passed(self) -> None:
        self.fd = None


class End:
    """One end of a connection: a socket, and the transport and the raw duplicate that a Link has of it."""

    def __init__(self, network: Network, loop: ProcessLoop, family: int) -> None:
        self.network = network
        self.loop = loop
        self.family = family
        self.peer: End
        self.link: Any = None
        self.broken = False  # this end was closed, or its process is dead
        self.lost = False  # connection_lost was called
        self._under_way: deque[bytes] = deque()
        self._inbox: list[bytes] = []
        self._eof = False
        self._woken = False
        self._arrives = 0.0

    # --- as a socket ---

    def close(self) -> None:
        """Close this end; the peer reads what was written, then the end."""
        if not self.broken:
            self.broken = True
            self.network.ends.pop(self, None)
            self._deliver(self.peer._at_end)
            self._lose()

    def fileno(self) -> int:
        return 0

    def shutdown(self, how: int) -> None:
        pass

    def setblocking(self, flag: bool) -> None:
        pass

    def recv(self, size: int) -> bytes:
        """All that is unread: so a link that has ended is read dry. What was written on this node is there at once."""
        unread = b"".join((*self._inbox, *self._under_way))
        self._inbox.clear()
        self._under_way.clear()
        if not unread and not self._eof:
            raise BlockingIOError
        return unread

    def send(self, data: bytes) -> int:
        """As CallerLink.send_from_any_thread does."""
        if self.peer.broken:
            raise BrokenPipeError
        self.write(data)
        return len(data)

    # --- as a transport ---

    def write(self, data: bytes) -> None:
        if self.broken:
            return
        if self.peer.broken:  # EPIPE: the event loop drops unread input and reports the end
            self.broken = True
            self.network.ends.pop(self, None)
            self._lose()
        else:
            self.peer._under_way.append(bytes(data))
            self._deliver(self.peer._arrived)

    def writelines(self, parts: Any) -> None:
        self.write(b"".join(bytes(part) for part in parts))

    def abort(self) -> None:
        self.close()

    def get_write_buffer_size(self) -> int:
        return 0

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    # --- the wire ---

    def _deliver(self, function: Callable[..., object], *arguments: Any) -> None:
        """Have something happen at the peer, after all that was sent before."""
        network = self.network
        self._arrives = max(self._arrives, network.world.time() + network.delay_s())
        network.world.call_at(self._arrives, function, *arguments)

    def _arrived(self) -> None:
        if self._under_way:
            self._inbox.append(self._under_way.popleft())
            self._wake()

    def _at_end(self) -> None:
        self._eof = True
        self._wake()

    def _wake(self) -> None:
        if not self._woken and self.link is not None:
            self._woken = True
            self.loop.call_soon(self._read)

    def _read(self) -> None:
        self._woken = False
        link = self.link
        while self._inbox and not self.broken and not link.closed:
            data = b"".join(self._inbox)
            self._inbox.clear()
            while data and not self.broken and not link.closed:
                buffer = link.get_buffer(-1)
                size = min(len(buffer), len(data))
                buffer[:size] = data[:size]
                data = data[size:]
                link.buffer_updated(size)
        if self._eof and not self.broken:
            self.close()

    def _lose(self) -> None:
        """Tell the link that the connection has ended, in a later turn."""
        if self.link is not None and not self.lost:
            self.loop.call_soon(self._tell_lost)

    def _tell_lost(self) -> None:
        if not self.lost:
            self.lost = True
            self.link.connection_lost(None)

    def cut(self) -> None:
        """Both ends lose the connection, and what was under way."""
        for end in (self, self.peer):
            if not end.broken:
                end.broken = True
                end._inbox.clear()
                end._under_way.clear()
                end._eof = True
                end.network.ends.pop(end, None)
                end._lose()

    def process_died(self) -> None:
        """The kernel closes what a dead process had open."""
        self.broken = True
        self.network.ends.pop(self, None)
        self._deliver(self.peer._at_end)


class Listener:
    """Stands for a listening socket; what is done with those that connect is the acceptor's."""

    def __init__(self, network: Network, loop: ProcessLoop, address: str) -> None:
        self.network = network
        self.loop = loop
        self.address = address


class MemoryAcceptor:
    """As wire.acceptor.Acceptor; there are no strangers here."""

    def __init__(self, listener: Listener, token: bytes, admit: Callable[[Any, str, list[Any]], Any]) -> None:
        self.listener = listener
        self._admit = admit

    def open(self) -> None:
        self.listener.network.listening[self.listener.address] = self

    def accept(self, end: End, name: str, fds: list[Any]) -> None:
        """Someone has connected."""
        self.listener.loop.create_task(self._admit(end, name, fds))

    def close(self) -> None:
        self.listener.network.listening.pop(self.listener.address, None)


class Network:
    """All connections of one simulation.

    world      the loop of what no process does: bytes under way, engines, the user
    slow_s     the longest that most messages take; one in twenty takes ten times as long, up to `slowest_s`
    """

    def __init__(self, world: ProcessLoop, chance: random.Random, slow_s: float) -> None:
        self.world = world
        self.listening: dict[str, MemoryAcceptor] = {}
        self.ends: dict[End, None] = {}
        self.processes: dict[int, ProcessLoop] = {}  # by pid
        self._chance = chance
        self._slow_s = slow_s
        self.slowest_s = slow_s * _SLOWEST

    def delay_s(self) -> float:
        chance = self._chance.random()
        return chance * self._slow_s * (_SLOWEST if chance > 0.95 else 1.0)

    def died(self, loop: ProcessLoop, pid: int) -> None:
        """A process has ended: its connections break, and whoever watches it learns of it."""
        loop.end()
        self.processes.pop(pid, None)
        for address in [address for address, one in self.listening.items() if one.listener.loop is loop]:
            del self.listening[address]
        for end in [end for end in self.ends if end.loop is loop]:
            end.process_died()
        for other in self.processes.values():
            other.readable(pid)

    async def dial(self, address: str, token: bytes, name: str, fds: Any = ()) -> tuple[End, int]:
        """As wire.handshake.dial."""
        loop: Any = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(handshake.TIMEOUT_S):
                await asyncio.sleep(self.delay_s())
                acceptor = self.listening.get(address)
                if acceptor is None:
                    raise ConnectionRefusedError(f"nobody listens on {address}")
                theirs = acceptor.listener.loop
                greeted: asyncio.Future[None] = loop.create_future()
                theirs.call_soon(self._answer, greeted)  # a frozen process does not answer
                await greeted
                await asyncio.sleep(self.delay_s())
        except TimeoutError:
            raise ProtocolError(f"{address} did not answer within {handshake.TIMEOUT_S:g} s") from None
        if theirs.dead:
            raise ConnectionResetError(f"whoever listened on {address} is gone")
        is_remote = address.startswith("tcp:")
        family = 2 if is_remote else 1
        ours, other = End(self, loop, family), End(self, theirs, family)
        ours.peer, other.peer = other, ours
        self.ends[ours] = self.ends[other] = None
        theirs.call_soon(acceptor.accept, other, name, list(fds))
        pid = next((pid for pid, one in self.processes.items() if one is theirs), 0)
        return ours, 0 if is_remote else pid

    def _answer(self, greeted: asyncio.Future[None]) -> None:
        self.world.call_later(self.delay_s(), lambda: greeted.done() or greeted.set_result(None))

    async def open_link(self, link: Any, end: End) -> None:
        """As wire.link.open_link."""
        end.link = link
        if end.loop.dead:
            return
        link._transport = link._raw = end
        link._call_soon = end.loop.call_soon
        await asyncio.sleep(0)
        if end.broken:
            end._lose()
        else:
            end._wake()

    def pidfd_open(self, pid: int) -> int:
        """The pid itself stands for the descriptor; `died` makes it readable."""
        if pid not in self.processes:
            raise ProcessLookupError(pid)
        return pid

    # --- the product's doors to the kernel ---

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """This network in place of the kernel's."""
        os_of_links = SimpleNamespace(pidfd_open=self.pidfd_open, close=lambda fd: None)
        serials = iter(range(1 << 60))

        def hash_of(one: Any) -> int:
            """Sets of these are walked in the order in which they were first put into one, not by address."""
            serial: int | None = one.__dict__.get("_serial")
            if serial is None:
                serial = one.__dict__["_serial"] = next(serials)
            return serial

        replica_link, control = headgate.wire.replica_link, headgate.wire.control
        changes: list[tuple[Any, str, Any]] = [
            (replica_link, "os", os_of_links),
            (replica_link, "SlotPage", MemorySlots),
            (replica_link, "WHOLE_BYTES", WHOLE_BYTES),
            (replica_link, "PIECE_BYTES", PIECE_BYTES),
            (control, "Acceptor", MemoryAcceptor),
            (headgate.replica.batches, "monotonic", self.world.time),
            (headgate.replica.links, "monotonic", self.world.time),
            (headgate.replica.plain_calls, "monotonic", self.world.time),
            (headgate.replica.async_calls, "monotonic", self.world.time),
            (headgate.controller.health, "is_stopped_in_proc", self._is_stopped),
            (Caller, "__hash__", hash_of),
            (Link, "__hash__", hash_of),
        ]
        changes += [(each, "dial", self.dial) for each in (replica_link, headgate.wire.remote_link, control)]
        changes += [(each, "open_link", self.open_link) for each in (replica_link, headgate.wire.remote_link, control)]
        before = [(where, name, getattr(where, name)) for where, name, _ in changes]
        for where, name, value in changes:
            setattr(where, name, value)
        try:
            yield
        finally:
            for where, name, value in before:
                setattr(where, name, value)

    def _is_stopped(self, pid: int) -> bool:
        loop = self.processes.get(pid)
        return loop is not None and loop.frozen


def hub(network: Network, loop: ProcessLoop, address: str) -> Hub:
    """The controller's end of all control connections."""
    listener: Any = Listener(network, loop, address)
    return Hub(listener, b"", lambda peer, message: None, lambda peer: None)


