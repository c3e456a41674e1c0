"""Clients that leave in the middle: what they had asked for ends, and their slots are free."""

from __future__ import annotations

import asyncio
import socket
import time
from pathlib import Path
from typing import Any

from http_load import Connection, in_thread
from running import eventually
from under_load import address_of, serve

import headgate

START = {"http_options": {"port": 0}}


def test_a_client_that_leaves_has_its_async_handler_cancelled_at_once(client: headgate.Client, tmp_path: Path) -> None:
    log = tmp_path / "log"

    async def hang(request: Any) -> str:
        if "stay" in request.query_params:
            return "free"
        log.write_text("started")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            log.write_text("cancelled")
            raise
        return "never"

    handle = serve(client, hang, max_concurrent_queries=1)

    async def leave(how: str) -> None:
        connection = await Connection(address_of(client)).open()
        await connection.send("/it")
        await in_thread(eventually, lambda: log.exists() and log.read_text() == "started")
        if how == "reset":
            sock: socket.socket = connection._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.reset()
        else:
            await connection.close()

    for how in ("close", "reset") * 3:
        log.unlink(missing_ok=True)
        asyncio.run(leave(how))
        began = time.monotonic()
        eventually(lambda: log.read_text() == "cancelled", 2.0)
        assert time.monotonic() - began < 0.5
        assert handle.call(stay="1") == "free"


def test_two_hundred_clients_that_reset_leave_all_slots_free(client: headgate.Client) -> None:
    async def hang(request: Any) -> str:
        if "stay" not in request.query_params:
            await asyncio.sleep(3600)
        return "free"

    handle = serve(client, hang, max_concurrent_queries=50)

    async def main() -> None:
        connections = await asyncio.gather(*(Connection(address_of(client)).open() for _ in range(200)))
        for connection in connections:
            await connection.send("/it")
        await asyncio.sleep(0.3)
        for connection in connections:
            sock: socket.socket = connection._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            connection.reset()

    asyncio.run(main())
    assert headgate.get([handle.remote(stay="1") for _ in range(100)], timeout=5) == ["free"] * 100


def test_clients_that_leave_as_soon_as_they_have_asked_leave_all_slots_free(client: headgate.Client) -> None:
    async def quick(request: Any) -> str:
        await asyncio.sleep(0.001)
        return "free"

    handle = serve(client, quick, max_concurrent_queries=3)

    async def main() -> None:
        for delay in [0.0, 0.0002, 0.001] * 60:
            connection = await Connection(address_of(client)).open()
            await connection.send("/it")
            await asyncio.sleep(delay)
            connection.reset()

    asyncio.run(main())
    assert headgate.get([handle.remote() for _ in range(50)], timeout=5) == ["free"] * 50
