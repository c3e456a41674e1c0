"""From the key of an instance to its home: what a pickled handle carries, and what finds it again.

A key is a run directory, or it begins with a kind: "ray:<Ray namespace>". The modules that know a
kind are imported when the first key of it is met.
"""

from __future__ import annotations

from collections.abc import Callable

from headgate.engine import directory
from headgate.engine.directory import read_token
from headgate.wire.home import DirectoryHome, Home


def home_of(key: str) -> Home:
    """The home with that key. InstanceError if there is no such instance any more."""
    kind, colon, _ = key.partition(":")
    find = _kinds.get(kind) if colon else None
    return DirectoryHome(key, read_token(key)) if find is None else find(key)


def is_alive(key: str) -> bool:
    """Whether the instance with that key lives, or is being brought back."""
    if key.startswith("ray:"):
        from headgate.engine import cluster

        return cluster.is_alive(key.removeprefix("ray:"))
    return directory.is_alive(key)


def register(kind: str, find: Callable[[str], Home]) -> Callable[[str], Home] | None:
    """Have `find(key)` answer for the keys that begin with "<kind>:"; returns what did so far."""
    before = _kinds.get(kind)
    _kinds[kind] = find
    return before


def _of_cluster(key: str) -> Home:
    from headgate.engine import ray_home  # imports Ray

    return ray_home.home(key)


_kinds: dict[str, Callable[[str], Home]] = {"ray": _of_cluster}
