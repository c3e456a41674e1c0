"""Where a replica runs: what it needs to know of the process around it.

On one machine that is a child of the instance's supervisor. Elsewhere it may be threads in a worker of
somebody else's, whose end is not the replica's to decide.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from msgspec import Struct

from headgate.engine import directory
from headgate.wire import address
from headgate.wire.home import Home, home_of_child

if TYPE_CHECKING:
    import socket

    from headgate.engine.boot import ChildBoot


def _exit() -> None:
    os._exit(0)


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


class Place(Struct, frozen=True):
    """One replica's place.

    home        the way to its instance
    expose      whether tracebacks go to HTTP clients
    listen      the addresses (wire/address.py) to listen on: one of its node, perhaps one for other nodes
    read_blob   the content of a blob of the controller's; FileNotFoundError if it was withdrawn. Called
                on the plain thread and on the replica's loop
    over        the instance is over; called on any thread, perhaps more than once
    """

    home: Home
    id: str
    backend: str
    listen: Sequence[str]
    expose: bool = False
    read_blob: Callable[[str], bytes] = _read
    over: Callable[[], object] = _exit

    @classmethod
    def of(cls, child: ChildBoot) -> Place:
        """The place of a supervisor's child."""
        boot = child.boot
        return cls(
            home=home_of_child(boot),
            id=child.id,
            backend=child.name,
            listen=[directory.replica_socket(boot.directory, child.id)],
            expose=bool(boot.http.get("expose_tracebacks")),
        )

    def bind(self) -> list[socket.socket]:
        """Listening sockets, one for each of `listen`."""
        return [address.listen(at) for at in self.listen]


def addresses(listeners: Sequence[socket.socket]) -> tuple[str, str]:
    """Of bound sockets: the address for processes of the same node and the one for others; "" for none."""
    found = [address.address_of(sock) for sock in listeners]
    local = [each for each in found if not address.is_remote(each)]
    remote = [each for each in found if address.is_remote(each)]
    return "".join(local[:1]), "".join(remote[:1])
