"""Who is connected: what each process's messages mean, and who is asked for a sign of life.

Replicas' own reports go to the engine, which hands them on as events (controller.py).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from headgate import logs
from headgate.controller.calls import Calls
from headgate.controller.failpoints import reach
from headgate.controller.fleet import LOCAL
from headgate.controller.health import PERIOD_S, Heartbeats, Process
from headgate.controller.publisher import PROXY, REPLICA
from headgate.core.state import Settings
from headgate.wire import messages

if TYPE_CHECKING:
    from headgate.controller.controller import Controller

log = logs.get("controller")


class Peers:
    """All connections to one controller."""

    def __init__(self, controller: Controller, calls: Calls) -> None:
        self._controller = controller
        self._calls = calls
        self._connected: dict[Process, str] = {}  # and the node of each
        self._heartbeats = Heartbeats(self._timeout_s)
        self._timer: asyncio.TimerHandle | None = None

    def on_message(self, peer: Process, message: messages.ToController) -> None:
        """A process said something."""
        self._heartbeats.heard(peer)
        match message:
            case messages.Hello():
                self._hello(peer, message)
            case messages.Linked(name, is_linked):
                self._controller.publisher.linked(peer, name, is_linked)
            case messages.Follow():
                self._controller.publisher.join(peer)
            case messages.Ack(version):
                self._controller.publisher.acked(peer, version)
                reach("ack.heard")
            case messages.Fenced(number):
                self._controller.publisher.fenced(peer, number)
            case messages.Request():
                self._calls.answer(peer, self._connected.get(peer, LOCAL), message)
            case _:  # Pong: that it came is all it says
                pass

    def on_gone(self, peer: Process) -> None:
        """The connection of a process has ended."""
        self._connected.pop(peer, None)
        self._heartbeats.gone(peer)
        self._controller.publisher.leave(peer)
        self._controller.proxies.left(peer)

    def _hello(self, peer: Process, hello: messages.Hello) -> None:
        controller = self._controller
        self._connected[peer] = hello.node
        if hello.role == PROXY:
            controller.proxies.joined(peer)
            if controller.leaving:
                peer.tell(messages.Goodbye())
        elif hello.role == REPLICA:
            controller.fleet.met(hello.id, hello.pid, hello.node)
            controller.publisher.join_replica(peer, hello.routers)
        if hello.follows:
            controller.publisher.join(peer, hello.snapshot_version)
        controller.said_hello(hello.id)
        controller.poke()

    def beat(self) -> None:
        """Ask everybody for a sign of life, now and once a second."""
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(PERIOD_S, self.beat)
        for id, reason in self._heartbeats.round(self._connected, loop.time()):
            self._controller.kill(id, reason)

    def close(self) -> None:
        """Ask nobody any more."""
        if self._timer is not None:
            self._timer.cancel()

    def _timeout_s(self, id: str) -> float:
        controller = self._controller
        one = controller.fleet.seen.get(id)
        for goal in controller.goals.backends:
            if one is not None and goal.tag == one.backend:
                return goal.settings.health_check_timeout_s
        return Settings().health_check_timeout_s
