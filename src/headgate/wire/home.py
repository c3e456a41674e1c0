"""How a process finds its instance: where the controller listens now, or that the instance is over.

A ControlClient asks its home before each try to connect. One machine's instance has a run
directory with the controller's socket, which the supervisor holds open through restarts of the
controller: nobody listens there only when the instance is over. On several nodes the controller
may come back elsewhere; each node's processes find its address in a file that is kept for them.
"""

from __future__ import annotations

import os
from typing import Protocol

LOCAL = "local"

_SOCKET = "control.sock"
_FILE = "controller"
_LOOK_AGAIN_S = 0.05


class Home(Protocol):
    """The way to one instance.

    key     tells instances apart in this process, and is what a handle's pickle carries: the run
            directory, or "ray:<Ray namespace>"
    token   the instance's secret
    node    of this process: "local", or a Ray node id

    A home may have `watch(on_over: Callable[[], None])` too: it calls `on_over` on any thread once
    it knows that the instance is over; and `close()`, for what it holds of the instance for this process.
    """

    key: str
    token: bytes
    node: str

    async def find(self, error: Exception | None) -> str | None:
        """The controller's address; None: the instance is over.

        error   what the last try to connect ended with, None at first

        Raises OSError when it cannot tell now.
        """


class Booted(Protocol):
    """What a child of a supervisor was told (engine/boot.py)."""

    @property
    def directory(self) -> str: ...
    @property
    def token(self) -> bytes: ...
    @property
    def node(self) -> str: ...


class DirectoryHome:
    """An instance of this machine, by its run directory.

    path   of the socket where every controller of it listens
    """

    node = LOCAL

    def __init__(self, directory: str, token: bytes) -> None:
        self.key = directory
        self.token = token
        self.path = os.path.join(directory, _SOCKET)

    async def find(self, error: Exception | None) -> str | None:
        if isinstance(error, ConnectionRefusedError | FileNotFoundError):
            return None
        return self.path


class FileHome:
    """For the children of a node's supervisor: the file that `write_controller` keeps."""

    def __init__(self, directory: str, token: bytes, node: str) -> None:
        self.key = directory
        self.token = token
        self.node = node

    async def find(self, error: Exception | None) -> str | None:
        if error is not None:  # the controller may be on its way to another place
            import asyncio  # which a process without a loop does not have

            await asyncio.sleep(_LOOK_AGAIN_S)
        try:
            with open(os.path.join(self.key, _FILE), encoding="utf-8") as file:
                unix, tcp, node, *_ = [*file.read().splitlines(), "", "", ""]
        except FileNotFoundError:
            return None
        return (unix if unix and node == self.node else tcp) or None


def write_controller(directory: str, unix: str = "", tcp: str = "", node: str = "") -> None:
    """Say where the controller listens, and on which node; with no address, that the instance is over."""
    lines = [unix, tcp, node] if unix or tcp else []
    path = os.path.join(directory, _FILE)
    fresh = f"{path}.{os.getpid()}"
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        file.write("".join(f"{line}\n" for line in lines))
    os.replace(fresh, path)


def home_of_child(boot: Booted) -> Home:
    """The home of a supervisor's child."""
    if boot.node == LOCAL:
        return DirectoryHome(boot.directory, boot.token)
    return FileHome(boot.directory, boot.token, boot.node)
