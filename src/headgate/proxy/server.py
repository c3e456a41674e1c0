"""The HTTP proxy process: listens, follows the snapshot, and ends without losing a request.

`Server` is what all connections share: limits, routes, the router, the receive buffer, one sweep
for all time-outs. What a connection does is connection.py, what it answers answer.py.

Rule: nothing is accepted before the first snapshot, since a path that is not routed yet would be
answered with 404; connections wait in the listening socket's queue until then.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.msgpack import encode

from headgate import eventloop, logs
from headgate.config import HTTPOptions, as_http_options
from headgate.core.http11 import Head, Limits, header_values
from headgate.core.replies import http_date
from headgate.core.routes import RouteTable
from headgate.core.state import Endpoint, Snapshot
from headgate.engine import listener
from headgate.proxy import admin, fields
from headgate.proxy.answer import Starts
from headgate.proxy.budget import Budget
from headgate.proxy.connection import Connection
from headgate.proxy.door import Door
from headgate.proxy.second_opinion import SecondOpinion
from headgate.proxy.upload import Lender, Upload
from headgate.router import Router
from headgate.wire import descriptors, messages
from headgate.wire.arena import Arena
from headgate.wire.control import ControlClient
from headgate.wire.home import home_of_child
from headgate.wire.link import receive_buffer

if TYPE_CHECKING:
    import socket

    from headgate.engine.boot import ChildBoot
    from headgate.proxy.asgi import Stack
    from headgate.proxy.dispatch import Dispatching
    from headgate.proxy.tls import Certificate

log = logging.getLogger("headgate.proxy")

QUEUE_LIMIT = 1000  # requests that may wait per backend whose config does not say
#: How much is received at once while no body is expected.
_HEAD_BYTES = 64 * 1024
#: How much of an answer the kernel keeps of what it has not sent; socket.TCP_NOTSENT_LOWAT is newer than Python 3.11.
_UNSENT_BYTES = 256 * 1024
_IPPROTO_TCP, _TCP_NOTSENT_LOWAT = 6, 25
_TRIM_S = 5.0
#: When it leaves: how long it takes to accept those who have connected already, and how long a connection
#: without a request is kept open, for a request that is on its way just then.
_QUEUE_S = 0.5
_LAST_REQUEST_S = 0.1
_LOOK_S = 0.005
_TWO_DIGITS = [b"%02x" % number for number in range(0x100)]
#: How long to wait for a first snapshot before clients are answered without one.
_SNAPSHOT_S = 2.0


class Target(NamedTuple):
    """An endpoint and its part of a request's meta, to be followed by the path's parameters."""

    endpoint: Endpoint
    route: bytes
    route_alone: bytes  # with no parameters


class Server:
    """What the connections of one proxy share."""

    def __init__(self, options: HTTPOptions, router: Router, lender: Lender | None = None) -> None:
        self.options = options
        self.limits = Limits(**{name: getattr(options, name) for name in Limits.__struct_fields__})
        self.router = router
        self.lender = lender
        self.app: Stack | None = None  # middlewares around everything
        self.scheme = "https" if options.ssl_certfile else "http"
        self.is_trusted = fields.trust(options.forwarded_allow_ips)
        self.connections: set[Connection] = set()
        self.budget = Budget(options.max_buffered_bytes)
        self.second_opinion = SecondOpinion()
        self.view = receive_buffer()
        self.memory: Any = self.view.obj  # the same, whose slices are bytes
        self.head_view = self.view[:_HEAD_BYTES]
        self.table = RouteTable(())
        self._routes: list[tuple[str, str, tuple[str, ...]]] = []
        self.targets: dict[str, Target] = {}
        self.snapshot = Snapshot()
        self.leaving = False
        self.count = 0  # requests so far
        self._id_prefix = os.urandom(4).hex().encode() + b"-"
        self._id_start = b"%b%09x" % (self._id_prefix, 0)
        self.tick_s = max(0.02, min(0.5, self._shortest_timeout_s() / 4))
        self.now = 0.0
        self.date = b""
        self.starts = Starts()
        self._date_of = 0
        self._trim_at = 0.0

    def _shortest_timeout_s(self) -> float:
        limits = self.limits
        return min(
            limits.head_timeout_s, limits.body_timeout_s, limits.write_timeout_s, limits.keep_alive_timeout_s
        )

    def follow(self, snapshot: Snapshot) -> None:
        """Route by `snapshot` from now on."""
        self.router.follow(snapshot)
        self.snapshot = snapshot
        routes = [(each.name, each.route, each.methods) for each in snapshot.endpoints if each.route is not None]
        if routes != self._routes:  # most changes concern no route
            self._routes, self.table = routes, RouteTable(routes)
        before = self.targets
        self.targets = {each.name: _target(each, before.get(each.name)) for each in snapshot.endpoints}

    def new_id(self) -> bytes:
        """An id for a request that brings none."""
        self.count = count = self.count + 1
        low = count & 0xFF
        if not low:
            self._id_start = b"%b%09x" % (self._id_prefix, count >> 8)
        return self._id_start + _TWO_DIGITS[low]

    def borrow(self, owner: Dispatching, size: int) -> Upload | None:
        """Room in the arena for a body, if there is and it pays."""
        if self.lender is None or self.app is not None:
            return None
        return self.lender.take(owner, size)

    def refusal(self, head: Head, raw: bytes, scheme: str, local: tuple[str, int]) -> admin.Local | None:
        """The proxy's own answer to a request; None if an endpoint serves it."""
        if head.path.startswith(admin.PREFIX):
            return admin.page(head.path, head.method, self.snapshot, self.leaving)
        outcome = self.table.match(head.path, head.method)
        if outcome[0] == "match":
            return None
        hosts = header_values(raw, b"host")
        host = hosts[0].decode("latin-1") if hosts and hosts[0] else f"{local[0]}:{local[1]}"
        templates = self.table.templates
        return admin.unrouted(outcome, head.path, head.method, templates, f"{scheme}://{host}", head.query)

    def sweep(self, now: float, wall: float) -> None:
        """Find what timed out. To be called every `tick_s`."""
        self.now = now
        if int(wall) != self._date_of:
            self._date_of = int(wall)
            self.date = http_date(self._date_of)
            self.starts.follow(self.date)
        for connection in list(self.connections):
            connection.sweep(now)
        if self.lender is not None and now >= self._trim_at:
            self._trim_at = now + _TRIM_S
            self.lender.sweep()
            self.lender.arena.trim()

    def leave(self) -> None:
        """From now on each answer is its connection's last one."""
        self.leaving = True
        for connection in self.connections:
            connection.last = True

    def close_idle(self) -> None:
        """End the connections that ask for nothing. To be called after `leave`, until none is left."""
        for connection in list(self.connections):
            connection.leave_if_idle()


def _target(endpoint: Endpoint, before: Target | None) -> Target:
    if before is not None and before.endpoint is endpoint:  # as most are, after a change
        return before
    route = encode(endpoint.name) + encode(endpoint.route)
    return Target(endpoint, route, route + b"\x90")


class Proxy:
    """The process: server, control connection, listening socket."""

    def __init__(self, child: ChildBoot) -> None:
        assert child.http_listener is not None
        boot = child.boot
        home = home_of_child(boot)
        self._id = child.id
        self._node = home.node
        self._listener: socket.socket = child.http_listener
        self._middlewares = boot.middlewares
        self._tls_fd = boot.tls_fd
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._options = as_http_options(boot.http)
        arena = Arena(self._options.max_buffered_bytes)
        lender = Lender(arena)
        router = Router(
            home.token,
            child.id,
            node=home.node,
            arena_fd=arena.fd,
            on_free=lender.on_free,
            queue_limit=QUEUE_LIMIT,
        )
        self.server = Server(self._options, router, lender)
        self._listening: Door | None = None
        self._first = asyncio.Event()
        self._control = ControlClient(
            home.find,
            home.token,
            self._hello,
            on_message=self._on_message,
            on_snapshot=self._on_snapshot,
            on_gone=self._end,
        )

    def _hello(self, version: int) -> messages.Hello:
        return messages.Hello(
            "proxy", self._id, os.getpid(), follows=True, snapshot_version=version, node=self._node
        )

    async def run(self) -> None:
        """Serve until told to leave, or until the instance is gone."""
        if self._middlewares:
            from headgate.proxy.asgi import load

            self.server.app = load(self.server, self._middlewares)
        self._tick()
        certificate = _certificate(self._options, self._tls_fd)
        await self._control.open()
        try:
            await asyncio.wait_for(self._first.wait(), _SNAPSHOT_S)
        except TimeoutError:
            log.warning("no snapshot came in %g s; paths are answered with 404 until it does", _SNAPSHOT_S)
        await self._listen(certificate)
        gc.collect()
        gc.freeze()
        watching = None if certificate is None else self._loop.create_task(certificate.watch())
        await self._ended
        if watching is not None:
            watching.cancel()

    async def _listen(self, certificate: Certificate | None) -> None:
        if self.server.leaving or self._ended.done():
            return
        options = {} if certificate is None else certificate.for_server()
        # Its connections have it from it. Without, a client that reads nothing has the kernel keep 4 MB for it.
        self._listener.setsockopt(_IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        self._listening = Door(self._listener, lambda: Connection(self.server), **options)
        await self._listening.open()

    def _tick(self) -> None:
        self._loop.call_later(self.server.tick_s, self._tick)
        self.server.sweep(self._loop.time(), time.time())
        if self._listening is not None:
            self._listening.look()

    def _on_snapshot(self, snapshot: Snapshot) -> None:
        self.server.follow(snapshot)
        self._first.set()

    def _on_message(self, message: messages.FromController) -> None:
        if isinstance(message, messages.Goodbye):
            self._leave(message.timeout_s)

    def _leave(self, timeout_s: float) -> None:
        if self.server.leaving:
            return
        self.server.leave()
        self._loop.call_later(timeout_s, self._end)
        begun = self._loop.time()
        with contextlib.suppress(OSError):  # then some of those who come now are reset
            listener.admit_no_more(self._listener)
        self._close_listener(begun + _QUEUE_S)
        # Who was accepted just now is among the connections a turn later.
        self._loop.call_later(_LOOK_S, self._wait_for_connections, begun + _LAST_REQUEST_S)

    def _close_listener(self, at_last: float) -> None:
        """Close it when all who waited there have been accepted: to close it is to reset them."""
        is_accepting = self._listening is not None and self._loop.time() < at_last
        if is_accepting and listener.has_waiting(self._listener):
            self._loop.call_later(_LOOK_S, self._close_listener, at_last)
            return
        if self._listening is not None:
            self._listening.close()
        self._listener.close()

    def _wait_for_connections(self, patient_until: float) -> None:
        is_patient = self._loop.time() < patient_until
        if not is_patient:
            self.server.close_idle()
        in_handshake = is_patient and self.server.scheme == "https"  # there may be such, and they are not counted yet
        if self.server.connections or in_handshake or self._listener.fileno() >= 0:
            self._loop.call_later(_LOOK_S, self._wait_for_connections, patient_until)
        else:
            self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def _certificate(options: HTTPOptions, kept_fd: int) -> Certificate | None:
    if not options.ssl_certfile:
        return None
    from headgate.proxy.tls import Certificate, Files, Kept

    return Certificate(Files(options.ssl_certfile, options.ssl_keyfile), Kept(kept_fd))


async def _serve(child: ChildBoot) -> None:
    await Proxy(child).run()


def main(child: ChildBoot) -> int:
    """Be an HTTP proxy until the instance shuts down; the exit status."""
    logs.configure()
    descriptors.raise_limit()
    eventloop.run(_serve(child))
    return 0
