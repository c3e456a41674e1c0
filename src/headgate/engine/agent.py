"""The agent: on a node of a cluster, what stands between the supervisor there and the controller elsewhere.

It is the supervisor's child in the place where one machine's instance has the controller. What the
controller asks (messages.Ask) it hands to the supervisor, and what that answers (messages.Answer) it
hands back; it looks into neither and keeps nothing. Answers that come while the controller is away
are lost, and so is what an agent that is killed had in hand: the controller lists all anew on each Hello.

It ends with status 0 when the instance is over, and that ends all that the supervisor has started.
"""

from __future__ import annotations

import asyncio
import os

from headgate import eventloop, logs
from headgate.engine import asks
from headgate.engine.boot import ChildBoot
from headgate.errors import InstanceError
from headgate.wire import messages
from headgate.wire.control import ControlClient
from headgate.wire.home import home_of_child

#: How often it looks whether the instance is over, though it is connected.
_LOOK_S = 0.25


class Agent:
    """Hands datagrams on in both directions, and waits for neither side."""

    def __init__(self, child: ChildBoot) -> None:
        assert child.ask is not None
        boot = child.boot
        self._home = home_of_child(boot)
        self._hello = messages.Hello("agent", f"agent@{boot.node[:8]}", os.getpid(), node=boot.node)
        self._line = asks.LoopLine(child.ask, lambda data: self._client.tell(messages.Answer(data)))
        self._over = asyncio.Event()
        self._client = ControlClient(
            self._home.find,
            boot.token,
            lambda version: self._hello,
            on_message=self._on_message,
            on_gone=self._over.set,
        )

    async def run(self) -> None:
        """Relay until the instance is over."""
        self._line.open(asyncio.get_running_loop())
        watch = asyncio.create_task(self._watch())
        connect = asyncio.create_task(self._connect())
        await self._over.wait()
        for task in (watch, connect):
            task.cancel()
        self._client.close()

    async def _connect(self) -> None:
        try:
            await self._client.open()
        except InstanceError:  # it is over
            self._over.set()

    async def _watch(self) -> None:
        while not self._over.is_set():
            await asyncio.sleep(_LOOK_S)
            try:
                if await self._home.find(None) is None:
                    self._over.set()
            except OSError:  # cannot tell now
                continue

    def _on_message(self, message: messages.FromController) -> None:
        if isinstance(message, messages.Ask):
            self._line.send(message.data)


async def _serve(child: ChildBoot) -> None:
    await Agent(child).run()


def main(child: ChildBoot) -> int:
    """Be the agent of this node until the instance is over: 0, which ends the supervisor."""
    logs.configure()
    eventloop.run(_serve(child))
    return 0
