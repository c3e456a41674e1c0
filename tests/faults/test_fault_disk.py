"""A disk that is full or read-only, a full /dev/shm: serving goes on, changes fail typed, all recovers by itself."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from apart import Apart, Raised
from http_load import Connection, get, in_thread, load
from promises import Promise
from running import eventually, is_alive

pytestmark = pytest.mark.local("the disk of an instance of one machine; on Ray goals are in Ray's store")

CODE = """
import sys

async def here(request):
    print("a line of the user's")
    return "here"

@headgate.accept_batch
def batch(requests):
    print("a line of the user's")
    return [len(request.data) if request.data else 0 for request in requests]

def plain(request):
    print("a line of the user's", file=sys.stderr)
    return len(request.data or "")

for name, code, config in (("it", here, {"num_replicas": 2}), ("batch", batch, {}), ("plain", plain, {})):
    client.create_backend(name, code, config=config)
    client.create_endpoint(name, backend=name, route="/" + name, methods=["GET", "POST"])
handles = {name: client.get_handle(name) for name in ("it", "batch", "plain")}
"""
#: A change.
MORE = 'client.create_endpoint("more", backend="it", route="/more")'
OTHER = 'client.create_backend("other", lambda request: "other")'
LARGE = 3 * 2**20


class Disk:
    """A small file system at `folder`, and two ways to spoil it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        filler = self.folder / "filler"
        fill(filler)
        for log in self.folder.glob("stderr*"):  # there may be room in its last page
            fill(log)
        yield
        filler.unlink()

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """For all that is opened from now on; a file that is open for writing would prevent anything else."""
        mount("--bind", self.folder, self.folder)
        try:
            mount("-o", "remount,bind,ro", self.folder)
            yield
        finally:
            subprocess.run(["umount", self.folder], check=True)


def mount(*arguments: str | Path) -> None:
    subprocess.run(["mount", *arguments], check=True)


def fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for size in (2**16, 1):
            with contextlib.suppress(OSError):
                while file.write(b"\n" * size) == size:
                    pass


@pytest.fixture
def disk(short_dir: Path) -> Iterator[Disk]:
    needs.mounts()
    mount("-t", "tmpfs", "-o", "size=8m", "tmpfs", short_dir)
    try:
        yield Disk(short_dir)
    finally:
        subprocess.run(["umount", short_dir], check=True)


async def post(address: str, path: str, size: int) -> str:
    connection = await Connection(address).open()
    connection.write(f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Length: {size}\r\n\r\n".encode() + b"x" * size)
    answer = await connection.receive()
    await connection.close()
    assert answer.status == 200, answer
    return answer.text


def ask_everything(apart: Apart) -> int:
    """Ask each backend over HTTP and by a handle, with bodies small and large; how many requests that was."""
    asked = [
        asyncio.run(post(apart.address, "/plain", LARGE)),
        asyncio.run(post(apart.address, "/plain", 10)),
        asyncio.run(get(apart.address, "/batch")).text,
        asyncio.run(get(apart.address, "/it")).text,
        apart.do(f'handles["batch"].call("x" * {LARGE})'),
        apart.do('handles["it"].call()'),
    ]
    assert asked == [str(LARGE), "10", "0", "here", LARGE, "here"]
    return len(asked)


def kill_one_of_each(apart: Apart, *, with_replica: bool) -> None:
    """All come back, and what runs is what ran."""
    names = apart.do("sorted(client.list_endpoints())")
    before = apart.replicas()
    if with_replica:
        os.kill(before[0], signal.SIGKILL)
        eventually(lambda: len(set(apart.replicas()) - {before[0]}) == 2)
    after = apart.replicas()
    proxy = apart.proxy()
    os.kill(proxy, signal.SIGKILL)
    eventually(lambda: apart.proxy() != proxy)
    controller = apart.controller()
    os.kill(controller, signal.SIGKILL)
    eventually(lambda: not is_alive(controller))
    assert apart.do("sorted(client.list_endpoints())") == names
    assert apart.replicas() == after


def check(apart: Apart, disk: Disk, promise: Promise, spoilt: Any, why: str, *, with_replica: bool) -> None:
    rounds = promise.size(5, 1)
    refusals = 0

    async def spoil() -> int:
        nonlocal refusals
        asked = 0
        async with load(apart.address, "/it", 200) as running:
            for _ in range(rounds):
                with spoilt():
                    for change in (MORE, OTHER):
                        with pytest.raises(Raised) as refused:
                            await in_thread(apart.do, change)
                        assert refused.value.kind == "InstanceError"
                        assert refused.value.is_ours
                        assert why in refused.value.text
                        assert str(disk.folder) in refused.value.text
                        refusals += 1
                    assert await in_thread(apart.do, "sorted(client.list_endpoints())") == ["batch", "it", "plain"]
                    assert await in_thread(apart.do, "sorted(client.list_backends())") == ["batch", "it", "plain"]
                    asked += await in_thread(ask_everything, apart)
                    await asyncio.sleep(0.2)
                began = time.monotonic()
                await in_thread(apart.do, MORE)
                await in_thread(apart.do, OTHER)
                promise.within(time.monotonic() - began, 2.0, "changed at once when it was mended")
                await in_thread(apart.do, 'client.delete_endpoint("more")')
                await in_thread(apart.do, 'client.delete_backend("other")')
        assert running.failed == {}
        return asked + running.sent

    asked = asyncio.run(spoil())
    with spoilt():
        kill_one_of_each(apart, with_replica=with_replica)
        asked += ask_everything(apart)
    apart.do(MORE)
    assert asyncio.run(get(apart.address, "/more")).text == "here"
    assert not list(disk.folder.rglob("*.new")) + list(disk.folder.rglob("*.corrupt-*"))
    promise.none_of(asked, "requests lost or failed")
    promise.says(f"{refusals} changes refused, {why!r}")


@pytest.mark.promise("disk full, goals and logs: serving goes on, changes fail typed, recovers by itself")
def test_a_full_disk(disk: Disk, tmp_path: Path, promise: Promise) -> None:
    log = disk.folder / "stderr"
    with Apart(CODE, tmp_path, env={"XDG_RUNTIME_DIR": str(disk.folder)}, errors_to=log) as apart:
        check(apart, disk, promise, disk.full, "No space left", with_replica=True)
        lines = len(log.read_text().splitlines())
        assert asyncio.run(get(apart.address, "/it")).text == "here"
        eventually(lambda: len(log.read_text().splitlines()) > lines)  # what is printed now is written again
        assert "Traceback" not in log.read_text()


@pytest.mark.promise("disk read-only: serving goes on, changes fail typed, recovers by itself")
def test_a_read_only_disk(disk: Disk, tmp_path: Path, promise: Promise) -> None:
    with Apart(CODE, tmp_path, env={"XDG_RUNTIME_DIR": str(disk.folder)}) as apart:
        check(apart, disk, promise, disk.read_only, "Read-only file system", with_replica=False)
        assert "Traceback" not in apart.errors


@pytest.mark.promise("disk read-only: a replica that dies is replaced once the disk is mended")
def test_a_replica_that_has_no_place_for_its_socket(disk: Disk, tmp_path: Path, promise: Promise) -> None:
    with Apart(CODE, tmp_path, env={"XDG_RUNTIME_DIR": str(disk.folder)}) as apart:
        dead, left = apart.replicas()
        with disk.read_only():
            os.kill(dead, signal.SIGKILL)
            eventually(lambda: "Read-only file system" in json.dumps(apart.do("client.status().waiting")))
            assert asyncio.run(get(apart.address, "/it")).text == "here"
            assert apart.replicas() == [left]
        began = time.monotonic()
        eventually(lambda: len(apart.replicas()) == 2, 15.0)
        promise.within(time.monotonic() - began, 10.5, "replaced")


@pytest.mark.promise("/dev/shm full: large bodies pass, nothing dies")
def test_a_full_dev_shm(disk: Disk, tmp_path: Path, promise: Promise) -> None:
    """In a mount namespace of its own, with a /dev/shm of 1 MiB, filled."""
    program = 'mount -t tmpfs -o size=1m tmpfs /dev/shm; cat /dev/zero > /dev/shm/filler 2>/dev/null; exec "$@"'
    command = [needs.program("unshare"), "--mount", "sh", "-c", program, "sh"]
    with Apart(CODE, tmp_path, env={"XDG_RUNTIME_DIR": str(disk.folder)}, command=command) as apart:
        assert apart.do("__import__('shutil').disk_usage('/dev/shm').free") == 0
        pids = apart.replicas(), apart.replicas("plain"), apart.proxy()
        asked = sum(ask_everything(apart) for _ in range(promise.size(50, 3)))
        assert (apart.replicas(), apart.replicas("plain"), apart.proxy()) == pids
        promise.none_of(asked, "requests lost or failed")
