"""Which replica this process is.

Set once, by the worker, before user code is loaded; read by user code from any thread.
"""

from __future__ import annotations

from msgspec import Struct

from headgate.errors import InstanceError


class ReplicaContext(Struct, frozen=True):
    """The backend that this process serves, and its own id, as in `client.status()`."""

    backend_tag: str
    replica_tag: str


_context: ReplicaContext | None = None


def set_replica_context(context: ReplicaContext) -> None:
    """Make this process that replica, for good."""
    global _context
    if _context is not None:
        raise InstanceError(f"this process is replica {_context.replica_tag!r} already")
    _context = context


def get_replica_context() -> ReplicaContext:
    """The replica that the caller runs in; InstanceError outside of one."""
    if _context is None:
        raise InstanceError(
            "not inside a replica: call this in a backend's constructor, reconfigure or handler, "
            "not in the script that creates the backend"
        )
    return _context


def get_current_backend_tag() -> str:
    """The tag of the backend that the caller is part of; InstanceError outside of a replica."""
    return get_replica_context().backend_tag


def get_current_replica_tag() -> str:
    """The id of the replica that the caller runs in; InstanceError outside of one."""
    return get_replica_context().replica_tag
