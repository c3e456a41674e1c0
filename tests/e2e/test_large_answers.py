"""Large HTTP answers through shared memory: whole for fast and slow clients, whatever dies, and no trace after."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import leftovers
import pytest
from plain_sockets import connect, read_to_end
from running import eventually, one_instance
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response
from under_load import proxy_pid, replica_pids, serve

import headgate
from headgate.wire.borrowed import NAME

MIB = 1 << 20
KIB = 1 << 10


def content(size: int) -> bytes:
    return hashlib.sha256(b"%d" % size).digest() * (size // 32) + b"." * (size % 32)


def give(request: Any) -> bytes:
    return content(int(request.query_params["size"]))


async def give_later(request: Any) -> Response:
    return Response(content(int(request.query_params["size"])), headers={"x-own": "y"})


def echo(request: Any) -> bytes:
    data: bytes = request.data
    return data


def echo_view(request: Any) -> memoryview:
    view: memoryview = request.view
    return view


@pytest.fixture
def client() -> Iterator[headgate.Client]:
    with headgate.start(http_options={"port": 0, "write_timeout_s": 2.0}) as started:
        yield started


def segments(pid: int) -> int:
    return sum(NAME in target for target in leftovers.descriptors(pid).values())


def mapped(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count(NAME)


def ask(client: headgate.Client, size: int, receive_bytes: int = 16 * KIB) -> socket.socket:
    """A connection that has asked and reads nothing yet."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    sock.settimeout(20)
    host, _, port = str(client.http_address).removeprefix("http://").partition(":")
    sock.connect((host, int(port)))
    sock.sendall(b"GET /it?size=%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % size)
    return sock


def body_of(sock: socket.socket) -> bytes:
    return read_to_end(sock).partition(b"\r\n\r\n")[2]


@pytest.mark.parametrize("code", [give, give_later])
def test_answers_of_any_size_arrive_whole(client: headgate.Client, code: Any) -> None:
    serve(client, code)
    with httpx.Client(base_url=client.http_address) as http:
        for size in (64 * KIB - 1, 64 * KIB, 64 * KIB + 1, 100 * KIB, MIB, MIB + 1, 5 * MIB, 65 * MIB, 100 * KIB):
            answer = http.get("/it", params={"size": size})
            assert (answer.content == content(size)) is True
            assert answer.headers["content-length"] == str(size)
            assert ("x-own" in answer.headers) == (code is give_later)
            assert int(http.head("/it", params={"size": size}).headers["content-length"]) == size


@pytest.mark.parametrize("code", [echo, echo_view])
def test_many_at_once_get_each_their_own(client: headgate.Client, code: Any) -> None:
    client.create_backend("it", code, config={"num_replicas": 2})
    client.create_endpoint("it", backend="it", route="/it", methods=["POST"])

    async def run() -> None:
        limits = httpx.Limits(max_connections=40)
        async with httpx.AsyncClient(base_url=client.http_address, timeout=60, limits=limits) as http:
            bodies = [os.urandom(70_000 + n * 9_973) for n in range(100)]
            answers = await asyncio.gather(*(http.post("/it", content=body) for body in bodies))
            assert all(answer.content == body for answer, body in zip(answers, bodies, strict=True))

    asyncio.run(run())


def test_middlewares_get_them_in_parts() -> None:
    with one_instance(http_options={"port": 0, "middlewares": [Middleware(GZipMiddleware)]}) as client:
        serve(client, give)
        answer = httpx.get(f"{client.http_address}/it", params={"size": 5 * MIB})
        assert answer.headers["content-encoding"] == "gzip"
        assert (answer.content == content(5 * MIB)) is True


def test_what_was_used_is_given_back_when_nobody_asks_any_more(client: headgate.Client) -> None:
    serve(client, give)
    (replica,), proxy = replica_pids(client), proxy_pid(client)
    with ThreadPoolExecutor(16) as pool:
        pages = pool.map(lambda _: httpx.get(f"{client.http_address}/it", params={"size": MIB}).content, range(64))
        assert all(page == content(MIB) for page in pages)
    assert 0 < segments(replica) <= 16
    assert segments(proxy) == 0  # what it reads it has mapped, and open no longer
    eventually(lambda: segments(replica) == mapped(replica) == mapped(proxy) == 0, 10)


def test_clients_that_do_not_read_take_little_memory_and_are_given_up(client: headgate.Client) -> None:
    serve(client, give, max_concurrent_queries=200)
    (replica,), proxy = replica_pids(client), proxy_pid(client)
    httpx.get(f"{client.http_address}/it", params={"size": 8 * MIB})
    slow = [ask(client, 8 * MIB) for _ in range(40)]
    eventually(lambda: mapped(proxy) >= 8)
    time.sleep(0.5)
    assert mapped(proxy) <= 9  # of 8 MiB each; the others are answered in pieces
    began = time.monotonic()
    assert httpx.get(f"{client.http_address}/it", params={"size": MIB}).content == content(MIB)
    assert time.monotonic() - began < 1.0
    eventually(lambda: segments(replica) == mapped(proxy) == 0, 20)  # write_timeout_s, and they are kept for a while
    for sock in slow:
        sock.close()


def test_a_replica_that_dies_leaves_the_answer_that_it_gave(client: headgate.Client) -> None:
    serve(client, give)
    (replica,), proxy = replica_pids(client), proxy_pid(client)
    sock = ask(client, 6 * MIB)
    eventually(lambda: mapped(proxy) == 1)
    os.kill(replica, signal.SIGKILL)
    eventually(lambda: segments(replica) == 0)  # it is dead; another may take longer than write_timeout_s
    body = body_of(sock)
    assert len(body) == 6 * MIB
    assert (body == content(6 * MIB)) is True  # a diff of so much would take minutes
    sock.close()
    eventually(lambda: replica_pids(client) not in ([], [replica]))
    assert httpx.get(f"{client.http_address}/it", params={"size": MIB}).content == content(MIB)
    eventually(lambda: mapped(proxy) == 0, 10)


@pytest.mark.parametrize("victim", [replica_pids, lambda client: [proxy_pid(client)]])
def test_kill_9_in_the_middle_leaves_nothing(client: headgate.Client, victim: Callable[[Any], list[int]]) -> None:
    serve(client, give, max_concurrent_queries=50)
    before = set(os.listdir("/dev/shm"))
    for _ in range(3):
        waiting = [ask(client, 3 * MIB) for _ in range(8)]
        time.sleep(0.05)
        for pid in victim(client):
            os.kill(pid, signal.SIGKILL)
        for sock in waiting:
            sock.close()

        def answers() -> bool:
            try:
                return httpx.get(f"{client.http_address}/it", params={"size": MIB}).content == content(MIB)
            except httpx.TransportError:
                return False

        eventually(answers, 10)
    (replica,), proxy = replica_pids(client), proxy_pid(client)
    eventually(lambda: segments(replica) == mapped(replica) == mapped(proxy) == 0, 10)
    assert set(os.listdir("/dev/shm")) <= before


def test_an_answer_of_a_client_that_leaves_is_given_back(client: headgate.Client) -> None:
    serve(client, give)
    (replica,) = replica_pids(client)
    for _ in range(20):
        ask(client, 2 * MIB).close()
    with connect(client) as sock:
        sock.sendall(b"GET /it?size=%d HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % MIB)
        assert (body_of(sock) == content(MIB)) is True
    eventually(lambda: segments(replica) == 0, 10)
