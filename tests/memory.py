"""An instance in memory: what a handle needs of one, without processes, sockets or a controller.

    instance = MemoryInstance({"echo": lambda request: request.data})
    make_handle(instance, "echo").call(3)

A handler gets a `Received` and returns the answer or raises. Its endpoint may have no room
(`instance.room = 0`): requests wait then until `admit()`. A handler that returns HELD answers later,
by `instance.held.pop().answer(value)`, on the loop that it came from.

With `actors` its replicas are actors, as on Ray: a reservation is granted, and `instance.granted`
holds its request by its token.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from itertools import count
from typing import Any

import msgspec

from headgate.core import framing
from headgate.core.state import Endpoint, ReplicaAddress, Snapshot, Traffic
from headgate.errors import HeadgateError, RequestTimeout
from headgate.router import Caller, ShadowCaller
from headgate.wire import payload
from headgate.wire.thread import HeadgateThread

HELD = object()
PIECE = 1000
_numbers = count(1)


class Received:
    """A request as it arrived."""

    def __init__(self, caller: Caller, shard_key: str | None) -> None:
        meta = msgspec.msgpack.decode(caller.meta)
        self.caller = caller
        self.shard_key = shard_key
        self.request_id, self.endpoint, self.method_name, self.http_method, self.headers, has_kwargs = meta
        self.flags = caller.flags
        self.data = None if caller.flags & framing.RESERVE else payload.decode(caller.inline()[1])
        self.kwargs: dict[str, Any] = {}
        self.has_kwargs = has_kwargs
        if has_kwargs and self.data is not None:
            self.data, self.kwargs = self.data

    def answer(self, value: Any) -> None:
        """Reply, in parts if it is large; always with strange bytes around it."""
        body = b"".join(payload.encode(value))
        if len(body) <= PIECE:
            self.caller.on_reply(200, framing.VALUE, 1, b"??m" + body + b"?", 2, 3 + len(body))
            return
        self.caller.on_reply_start(200, framing.VALUE, 0, b"?" + len(body).to_bytes(8, "little"), 1, 9)
        for at in range(0, len(body), PIECE):
            piece = body[at : at + PIECE]
            self.caller.on_data(b"?" + piece, 1, 1 + len(piece))
        self.caller.on_reply_end()

    def fail(self, error: BaseException, traceback: str = "Traceback of the replica") -> None:
        """Reply with an error of user code."""
        body = payload.encode_error(error, traceback)
        self.caller.on_error(500, framing.VALUE, 0, b"?" + body, 1, 1 + len(body))


class MemoryLink:
    """Enough of a link to tell which replica it leads to."""

    replica = ReplicaAddress("it#0001", "/nowhere", 1)


class MemoryHome:
    """The home of an instance in memory; `actors`: its replicas are actors."""

    token = b""
    node = "local"

    def __init__(self, key: str, actors: Any = None) -> None:
        self.key = key
        self.actors = actors

    async def find(self, error: Exception | None) -> str | None:
        return None


class MemoryRouter:
    """Runs handlers on the loop it was made on, one turn after the request came."""

    def __init__(self, instance: MemoryInstance) -> None:
        self.instance = instance
        self.loop = asyncio.get_running_loop()
        self.closed = False
        self.snapshot = Snapshot()
        self.endpoints: dict[str, Endpoint] = {}
        self.waiting: list[tuple[Endpoint, Caller, str | None]] = []
        self.cancelled: list[Caller] = []

    def follow(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.endpoints = {endpoint.name: endpoint for endpoint in snapshot.endpoints}

    def submit(self, endpoint: Endpoint, caller: Caller, shard_key: str | None = None) -> None:
        caller.backend = self  # type: ignore[assignment]
        for _ in endpoint.traffic.shadows:
            original = caller.original()
            if original is not None:
                self.instance.shadows.append(Received(ShadowCaller(original), None))
        self.waiting.append((endpoint, caller, shard_key))
        if caller.deadline != float("inf"):
            self.loop.call_at(caller.deadline, self._expire, caller)
        if self.instance.room:
            self.admit()

    def admit(self) -> None:
        """Let everything that waits go to its handler."""
        while self.waiting:
            endpoint, caller, shard_key = self.waiting.pop(0)
            caller.on_assigned()
            run = self._grant if caller.flags & framing.RESERVE else self._run
            self.loop.call_soon(run, endpoint, Received(caller, shard_key))

    def _grant(self, endpoint: Endpoint, received: Received) -> None:
        refusal = self.instance.refusal
        if received.caller in self.cancelled:
            return
        if refusal is not None:
            text = b"?" + str(refusal).encode()
            received.caller.on_error(refusal.http_status, 0, 0, text, 1, len(text))
            return
        token = (1 << 40) + next(_numbers)
        received.caller.link = MemoryLink()  # type: ignore[assignment]
        received.caller.answering = True
        self.instance.granted[token] = received
        received.caller.on_reply_start(200, framing.MORE, 2, b"?mm" + token.to_bytes(8, "little") + b"?", 1, 11)

    def _run(self, endpoint: Endpoint, received: Received) -> None:
        self.instance.received.append(received)
        if received.caller in self.cancelled:
            return
        try:
            value = self.instance.handlers[endpoint.name](received)
        except HeadgateError as error:
            received.caller.on_failure(error)
        except Exception as error:  # noqa: BLE001 - as a replica does
            received.fail(error)
        else:
            if value is HELD:
                self.instance.held.append(received)
            else:
                received.answer(value)

    def _expire(self, caller: Caller) -> None:
        self.waiting = [each for each in self.waiting if each[1] is not caller]
        caller.on_failure(RequestTimeout("the request passed its deadline"))

    def cancel(self, caller: Caller) -> None:
        self.waiting = [each for each in self.waiting if each[1] is not caller]
        self.cancelled.append(caller)


class MemoryInstance:
    """Endpoints that are functions of this process."""

    role = "client"

    def __init__(
        self, handlers: dict[str, Callable[[Received], Any]] | None = None, actors: Any = None, key: str = ""
    ) -> None:
        self.key = key or f"/nowhere/{next(_numbers)}"
        self.home = MemoryHome(self.key, actors)
        self.pid = os.getpid()
        self.usable = True
        self.room = 1
        self.handlers: dict[str, Callable[[Received], Any]] = {}
        self.snapshot = Snapshot(version=1)
        self.received: list[Received] = []
        self.held: list[Received] = []
        self.granted: dict[int, Received] = {}
        self.refusal: HeadgateError | None = None
        self.shadows: list[Received] = []
        self.routers: dict[asyncio.AbstractEventLoop, MemoryRouter] = {}
        self.thread = HeadgateThread()
        self.follows = 0
        self.watchers: set[Callable[[], object]] = set()
        for name, handler in (handlers or {}).items():
            self.add(name, handler)

    def add(self, name: str, handler: Callable[[Received], Any], shadow: str = "") -> None:
        """Create an endpoint."""
        self.handlers[name] = handler
        traffic = Traffic(((name, 1.0),), ((shadow, 1.0),) if shadow else ())
        endpoint = Endpoint(name, None, ("GET",), traffic)
        self.snapshot = Snapshot(self.snapshot.version + 1, (*self.snapshot.endpoints, endpoint))
        for watcher in list(self.watchers):
            watcher()

    def remove(self, name: str) -> None:
        """Delete an endpoint."""
        left = tuple(each for each in self.snapshot.endpoints if each.name != name)
        self.snapshot = Snapshot(self.snapshot.version + 1, left)

    def endpoint(self, name: str) -> Endpoint | None:
        return next((each for each in self.snapshot.endpoints if each.name == name), None)

    def watch(self, watcher: Callable[[], object]) -> None:
        self.watchers.add(watcher)

    def unwatch(self, watcher: Callable[[], object]) -> None:
        self.watchers.discard(watcher)

    def router(self) -> MemoryRouter:
        loop = asyncio.get_running_loop()
        if loop not in self.routers or self.routers[loop].closed:
            self.routers[loop] = MemoryRouter(self)
        return self.routers[loop]

    def follow(self) -> None:
        self.follows += 1

    def start(self) -> None:
        """Start the thread that sync handles need."""
        self.thread.start()

    def leave(self) -> None:
        """End, as a client's shutdown does."""
        self.usable = False
        for router in self.routers.values():
            router.closed = True
        self.thread.stop()

    def on_thread(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a function that is called on the headgate thread."""

        async def run() -> Any:
            return function(*arguments)

        return self.thread.run(run(), 5.0)
