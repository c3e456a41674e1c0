"""What changed from one snapshot to the next, so that a change costs what it changes and not what there is.

The rule: `apply(old, between(old, new)) == new`, to the last field and in the same order; where a delta
cannot say that, `between` gives none, and the whole snapshot is sent. What did not change is the same
object in both, by which routers know what they need not look at.

Who is sent a delta and who a whole snapshot is controller/publisher.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TypeVar

from msgspec import Struct

from headgate.core.state import BackendView, Endpoint, Snapshot
from headgate.errors import ProtocolError

T = TypeVar("T")

_name = attrgetter("name")
_tag = attrgetter("tag")


class Delta(Struct, frozen=True, array_like=True):
    """What turns snapshot `base` into snapshot `version`.

    endpoints, backends         those that changed, which keep their places, and new ones, which come last
    no_endpoints, no_backends   the names and tags of those that are gone
    """

    base: int
    version: int
    ready: bool
    endpoints: tuple[Endpoint, ...] = ()
    no_endpoints: tuple[str, ...] = ()
    backends: tuple[BackendView, ...] = ()
    no_backends: tuple[str, ...] = ()


def between(old: Snapshot, new: Snapshot) -> Delta | None:
    """The delta from `old` to `new`; None if that takes the whole snapshot, as after a change of order.

    >>> from headgate.core.state import Settings
    >>> old = Snapshot(1, backends=(BackendView("a", 1, Settings()), BackendView("b", 1, Settings())))
    >>> between(old, Snapshot(2, backends=old.backends[1:])).no_backends
    ('a',)
    """
    endpoints, no_endpoints = _changes(old.endpoints, new.endpoints, _name)
    backends, no_backends = _changes(old.backends, new.backends, _tag)
    delta = Delta(old.version, new.version, new.ready, endpoints, no_endpoints, backends, no_backends)
    return delta if apply(old, delta) == new else None


def apply(old: Snapshot, delta: Delta) -> Snapshot:
    """The snapshot that follows `old`; raises ProtocolError if `delta` is not from that one."""
    if delta.base != old.version:
        raise ProtocolError(f"a change of snapshot {delta.base} came to one that has {old.version}")
    return Snapshot(
        delta.version,
        _changed(old.endpoints, delta.endpoints, delta.no_endpoints, _name),
        _changed(old.backends, delta.backends, delta.no_backends, _tag),
        delta.ready,
    )


def _changes(old: Sequence[T], new: Sequence[T], key: attrgetter[str]) -> tuple[tuple[T, ...], tuple[str, ...]]:
    """What is new or different, and the keys of what is gone."""
    if old is new or old == new:
        return (), ()
    before = {key(one): one for one in old}
    news = tuple(one for one in new if before.pop(key(one), None) != one)
    return news, tuple(before)


def _changed(old: tuple[T, ...], news: Sequence[T], gone: Sequence[str], key: attrgetter[str]) -> tuple[T, ...]:
    if not (news or gone):
        return old
    changed, left = {key(one): one for one in news}, frozenset(gone)
    kept = tuple(changed.pop(key(one), one) for one in old if key(one) not in left)
    return kept + tuple(changed.values())
