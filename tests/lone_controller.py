"""A controller that decides nothing: it listens, keeps what it hears, and answers as it is told.

For tests of what is connected to one. `LoneController` lives on the running loop, `ControllerOnThread` on a thread.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from headgate.wire import messages
from headgate.wire.control import Hub, Peer
from headgate.wire.thread import HeadgateThread

TOKEN = b"t" * 32
PATIENCE_S = 10.0
Answer = Callable[[messages.Request], messages.Response | None]


def echo(request: messages.Request) -> messages.Response | None:
    return messages.Response(request.id, msgspec.Raw(request.params))


def refuse(request: messages.Request) -> messages.Response | None:
    return messages.Response(request.id, error=("ConfigError", "no"))


def no_answer(request: messages.Request) -> messages.Response | None:
    return None


class LoneController:
    """The socket `control.sock` in a folder, and one controller at a time that listens on it.

    heard   every message that came
    gone    whose connections have ended
    """

    def __init__(self, folder: Path) -> None:
        self.path = str(folder / "control.sock")
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.answer: Answer = echo
        self.heard: list[Any] = []
        self.gone: list[str] = []
        self.hub: Hub
        self.start()

    def do(self, function: Callable[[], object]) -> None:
        """Do it where the controller lives."""
        function()

    def start(self) -> None:
        def open_hub() -> None:
            self.hub = Hub(self.listener.dup(), TOKEN, self.hear, lambda peer: self.gone.append(peer.id))
            self.hub.open()

        self.do(open_hub)

    def stop(self) -> None:
        """The socket stays, as the supervisor holds it open."""
        self.do(self.hub.close)

    def restart(self, answer: Answer) -> None:
        """Another controller listens."""
        self.stop()
        self.answer = answer
        self.start()

    def end(self) -> None:
        """Nobody will ever listen again."""
        self.listener.close()
        self.stop()

    def hear(self, peer: Peer, message: messages.ToController) -> None:
        """Called with each message, Hello first."""
        self.heard.append(message)
        if isinstance(message, messages.Request) and (response := self.answer(message)) is not None:
            peer.tell(response)

    def tell(self, message: messages.FromController) -> None:
        """Send a message to all who are connected."""
        self.do(lambda: [peer.tell(message) for peer in self.hub.peers])

    def all_of(self, kind: type[Any]) -> list[Any]:
        """What it has heard of that kind."""
        return [message for message in self.heard if isinstance(message, kind)]


class ControllerOnThread(LoneController):
    """The same on a thread of its own, for tests without a loop. It is to be closed."""

    def __init__(self, folder: Path) -> None:
        self.thread = HeadgateThread("controller")
        self.thread.start()
        super().__init__(folder)

    def do(self, function: Callable[[], object]) -> None:
        async def run() -> None:
            function()

        self.thread.run(run(), PATIENCE_S)

    def close(self) -> None:
        self.end()
        self.thread.stop()
