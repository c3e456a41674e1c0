"""At most once: under all faults at the same time, in streams, and of what came too late to run.

What ran is said by a side log: the handler's first act is to append its request's id to a file.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from held_up import Block
from http_load import Answer, Asked, Connection, Load, get, get_many, in_thread, load
from promises import Promise
from running import cancel, eventually, key_of, pid_of
from under_load import address_of, proxy_pid, replica_pids, serve, starts

import headgate

START = {"http_options": {"port": 0}}


def worker(log: Path, said: str) -> Callable[..., Any]:
    """Notes each request's id as it starts; takes 20 ms, and 20 times as long in the replica that is slow."""
    slow = slow_of(log)

    async def work(request: Any) -> str:
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{request.query_params['id']}\n".encode())
        os.close(fd)
        with contextlib.suppress(OSError):
            if slow.read_text() == str(os.getpid()):
                await asyncio.sleep(0.38)
        await asyncio.sleep(0.02)
        return said

    return work


def slow_of(log: Path) -> Path:
    return log.with_suffix(".slow")


class Chaos:
    """All faults, one after the other and often several at a time, by the promise's seed.

    proxies_killed   when (time.monotonic())
    """

    def __init__(self, client: headgate.Client, promise: Promise, log: Path) -> None:
        self.client = client
        self.promise = promise
        self.log = log
        self.done: Counter[str] = Counter()
        self.proxies_killed: list[float] = []
        self._stopped: set[int] = set()
        self._changing: set[asyncio.Task[None]] = set()
        self._lock = asyncio.Lock()
        self.refused: list[str] = []

    async def run(self, is_over: Callable[[], bool]) -> None:
        """A fault about every 0.4 s; each kind comes as often as the others."""
        kinds: list[Callable[[], Awaitable[None]]] = []
        while not is_over():
            if not kinds:
                kinds = [self.replica, self.stop, self.proxy, self.controller, self.scale, self.update, self.slow]
                kinds += [self.freeze, self.resets, self.traffic, self.backend]
                self.promise.random.shuffle(kinds)
            kind = kinds.pop()
            self.done[kind.__name__] += 1
            await kind()
            await asyncio.sleep(self.promise.random.uniform(0.2, 0.6))
        for pid in self._stopped:
            _send(pid, signal.SIGCONT)
        if self._changing:
            await asyncio.wait(self._changing)

    async def _pids(self) -> list[int]:
        with contextlib.suppress(headgate.ControllerUnavailable):
            return await in_thread(replica_pids, self.client)
        return []

    async def replica(self) -> None:
        if pids := await self._pids():
            _send(self.promise.random.choice(pids), signal.SIGKILL)

    async def stop(self) -> None:
        """It is killed after 3 s, or goes on before."""
        if pids := await self._pids():
            pid = self.promise.random.choice(pids)
            self._stopped.add(pid)
            _send(pid, signal.SIGSTOP)
            if self.promise.random.random() < 0.5:
                asyncio.get_running_loop().call_later(1.5, _send, pid, signal.SIGCONT)

    async def slow(self) -> None:
        if pids := await self._pids():
            slow_of(self.log).write_text(str(self.promise.random.choice(pids)))

    async def proxy(self) -> None:
        with contextlib.suppress(headgate.ControllerUnavailable, ValueError):
            pid = await in_thread(proxy_pid, self.client)
            self.proxies_killed.append(time.monotonic())
            _send(pid, signal.SIGKILL)

    async def controller(self) -> None:
        with contextlib.suppress(LookupError):
            _send(pid_of(key_of(self.client), "headgate-ctl"), signal.SIGKILL)

    async def freeze(self) -> None:
        """The proxy or the controller stands still for less than it takes to be replaced."""
        with contextlib.suppress(LookupError):
            pid = pid_of(key_of(self.client), self.promise.random.choice(["headgate-proxy", "headgate-ctl"]))
            self._stopped.add(pid)
            _send(pid, signal.SIGSTOP)
            asyncio.get_running_loop().call_later(1.0, _send, pid, signal.SIGCONT)

    async def resets(self) -> None:
        """Clients that go away while their requests wait or run."""
        for number in range(10):
            with contextlib.suppress(OSError):
                connection = await Connection(address_of(self.client)).open()
                await connection.send(f"/it?id=reset-{self.done['resets']}-{number}")
                await asyncio.sleep(self.promise.random.choice([0.0, 0.01]))
                connection.reset()

    async def traffic(self) -> None:
        share = self.promise.random.random()
        self._change("set_traffic", {"it": share, "spare": 1 - share})

    async def backend(self) -> None:
        """One is made and deleted, with an endpoint of its own."""
        self._task(self._make_and_delete())

    async def _make_and_delete(self) -> None:
        async with self._lock:
            for method, *arguments in (
                ("create_backend", "short", worker(self.log, "short")),
                ("create_endpoint", "short"),
                ("delete_endpoint", "short"),
                ("delete_backend", "short"),
            ):
                named = {"backend": "short", "route": "/short"} if method == "create_endpoint" else {}
                await self._call(method, *arguments, **named)

    async def scale(self) -> None:
        self._change("update_backend_config", {"num_replicas": self.promise.random.randrange(2, 5)})

    async def update(self) -> None:
        self._change("update_backend", worker(self.log, f"v{self.done['update']}"))

    def _change(self, method: str, argument: Any) -> None:
        async def change() -> None:
            async with self._lock:
                await self._call(method, "it", argument)

        self._task(change())

    async def _call(self, method: str, *arguments: Any, **named: Any) -> None:
        try:
            await in_thread(functools.partial(getattr(self.client, method), *arguments, **named))
        except headgate.HeadgateError as error:  # the replica that it waited for was killed
            self.refused.append(f"{method}: {type(error).__name__}")

    def _task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)


def _send(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


class Callers:
    """Threads that call the handle; `outcomes[id]` for each call."""

    def __init__(self, handle: Any) -> None:
        self.outcomes: dict[str, Any] = {}
        self._handle = handle
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(4)]

    def _run(self, number: int) -> None:
        count = 0
        while not self._stop.is_set():
            count += 1
            id = f"h{number}-{count}"
            try:
                self.outcomes[id] = self._handle.call(id=id)
            except Exception as error:  # noqa: BLE001 - judged by the test
                self.outcomes[id] = error
            time.sleep(0.02)

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def held_by_a_killed_proxy(one: Asked, killed: list[float]) -> bool:
    return any(one.connection.begun < at < one.ended for at in killed)


@pytest.mark.local("on Ray the faults of one node's processes are tests/ray")
@pytest.mark.timeout(600)
@pytest.mark.promise("at most once, under all faults at the same time: each id runs once at most, each is answered")
def test_under_all_faults_nothing_runs_twice_and_everything_is_answered(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    log = tmp_path / "log"
    wanted = promise.size(full=10_000, small=1_000)
    config = {"num_replicas": 3, "max_concurrent_queries": 100, "request_timeout_s": 15.0}
    handle = serve(client, worker(log, "v0"), **config)
    client.create_backend("spare", worker(log, "spare"), config=config)
    chaos = Chaos(client, promise, log)

    async def main(callers: Callers) -> Load:
        async with load(address_of(client), "/it", 150, proxy_dies=True) as running:
            await chaos.run(lambda: running.sent + len(callers.outcomes) >= wanted)
        return running

    with Callers(handle) as callers:
        running = asyncio.run(main(callers))
    started = starts(log)
    assert {id: count for id, count in started.items() if count > 1} == {}

    assert running.unconnected == []
    assert len(running.answers) == running.sent
    http: Counter[int] = Counter()
    for one in running.asked:
        http[one.answer.status] += 1
        what = (one.id, one.answer.status, one.answer.text[:200])
        if one.is_lost:
            assert held_by_a_killed_proxy(one, chaos.proxies_killed), what
        elif one.answer.status == 502:
            assert one.answer.headers["x-headgate-started"] == "1" or one.id not in started, what
        elif one.answer.status == 200:
            assert started[one.id] == 1
        else:
            assert one.answer.status == 504, what
    calls: Counter[str] = Counter(
        type(outcome).__name__ if isinstance(outcome, Exception) else "answered"
        for outcome in callers.outcomes.values()
    )
    assert set(calls) <= {"answered", "ReplicaDied", "RequestTimeout"}, calls
    assert {id for id, outcome in callers.outcomes.items() if isinstance(outcome, str)} <= started.keys()
    assert http[200] > 0.8 * running.sent
    promise.none_of(running.sent + len(callers.outcomes), "ids run twice or not answered")
    promise.says(f"HTTP {dict(http)} (0: reset, held by a killed proxy), handle {dict(calls)}")
    promise.says(f"faults {dict(chaos.done)}; control calls that failed: {dict(Counter(chaos.refused))}")


# --- streams ---


async def read_stream(address: str, path: str) -> bytes:
    """All bytes of the answer, until the server ends the connection."""
    connection = await Connection(address).open()
    await connection.send(path)
    try:
        return await connection._reader.read(-1)
    except ConnectionResetError:
        return b"reset"
    finally:
        connection.reset()


@pytest.mark.timeout(300)
@pytest.mark.promise("streams: never run again after the first byte, and a broken one has no end")
@pytest.mark.parametrize("idempotent", [False, True])
def test_a_stream_whose_replica_dies_breaks_and_is_not_run_again(
    client: headgate.Client, tmp_path: Path, promise: Promise, idempotent: bool
) -> None:
    log = tmp_path / "log"

    async def stream(request: Any) -> Any:
        id = request.query_params["id"]
        fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{id}\n".encode())
        os.close(fd)

        async def items() -> Any:
            yield "first"
            await asyncio.sleep(0.3)  # else this is a crash loop, with its back-off
            os._exit(1)

        return items()

    serve(client, stream, idempotent=idempotent, num_replicas=2)
    count = promise.size(full=30, small=4)
    for number in range(count):
        answer = asyncio.run(read_stream(address_of(client), f"/it?id={number}"))
        assert answer.startswith(b"HTTP/1.1 200"), answer
        assert answer.endswith(b"5\r\nfirst\r\n"), answer  # and not "0\r\n\r\n"
        eventually(lambda: len(replica_pids(client)) == 2)
    assert starts(log) == {str(number): 1 for number in range(count)}
    promise.none_of(count, "run again, or with an end")


# --- deadlines ---


def held_up(client: headgate.Client, folder: Path, where: str, count: int, **config: Any) -> Block:
    """So many requests and the one before them wait in the router's line; or were sent, and wait in the replica."""
    limit = 1 if where == "router" else count + 10
    return Block(client, folder, max_concurrent_queries=limit, **config)


async def first_of(client: headgate.Client, block: Block) -> asyncio.Task[Answer]:
    """A request that has started, behind which the others wait."""
    first = asyncio.create_task(get(address_of(client), "/it?id=first"))
    await asyncio.to_thread(eventually, lambda: block.started)
    return first


def check_only_the_first_started(block: Block) -> None:
    assert block.handle.call(id="after") == "done"
    assert block.started == ["first", "after"]


@pytest.mark.promise("deadlines: what expired while it waited never runs")
@pytest.mark.parametrize("where", ["router", "replica"])
def test_what_waits_beyond_its_deadline_is_answered_504_and_never_starts(
    client: headgate.Client, tmp_path: Path, promise: Promise, where: str
) -> None:
    count = promise.size(full=100, small=20)
    block = held_up(client, tmp_path, where, count, request_timeout_s=1.0)

    async def main() -> None:
        first = await first_of(client, block)
        waiting = asyncio.create_task(get_many(address_of(client), ["/it?id=late"] * count))
        await asyncio.sleep(0.3)  # all of them are sent
        sent = time.monotonic()
        with pytest.raises(headgate.RequestTimeout):
            await asyncio.to_thread(block.handle.options(timeout_s=0.5).call, id="late")
        assert {answer.status for answer in await waiting} == {504}
        promise.within(max(0.0, time.monotonic() - sent - 1.0), 0.2, "the last 504 after the deadline")
        assert (await first).status == 504
        block.release()

    asyncio.run(main())
    check_only_the_first_started(block)
    promise.none_of(count + 1, "started")


@pytest.mark.promise("cancelled: what its client left while it waited never runs")
@pytest.mark.parametrize("where", ["router", "replica"])
def test_what_was_left_by_its_client_while_it_waited_never_starts(
    client: headgate.Client, tmp_path: Path, promise: Promise, where: str
) -> None:
    count = promise.size(full=100, small=20)
    block = held_up(client, tmp_path, where, count)

    async def main() -> None:
        first = await first_of(client, block)
        connections = await asyncio.gather(*(Connection(address_of(client)).open() for _ in range(count)))
        for connection in connections:
            await connection.send("/it?id=left")
        ref = block.handle.remote(id="left") if where == "replica" else None
        await asyncio.sleep(0.3)
        for connection in connections:
            connection.reset()
        if ref is not None:
            cancel(ref)
        await asyncio.sleep(0.2)
        block.release()
        assert (await first).status == 200

    asyncio.run(main())
    check_only_the_first_started(block)
    promise.none_of(count, "started")
