"""The HTTP proxy process: listens, follows the snapshot, and ends without losing a request.

`Server` is what all connections share: limits, routes, the router, the receive buffer, one sweep
for all time-outs. What a connection does is connection.py, what it answers answer.py.

Rule: nothing is accepted before the first snapshot, since a path that is not routed yet would be
answered with 404; connections wait in the listening socket's queue until then.
"""

from __future__ import annotations

import asyncio
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
from headgate.proxy import admin, fields
from headgate.proxy.budget import Budget
from headgate.proxy.connection import Connection
from headgate.proxy.second_opinion import SecondOpinion
from headgate.proxy.upload import Lender, Upload
from headgate.router import Router
from headgate.wire import messages
from headgate.wire.arena import Arena
from headgate.wire.control import ControlClient
from headgate.wire.home import home_of_child

if TYPE_CHECKING:
    import socket
    import ssl

    from headgate.engine.boot import ChildBoot
    from headgate.proxy.asgi import Stack
    from headgate.proxy.dispatch import Dispatching

log = logging.getLogger("headgate.proxy")

QUEUE_LIMIT = 1000  # requests that may wait per backend whose config does not say
_BACKLOG = 4096  # create_server calls listen() again: asyncio's own 100 would shrink the shared queue
_READ_BYTES = 256 * 1024
_HANDSHAKE_S = 10.0
_TRIM_S = 5.0
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
        self.view = memoryview(bytearray(_READ_BYTES))
        self.table = RouteTable(())
        self.targets: dict[str, Target] = {}
        self.snapshot = Snapshot()
        self.leaving = False
        self.count = 0  # requests so far
        self.id_prefix = os.urandom(4).hex().encode() + b"-"
        self.tick_s = max(0.02, min(0.5, self._shortest_timeout_s() / 4))
        self.now = 0.0
        self.date = b""
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
        routed = [(each.name, each.route, each.methods) for each in snapshot.endpoints if each.route is not None]
        self.table = RouteTable(routed)
        self.targets = {each.name: _target(each) for each in snapshot.endpoints}

    def new_id(self) -> bytes:
        """An id for a request that brings none."""
        self.count += 1
        return b"%b%011x" % (self.id_prefix, self.count)

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
        for connection in list(self.connections):
            connection.sweep(now)
        if self.lender is not None and now >= self._trim_at:
            self._trim_at = now + _TRIM_S
            self.lender.sweep()
            self.lender.arena.trim()

    def leave(self) -> None:
        """Answer what is in flight, each with `Connection: close`; nothing new."""
        self.leaving = True
        for connection in list(self.connections):
            connection.leave_if_idle()


def _target(endpoint: Endpoint) -> Target:
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
        self._listening: asyncio.Server | None = None
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
        context = _ssl_context(self._options)
        await self._control.open()
        try:
            await asyncio.wait_for(self._first.wait(), _SNAPSHOT_S)
        except TimeoutError:
            log.warning("no snapshot came in %g s; paths are answered with 404 until it does", _SNAPSHOT_S)
        await self._listen(context)
        gc.collect()
        gc.freeze()
        await self._ended

    async def _listen(self, context: ssl.SSLContext | None) -> None:
        if self.server.leaving or self._ended.done():
            return
        options: dict[str, Any] = {"ssl_handshake_timeout": _HANDSHAKE_S} if context else {}
        self._listening = await self._loop.create_server(
            lambda: Connection(self.server), sock=self._listener, backlog=_BACKLOG, ssl=context, **options
        )

    def _tick(self) -> None:
        self._loop.call_later(self.server.tick_s, self._tick)
        self.server.sweep(self._loop.time(), time.time())

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
        if self._listening is not None:
            self._listening.close()
        self._listener.close()
        self._loop.call_later(timeout_s, self._end)
        self._wait_for_connections()

    def _wait_for_connections(self) -> None:
        if self.server.connections:
            self._loop.call_later(0.01, self._wait_for_connections)
        else:
            self._end()

    def _end(self) -> None:
        if not self._ended.done():
            self._ended.set_result(None)


def _ssl_context(options: HTTPOptions) -> ssl.SSLContext | None:
    if not options.ssl_certfile:
        return None
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(options.ssl_certfile, options.ssl_keyfile)
    return context


async def _serve(child: ChildBoot) -> None:
    await Proxy(child).run()


def main(child: ChildBoot) -> int:
    """Be an HTTP proxy until the instance shuts down; the exit status."""
    logs.configure()
    eventloop.run(_serve(child))
    return 0
