"""Many requests of every kind and many creations and deletions; then nothing may have grown.

    python tests/soak.py --requests 1000000 --cycles 200        as scripts/soak does

An instance under load from processes of its own: keep-alive and new connections, bodies of mixed sizes, batches, plain
and async handlers, errors, clients that go away in the middle, handles; meanwhile backends and endpoints come and go.
After a warm-up it is measured once, and again at the end: memory, descriptors and threads of each process, files of the
run directory, shared memory. `Soak.verdict` says what has grown.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import leftovers
from running import instance_pids, key_of

import headgate

MB = 2**20
#: What may be added to a process after the warm-up.
ALLOWED_BYTES = 2 * MB
#: The share of the whole that warms up: allocators, caches and thread pools have their size then.
WARM_UP = 0.2
#: How long the instance rests before it is measured: connections are closed, and idle threads end.
REST_S = 2.0

SIZES = (0, 1, 100, 4_000, 70_000, 300_000)
THREADS = 8
_RESET = struct.pack("ii", 1, 0)


# --- the instance ----------------------------------------------------------------------------------


async def quick(request: Any) -> int:
    return len(await request.body())


def plain(request: Any) -> str:
    return "x" * int(request.query_params.get("size", 10))


@headgate.accept_batch
async def batched(requests: list[Any]) -> list[int]:
    return [len(requests)] * len(requests)


async def raising(request: Any) -> None:
    raise ValueError("of the user's")


def handled(request: Any) -> Any:
    return request.data


def start() -> headgate.Client:
    """An instance with an endpoint of each kind."""
    client = headgate.start(http_options={"port": 0})
    kinds = {"quick": quick, "plain": plain, "batched": batched, "raising": raising, "handled": handled}
    for name, function in kinds.items():
        config = {"max_batch_size": 8, "batch_wait_timeout": 0.002} if function is batched else {}
        client.create_backend(name, function, config={"max_concurrent_queries": 100, **config})
        client.create_endpoint(name, backend=name, route=f"/{name}", methods=["GET", "POST"])
    return client


def cycle(client: headgate.Client, number: int) -> None:
    """A backend and its endpoint come, are used, changed, and go."""
    tag = f"tag{number % 7}"
    client.create_backend(tag, plain)
    client.create_endpoint(tag, backend=tag, route=f"/{tag}")
    assert client.get_handle(tag).call() == "x" * 10
    if number % 3 == 0:
        client.update_backend(tag, handled)
    client.set_traffic("handled", {"handled": 0.5, tag: 0.5})
    client.set_traffic("handled", {"handled": 1.0})
    client.delete_endpoint(tag)
    client.delete_backend(tag)


# --- load over HTTP: in processes of its own -------------------------------------------------------


class Caller:
    """One client: a connection that it keeps, and ways to misuse others."""

    def __init__(self, host: str, port: int, seed: str, sizes: tuple[int, ...] = SIZES) -> None:
        self._address = host, port
        self._sizes = sizes
        self._random = random.Random(seed)
        self._sock: socket.socket | None = None
        self._rest = b""

    def one(self) -> str:
        """A request of some kind: how it was answered."""
        dice = self._random.random()
        if len(self._sizes) == 1:  # the peak of what is taken
            dice = 0.7 if dice < 0.5 else 0.8
        if dice < 0.03:
            return self._go_away()
        if dice < 0.10:
            self.close()  # the next is a new connection
        if dice < 0.60:
            return self._ask("GET", "/quick")
        if dice < 0.75:
            return self._ask("POST", "/quick", b"x" * self._random.choice(self._sizes))
        if dice < 0.83:
            return self._ask("GET", f"/plain?size={self._random.choice(self._sizes)}")
        if dice < 0.93:
            return self._ask("GET", "/batched")
        return self._ask("GET", self._random.choice(("/raising", "/nowhere", "/quick?" + "y" * 3000)))

    def _connect(self) -> socket.socket:
        sock = socket.create_connection(self._address, timeout=30)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock

    def _request(self, method: str, path: str, body: bytes = b"") -> bytes:
        fields = f"{method} {path} HTTP/1.1\r\nHost: soak\r\n"
        return (fields + (f"Content-Length: {len(body)}\r\n" if method == "POST" else "") + "\r\n").encode() + body

    def _ask(self, method: str, path: str, body: bytes = b"") -> str:
        if self._sock is None:
            self._sock = self._connect()
        try:
            self._sock.sendall(self._request(method, path, body))
            return f"{path.partition('?')[0]} {self._answer(self._sock)}"
        except OSError as error:
            self.close()
            return type(error).__name__

    def _answer(self, sock: socket.socket) -> int:
        data = self._rest
        while (end := data.find(b"\r\n\r\n")) < 0:
            data += self._more(sock)
        head = data[:end].lower()
        found = re.search(rb"content-length: (\d+)", head)
        length = end + 4 + (int(found.group(1)) if found else 0)
        parts, have = [data], len(data)
        while have < length:
            parts.append(self._more(sock))
            have += len(parts[-1])
        self._rest = b"".join(parts)[length:]
        if b"connection: close" in head:
            self.close()
        return int(head[9:12])

    def _more(self, sock: socket.socket) -> bytes:
        data = sock.recv(65536)
        if not data:
            raise ConnectionResetError
        return data

    def _go_away(self) -> str:
        """Reset the connection: in the middle of the head, of the body, or before the answer."""
        whole = self._request("POST", "/batched", b"x" * 5000)
        with self._connect() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.sendall(whole[: self._random.choice((20, 500, len(whole)))])
            if self._random.random() < 0.5:
                time.sleep(0.001)
        return "reset"

    def close(self) -> None:
        if self._sock is not None:
            self._sock.close()
        self._sock, self._rest = None, b""


def load(address: str, requests: int, seed: str, sizes: tuple[int, ...] = SIZES) -> Counter[str]:
    """So many requests from THREADS clients: how they were answered."""
    host, _, port = address.removeprefix("http://").rpartition(":")

    def work(number: int) -> Counter[str]:
        caller = Caller(host, int(port), f"{seed} {number}", sizes)
        found = Counter(caller.one() for _ in range(requests // THREADS))
        caller.close()
        return found

    with ThreadPoolExecutor(THREADS) as pool:
        return sum(pool.map(work, range(THREADS)), Counter())


EXPECTED = {"/quick 200", "/plain 200", "/batched 200", "/raising 500", "/nowhere 404", "reset"}


def load_elsewhere(address: str, requests: int, seed: str, largest: bool = False) -> Counter[str]:
    """`load` in a process of its own."""
    command = [sys.executable, __file__, "--load", address, "--requests", str(requests), "--seed", seed]
    command += ["--largest"] if largest else []
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return Counter({key: int(count) for count, _, key in (line.partition(" ") for line in output.splitlines())})


def wrk(address: str, seconds: int) -> Counter[str]:
    """What `wrk` gets done on keep-alive connections."""
    command = ["wrk", "-t1", "-c32", f"-d{seconds}s", "--timeout", "20s", f"{address}/quick"]
    output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "Non-2xx" not in output, output
    assert "Socket errors" not in output, output
    found = re.search(r"(\d+) requests in", output)
    assert found, output
    return Counter({"/quick 200": int(found.group(1))})


# --- what is measured ------------------------------------------------------------------------------


class Size(NamedTuple):
    """Of one process."""

    rss: int
    uss: int
    descriptors: int
    threads: int


def size_of(pid: int) -> Size:
    fields = Counter[str]()
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, amount, _ = line.split()
        fields[name] += int(amount) * 1024
    uss = fields["Private_Clean:"] + fields["Private_Dirty:"]
    return Size(fields["Rss:"], uss, len(leftovers.descriptors(pid)), len(os.listdir(f"/proc/{pid}/task")))


def title_of(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


class Measured(NamedTuple):
    """The instance at one moment: its processes, the names of its files, the shared memory."""

    processes: dict[tuple[int, str], Size]
    files: list[str]
    shared_memory: list[str]


def measure(client: headgate.Client) -> Measured:
    folder = Path(key_of(client))
    backends = {one.pid: one.backend for one in client.status().replicas}
    everybody = instance_pids(str(folder))
    pids = {pid: f"replica of {backends[pid]}" if pid in backends else title_of(pid) for pid in everybody}
    pids[os.getpid()] = "driver"
    return Measured(
        {(pid, role): size_of(pid) for pid, role in pids.items()},
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*")),
        sorted(map(str, leftovers.shared_memory())),
    )


class Soak:
    """One soak; `lines` is a line for each process, `verdict` what is wrong."""

    def __init__(
        self, requests: int, cycles: int, seed: str = "1", processes: int = 2, with_wrk: bool = True,
        rest_s: float = REST_S,
    ) -> None:
        self._requests = requests
        self._cycles = cycles
        self._seed = seed
        self._processes = processes
        self._wrk = with_wrk and shutil.which("wrk") is not None
        self._rest_s = rest_s
        self._cycled = 0
        self.answers: Counter[str] = Counter()
        self.before: Measured
        self.after: Measured

    def run(self) -> Soak:
        with start() as client:
            self._burst(client)
            self._part(client, WARM_UP)
            self.before = self._rested(client)
            self._part(client, 1.0 - WARM_UP)
            self.after = self._rested(client)
        return self

    def _burst(self, client: headgate.Client) -> None:
        """All bodies and answers of the largest size at once: an allocator keeps what its peak has taken."""
        assert client.http_address
        requests = max(int(self._requests * WARM_UP) // 20, 40 * THREADS)
        with ThreadPoolExecutor(self._processes) as pool:
            jobs = [
                pool.submit(load_elsewhere, client.http_address, requests, f"burst {number}", True)
                for number in range(self._processes)
            ]
            for _ in range(40):
                refs = [client.get_handle("handled").remote(b"y" * SIZES[4]) for _ in range(16)]
                headgate.get(refs)
            for job in jobs:
                self.answers += job.result()

    def _rested(self, client: headgate.Client) -> Measured:
        time.sleep(self._rest_s)
        return measure(client)

    def _part(self, client: headgate.Client, share: float) -> None:
        """That share of everything, all at the same time."""
        assert client.http_address
        requests = int(self._requests * share)
        by_handle = requests // 10
        by_wrk = requests // 2 if self._wrk else 0
        by_http = (requests - by_handle - by_wrk) // self._processes
        errors: list[BaseException] = []

        def guarded(function: Any, *arguments: Any) -> None:
            try:
                function(*arguments)
            except BaseException as error:  # noqa: BLE001 - told at the end
                errors.append(error)

        jobs = [(self._http, client.http_address, by_http, f"{self._seed} {share} {n}") for n in range(self._processes)]
        jobs += [(self._handles, client, by_handle), (self._many_wrk, client.http_address, by_wrk)]
        jobs += [(self._cycling, client, int(self._cycles * share))]
        threads = [threading.Thread(target=guarded, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def _http(self, address: str, requests: int, seed: str) -> None:
        self.answers += load_elsewhere(address, requests, seed)

    def _many_wrk(self, address: str, requests: int) -> None:
        done = 0
        while done < requests:
            found = wrk(address, 2)
            done += found.total()
            self.answers += found

    def _handles(self, client: headgate.Client, requests: int) -> None:
        handle: Any = client.get_handle("handled")
        chance = random.Random(self._seed)
        waiting = []
        for number in range(requests):
            data = b"y" * chance.choice(SIZES[:5])
            waiting.append((handle.remote(data), len(data)))
            if len(waiting) >= 16 or number == requests - 1:
                for ref, length in waiting:
                    # While traffic is split, the other backend answers in its own way.
                    assert len(ref.result(30)) in (length, 10)
                waiting.clear()
        self.answers["handle"] += requests

    def _cycling(self, client: headgate.Client, cycles: int) -> None:
        for _ in range(cycles):
            cycle(client, self._cycled)
            self._cycled += 1

    def lines(self) -> Iterator[str]:
        """What there was of each process, and what was added."""
        for (pid, role), now in sorted(self.after.processes.items(), key=lambda item: item[0][1]):
            was = self.before.processes.get((pid, role))
            if was is None:
                yield f"{role:22} it is new"
                continue
            yield (
                f"{role:22} RSS {now.rss / MB:6.1f} MB ({(now.rss - was.rss) / MB:+.2f}), own {now.uss / MB:6.1f} MB "
                f"({(now.uss - was.uss) / MB:+.2f}), fds {now.descriptors} ({now.descriptors - was.descriptors:+d}), "
                f"threads {now.threads} ({now.threads - was.threads:+d})"
            )
        added = len(self.after.files) - len(self.before.files)
        yield f"{'run directory':22} {len(self.after.files)} files ({added:+d})"
        added = len(self.after.shared_memory) - len(self.before.shared_memory)
        yield f"{'/dev/shm':22} {len(self.after.shared_memory)} files ({added:+d})"

    def verdict(self, allowed_bytes: int = ALLOWED_BYTES) -> list[str]:
        """What is not as it was, a line for each."""
        found = [f"unexpected answer: {key} x {count}" for key, count in self._unexpected()]
        if self.before.processes.keys() != self.after.processes.keys():
            found.append(f"other processes than before: {self.before.processes.keys() ^ self.after.processes.keys()}")
        for (pid, role), was in self.before.processes.items():
            now = self.after.processes.get((pid, role), was)
            if now.rss - was.rss > allowed_bytes:
                found.append(f"{role}: {(now.rss - was.rss) / MB:.2f} MB more than after the warm-up")
            if now.descriptors > was.descriptors:
                found.append(f"{role}: {now.descriptors - was.descriptors} more descriptors")
            if now.threads > was.threads:
                found.append(f"{role}: {now.threads - was.threads} more threads")
        if new := set(self.after.files) - set(self.before.files):
            found.append(f"more files in the run directory: {sorted(new)}")
        mine = [name for name in set(self.after.shared_memory) - set(self.before.shared_memory) if "headgate" in name]
        return found + [f"shared memory {name}" for name in mine]

    def _unexpected(self) -> list[tuple[str, int]]:
        return [(key, count) for key, count in self.answers.items() if key not in EXPECTED | {"handle"}]


def main() -> int:
    parser = argparse.ArgumentParser(description="Many requests and changes; then nothing may have grown.")
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--processes", type=int, default=2, help="of the load")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--no-wrk", action="store_true", help="the tests' own load only")
    parser.add_argument("--load", metavar="ADDRESS", help=argparse.SUPPRESS)
    parser.add_argument("--largest", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.load:
        sizes = SIZES[-1:] if given.largest else SIZES
        for key, count in load(given.load, given.requests, given.seed, sizes).items():
            print(count, key)
        return 0
    begun = time.monotonic()
    soak = Soak(given.requests, given.cycles, given.seed, given.processes, not given.no_wrk).run()
    print(f"{soak.answers.total():,} requests and {given.cycles} cycles in {time.monotonic() - begun:.0f} s:")
    print("  " + ", ".join(f"{key} x {count:,}" for key, count in sorted(soak.answers.items())))
    for line in soak.lines():
        print(line)
    wrong = soak.verdict()
    for line in wrong:
        print(f"NOT KEPT: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
