"""A whole instance in memory: a real controller over the fake engine, on virtual time."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import virtual_time
from fake_peers import FakePeer
from msgspec.structs import replace

from headgate.controller.calls import Calls
from headgate.controller.controller import Controller
from headgate.controller.peers import Peers
from headgate.controller.shelf import FileShelf
from headgate.controller.store import Store
from headgate.core.state import BackendView, Snapshot
from headgate.engine.fake import FakeEngine, Habits
from headgate.engine.interface import Event, Exited, Process
from headgate.wire import messages

START_S = 0.1
HABITS = Habits(
    start_s=(START_S, START_S), answer_s=(0.001, 0.001), drain_s=(0.5, 0.5), death_s=(0.001, 0.001)
)


class TextStore(Store):
    """Blobs that tell the fake engine what to do ("raise: why", "hang") are their own paths."""

    texts: dict[str, str]

    def __init__(self, directory: str) -> None:
        super().__init__(FileShelf(directory))
        self.texts = {}

    def put(self, data: bytes) -> str:
        name = super().put(data)
        self.texts[name] = data.decode()
        return name

    def path(self, name: str) -> str:
        text = self.__dict__.get("texts", {}).get(name, "")
        return text if text.startswith("raise:") or text == "hang" else super().path(name)


class FakeNode(FakeEngine):
    """The fake engine, whose proxies also connect.

    opens_s    how long `open` takes
    mute_proxies  whether they do not: they exist, and that is all
    proxies_s  how long `start_proxy` does; the proxy has connected by then
    waits_for  what replicas wait for, by id
    """

    def __init__(
        self, loop: asyncio.AbstractEventLoop, habits: Habits = HABITS, nodes: tuple[str, ...] = ("local",)
    ) -> None:
        super().__init__(1, loop, habits, nodes)
        self.opens_s = 0.0
        self.mute_proxies = False
        self.proxies_s = 0.0
        self.waits_for: dict[str, str] = {}
        self.peers: dict[str, FakePeer] = {}
        self.started: list[messages.ReplicaSpec] = []
        self.hears: Any = None
        self.gone: Any = None
        self.broken_proxy = ""
        self.broken_node = ""  # the one where no proxy runs; "": all

    async def open(self, on_event: Any) -> None:
        def event(event: Event) -> None:
            if isinstance(event, Exited) and (peer := self.peers.pop(event.id, None)):
                self.gone(peer)
            on_event(event)

        await super().open(event)
        if self.opens_s:
            await asyncio.sleep(self.opens_s)

    def observe(self) -> tuple[Process, ...]:
        return tuple(
            replace(one, waits_for=self.waits_for.get(one.id, "")) if one.id in self.waits_for else one
            for one in super().observe()
        )

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        self.started.append(spec)
        return await super().start_replica(spec)

    async def start_proxy(self, node: str) -> str:
        id = await super().start_proxy(node)
        if self.broken_proxy and self.broken_node in ("", node):
            self.crash(id, self.broken_proxy)
        elif not self.mute_proxies:
            peer = self.peers[id] = FakePeer(
                "proxy", id, lambda peer, message: self.hears(peer, message), node=node
            )
            peer.hello()
        if self.proxies_s:
            await asyncio.sleep(self.proxies_s)
        return id

    def stop_accepting(self) -> None:
        super().stop_accepting()
        for id, peer in self.peers.items():  # they hear Goodbye and leave
            if not peer.silent:
                asyncio.get_running_loop().call_later(0.2, self.crash, id, "exited with status 0")


class World:
    """One instance. `client` is the process that calls."""

    def __init__(
        self,
        directory: Path,
        *,
        location: str | None = None,
        nodes: tuple[str, ...] = ("local",),
        habits: Habits = HABITS,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.directory = str(directory)
        self.engine = FakeNode(self.loop, habits, nodes)
        self.location = location
        self.incarnation = 0
        self.peers: Peers
        self.client = FakePeer("client", "driver", self.hears)
        self.store = TextStore(self.directory)

    async def start(self) -> None:
        """Start a controller: the first, or the next one after `crash`."""
        self.incarnation += 1
        self.controller = Controller(
            self.engine, self.store, incarnation=self.incarnation, location=self.location
        )
        self.calls = Calls(self.controller)
        self.peers = Peers(self.controller, self.calls)
        self.engine.hears = self.hears
        self.engine.gone = self.peers.on_gone
        await self.controller.open()
        for peer in (self.client, *self.engine.peers.values()):
            peer.hello(has=peer.snapshots[-1].version if peer.snapshots else 0)

    def crash(self) -> None:
        """The controller's process is gone; all others live on."""
        self.engine._on_event = lambda event: None
        self.controller.tick = lambda: None  # type: ignore[method-assign]
        self.controller.poke = lambda: None  # type: ignore[method-assign]
        if self.controller._timer is not None:
            self.controller._timer.cancel()
        for call in self.calls._running.values():
            call.cancel()

    def hears(self, peer: FakePeer, message: Any) -> None:
        self.peers.on_message(peer, message)

    async def call(self, method: str, **params: Any) -> Any:
        return await self.client.call(method, **params)

    async def create(self, tag: str = "b", code: str = "code", *, call: str = "", **given: Any) -> None:
        await self.call("create_backend", call=call, tag=tag, code=code.encode(), facts=FACTS, given=given)

    async def update(self, tag: str = "b", code: str = "new", *, call: str = "", **given: Any) -> None:
        await self.call("update_backend", call=call, tag=tag, code=code.encode(), facts=FACTS, given=given)

    async def configure(self, tag: str = "b", *, call: str = "", **given: Any) -> None:
        await self.call("update_backend_config", call=call, tag=tag, given=given)

    async def reconfigure(self, user_config: str, tag: str = "b") -> None:
        await self.call(
            "update_backend_config", tag=tag, user_config=user_config.encode(), has_user_config=True
        )

    async def status(self) -> Any:
        return await self.call("status")

    @property
    def snapshot(self) -> Snapshot:
        """What the client follows."""
        return self.client.snapshots[-1]

    def served(self, tag: str = "b") -> list[str]:
        """The replicas to which the client may send."""
        (view,) = [view for view in self.snapshot.backends if view.tag == tag]
        return [one.id for one in view.replicas]

    def view(self, tag: str = "b") -> BackendView:
        (view,) = [view for view in self.snapshot.backends if view.tag == tag]
        return view

    def living(self, kind: str = "replica") -> list[str]:
        return [process.id for process in self.engine.observe() if process.kind == kind]

    def told(self, kind: type) -> list[tuple[str, Any]]:
        return [(id, message) for id, message in self.engine.told if isinstance(message, kind)]


FACTS = {"is_async": False, "accepts_batch": False}


def on_virtual_time(make: Callable[[Path], World]) -> Callable[[Test], Decorated]:
    """Run a test with a started instance, on virtual time."""

    def decorate(test: Test) -> Decorated:
        async def main(directory: Path) -> None:
            world = make(directory)
            await world.start()
            await test(world)

        def run(tmp_path: Path) -> None:
            virtual_time.run(main(tmp_path), limit_s=600.0)

        functools.update_wrapper(run, test)
        del run.__wrapped__  # pytest would ask it for its arguments
        return run

    return decorate


Test = Callable[[World], Coroutine[Any, Any, None]]
Decorated = Callable[[Path], None]
