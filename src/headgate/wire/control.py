"""The control connection: calls to the controller, snapshots and their acknowledgements.

`Hub` is the controller's side: it accepts peers and hands their messages on. `ControlClient` is
everybody else's: it stays connected through the controller's restarts, sends unanswered calls
(pending.py) again, keeps the newest snapshot and acknowledges it once `on_snapshot` has made it the one in
force. It lives on one event loop; a process whose loop belongs to its user runs it on a thread of headgate's
own, thread.py.

A connection brings the whole snapshot once, and then what changes (core/deltas.py). A change of another
snapshot than the one that is there breaks the protocol: the next connection brings all of it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from headgate.core import deltas, framing
from headgate.core.state import Snapshot
from headgate.errors import InstanceError, ProtocolError
from headgate.wire import messages
from headgate.wire.acceptor import Acceptor
from headgate.wire.calling import OVER
from headgate.wire.handshake import dial
from headgate.wire.link import Frame, Link, open_link
from headgate.wire.pending import Pending

__all__ = ["RECONNECT_S", "Acceptor", "ControlClient", "Hub", "Peer"]

RECONNECT_S = 0.02
_decode_snapshot = msgspec.msgpack.Decoder(Snapshot).decode
_decode_delta = msgspec.msgpack.Decoder(deltas.Delta).decode


class Peer(Link):
    """One process as the controller sees it; `role` is empty until its Hello."""

    role = ""
    id = ""
    pid = 0
    follows = False
    is_local = True  # it is on this node: its pid means something here

    def __init__(self, hub: Hub) -> None:
        super().__init__()
        self._hub = hub

    def tell(self, message: messages.FromController) -> None:
        """Send a message; nothing happens when the peer is gone."""
        if not self.closed:
            self.send(messages.framed(message))

    def on_frames(self, frames: list[Frame]) -> None:
        for kind, _, _, _, _, source, start, end in frames:
            if kind != framing.CONTROL:
                raise ProtocolError(f"frame type {kind} on a control connection")
            try:
                message = messages.decode_to_controller(source[start:end])
            except msgspec.MsgspecError as error:
                raise ProtocolError(f"not a control message: {error}") from None
            if isinstance(message, messages.Hello):
                self.role, self.id, self.pid = message.role, message.id, message.pid
                self.follows = message.follows
            self._hub.on_message(self, message)

    def on_end(self) -> None:
        self._hub.peers.discard(self)
        if self.role:
            self._hub.on_gone(self)


class Hub:
    """The controller's end of all control connections.

    on_message(peer, message)   every message, Hello first
    on_gone(peer)               the connection of a peer that had said Hello ended
    """

    def __init__(
        self,
        listeners: socket.socket | Sequence[socket.socket],
        token: bytes,
        on_message: Callable[[Peer, messages.ToController], None],
        on_gone: Callable[[Peer], None],
    ) -> None:
        self.peers: set[Peer] = set()
        self.on_message = on_message
        self.on_gone = on_gone
        self._acceptor = Acceptor(listeners, token, self._admit)

    def open(self) -> None:
        """Accept connections on the running loop."""
        self._acceptor.open()

    async def _admit(self, sock: socket.socket, name: str, fds: list[int]) -> None:
        for fd in fds:
            os.close(fd)
        peer = Peer(self)
        peer.is_local = sock.family == socket.AF_UNIX
        self.peers.add(peer)
        await open_link(peer, sock)

    def close(self) -> None:
        """Stop accepting and end every connection once it is written out."""
        self._acceptor.close()
        for peer in list(self.peers):
            peer.close()


class _Connection(Link):
    """The client's side of one connection to one incarnation of the controller."""

    def __init__(self, client: ControlClient) -> None:
        super().__init__()
        self._client = client

    def on_frames(self, frames: list[Frame]) -> None:
        self._client._pending.heard()
        for kind, _, _, _, _, source, start, end in frames:
            if kind != framing.CONTROL:
                raise ProtocolError(f"frame type {kind} on a control connection")
            self._client._received(messages.decode_from_controller(source[start:end]))

    def on_end(self) -> None:
        self._client._lost(self)


class ControlClient:
    """A process's connection to its controller.

    find          a home's (home.py): the controller's address, or None when the instance is over
    hello         makes the Hello for each (re)connection, given the version of the newest snapshot
    on_message    what is not an answer, a snapshot or a ping: commands for replicas and proxies
    on_snapshot   called with each newer snapshot, on this loop, before it is acknowledged
    on_gone       called once when the instance is over
    """

    def __init__(
        self,
        find: Callable[[Exception | None], Awaitable[str | None]],
        token: bytes,
        hello: Callable[[int], messages.Hello],
        *,
        on_message: Callable[[messages.FromController], None] = lambda message: None,
        on_snapshot: Callable[[Snapshot], None] = lambda snapshot: None,
        on_gone: Callable[[], None] = lambda: None,
    ) -> None:
        self.snapshot = Snapshot()
        self.gone = False
        self.on_message = on_message
        self.on_snapshot = on_snapshot
        self.on_gone = on_gone
        self._find = find
        self._address = ""  # the one tried last
        self._token = token
        self._hello = hello
        self._link: _Connection | None = None
        self._pending = Pending()
        self._connected_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._snapshot_waiters: list[tuple[int, asyncio.Future[None]]] = []

    async def open(self) -> None:
        """Connect; raises InstanceError when there is nobody to connect to."""
        self._loop = asyncio.get_running_loop()
        await self._connect()
        if self._link is None:
            raise InstanceError(f"no headgate instance listens on {self._address}" if self._address else OVER)

    async def _connect(self) -> None:
        error: Exception | None = None
        while not self.gone:
            address = await self._look(error)
            if address is None:
                self._end()
                return
            if error is not None:  # the controller is being replaced: do not spin
                await asyncio.sleep(RECONNECT_S)
            try:
                await self._reach(address)
                return
            except (OSError, ProtocolError) as trouble:
                error = trouble

    async def _look(self, error: Exception | None) -> str | None:
        """Where the controller is, however long it takes to know; None: the instance is over."""
        while not self.gone:
            try:
                return await self._find(error)
            except (OSError, ProtocolError) as trouble:
                error = trouble
                await asyncio.sleep(RECONNECT_S)
        return None

    async def _reach(self, address: str) -> None:
        self._address = address
        link = _Connection(self)
        sock, _ = await dial(address, self._token, self._hello(self.snapshot.version).id)
        await open_link(link, sock)
        if self.gone:
            link.close()
            return
        self._link = link
        self._connected_at = asyncio.get_running_loop().time()
        self.tell(self._hello(self.snapshot.version))
        for request in self._pending:
            self.tell(request)

    def tell(self, message: messages.ToController) -> None:
        """Send a message; dropped while the controller is away (Hello repeats all that matters)."""
        if self._link is not None:
            self._link.send(messages.framed(message))

    async def call(self, method: str, params: dict[str, Any]) -> Any:
        """The controller's answer to a call, repeated by itself when the controller is replaced.

        Raises what the controller raised, ControllerUnavailable when it gives no sign of life, and
        InstanceError when the instance is over.
        """
        if self.gone:
            raise InstanceError(OVER)
        request = self._pending.add(method, params)
        self.tell(request)
        return await self._pending.answer(request)

    async def newer_than(self, version: int) -> None:
        """Wait until a snapshot newer than `version` is in force here."""
        if self.snapshot.version <= version and not self.gone:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._snapshot_waiters.append((version, waiter))
            await waiter

    def _received(self, message: messages.FromController) -> None:
        if isinstance(message, messages.Response):
            self._pending.answered(message)
        elif isinstance(message, messages.Publish | messages.PublishChange):
            self._take(message)
        elif isinstance(message, messages.Ping):
            self.tell(messages.Pong())
        else:
            self.on_message(message)

    def _take(self, publish: messages.Publish | messages.PublishChange) -> None:
        if publish.version > self.snapshot.version:
            if isinstance(publish, messages.Publish):
                self.snapshot = _decode_snapshot(publish.snapshot)
            else:
                self.snapshot = deltas.apply(self.snapshot, _decode_delta(publish.delta))
            self.on_snapshot(self.snapshot)
            waiters, self._snapshot_waiters = self._snapshot_waiters, []
            for version, waiter in waiters:
                if self.snapshot.version <= version:
                    self._snapshot_waiters.append((version, waiter))
                elif not waiter.done():
                    waiter.set_result(None)
        self.tell(messages.Ack(self.snapshot.version))

    def _lost(self, link: _Connection) -> None:
        if link is self._link and not self.gone:
            self._link = None
            assert self._loop is not None
            self._task = self._loop.create_task(self._reconnect())

    async def _reconnect(self) -> None:
        now = asyncio.get_running_loop().time()
        if now - self._connected_at < 1.0:  # it did not last: do not spin
            await asyncio.sleep(RECONNECT_S)
        await self._connect()

    def _end(self) -> None:
        if self.gone:
            return
        self.gone = True
        self._pending.fail(InstanceError(OVER))
        for _, waiter in self._snapshot_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self.on_gone()

    def over(self) -> None:
        """The instance is over, says who knows."""
        self._end()
        self._disconnect()

    def end_threadsafe(self) -> None:
        """As `over`, from any thread."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(self.over)
        except RuntimeError:  # the loop was closed
            pass

    def close(self) -> None:
        """Leave; the instance goes on. Calls without an answer fail."""
        self.on_gone = lambda: None
        self._end()
        self._disconnect()

    def _disconnect(self) -> None:
        if self._task is not None:
            self._task.cancel()
        if self._link is not None:
            self._link.close()
