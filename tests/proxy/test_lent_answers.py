"""Answers that lie in the replica's memory: written from there, and no longer referred to than needed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
from fakes import Wire, get

from headgate.core import framing
from headgate.core.http11 import RUNNING
from headgate.core.replies import OWN_HEADERS

BODY = bytes(range(256)) * 4000


class Memory(bytearray):
    """What a replica would have lent."""


def lend(wire: Wire, body: bytes = BODY, block: bytes = b"", status: int = 200) -> weakref.ref[Memory]:
    """Answer the newest request with memory that is lent; dead when nothing refers to it any more."""
    memory = Memory(block + body)
    flags = framing.SEGMENT | (framing.HEAD if block else 0)
    view = memoryview(memory).toreadonly()
    wire.router.callers[-1].on_reply(status | 1 << 16, flags, len(block), view, 0, len(view))
    return weakref.ref(memory)


def is_free(memory: weakref.ref[Memory]) -> bool:
    gc.collect()
    return memory() is None


@pytest.fixture(params=["http", "https"])
def wire(request: Any) -> Wire:
    wire = Wire()
    wire.server.scheme = request.param
    return wire


def test_an_answer_is_written_whole_and_its_memory_is_free(wire: Wire) -> None:
    for _ in range(3):
        wire.receive(get())
        memory = lend(wire)
        output = wire.output
        assert output.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"content-length: %d\r\n" % len(BODY) in output.lower()
        assert b"content-type: text/plain" in output
        assert output.endswith(b"\r\n\r\n" + BODY)
        assert is_free(memory)


def test_header_lines_come_before_the_body(wire: Wire) -> None:
    wire.receive(get())
    lend(wire, block=b"x-own: y\r\n", status=201)
    output = wire.output
    assert output.startswith(b"HTTP/1.1 201 ")
    assert b"\r\nx-own: y\r\n" in output
    assert output.endswith(b"\r\n\r\n" + BODY)


def test_a_head_request_gets_no_body(wire: Wire) -> None:
    wire.receive(get(method="HEAD", path="/user/1/x"))
    memory = lend(wire)
    output = wire.output
    assert output.endswith(b"\r\n\r\n")
    assert b"content-length: %d\r\n" % len(BODY) in output.lower()
    assert is_free(memory)


def test_pipelined_requests_follow_in_order(wire: Wire) -> None:
    wire.receive(get() * 2)
    lend(wire)
    lend(wire, BODY[::-1])
    first, _, second = wire.output.partition(BODY)
    assert first.startswith(b"HTTP/1.1 200")
    assert second.endswith(BODY[::-1])


def test_a_client_that_has_gone_frees_the_memory(wire: Wire) -> None:
    wire.receive(get())
    wire.connection.connection_lost(None)
    assert is_free(lend(wire))


@pytest.fixture
def slow(wire: Wire) -> Wire:
    """Under TLS, with a client that takes little at a time."""
    wire.server.scheme = "https"
    write = wire.transport.write

    def write_and_fill(data: bytes) -> None:
        write(data)
        if len(data) > 1000:
            wire.connection.pause_writing()

    wire.transport.write = write_and_fill  # type: ignore[method-assign]
    wire.receive(get())
    return wire


def test_under_tls_no_more_is_written_than_the_client_takes(slow: Wire) -> None:
    memory = lend(slow)
    received = b""
    while output := slow.output:
        assert len(output) <= 66_000
        received += output
        assert is_free(memory) == (len(received) > len(BODY))
        slow.connection.resume_writing()
    assert received.endswith(b"\r\n\r\n" + BODY)
    assert is_free(memory)
    slow.receive(get())
    slow.reply(b"next")
    assert slow.output.endswith(b"next")


def test_under_tls_a_client_that_goes_in_the_middle_frees_the_memory(slow: Wire) -> None:
    memory = lend(slow)
    slow.connection.connection_lost(None)
    assert is_free(memory)


def test_a_head_that_cannot_be_written_does_not_cancel_the_next_request(wire: Wire) -> None:
    order: list[str] = []
    submit, cancel = wire.router.submit, wire.router.cancel
    wire.router.submit = lambda *given: (order.append("submit"), submit(*given))[1]  # type: ignore[func-returns-value,method-assign]
    wire.router.cancel = lambda caller: (order.append("cancel"), cancel(caller))[1]  # type: ignore[func-returns-value,method-assign]
    wire.receive(get() * 2)
    block = b"x-a: a\x01b\r\n"
    answer = memoryview(block + BODY)
    wire.router.callers[-1].on_reply(
        200 | OWN_HEADERS << 16, framing.SEGMENT | framing.HEAD, len(block), answer, 0, len(answer)
    )
    assert order in (["submit", "submit"], ["submit", "cancel", "submit"])
    assert wire.transport.output.startswith(b"HTTP/1.1 500 ")
    assert wire.connection.state == RUNNING
