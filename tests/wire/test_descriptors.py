"""Asking for file descriptors before there are none; and who accepts meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import resource
import socket
from collections.abc import Iterator

import pytest
import virtual_time

from headgate.wire import descriptors
from headgate.wire.acceptor import Acceptor
from headgate.wire.link import Link, open_link


@contextlib.contextmanager
def left(count: int) -> Iterator[None]:
    """So many can be opened while the block runs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest + count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_some_are_kept_in_reserve() -> None:
    with left(1000):
        assert descriptors.are_left(0)
    with left(1):
        assert not descriptors.are_left(0)
    with left(0):
        assert not descriptors.are_left(0)


def test_asking_opens_nothing() -> None:
    before = os.listdir("/proc/self/fd")
    descriptors.are_left(0)
    assert os.listdir("/proc/self/fd") == before


def test_a_shortage_is_said_once_in_a_while(caplog: pytest.LogCaptureFixture) -> None:
    shortage = descriptors.Shortage(logging.getLogger("headgate.test"), "visitors")
    for _ in range(1000):
        shortage.say()
    assert len(caplog.records) == 1
    assert "visitors wait until some are closed" in caplog.text


def test_a_process_may_raise_its_own_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, soft), hard))
        descriptors.raise_limit()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_whoever_connects_meanwhile_waits_and_is_accepted_later() -> None:
    """On a clock on which looking again takes no time."""

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        accepted: list[str] = []

        async def admit(sock: socket.socket, name: str, fds: list[int]) -> None:
            raise AssertionError("nobody proves itself here")

        acceptor = Acceptor(listener, b"t" * 32, admit)
        acceptor._greet = lambda sock: greeted(sock, accepted)  # type: ignore[method-assign]
        with socket.create_connection(listener.getsockname()):
            with left(1):
                acceptor.open()
                await asyncio.sleep(1.0)
                assert accepted == []
            await asyncio.sleep(2 * descriptors.LOOK_AGAIN_S)
            assert accepted == ["one"]
            acceptor.close()

    async def greeted(sock: socket.socket, accepted: list[str]) -> None:
        accepted.append("one")
        sock.close()

    virtual_time.run(main())


def test_a_link_without_a_descriptor_of_its_own_is_not_opened() -> None:
    async def main() -> None:
        here, there = socket.socketpair()
        with left(0), pytest.raises(OSError, match="Too many open files"):
            await open_link(Link(), here)
        assert here.fileno() == -1  # closed
        there.close()

    virtual_time.run(main())
