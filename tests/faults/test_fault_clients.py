"""Clients that leave in the middle: what they had asked for ends, and their slots are free."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from http_load import Connection, in_thread
from promises import Promise
from running import eventually
from under_load import address_of, serve

import headgate

START = {"http_options": {"port": 0}}


def reset(connection: Connection) -> None:
    """Leave with a TCP reset."""
    sock: socket.socket = connection._writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.reset()


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
            reset(connection)
        else:
            await connection.close()

    for how in ("close", "reset") * 3:
        log.unlink(missing_ok=True)
        asyncio.run(leave(how))
        began = time.monotonic()
        eventually(lambda: log.read_text() == "cancelled", 2.0)
        assert time.monotonic() - began < 0.5
        assert handle.call(stay="1") == "free"


@pytest.mark.timeout(120)
@pytest.mark.promise("client resets mid-request: the async handler is cancelled within 100 ms, the slot is free")
def test_clients_that_reset_have_their_handlers_cancelled_and_leave_all_slots_free(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    log = tmp_path / "log"
    log.touch()

    async def hang(request: Any) -> str:
        if "stay" in request.query_params:
            return "free"
        try:
            await asyncio.sleep(3600)
        finally:
            with log.open("a") as file:
                file.write(f"{request.query_params['id']} {time.monotonic()}\n")
        return "never"

    count = promise.size(full=200, small=50)
    handle = serve(client, hang, max_concurrent_queries=count // 2)  # the other half waits, and never starts
    left: dict[str, float] = {}

    async def main() -> None:
        connections = await asyncio.gather(*(Connection(address_of(client)).open() for _ in range(count)))
        for number, connection in enumerate(connections):
            await connection.send(f"/it?id={number}")
        await asyncio.sleep(0.5)
        for number, connection in reversed(list(enumerate(connections))):  # the waiting ones first
            left[str(number)] = time.monotonic()
            reset(connection)
            await asyncio.sleep(0.002)

    asyncio.run(main())
    eventually(lambda: len(log.read_text().splitlines()) >= count // 2)
    assert headgate.get([handle.remote(stay="1") for _ in range(count)], timeout=5) == ["free"] * count
    cancelled = dict(line.split() for line in log.read_text().splitlines())
    assert len(cancelled) == count // 2
    promise.within(max(float(at) - left[id] for id, at in cancelled.items()), 0.1, "the slowest to be cancelled")
    promise.none_of(count, "slots held by clients that had gone")


@pytest.mark.promise("client resets: siblings in its batch are unaffected")
@pytest.mark.parametrize("is_async", [False, True])
def test_the_siblings_in_the_batch_of_a_client_that_resets_are_answered(
    client: headgate.Client, tmp_path: Path, promise: Promise, is_async: bool
) -> None:
    log = tmp_path / "log"

    def note(requests: list[Any]) -> list[str]:
        with log.open("a") as file:
            file.write(f"{len(requests)}\n")
        return [f"call:{request.query_params['id']}" for request in requests]

    def plain(requests: list[Any]) -> list[str]:
        answers = note(requests)
        time.sleep(0.2)
        return answers

    async def later(requests: list[Any]) -> list[str]:
        answers = note(requests)
        await asyncio.sleep(0.2)
        return answers

    code = headgate.accept_batch(later if is_async else plain)
    serve(client, code, max_batch_size=8, batch_wait_timeout=5.0, max_concurrent_queries=100)
    rounds = promise.size(full=50, small=2)

    async def one_batch() -> None:
        connections = await asyncio.gather(*(Connection(address_of(client)).open() for _ in range(8)))
        for number, connection in enumerate(connections):
            await connection.send(f"/it?id={number}")
        await asyncio.sleep(0.1)
        for connection in connections[::2]:
            reset(connection)
        for number, connection in list(enumerate(connections))[1::2]:
            assert (await connection.receive()).text == f"call:{number}"
            await connection.close()

    for _ in range(rounds):
        asyncio.run(one_batch())
    assert log.read_text().split() == ["8"] * rounds
    promise.none_of(4 * rounds, "siblings affected")


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


# --- callers in Python whose event loop ends ---


@pytest.mark.local("on Ray refs are Ray's own")
@pytest.mark.parametrize("how", ["cancelled", "again while cancelled", "begun while cancelled"])
def test_a_loop_that_ends_leaves_no_connection_open(client: headgate.Client, how: str) -> None:
    """Whatever its tasks begin in their last moments; nor does its end wait for ever."""

    async def echo(request: Any) -> str:
        await asyncio.sleep(0.001)
        return "x"

    serve(client, echo, num_replicas=3)

    async def call(handle: Any) -> None:
        try:
            await handle.call()
        finally:
            if how.startswith("again"):
                with contextlib.suppress(headgate.InstanceError):
                    await handle.call()
            elif how.startswith("begun"):
                asyncio.get_running_loop().create_task(handle.call())

    async def main(turns: int) -> None:
        handle = client.get_handle("it", sync=False)
        tasks = [asyncio.create_task(call(handle)) for _ in range(3)]
        for _ in range(turns):
            await asyncio.sleep(0)
        assert len(tasks) == 3

    asyncio.run(main(0))
    before = open_sockets()
    gc.disable()  # it would close what was left open
    try:
        for turns in range(30):
            asyncio.run(main(turns))
            assert open_sockets() <= before, turns
    finally:
        gc.enable()


def open_sockets() -> int:
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
    return found
