"""Large bodies: received into the arena, and freed when nobody needs them any more."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from fakes import Wire, post

from headgate.core import framing
from headgate.errors import ReplicaDied
from headgate.proxy.upload import Lender
from headgate.wire.arena import Arena

BODY = bytes(range(256)) * 400  # 100 KiB


class FakeLink:
    closed = False


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(1 << 20)
    yield arena
    os.close(arena.fd)


@pytest.fixture
def wire(arena: Arena) -> Wire:
    return Wire(lender=Lender(arena))


def assign(wire: Wire) -> tuple[Any, FakeLink]:
    """Send the newest request to a replica."""
    caller, link = wire.router.callers[-1], FakeLink()
    caller.link = link
    caller.on_assigned()
    return caller, link


def taken(wire: Wire) -> int:
    assert wire.server.lender is not None
    return wire.server.lender.arena.segments.taken


def free(wire: Wire, offset: int = 0) -> None:
    assert wire.server.lender is not None
    wire.server.lender.on_free(offset)


@pytest.mark.parametrize("first", [80, 1000, 60_000, len(post(BODY)) - 1])
def test_a_large_body_lies_in_the_arena(wire: Wire, arena: Arena, first: int) -> None:
    data = post(BODY)
    wire.receive(data[:first])
    wire.receive(data[first:])
    caller, _ = assign(wire)
    offset, size = struct.unpack("<QQ", caller.body)
    assert caller.flags == framing.ARENA
    assert bytes(arena.view[offset : offset + size]) == BODY
    assert wire.meta()[1] == "hello"


def test_it_is_free_when_both_the_answer_is_out_and_the_replica_is_done(wire: Wire) -> None:
    for steps in ((free, Wire.reply), (Wire.reply, free)):
        wire.receive(post(BODY)[:-1])
        wire.receive(b"x")
        caller, _ = assign(wire)
        caller.link = None
        steps[0](wire)
        assert taken(wire)
        steps[1](wire)
        assert not taken(wire)
    assert wire.statuses() == [200, 200]


def test_it_is_free_when_its_replicas_link_has_ended(wire: Wire) -> None:
    wire.receive(post(BODY)[:-1])
    wire.receive(b"x")
    caller, link = assign(wire)
    caller.on_failure(ReplicaDied("gone"))
    assert taken(wire)
    link.closed = True
    wire.server.sweep(100.0, 0.0)
    assert not taken(wire)


def test_a_request_that_goes_to_a_second_replica_keeps_its_body(wire: Wire) -> None:
    wire.receive(post(BODY)[:-1])
    wire.receive(b"x")
    _, first = assign(wire)
    free(wire)  # the first had read it, and died before it answered
    first.closed = True
    assign(wire)
    wire.reply()
    assert taken(wire)
    free(wire)
    assert not taken(wire)


def test_a_request_that_was_never_sent_frees_it_at_once(wire: Wire) -> None:
    wire.receive(post(BODY)[:-1])
    wire.receive(b"x")
    wire.connection.eof_received()
    assert wire.router.cancelled == wire.router.callers
    assert not taken(wire)


def test_a_client_that_goes_in_the_middle_frees_it(wire: Wire) -> None:
    wire.receive(post(BODY)[:-1])
    assert taken(wire)
    wire.connection.connection_lost(None)
    assert not taken(wire)
    assert wire.server.budget.held == 0


def test_without_room_the_body_goes_elsewhere(wire: Wire) -> None:
    others = [wire.server.borrow(wire.connection, 1 << 20)]
    assert others[0] is not None
    wire.receive(post(BODY)[:-1])
    wire.receive(BODY[-1:])
    assert wire.router.seen[0][1] == BODY
    wire.reply()
    assert wire.statuses() == [200]


def test_for_a_replica_of_another_node_the_body_is_copied(wire: Wire) -> None:
    wire.receive(post(BODY)[:-1])
    wire.receive(b"x")
    caller = wire.router.callers[-1]
    assert caller.inline() == (0, BODY[:-1] + b"x")
    assert taken(wire)  # until the answer is out: another replica may have to be asked
    wire.reply()
    assert not taken(wire)


def test_a_body_with_shadows_is_copied(wire: Wire) -> None:
    wire.receive(post(BODY, path="/shadowed")[:-1])
    wire.receive(BODY[-1:])
    caller, _ = assign(wire)
    assert (caller.flags, caller.body) == (0, BODY)
    wire.reply()
    assert not taken(wire)


def test_the_next_request_follows_a_large_body(wire: Wire) -> None:
    data = post(BODY) + post(b"small")
    wire.receive(data[:200])
    wire.receive(data[200:])
    assign(wire)
    wire.reply()
    assert wire.router.seen[1][1] == b"small"
