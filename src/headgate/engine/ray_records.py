"""What an instance keeps in its Ray cluster: what its processes are told, where its controller listens, and more.

The keys are "<Ray namespace>/<name>" in one key-value namespace of the cluster. They go with the
instance; what one left that nobody could clear, the next start of any clears.
"""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from headgate.engine import cluster

#: What begins the names of goals and blobs.
STORE = "store/"


class Origin(Struct, frozen=True):
    """What every process of an instance on Ray is told.

    scope    the instance's Ray namespace
    home     id of the node where start was called, and its address
    http     fields of HTTPOptions without the middlewares, which cloudpickle packed
    path     sys.path and working directory of the driver
    """

    scope: str
    instance: str
    namespace: str
    token: bytes
    detached: bool
    home: str
    address: str
    http: dict[str, Any]
    middlewares: bytes = b""
    path: tuple[str, ...] = ()
    cwd: str = "/"


class Meeting(Struct, frozen=True):
    """Where a controller listens: `unix` for processes of its own node, `tcp` for all others."""

    unix: str
    tcp: str
    node: str
    incarnation: int


pack = msgspec.msgpack.encode
unpack_origin = msgspec.msgpack.Decoder(Origin).decode
unpack_meeting = msgspec.msgpack.Decoder(Meeting).decode


def actor_name(id: str) -> str:
    """The name of a replica's actor. A backend's tag may be any text; a name in Ray may not.

    >>> actor_name("iris#0007")
    'replica#0007'
    """
    return "replica#" + id.rpartition("#")[2]


class Records:
    """What one instance keeps in the cluster. OSError when the cluster's head does not answer in time."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._prefix = f"{scope}/".encode()

    def get(self, name: str) -> bytes | None:
        """The value, None if there is none."""
        found: bytes | None = cluster.kv("get", self._key(name))
        return found

    def has(self, name: str) -> bool:
        """Whether there is a value."""
        return bool(cluster.kv("exists", self._key(name)))

    def put(self, name: str, value: bytes) -> None:
        """Keep a value, instead of the one before."""
        cluster.kv("put", self._key(name), value, True)

    def remove(self, name: str) -> None:
        """Forget a value; nothing happens if there is none."""
        cluster.kv("del", self._key(name), False)

    def names(self) -> list[str]:
        """The names of all values."""
        found = cluster.kv("keys", self._prefix)
        return sorted(key.decode()[len(self._prefix) :] for key in found)

    def clear(self) -> None:
        """Forget everything."""
        cluster.kv("del", self._prefix, True)

    @staticmethod
    def scopes() -> set[str]:
        """The Ray namespaces of all instances that keep something."""
        found = cluster.kv("keys", b"")
        return {key.decode().partition("/")[0] for key in found}

    def origin(self) -> Origin | None:
        """What was told to the instance's processes, None if there is no such instance."""
        found = self.get("origin")
        return None if found is None else unpack_origin(found)

    def meeting(self) -> Meeting | None:
        """Where the controller listens; None when the instance is over."""
        found = self.get("meeting")
        return None if found is None else unpack_meeting(found)

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()
