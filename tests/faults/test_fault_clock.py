"""The wall clock jumps a day: nothing that waits, times out or is asked for signs of life takes notice."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from pathlib import Path

import needs
import pytest
from apart import Apart
from http_load import Answer, Connection, get, in_thread, load
from promises import Promise
from running import eventually, instance_pids

pytestmark = pytest.mark.local("the clocks of headgate's own processes; Ray's have theirs")

CODE = """
import asyncio, time

async def here(request):
    await asyncio.sleep(0.02)
    return str(time.time())

async def slow(request):
    await asyncio.sleep(float(request.query_params["seconds"]))
    return "done"

@headgate.accept_batch
def batch(requests):
    return ["done"] * len(requests)

def serve(name, code, **config):
    client.create_backend(name, code, config=config)
    client.create_endpoint(name, backend=name, route="/" + name)

serve("it", here, num_replicas=2, max_concurrent_queries=100)
serve("slow", slow, request_timeout_s=0.9, max_concurrent_queries=100)
serve("batch", batch, max_batch_size=8, batch_wait_timeout=0.3)
serve("full", slow, max_concurrent_queries=1, max_queued_requests=0)
handle = client.get_handle("slow")
"""

DAY_S = 86_400
#: How far the clocks of two processes may seem apart, by the time that looking at them takes.
APART_S = 30.0


class Clock:
    """The wall clock of the processes that were started with `environment`."""

    def __init__(self, folder: Path) -> None:
        needs.program("faketime")
        found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        assert found, "faketime has no libfaketimeMT.so.1"
        self._file = folder / "clock"
        self.library = str(found[0])
        self.set("+0")
        self.environment = {
            "LD_PRELOAD": self.library,
            "FAKETIME_TIMESTAMP_FILE": str(self._file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "FAKETIME_FORCE_MONOTONIC_FIX": "0",  # else it spins where Python's threads wait for each other
            "NO_FAKE_STAT": "1",
        }

    def set(self, offset: str) -> None:
        self._file.with_suffix(".new").write_text(offset + "\n")
        self._file.with_suffix(".new").replace(self._file)
        self.offset_s = int(offset.rstrip("d")) * DAY_S

    def is_seen(self, seconds: float) -> bool:
        return abs(seconds - time.time() - self.offset_s) < APART_S


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    return Clock(tmp_path)


@pytest.fixture
def apart(clock: Clock, tmp_path: Path, short_dir: Path) -> Iterator[Apart]:
    with Apart(CODE, tmp_path, env={**clock.environment, "XDG_RUNTIME_DIR": str(short_dir)}) as found:
        yield found


def date_of(answer: Answer) -> float:
    """The proxy's wall clock."""
    return parsedate_to_datetime(answer.headers["date"]).timestamp()


def logged_by_controller(apart: Apart) -> float:
    """The controller's wall clock."""
    count = len(apart.logged('"headgate.controller"'))
    apart.do('client.create_backend("new", here)')
    apart.do('client.delete_backend("new")')
    lines: list[str] = eventually(lambda: apart.logged('"headgate.controller"')[count:])
    return float(json.loads(lines[-1])["ts"])


async def timed(address: str, path: str) -> tuple[Answer, float]:
    began = time.monotonic()
    return await get(address, path), time.monotonic() - began


@pytest.mark.timeout(180)
@pytest.mark.promise("wall clock jumps a day forth and back: nothing times out, flaps or is late")
def test_the_wall_clock_jumps(apart: Apart, clock: Clock, promise: Promise) -> None:
    address = apart.address
    key = apart.do("client._instance.home.key")
    before = sorted(instance_pids(key))
    for pid in (*before, apart.process.pid):
        assert clock.library in Path("/proc", str(pid), "maps").read_text()
    jumps = (("+1d", "+0", "-1d", "+0", "+1d", "-1d") if promise.full else ("+1d", "-1d")) * promise.size(5, 1)
    pause_s = 1.5 if promise.full else 0.0  # some signs of life are due
    late_s: list[float] = []

    async def jump(offset: str) -> None:
        """Requests of all kinds are under way when the clock jumps."""
        asked = [asyncio.create_task(timed(address, path)) for path in KINDS]
        called = asyncio.create_task(in_thread(apart.do, "headgate.get(handle.remote(seconds=0.6), timeout=2.0)"))
        await asyncio.sleep(0.15)
        clock.set(offset)
        (refused, _), *answers = [(await timed(address, "/full?seconds=0"))] + [await one for one in asked]
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        for (answer, seconds), (status, shortest_s, due_s) in zip(answers, KINDS.values(), strict=True):
            assert answer.status == status, answer
            assert shortest_s <= seconds, (answer, seconds)
            late_s.append(seconds - due_s)
        assert await called == "done"
        assert clock.is_seen(await in_thread(apart.do, "time.time()")), "the driver"
        assert clock.is_seen(float((await get(address, "/it")).text)), "a replica"
        assert clock.is_seen(date_of(await get(address, "/it"))), "the proxy"
        assert clock.is_seen(await in_thread(logged_by_controller, apart)), "the controller"
        await asyncio.sleep(pause_s)

    async def main() -> int:
        idle = await Connection(address).open()
        async with load(address, "/it", 200) as running:
            for offset in jumps:
                await jump(offset)
                assert (await idle.get("/it")).status == 200
        await idle.close()
        assert running.failed == {}
        return running.sent

    sent = asyncio.run(main())
    assert sorted(instance_pids(key)) == before
    assert not apart.logged('"WARNING"') + apart.logged('"ERROR"')
    promise.none_of(sent + len(jumps) * (len(KINDS) + 2), "requests failed or early")
    promise.within(max(late_s), LATE_S, f"the latest of {len(late_s)} timed ones after its time")
    promise.says(f"{len(jumps)} jumps, seen by driver, proxy, replicas, controller; the same {len(before)} processes")


#: What is asked, and how it is answered: status, after how long at least, and when it is due.
KINDS = {
    "/slow?seconds=0.6": (200, 0.6, 0.6),
    "/slow?seconds=9": (504, 0.85, 0.9),  # its deadline
    "/batch": (200, 0.25, 0.3),  # waits for company
    "/full?seconds=0.5": (200, 0.5, 0.5),
}
#: How much later an answer may come: what a connection and the way there and back take.
LATE_S = 0.1
