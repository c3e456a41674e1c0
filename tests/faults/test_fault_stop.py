"""An instance that is told to stop under load: what it has accepted it answers, and then nothing of it is left."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable

import pytest
from http_load import Answer, Connection, Load, get, load
from promises import Promise
from running import Script, eventually, instance_pids

pytestmark = pytest.mark.local("signals and exit statuses of the program that owns the instance's processes")

PROGRAM = """
import asyncio, queue, signal, time
import headgate

client = headgate.start(http_options={"port": 0})

async def work(request):
    await asyncio.sleep(float(request.query_params.get("s", 0.02)))
    return "done"

async def stream(request):
    for _ in range(10):
        yield "part "
        await asyncio.sleep(0.03)

for name, code in (("it", work), ("stream", stream)):
    client.create_backend(name, code, config={"num_replicas": 2, "max_concurrent_queries": 100})
    client.create_endpoint(name, backend=name, route=f"/{name}", methods=["GET", "POST"])
print(client._instance.home.key, flush=True)
print(client.http_address, flush=True)
"""

SHUTDOWN = """
go = queue.SimpleQueue()  # an Event's lock may be held here when the handler sets it
signal.signal(signal.SIGUSR1, lambda *_: go.put(None))
go.get()
client.shutdown()
"""

WAIT, ELSEWHERE = "client.wait()", "time.sleep(60)"

#: What the program is in, what makes it end, and its exit status then.
WAYS = (
    (WAIT, signal.SIGTERM, (0,)),
    (ELSEWHERE, signal.SIGINT, (130, -signal.SIGINT)),
    (SHUTDOWN, signal.SIGUSR1, (0,)),
    (ELSEWHERE, signal.SIGTERM, (143,)),
    (WAIT, signal.SIGINT, (0,)),
)

#: How long the slowest request in flight takes.
SLOW_S = 0.5


class Stopping:
    """A program that serves, the load on it, and what its end was like."""

    def __init__(self, program: Script) -> None:
        self.program = program
        self.key = program.line()
        self.address = program.line()
        self.told = 0.0  # when it was told to stop
        self.unwell_after_s = 0.0  # until /-/healthz said 503
        self.loads: tuple[Load, ...] = ()
        self.ended_after_s = 0.0  # from the last answer to the end of the program
        self.slow: list[Answer] = []

    async def under_load(self, number: signal.Signals) -> None:
        async with (
            load(self.address, "/it", 200, proxy_dies=True) as kept,
            load(self.address, "/it", 200, True, "f") as fresh,
            load(self.address, "/stream", 20, True, "s") as streams,
        ):
            self.loads = kept, fresh, streams
            health = await Connection(self.address).open()
            assert (await health.get("/-/healthz")).status == 200
            slow = [asyncio.create_task(get(self.address, f"/it?s={SLOW_S}")) for _ in range(5)]
            slow.append(asyncio.create_task(self._slow_upload()))
            await asyncio.sleep(0.2)
            assert not any(running.unconnected for running in self.loads)
            self.told = time.monotonic()
            self.program.send(number)
            await until_unwell(health)
            self.unwell_after_s = time.monotonic() - self.told
            self.slow = await asyncio.gather(*slow)
            answered = time.monotonic()
            await asyncio.to_thread(self.program.process.wait, 10)
            ended = time.monotonic()
            self.ended_after_s = ended - max(answered, *(one.ended for one in self.loads[2].asked))

    async def _slow_upload(self) -> Answer:
        """A request of which half has come when the program is told to stop."""
        connection = await Connection(self.address).open()
        try:
            connection.write(b"POST /it HTTP/1.1\r\nHost: test\r\nContent-Length: 8\r\n\r\nhalf")
            await asyncio.sleep(SLOW_S - 0.1)
            connection.write(b"half")
            return await connection.receive()
        finally:
            await connection.close()

    async def twice(self, number: signal.Signals) -> None:
        """Told to stop, and again while it waits for a request."""
        asked = asyncio.create_task(get(self.address, "/it?s=30"))
        health = await Connection(self.address).open()
        await asyncio.sleep(0.2)
        self.program.send(number)
        await until_unwell(health)
        await asyncio.sleep(0.2)
        assert self.program.process.poll() is None
        self.told = time.monotonic()
        self.program.send(number)
        with pytest.raises((OSError, EOFError)):
            await asked
        await asyncio.to_thread(self.program.process.wait, 10)

    async def slowly(self, *seconds: float) -> list[Answer]:
        """Told to stop while it has requests that take so long; status 0 for one that was given up."""

        async def ask(seconds: float) -> Answer:
            try:
                return await get(self.address, f"/it?s={seconds}")
            except (OSError, EOFError) as error:
                return Answer(0, {}, type(error).__name__.encode())

        asked = [asyncio.create_task(ask(each)) for each in seconds]
        await asyncio.sleep(0.3)
        self.told = time.monotonic()
        self.program.send(signal.SIGTERM)
        return await asyncio.gather(*asked)

    def check(self) -> int:
        """Nothing that was accepted is lost; how many requests that were."""
        unwell = self.told + self.unwell_after_s
        for running in self.loads:
            assert set(running.unconnected) <= {"ConnectionRefusedError"}
            assert all(one.seen >= self.told for one in running.closed)
            for one in running.asked:
                assert one.answer.status == 200, one.answer
                assert one.sent < unwell or one.answer.headers["connection"] == "close"
        for answer in self.slow:
            assert (answer.status, answer.text, answer.headers["connection"]) == (200, "done", "close")
        assert {one.answer.text for one in self.loads[2].asked} == {"part " * 10}
        assert instance_pids(self.key) == []
        return sum(len(running.asked) for running in self.loads) + len(self.slow)


async def until_unwell(health: Connection) -> None:
    """Until the answer is 503, or the connection closed since this process was too busy to ask for a while."""
    while not health.is_over and (await health.get("/-/healthz")).status == 200:
        await asyncio.sleep(0.002)
    await health.close()


@pytest.mark.promise("stop under load: healthz 503 at once, 0 accepted requests lost, Connection: close, exit 0")
def test_a_stop_under_load_loses_nothing_that_was_accepted(script: Callable[..., Script], promise: Promise) -> None:
    asked, unwell, ended = 0, [], []
    exits: set[str] = set()
    for turn in range(promise.size(20, 3)):
        ending, number, statuses = WAYS[turn % len(WAYS)]
        stopping = Stopping(script(PROGRAM + ending))
        asyncio.run(stopping.under_load(number))
        assert stopping.program.process.returncode in statuses, stopping.program.errors
        exits.add(f"{stopping.program.process.returncode} by {number.name} in {ending.strip().splitlines()[-1]}")
        asked += stopping.check()
        unwell.append(stopping.unwell_after_s)
        ended.append(stopping.ended_after_s)
    promise.none_of(asked, "accepted requests lost")
    promise.says(f"exit {', '.join(sorted(exits))}")
    promise.within(max(unwell), 0.1, "healthz 503")
    promise.within(max(ended), 1.0, "ended after the last answer")


@pytest.mark.promise("stop: a second signal ends everything now")
def test_a_second_signal_ends_everything_now(script: Callable[..., Script], promise: Promise) -> None:
    took = []
    for turn in range(promise.size(20, 2)):
        ending, number, _ = [way for way in WAYS if way[1] != signal.SIGUSR1][turn % 4]
        program = script(PROGRAM + ending)
        stopping = Stopping(program)
        asyncio.run(stopping.twice(number))
        assert program.process.returncode != 0
        eventually(lambda: not instance_pids(stopping.key))  # noqa: B023
        took.append(time.monotonic() - stopping.told)
    promise.within(max(took), 0.5, "everything gone")


@pytest.mark.promise("stop: what is in flight has 20 s")
def test_what_is_in_flight_has_twenty_seconds(script: Callable[..., Script], promise: Promise) -> None:
    if not promise.full:
        pytest.skip("takes 21 s: with --promises full only")
    program = script(PROGRAM + "client.wait()")
    stopping = Stopping(program)
    in_time, late = asyncio.run(stopping.slowly(19.0, 40.0))
    assert (in_time.status, late.status) == (200, 0)
    assert program.process.wait(10) == 0
    promise.within(time.monotonic() - stopping.told, 21.5, "ended, with a request of 40 s")
