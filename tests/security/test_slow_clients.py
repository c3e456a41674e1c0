"""Clients that are slow on purpose or send without end: who is cut off, what others notice, what it costs."""

from __future__ import annotations

import asyncio
import contextlib
import re
import select
import socket
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from http_load import Connection
from plain_sockets import connect, read_to_end
from promises import SLACK, Promise
from running import one_instance
from under_load import address_of, proxy_pid

import headgate

pytestmark = pytest.mark.local("what comes in by HTTP is the proxy's business, the same on both engines")

MIB = 1 << 20


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[headgate.Client]:
    """In place of the usual one: its time-outs are shorter, and shorter still where few connections are opened."""
    seconds = 6.0 if request.config.getoption("--promises") == "full" else 1.5
    timeouts = dict.fromkeys(("head_timeout_s", "body_timeout_s", "write_timeout_s"), seconds)
    limits = {"max_body_bytes": 4 * MIB, "max_buffered_bytes": 16 * MIB}
    with one_instance(http_options={"port": 0, **timeouts, **limits}) as client:
        yield client


#: slowhttptest's own words for its modes: a line of a head, a few bytes of a body, a few bytes of an answer a second.
MODES = {
    "head": ["-H", "-i", "1", "-x", "24"],
    "body": ["-B", "-i", "1", "-x", "10", "-s", "100000"],
    "read": ["-X", "-n", "1", "-w", "512", "-y", "1024", "-z", "32"],
}


async def quick(request: Any) -> str:
    await asyncio.sleep(0.02)
    return "ok"


def large_answer(size: int) -> Callable[..., Any]:
    """The same bytes for all: what 1,000 answers cost the replica is not what is measured."""
    answer = b"y" * size

    async def large(request: Any) -> bytes:
        return answer

    return large


def serve(client: headgate.Client) -> None:
    for name, code in (("quick", quick), ("large", large_answer(4 * MIB))):
        client.create_backend(name, code, config={"max_concurrent_queries": 2000})
        client.create_endpoint(name, backend=name, route=f"/{name}", methods=["GET", "POST"])


def resident(pid: int) -> int:
    """Bytes of memory that the process has of its own, without what it shares (the arena)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * sum(int(kb) for kb in re.findall(r"Rss(?:Anon|Shmem):\s+([0-9]+) kB", status))


async def watch_normal_clients(address: str, latencies: list[float], until: Callable[[], bool]) -> None:
    """Eight clients, each with 10 requests a second on a fixed schedule: latencies from the intended times."""
    loop = asyncio.get_running_loop()

    async def client(offset_s: float) -> None:
        connection = await Connection(address).open()
        due = loop.time() + offset_s
        while not until():
            await asyncio.sleep(due - loop.time())
            answer = await asyncio.wait_for(connection.get("/quick"), 10.0)
            assert answer.status == 200
            latencies.append(loop.time() - due)
            due += 0.1
        await connection.close()

    await asyncio.gather(*(client(number / 80) for number in range(8)))


def p99(latencies: list[float]) -> float:
    return statistics.quantiles(latencies, n=100)[98]


def server_sockets(address: str) -> int:
    """How many connections to the address the kernel keeps on the server's side, those without a process too."""
    port = f"{int(address.rpartition(':')[2]):04X}"
    states = re.findall(rf": [0-9A-F]+:{port} \S+ (..)".encode(), Path("/proc/net/tcp").read_bytes())
    return len(states) - states.count(b"0A") - states.count(b"06")  # listens; waits in vain


def tcp_pages() -> int:
    """Pages of memory that the kernel keeps for TCP, on the whole machine."""
    found = re.search(r"^TCP: .* mem ([0-9]+)", Path("/proc/net/sockstat").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


class Attack:
    """slowhttptest's connections, a normal client's requests meanwhile, and what the kernel keeps."""

    def __init__(self, address: str, mode: str, connections: int) -> None:
        self.latencies: list[float] = []
        self.sockets: list[int] = []  # every half second
        self.kernel_pages = 0  # of memory for TCP, at most
        self.said = ""
        self._address = address
        # It takes all of a core, and would come from another machine.
        self._command = ["nice", "-n", "10", needs.program("slowhttptest"), "-c", str(connections)]
        self._command += ["-r", str(connections), *MODES[mode]]
        self._command += ["-u", address + ("/large" if mode == "read" else "/quick"), "-p", "5"]

    async def run(self, seconds: int) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command, "-l", str(seconds), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        said = asyncio.create_task(process.communicate())
        looking = asyncio.create_task(self._look())
        await watch_normal_clients(self._address, self.latencies, said.done)
        looking.cancel()
        output, _ = await said
        self.said = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", output.decode(errors="replace"))

    async def _look(self) -> None:
        while True:
            self.sockets.append(await asyncio.to_thread(server_sockets, self._address))
            self.kernel_pages = max(self.kernel_pages, tcp_pages())
            await asyncio.sleep(0.5)


@pytest.mark.parametrize("mode", [
    pytest.param("head", marks=pytest.mark.promise("slow head (slowhttptest -H): 408 or close, others' p99 < 2 x")),
    pytest.param("body", marks=pytest.mark.promise("slow body (slowhttptest -B): 408 or close, others' p99 < 2 x")),
    pytest.param("read", marks=pytest.mark.promise("slow reader (slowhttptest -X): closed, others' p99 < 2 x")),
])  # fmt: skip
def test_slow_clients_are_cut_off_and_others_do_not_notice(
    client: headgate.Client, promise: Promise, mode: str
) -> None:
    serve(client)
    address = address_of(client)
    quiet: list[float] = []
    ends = time.monotonic() + (5.0 if promise.full else 1.0)
    asyncio.run(watch_normal_clients(address, quiet, lambda: time.monotonic() > ends))
    before, pages = resident(proxy_pid(client)), tcp_pages()

    connections = promise.size(1000, 50)
    slow = Attack(address, mode, connections)
    asyncio.run(slow.run(40 if promise.full else 7))

    grown = resident(proxy_pid(client)) - before
    assert max(slow.sockets) >= 0.9 * connections, slow.sockets
    if mode == "read":  # it does not notice: what came before the reset keeps it reading
        assert slow.sockets[-2] <= 12, slow.sockets  # the normal clients
    else:
        assert "No open connections left" in slow.said, slow.said[-800:]
    promise.says(f"all {connections:,} closed, at most {max(slow.sockets):,} open at once")
    was, became = p99(quiet), p99(slow.latencies)
    promise.says(f"p99 of a normal client {1000 * became:.1f} ms, before {1000 * was:.1f} ms")
    assert became < (was * 2.0 if promise.full else was * 2.0 * SLACK + 1.0)
    kernel = (slow.kernel_pages - pages) * 4096
    promise.says(f"proxy's memory grew by {grown / MIB:.1f} MB, the kernel's by {kernel / MIB:.1f}")
    assert kernel < connections * 1024 * 1024 + 64 * MIB  # of the whole machine: others use TCP too
    assert grown < connections * 400 * 1024 + 8 * MIB


def status_of(sock: socket.socket) -> int:
    """What is answered before the connection ends; 0 if nothing."""
    data = read_to_end(sock)
    return int(data[9:12]) if data else 0


CHUNKED = b"POST /quick HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
#: What begins so and goes on with so much of the same: and its answer.
BOMBS = {
    "a target without end": (b"GET /", b"x", 414),
    "a field without end": (b"GET /quick HTTP/1.1\r\nHost: a\r\nA: ", b"x", 431),
    "fields without end": (b"GET /quick HTTP/1.1\r\nHost: a\r\n", b"a: b\r\n", 431),
    "a method without end": (b"", b"X", 431),
    "a chunk extension without end": (CHUNKED + b"1;a=", b"x", 400),
    "chunks of a byte without end": (CHUNKED, b"1;" + b"a" * 1000 + b"\r\nx\r\n", 413),
    "leading zeros without end": (CHUNKED, b"0", 400),
    "chunks without end": (CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n", 413),
    "trailers without end": (CHUNKED + b"0\r\n", b"a: b\r\n", 431),
    "a trailer without end": (CHUNKED + b"0\r\na: ", b"x", 431),
    "a length without end": (b"POST /quick HTTP/1.1\r\nHost: a\r\nContent-Length: ", b"1", 431),
    "a giant body": (b"POST /quick HTTP/1.1\r\nHost: a\r\nContent-Length: 4194305\r\n\r\n", b"x", 413),
    "a body for nobody": (b"POST /nobody HTTP/1.1\r\nHost: a\r\nContent-Length: 4194304\r\n\r\n", b"x", 404),
}


@pytest.mark.promise("head bomb, endless chunks, giant body: 431, 414, 413, 400 before buffering")
def test_what_has_no_end_is_refused_before_it_is_kept(client: headgate.Client, promise: Promise) -> None:
    serve(client)
    size = promise.size(32, 8) * MIB
    pid = proxy_pid(client)
    before = most = resident(pid)
    for name, (begin, more, status) in BOMBS.items():
        with connect(client) as sock:
            sock.sendall(begin)
            taken = 0
            block = more * (65536 // len(more) + 1)
            try:
                while taken < size:
                    sock.sendall(block)
                    taken += len(block)
            except ConnectionError:
                pass
            most = max(most, resident(pid))
            assert status_of(sock) in (status, 0), name  # 0: it was reset while it still sent
        with connect(client) as sock:  # in no greater haste it gets its answer
            sock.sendall(begin)
            for _ in range(6 * MIB // len(block)):
                try:
                    sock.sendall(block)
                except ConnectionError:
                    break
                if select.select([sock], [], [], 0.01)[0]:
                    break
            assert status_of(sock) == status, name
    promise.says(f"{len(BOMBS)} kinds of {size // MIB} MB; the proxy's memory grew by {(most - before) / MIB:.1f} MB")
    assert most - before < 6 * MIB  # a body that was still within its limit of 4 MB


@pytest.mark.promise("proxy memory is bounded by connections x buffer")
def test_memory_is_bounded_by_connections(client: headgate.Client, promise: Promise) -> None:
    serve(client)
    pid = proxy_pid(client)
    connections = promise.size(1000, 100)
    half = b"GET /quick HTTP/1.1\r\nHost: a\r\nA: " + b"x" * 30_000
    body = b"POST /quick HTTP/1.1\r\nHost: a\r\nContent-Length: 4000000\r\n\r\n" + b"x" * 3_000_000
    one_read = 256 * 1024  # what each has sent by the time it is told to wait
    for name, data, bound in (
        ("half heads of 30 KB", half, connections * 48 * 1024),
        ("half bodies of 3 MB, of which max_buffered_bytes allows 16 MB", body, 16 * MIB + connections * one_read),
    ):
        before = resident(pid)
        socks = [connect(client) for _ in range(connections)]
        try:
            for sock in socks:
                sock.setblocking(False)
            ends = time.monotonic() + 1.0
            sent = dict.fromkeys(socks, 0)
            while time.monotonic() < ends:
                for sock in socks:
                    with contextlib.suppress(BlockingIOError, ConnectionError):
                        sent[sock] += sock.send(data[sent[sock] : sent[sock] + 65536])
            grown = resident(pid) - before
        finally:
            for sock in socks:
                sock.close()
        promise.says(f"{name}: {grown / MIB:.1f} MB more (at most {bound / MIB:.0f})")
        assert grown < bound + 8 * MIB
