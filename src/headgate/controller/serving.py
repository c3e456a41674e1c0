"""The controller with all that belongs to it: its engine, its store, its connections. It begins here and ends here.

`main` is the process of the local engine; on Ray it is on_ray.py that calls `serve`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from headgate import eventloop, logs
from headgate.controller import failpoints
from headgate.controller.calls import Calls
from headgate.controller.controller import Controller
from headgate.controller.peers import Peers
from headgate.controller.shelf import FileShelf, Memory
from headgate.controller.store import Store
from headgate.engine import directory
from headgate.engine.interface import Engine
from headgate.engine.local import LocalEngine
from headgate.wire import messages
from headgate.wire.control import Hub

if TYPE_CHECKING:
    from headgate.engine.boot import ChildBoot


log = logs.get("controller")


class Connections(Protocol):
    """What is needed of a wire.control.Hub."""

    on_message: Callable[[Any, messages.ToController], None]
    on_gone: Callable[[Any], None]

    def open(self) -> None: ...

    def close(self) -> None: ...


def main(child: ChildBoot) -> int:
    """Run the controller until the instance is shut down: 0, which ends it."""
    logs.configure()
    eventloop.run(_main(child))
    return 0


async def _main(child: ChildBoot) -> None:
    assert child.ask is not None
    assert child.control_listener is not None
    boot = child.boot
    hub = Hub(child.control_listener, boot.token, lambda peer, message: None, lambda peer: None)
    engine = LocalEngine(child.ask, hub, http=directory.read_address(boot.directory))
    location = boot.http.get("location", "HeadOnly") if boot.http_fd >= 0 else None
    store = Store(FileShelf(boot.directory), Memory(child.memory_fd))
    await serve(engine, store, hub, incarnation=child.incarnation, location=location)


async def serve(
    engine: Engine, store: Store, hub: Connections, *, incarnation: int = 1, location: str | None = None
) -> None:
    """Be the controller of an instance; returns when it was shut down and every process has ended.

    The hub accepts while the engine opens: `engine.open` takes what it wants of the hub's messages
    before it first waits, and hands on the rest.
    """
    if failpoints.arm(os.environ.get(failpoints.VARIABLE, "")):
        log.warning("%s is set: this controller fails where a test wants it to", failpoints.VARIABLE)
    if incarnation > 1:
        log.warning("the controller's process ended; this is incarnation %d", incarnation)
    controller = Controller(engine, store, incarnation=incarnation, location=location)
    calls = Calls(controller)
    peers = Peers(controller, calls)
    hub.on_message, hub.on_gone = peers.on_message, peers.on_gone
    hub.open()
    try:
        await controller.open()
        peers.beat()
        await calls.over
    finally:
        peers.close()
        controller.close()
        hub.close()
        await asyncio.sleep(0)  # the last answers are written
