"""core/deltas.py: what a delta makes of the snapshot before is the snapshot after, and it holds what changed only."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from headgate.core.deltas import Delta, apply, between
from headgate.core.state import BackendView, Endpoint, ReplicaAddress, Settings, Snapshot, Traffic
from headgate.errors import ProtocolError


def endpoint(name: str, share: float = 1.0, route: str | None = None) -> Endpoint:
    return Endpoint(name, route or f"/{name}", ("GET",), Traffic((("b", share), ("c", 1.0 - share))))


def backend(tag: str, version: int = 1, *replicas: str) -> BackendView:
    return BackendView(tag, version, Settings(), tuple(ReplicaAddress(id, f"/run/{id}", 1) for id in replicas))


NAMES = st.sampled_from("abcdef")
ENDPOINTS = st.lists(st.builds(endpoint, NAMES, st.sampled_from([0.0, 0.5, 1.0])), unique_by=lambda one: one.name)
BACKENDS = st.lists(st.builds(backend, NAMES, st.integers(1, 2), NAMES), unique_by=lambda one: one.tag)


@st.composite
def snapshots(draw: st.DrawFn, version: int) -> Snapshot:
    return Snapshot(version, tuple(draw(ENDPOINTS)), tuple(draw(BACKENDS)), draw(st.booleans()))


def edited(draw: st.DrawFn, before: tuple, new: list, key: str) -> tuple:
    """As users change things: some go, some change at their places, new ones come last."""
    fresh = {getattr(one, key): one for one in new}
    kept = [
        fresh.pop(getattr(one, key)) if getattr(one, key) in fresh and draw(st.booleans()) else one
        for one in before
        if draw(st.booleans())
    ]
    there = {getattr(one, key) for one in before}
    return (*kept, *(one for name, one in fresh.items() if name not in there))


@st.composite
def changes(draw: st.DrawFn) -> tuple[Snapshot, Snapshot]:
    old = draw(snapshots(3))
    endpoints = edited(draw, old.endpoints, draw(ENDPOINTS), "name")
    backends = edited(draw, old.backends, draw(BACKENDS), "tag")
    return old, Snapshot(4, endpoints, backends, draw(st.booleans()))


def travelled(delta: Delta) -> Delta:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(delta), type=Delta)


@settings(max_examples=500)
@given(snapshots(3), snapshots(4))
def test_a_delta_gives_exactly_the_new_snapshot_or_there_is_none(old, new):
    delta = between(old, new)
    assert delta is None or apply(old, travelled(delta)) == new


@settings(max_examples=500)
@given(changes())
def test_a_change_that_keeps_the_order_always_has_a_delta(change):
    old, new = change
    delta = between(old, new)
    assert delta is not None
    assert apply(old, travelled(delta)) == new


@settings(max_examples=300)
@given(changes())
def test_what_did_not_change_is_the_same_object_and_does_not_travel(change):
    old, new = change
    delta = between(old, new)
    after = apply(old, travelled(delta))
    for was, now, key, sent in (
        (old.endpoints, after.endpoints, "name", delta.endpoints),
        (old.backends, after.backends, "tag", delta.backends),
    ):
        before = {getattr(one, key): one for one in was}
        for one in now:
            is_as_before = before.get(getattr(one, key)) == one
            assert (one not in sent) is is_as_before
            assert (one is before.get(getattr(one, key))) is is_as_before


@given(st.lists(changes(), min_size=1, max_size=6))
def test_who_follows_by_deltas_alone_has_the_newest_snapshot(steps):
    follows = Snapshot(0)
    newest = follows
    for _, content in steps:
        before, newest = newest, replace(content, version=newest.version + 1)
        delta = between(before, newest)
        follows = newest if delta is None else apply(follows, travelled(delta))
    assert follows == newest


def test_another_order_of_the_same_has_no_delta():
    one, two = endpoint("one"), endpoint("two")
    assert between(Snapshot(1, (one, two)), Snapshot(2, (two, one))) is None


def test_one_that_comes_back_before_another_has_no_delta():
    one, two, three = endpoint("one"), endpoint("two"), endpoint("three")
    assert between(Snapshot(1, (one, three)), Snapshot(2, (one, two, three))) is None


def test_a_delta_is_for_the_snapshot_before_only():
    delta = between(Snapshot(1), Snapshot(2, (endpoint("one"),)))
    with pytest.raises(ProtocolError, match="a change of snapshot 1 came to one that has 7"):
        apply(Snapshot(7), delta)


def test_a_change_among_a_thousand_is_as_small_as_among_ten():
    def size(count: int) -> int:
        endpoints = tuple(endpoint(f"e{number}") for number in range(count))
        backends = tuple(backend(f"b{number}", 1, f"b{number}#1") for number in range(count))
        changed = (replace(endpoints[0], traffic=Traffic((("b", 1.0),))), *endpoints[1:])
        delta = between(Snapshot(1, endpoints, backends), Snapshot(2, changed, backends))
        return len(msgspec.msgpack.encode(delta))

    assert size(1000) == size(10) < 200
