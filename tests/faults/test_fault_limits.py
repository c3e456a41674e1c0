"""A process that may open no more files, or take no more memory: what it holds goes on, and it recovers."""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import leftovers
import needs
import pytest
from apart import Apart, Raised
from http_load import Answer, Connection, get
from promises import Promise
from running import eventually, is_alive

pytestmark = pytest.mark.local("limits of headgate's own processes; on Ray they are Ray's workers")

CODE = """
async def here(request):
    return "here"

def big(request):
    return len(bytearray(int(request.query_params["bytes"])))

client.create_backend("it", here)
client.create_endpoint("it", backend="it", route="/it")
client.create_backend("big", big)
client.create_endpoint("big", backend="big", route="/big")
handle = client.get_handle("it")
"""

#: A change.
MORE = 'client.create_endpoint("more", backend="it", route="/more")'

MIB = 2**20


@pytest.fixture
def apart(tmp_path: Path, short_dir: Path) -> Iterator[Apart]:
    with Apart(CODE, tmp_path, env={"XDG_RUNTIME_DIR": str(short_dir)}) as found:
        yield found


def limit(pid: int, what: str, count: int | str) -> None:
    """Change a limit of a running process."""
    subprocess.run([needs.program("prlimit"), f"--pid={pid}", f"--{what}={count}:"], check=True)


def open_files(pid: int) -> int:
    return len(leftovers.descriptors(pid))


def cpu_s(pid: int) -> float:
    fields = Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def share_of_a_core(pid: int, seconds: float) -> float:
    """How much of one core the process uses while this waits."""
    before = cpu_s(pid)
    await asyncio.sleep(seconds)
    return (cpu_s(pid) - before) / seconds


async def ask_late(address: str) -> tuple[Answer, float]:
    """An answer, however long it takes, and when it came."""
    answer = await get(address, "/it")
    return answer, time.monotonic()


@pytest.mark.promise("fd limit of a proxy: no busy loop, connections live, recovers in 1 s")
def test_a_proxy_without_descriptors(apart: Apart, promise: Promise) -> None:
    pid = apart.proxy()
    waiting = promise.size(200, 60)

    async def main() -> None:
        old = [await Connection(apart.address).open() for _ in range(40)]
        assert {(await one.get("/it")).status for one in old} == {200}
        limit(pid, "nofile", open_files(pid) + 10)
        await asyncio.sleep(0.6)  # it looks at its limit twice a second
        late = [asyncio.create_task(ask_late(apart.address)) for _ in range(waiting)]
        await asyncio.sleep(0.3)
        busy = await share_of_a_core(pid, 3.0 if promise.full else 1.0)
        pending = [task for task in late if not task.done()]
        assert pending, "the limit had no effect"
        assert {(await one.get("/it")).status for one in old} == {200}
        began = time.monotonic()
        for one in old:
            await one.close()
        answers = await asyncio.gather(*late)
        assert {answer.status for answer, _ in answers} == {200}
        promise.within(max(when for _, when in answers) - began, 1.0, "recovered")
        promise.says(f"{busy:.1%} of a core at the limit, {len(pending)} of {waiting} waited")
        promise.none_of(waiting + 2 * len(old), "refused, reset or lost")
        assert busy < 0.2

    asyncio.run(main())
    assert is_alive(pid)
    assert len(apart.logged("ulimit -n")) == 1
    assert not apart.logged("Traceback")


@pytest.mark.promise("fd limit of a replica: no busy loop, connections live, recovers in 1 s")
def test_a_replica_without_descriptors(apart: Apart, promise: Promise) -> None:
    """Nobody new can reach it: a proxy that is replaced waits for it, and answers all who ask meanwhile."""
    (pid,) = apart.replicas()
    assert apart.do("handle.call()") == "here"
    limit(pid, "nofile", open_files(pid) - 8)  # what the proxy's end sets free is of no use
    os.kill(apart.proxy(), 9)

    async def main() -> None:
        late = [asyncio.create_task(ask_late(apart.address)) for _ in range(10)]
        await asyncio.sleep(1.2)  # handshakes are given up and begun again
        busy = await share_of_a_core(pid, 3.0 if promise.full else 1.0)
        done = [task.result() for task in late if task.done()]
        assert not done, "the limit had no effect"
        assert await asyncio.to_thread(apart.do, "handle.call()") == "here"
        limit(pid, "nofile", 1000)
        began = time.monotonic()
        answers = await asyncio.gather(*late)
        assert {answer.status for answer, _ in answers} == {200}
        promise.within(max(when for _, when in answers) - began, 1.0, "recovered")
        promise.says(f"{busy:.1%} of a core at the limit")
        assert busy < 0.2

    asyncio.run(main())
    assert apart.replicas() == [pid]
    assert len(apart.logged("ulimit -n")) == 1
    assert not apart.logged("Traceback")


@pytest.mark.promise("fd limit of the controller: no busy loop, serving goes on, a change fails typed, recovers in 1 s")
def test_a_controller_without_descriptors(apart: Apart, promise: Promise) -> None:
    pid = apart.controller()
    limit(pid, "nofile", open_files(pid) - 8)  # what the proxy's end sets free is of no use
    with pytest.raises(Raised, match=r"InstanceError: cannot store .*Too many open files") as refused:
        apart.do(MORE)
    assert refused.value.is_ours
    os.kill(apart.proxy(), 9)

    async def main() -> None:
        late = asyncio.create_task(ask_late(apart.address))
        busy = await share_of_a_core(pid, 4.0 if promise.full else 1.5)
        assert apart.do("handle.call()") == "here"
        limit(pid, "nofile", 1000)
        began = time.monotonic()
        answer, _ = await late
        assert answer.status == 200
        await asyncio.to_thread(eventually, lambda: apart.do(MORE) is None)
        promise.within(time.monotonic() - began, 1.0, "recovered")
        promise.says(f"{busy:.1%} of a core at the limit")
        assert busy < 0.2

    asyncio.run(main())
    assert len(apart.logged("ulimit -n")) == 1
    assert not apart.logged("Traceback")


@pytest.mark.promise("no more memory in a replica: an ordinary 500, and it serves on")
def test_a_replica_without_memory(apart: Apart, promise: Promise) -> None:
    (pid,) = apart.replicas("big")
    used = int(Path("/proc", str(pid), "statm").read_text().split()[0]) * 4096
    limit(pid, "as", used + 64 * MIB)
    times = promise.size(100, 10)

    async def main() -> None:
        for _ in range(times):
            failed = await get(apart.address, f"/big?bytes={256 * MIB}")
            assert failed.status == 500
            assert "MemoryError" in failed.text
            assert failed.headers["x-request-id"]
            assert (await get(apart.address, f"/big?bytes={MIB}")).text == str(MIB)

    asyncio.run(main())
    promise.none_of(times, "replicas lost")
    assert apart.replicas("big") == [pid]
