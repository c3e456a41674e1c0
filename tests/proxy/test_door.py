"""The listening socket of a proxy is shut while file descriptors run out, and opened again by itself."""

from __future__ import annotations

import asyncio
import socket

import pytest

from headgate import eventloop
from headgate.proxy.door import Door
from headgate.wire import descriptors


class Greeter(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.write(b"hello")  # type: ignore[attr-defined]
        transport.close()


async def visit(address: tuple[str, int]) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        return await reader.read()
    finally:
        writer.close()


def test_who_comes_while_it_is_shut_is_let_in_later(monkeypatch: pytest.MonkeyPatch) -> None:
    are_left = True
    monkeypatch.setattr(descriptors, "are_left", lambda fd: are_left)
    monkeypatch.setattr(descriptors, "LOOK_AGAIN_S", 0.01)

    async def main() -> None:
        nonlocal are_left
        listener = socket.create_server(("127.0.0.1", 0))
        address = listener.getsockname()
        door = Door(listener, Greeter)
        await door.open()
        assert await visit(address) == b"hello"
        for _ in range(3):  # nobody is refused, however often
            are_left = False
            door.look()
            visits = [asyncio.create_task(visit(address)) for _ in range(5)]
            await asyncio.sleep(0.05)
            assert not any(each.done() for each in visits)
            are_left = True
            assert await asyncio.gather(*visits) == [b"hello"] * 5
        door.close()
        listener.close()

    eventloop.run(main())


def test_it_is_shut_when_the_last_ones_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    inside = 0
    monkeypatch.setattr(descriptors, "are_left", lambda fd: inside < 3)
    monkeypatch.setattr(descriptors, "LOOK_AGAIN_S", 3600)

    def greet() -> asyncio.Protocol:
        nonlocal inside
        inside += 1
        return Greeter()

    async def main() -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        door = Door(listener, greet)
        await door.open()
        visits = [asyncio.create_task(visit(listener.getsockname())) for _ in range(10)]
        await asyncio.sleep(0.1)
        let_in = [each for each in visits if each.done()]
        assert 3 <= len(let_in) <= 4  # one may be under way when it is shut
        for each in visits:
            each.cancel()
        await asyncio.gather(*visits, return_exceptions=True)
        door.close()
        listener.close()

    eventloop.run(main())


def test_a_closed_door_stays_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    are_left = False
    monkeypatch.setattr(descriptors, "are_left", lambda fd: are_left)
    monkeypatch.setattr(descriptors, "LOOK_AGAIN_S", 0.01)

    async def main() -> None:
        nonlocal are_left
        listener = socket.create_server(("127.0.0.1", 0))
        door = Door(listener, Greeter)
        await door.open()
        door.look()
        door.close()
        are_left = True
        coming = asyncio.create_task(visit(listener.getsockname()))
        await asyncio.sleep(0.05)
        assert not coming.done()
        listener.close()
        with pytest.raises(ConnectionResetError):
            await coming

    eventloop.run(main())
