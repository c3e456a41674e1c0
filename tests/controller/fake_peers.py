"""Processes as the controller sees them, in memory: they answer at once unless told not to."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import msgspec

from headgate import errors
from headgate.core import deltas
from headgate.core.state import Snapshot
from headgate.wire import messages

_numbers = itertools.count(1)


class FakePeer:
    """A connected process.

    hears   called with each message of it; a Peers' on_message
    """

    def __init__(
        self, role: str, id: str, hears: Callable[[Any, Any], None] | None = None, *, node: str = "local"
    ) -> None:
        self.role = role
        self.id = id
        self.pid = 0
        self.node = node  # it says so in its Hello
        self.is_local = True
        self.silent = False  # takes nothing, says nothing
        self.told: list[Any] = []
        self.snapshots: list[Snapshot] = []
        self._hears = hears or (lambda peer, message: None)
        self._answers: dict[int, asyncio.Future[Any]] = {}

    def tell(self, message: messages.FromController) -> None:
        """What a wire.control.Peer does with a message to its process."""
        self.told.append(message)
        if isinstance(message, messages.Publish):
            self.snapshots.append(msgspec.msgpack.decode(message.snapshot, type=Snapshot))
            self.say(messages.Ack(message.version))
        elif isinstance(message, messages.PublishChange):
            delta = msgspec.msgpack.decode(message.delta, type=deltas.Delta)
            self.snapshots.append(deltas.apply(self.snapshots[-1], delta))
            self.say(messages.Ack(message.version))
        elif isinstance(message, messages.Fence):
            self.say(messages.Fenced(message.number))
        elif isinstance(message, messages.Ping):
            self.say(messages.Pong())
        elif isinstance(message, messages.Response):
            self._answer(message)

    def say(self, message: messages.ToController) -> None:
        """Send a message, which arrives in a later turn of the loop."""
        if not self.silent:
            asyncio.get_running_loop().call_soon(self._hears, self, message)

    def hello(
        self,
        *,
        follows: bool = True,
        has: int = 0,
        report: messages.Report | None = None,
        routers: tuple[str, ...] = (),
    ) -> None:
        self.say(messages.Hello(self.role, self.id, self.pid, follows, has, report, self.node, routers))

    async def call(self, method: str, *, call: str = "", **params: Any) -> Any:
        """The controller's answer to a call."""
        number = next(_numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        packed = msgspec.Raw(msgspec.msgpack.encode(params))
        self.say(messages.Request(number, call or f"call-{number}", method, packed))
        return await answer

    def _answer(self, response: messages.Response) -> None:
        answer = self._answers.pop(response.id)
        if answer.done():
            return
        if response.error is not None:
            answer.set_exception(errors.from_wire(*response.error))
        else:
            answer.set_result(msgspec.msgpack.decode(response.value))

    def fences(self) -> list[dict[str, int]]:
        """The fences it was told, in order."""
        return [message.peers for message in self.told if isinstance(message, messages.Fence)]
