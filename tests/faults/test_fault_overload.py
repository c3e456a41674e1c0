"""Three times more requests than a backend can answer: some are answered in time, the rest is refused at once."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from http_load import Asked, Connection, get, get_many, load
from promises import Promise
from running import eventually
from under_load import address_of, proxy_pid, serve

import headgate

MIB = 2**20
BUDGET = 16 * MIB
START = {"http_options": {"port": 0, "max_buffered_bytes": BUDGET}}
pytestmark = pytest.mark.local("latencies of headgate's own data plane, which is the same on Ray")

RUNNING, QUEUED = 4, 10  # what one replica runs at once, what waits in each router
TIMES = 3
#: What must have been offered, as a multiple of the capacity: this process has to keep its schedule, in a
#: small run beside other tests.
AT_LEAST, AT_LEAST_SMALL = 2.7, 2.0


def takes(seconds: float) -> Callable[..., Any]:
    async def work(request: Any) -> str:
        await asyncio.sleep(seconds)
        return "done"

    return work


def overloaded(client: headgate.Client, seconds: float = 0.02, running: int = RUNNING) -> Any:
    return serve(client, takes(seconds), max_concurrent_queries=running, max_queued_requests=QUEUED)


def p99(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def took(asked: Sequence[Asked]) -> list[float]:
    return [one.took_s for one in asked]


def check_offered(promise: Promise, per_s: float, able_per_s: float) -> None:
    """So many requests/s went out, to a backend that answered so many at most."""
    times = per_s / able_per_s
    promise.says(f"offered {times:.2f} times the capacity of {able_per_s:.0f}/s")
    assert times >= (AT_LEAST if promise.full else AT_LEAST_SMALL)


def memory_bytes(pid: int) -> int:
    """Resident memory of a process, shared pages that it uses included."""
    return int(Path("/proc", str(pid), "statm").read_text().split()[1]) * resource.getpagesize()


class Peak:
    """The most memory that a process holds while the block runs."""

    def __init__(self, pid: int) -> None:
        self.before = self.bytes = memory_bytes(pid)
        self._pid = pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def _watch(self) -> None:
        while not self._over.wait(0.01):
            self.bytes = max(self.bytes, memory_bytes(self._pid))

    @property
    def grown(self) -> int:
        return self.bytes - self.before

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


async def capacity(address: str, seconds: float) -> float:
    """Answers per second when as many ask, again and again, as run and wait."""
    answers = 0
    until = time.monotonic() + seconds

    async def ask_again_and_again() -> None:
        nonlocal answers
        connection = await Connection(address).open()
        while time.monotonic() < until:
            assert (await connection.get("/it")).status == 200
            answers += 1
        await connection.close()

    await asyncio.gather(*(ask_again_and_again() for _ in range(RUNNING + QUEUED // 2)))
    return answers / seconds


async def one_by_one(address: str, count: int) -> float:
    """The median latency of requests that have the backend to themselves."""
    connection = await Connection(address).open()
    found = []
    for _ in range(count):
        began = time.monotonic()
        assert (await connection.get("/it")).status == 200
        found.append(time.monotonic() - began)
    await connection.close()
    return statistics.median(found)


@pytest.mark.promise("overload at 3 x capacity over HTTP: refused at once, admitted in time")
def test_three_times_the_capacity(client: headgate.Client, promise: Promise) -> None:
    overloaded(client)
    address = address_of(client)
    seconds = promise.size(20, 2)

    async def main() -> None:
        able = await capacity(address, 0.7)
        usual = await one_by_one(address, 10)
        with Peak(proxy_pid(client)) as peak:
            async with load(address, "/it", TIMES * able) as running:
                await asyncio.sleep(seconds)
            after = await one_by_one(address, 10)
        assert set(Counter(one.answer.status for one in running.asked)) == {200, 503}
        served = [one for one in running.asked if one.answer.status == 200]
        refused = [one for one in running.asked if one.answer.status == 503]
        assert len(served) + len(refused) == running.sent
        rate = len(served) / (max(one.ended for one in served) - min(one.sent for one in served))
        assert all(one.answer.headers["retry-after"] == "1" for one in refused)  # 14 requests at this rate
        assert all(one.answer.headers["x-headgate-code"] == "BACKEND_OVERLOADED" for one in refused)
        check_offered(promise, running.sent_per_s, max(able, rate))
        promise.says(f"sent {p99([one.sent - one.due for one in running.asked]):.3f} s after it was due, p99")
        promise.within(p99(took(refused)), 0.05, "refused, p99")
        promise.within(p99(took(served)), 1.2 * (RUNNING + QUEUED) / rate, "admitted, p99")
        promise.within(after, 2 * usual, "latency afterwards")
        promise.says(f"{len(served)} of {running.sent} served, {rate / able:.0%} of the {able:.0f}/s of before")
        promise.says(f"proxy's memory grew by {peak.grown / MIB:.1f} MiB")
        assert rate >= (0.9 if promise.full else 0.7) * able
        assert peak.grown < 8 * MIB

    asyncio.run(main())


#: After so long under load each Retry-After is right: by then each router has measured some ten answers.
MEASURED_S = 1.0


@pytest.mark.promise("overload: Retry-After is what the measured drain rate says, over HTTP and for handles")
def test_retry_after_is_measured(client: headgate.Client, promise: Promise) -> None:
    """Each of two routers has its own line and half of the replica; the pause before is none of the rate's business."""
    waiting, per_second = 40, 20
    serve(client, takes(1 / per_second), max_concurrent_queries=1, max_queued_requests=waiting)
    seconds = promise.size(10, 3)
    time.sleep(0.5)
    to_handles: list[tuple[float, int]] = []
    answered: list[float] = []

    async def call(handle: Any) -> None:
        try:
            await handle.call()
            answered.append(time.monotonic())
        except headgate.BackendOverloaded as error:
            to_handles.append((time.monotonic(), error.retry_after_s))

    async def main() -> tuple[tuple[list[int], float], ...]:
        calls = []
        handle = client.get_handle("it", sync=False)
        async with load(address_of(client), "/it", 50) as running:
            judged_from = time.monotonic() + MEASURED_S
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                calls.append(asyncio.create_task(call(handle)))
                await asyncio.sleep(0.02)
            for late in calls:
                late.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        refused = [one for one in running.asked if one.answer.status == 503]
        to_clients = [(one.ended, int(one.answer.headers["retry-after"])) for one in refused]
        served = [one.ended for one in running.asked if one.answer.status == 200]
        judged_s = until - judged_from
        return tuple(
            ([s for at, s in each if at > judged_from], sum(judged_from < at < until for at in ends) / judged_s)
            for each, ends in ((to_clients, served), (to_handles, answered))
        )

    for (said, rate), where in zip(asyncio.run(main()), ("over HTTP", "to handles"), strict=True):
        assert len(said) >= 10 * (seconds - MEASURED_S)
        assert rate > per_second / 8  # half of what it should be, on a machine that is held up
        right = (waiting + 0.5) / rate
        promise.says(f"{len(said)} said {min(said)} to {max(said)} s {where}, right {right:.1f} s")
        assert right - 1 <= min(said) <= max(said) <= right + 2, Counter(said)


@pytest.mark.promise("overload from HTTP and handles at once: each gets its turn")
def test_http_and_handles_share(client: headgate.Client, promise: Promise) -> None:
    overloaded(client)
    seconds = promise.size(10, 2)
    called: list[float] = []
    served: list[float] = []
    refused: list[float] = []
    told: set[int] = set()

    async def call(handle: Any, due: float) -> None:
        called.append(time.monotonic())
        try:
            assert await handle.call() == "done"
            served.append(time.monotonic() - due)
        except headgate.BackendOverloaded as error:
            refused.append(time.monotonic() - due)
            told.add(error.retry_after_s)

    async def main() -> None:
        handle = client.get_handle("it", sync=False)
        able = await capacity(address_of(client), 0.5)
        calls = []
        async with load(address_of(client), "/it", TIMES * able / 2) as running:
            begin = time.monotonic()
            for number in range(int(seconds * TIMES * able / 2)):
                due = begin + number / (TIMES * able / 2)
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                calls.append(asyncio.create_task(call(handle, due)))
        await asyncio.gather(*calls)
        assert len(running.asked) == running.sent
        assert len(served) + len(refused) == len(calls)
        over_http = [one for one in running.asked if one.answer.status == 200]
        rate = (len(served) + len(over_http)) / (max(one.ended for one in running.asked) - begin)
        calls_per_s = (len(called) - 1) / (called[-1] - called[0])
        check_offered(promise, running.sent_per_s + calls_per_s, max(able, rate))
        share = len(served) / (len(served) + len(over_http))
        promise.within(p99(refused), 0.05, "handles refused, p99")
        promise.within(p99(served), 1.2 * (RUNNING + QUEUED) * seconds / len(served), "admitted, p99")
        promise.says(f"handles got {share:.0%} of {len(served) + len(over_http)} answers")
        assert 1 / 3 < share < 2 / 3
        assert told == {1}
        assert not {one.answer.status for one in running.asked} - {200, 503}

    asyncio.run(main())


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """As many open files as this process may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.promise("overload with large bodies: the proxy's memory is bounded by max_buffered_bytes")
def test_memory_with_large_bodies(client: headgate.Client, promise: Promise) -> None:
    overloaded(client)
    client.create_backend("small", lambda request: "here")
    client.create_endpoint("small", backend="small", route="/small", methods=["GET", "POST"])
    client.delete_endpoint("it")
    client.create_endpoint("it", backend="it", route="/it", methods=["POST"])
    connections = promise.size(1000, 100)
    address = address_of(client)
    piece = b"x" * 65536

    async def post(number: int) -> int:
        connection = await Connection(address).open()
        chunked = number % 2
        framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {MIB}"
        connection.write(f"POST /it HTTP/1.1\r\nHost: test\r\n{framing}\r\n\r\n".encode())
        part = b"%x\r\n%b\r\n" % (len(piece), piece) if chunked else piece
        for _ in range(MIB // len(piece)):
            connection.write(part)
            await connection._writer.drain()
        if chunked:
            connection.write(b"0\r\n\r\n")
        answer = await connection.receive()
        await connection.close()
        return answer.status

    async def main() -> None:
        assert (await get(address, "/small")).status == 200
        with Peak(proxy_pid(client)) as peak:
            statuses = Counter(await asyncio.gather(*(post(number) for number in range(connections))))
            answers = await get_many(address, ["/small"] * 5)
        assert {answer.status for answer in answers} == {200}
        assert set(statuses) <= {200, 503}
        assert statuses[200] >= RUNNING
        # Bodies; pages of the arena that were used lately; connections; everything else.
        bound = BUDGET + BUDGET + connections * 16 * 1024 + 12 * MIB
        promise.says(
            f"{connections} bodies of 1 MiB at once: {peak.grown / MIB:.1f} MiB more at most, of which bodies may "
            f"take {BUDGET / MIB:.0f}; {statuses[200]} served, {statuses[503]} refused"
        )
        assert peak.grown < bound
        if connections * MIB > 4 * bound:
            promise.none_of(connections, "without an answer")

    with many_files():
        asyncio.run(main())
    eventually(lambda: asyncio.run(get(address, "/small")).status == 200)
