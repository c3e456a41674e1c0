"""A supervisor that is killed: the instance is over, whoever waits hears it at once, and nothing is left.

And what a living one ends: what user code forked and never executed.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import leftovers
import pytest
from promises import Promise
from running import Script, eventually, instance_pids, is_alive, key_of, pid_of
from under_load import address_of, serve

import headgate

pytestmark = pytest.mark.local("on Ray each node with a proxy has a supervisor; tests/ray kills agents and nodes")

HTTP = {"port": 0}


def work(request: Any) -> int:
    time.sleep(request.data or 0)
    return os.getpid()


class Slow:
    def __init__(self) -> None:
        time.sleep(30)

    def __call__(self, request: Any) -> None: ...


def is_over(client: headgate.Client) -> bool:
    """Whether a call says so."""
    try:
        client.status()
    except headgate.InstanceError as error:
        assert re.search(r"the instance is over.*were killed.*headgate\.start\(\)", str(error))  # noqa: PT017
        return True
    return False


def kill_supervisor(client: headgate.Client) -> None:
    os.kill(pid_of(key_of(client), "headgate-super"), signal.SIGKILL)


@pytest.mark.promise("supervisor kill -9: the instance ends, nothing left in 0.5 s; the driver's next call says so")
def test_a_killed_supervisor_ends_the_instance_and_the_next_call_says_so(promise: Promise, run_dir: Path) -> None:
    size = promise.size(10, 2)
    watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
    slowest = slowest_call = 0.0
    for _ in range(size):
        client = headgate.start(http_options=HTTP)
        handle = serve(client, work, num_replicas=2)
        handle.call()
        key, pids = key_of(client), instance_pids(key_of(client))
        begun = time.monotonic()
        kill_supervisor(client)
        eventually(lambda: is_over(client), 5.0)  # noqa: B023 - a controller that is being killed may answer yet
        slowest_call = max(slowest_call, time.monotonic() - begun)
        eventually(lambda: not any(map(is_alive, pids)) and not os.path.exists(key), 5.0)  # noqa: B023
        slowest = max(slowest, time.monotonic() - begun)
        for call in (handle.call, client.list_backends, client.wait, lambda: client.get_handle("it")):  # noqa: B023
            with pytest.raises(headgate.InstanceError, match="the instance is over"):
                call()
        client.shutdown()
        assert watch.leftovers(0.5) == []
    promise.within(slowest, 0.5, "all was gone in")
    promise.within(slowest_call, 0.5, "the next call said so in")
    promise.none_of(size, "killed instances left anything")


@pytest.mark.promise("supervisor kill -9: calls that wait end at once, with an error that says so")
def test_calls_that_wait_end_at_once(promise: Promise) -> None:
    size = promise.size(10, 1)
    slowest, count = 0.0, 0
    for _ in range(size):
        client = headgate.start(http_options=HTTP)
        handle = serve(client, work, max_concurrent_queries=1)
        handle.call()
        ended: list[tuple[float, BaseException]] = []

        def waiting(function: Callable[[], Any]) -> None:
            try:
                function()
            except BaseException as error:  # noqa: BLE001
                ended.append((time.monotonic(), error))  # noqa: B023

        async def awaited() -> None:
            other: Any = client.get_handle("it", sync=False)  # noqa: B023
            await (await other.remote(30))

        calls: list[Callable[[], Any]] = [
            lambda: handle.call(30),  # noqa: B023 - it runs
            lambda: handle.call(30),  # noqa: B023 - it waits in the line
            lambda: client.create_backend("slow", Slow),  # noqa: B023
            lambda: client.wait(),  # noqa: B023
            lambda: asyncio.run(awaited()),
        ]
        threads = [threading.Thread(target=waiting, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        time.sleep(0.3)
        assert ended == []
        begun = time.monotonic()
        kill_supervisor(client)
        for thread in threads:
            thread.join(10.0)
        assert len(ended) == len(calls)
        assert all(isinstance(error, headgate.HeadgateError) for _, error in ended), ended
        assert sum(isinstance(error, headgate.InstanceError) for _, error in ended) >= 2, ended
        slowest = max(slowest, *(at - begun for at, _ in ended))
        count += len(calls)
        client.shutdown()
    promise.within(slowest, 0.5, "all of them ended in")
    promise.none_of(count, "calls waited on")


@pytest.mark.promise("supervisor kill -9: HTTP clients are cut off, not left hanging, and the port is free")
def test_http_clients_are_cut_off(promise: Promise) -> None:
    import http.client

    size = promise.size(10, 1)
    slowest = 0.0
    for _ in range(size):
        client = headgate.start(http_options=HTTP)
        client.create_backend("it", lambda request: time.sleep(30))
        client.create_endpoint("it", backend="it", route="/it")
        host = address_of(client).removeprefix("http://")

        def ask() -> str:
            connection = http.client.HTTPConnection(host, timeout=20)  # noqa: B023
            try:
                connection.request("GET", "/it")
                return str(connection.getresponse().status)
            except (OSError, http.client.HTTPException) as error:
                return type(error).__name__
            finally:
                connection.close()

        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask) for _ in range(4)]
            time.sleep(0.2)
            begun = time.monotonic()
            kill_supervisor(client)
            assert {one.result() for one in asking} <= {"RemoteDisconnected", "ConnectionResetError"}
            slowest = max(slowest, time.monotonic() - begun)
        eventually(lambda: ask() == "ConnectionRefusedError", 1.0)
        client.shutdown()
    promise.within(slowest, 0.5, "clients were cut off in")


@pytest.mark.promise("a detached instance whose supervisor was killed: connect says so, the next start takes its place")
def test_a_detached_instance_whose_supervisor_was_killed(promise: Promise, script: Callable[..., Script]) -> None:
    size = promise.size(10, 1)
    start = (
        "import headgate\nclient = headgate.start(detached=True, http_options={'location': None})\n"
        "print(client._instance.home.key)"
    )
    for _ in range(size):
        key = script(start).output().strip()
        pids = instance_pids(key)
        assert pids
        os.kill(pid_of(key, "headgate-super"), signal.SIGKILL)
        eventually(lambda: not any(map(is_alive, pids)), 1.0)  # noqa: B023
        with pytest.raises(headgate.InstanceError, match="no detached instance of namespace 'default' runs"):
            headgate.connect()
        client = headgate.start(detached=True, http_options={"location": None})
        assert key_of(client) == key
        client.shutdown()
        assert not os.path.exists(key)
    promise.none_of(size, "detached instances stood in the way of the next")


class Forks:
    """User code with two daemons that were never executed: a fork of its own, and a fork's fork."""

    def __init__(self) -> None:
        reader, writer = os.pipe()
        for again in (False, True):
            if os.fork() == 0:
                os.setsid()
                if again and os.fork():
                    os._exit(0)
                os.write(writer, os.getpid().to_bytes(4, "little"))
                os.closerange(0, 4096)
                while True:
                    time.sleep(60)
        self.daemons = [int.from_bytes(os.read(reader, 4), "little") for _ in range(2)]

    def __call__(self, request: Any) -> list[int]:
        return [os.getpid(), *self.daemons]


@pytest.mark.promise("a replica that ends takes along what user code forked into sessions of its own")
def test_a_replica_takes_its_forks_along(promise: Promise) -> None:
    size = promise.size(10, 2)
    slowest = 0.0
    with headgate.start(http_options={"location": None}) as client:
        client.create_backend("other", Forks)
        client.create_endpoint("other", backend="other")
        others = client.get_handle("other").call()
        for number in range(size):
            client.create_backend("it", Forks)
            client.create_endpoint("it", backend="it")
            replica, *daemons = client.get_handle("it").call()
            assert all(map(is_alive, daemons))
            client.delete_endpoint("it")
            begun = time.monotonic()
            if number % 2:
                os.kill(replica, signal.SIGKILL)
            else:
                client.delete_backend("it")
            eventually(lambda: not any(map(is_alive, daemons)), 5.0)  # noqa: B023
            slowest = max(slowest, time.monotonic() - begun)
            if number % 2:
                client.delete_backend("it")
            assert all(map(is_alive, others))  # a replica that lives, and its daemons
    assert not any(map(is_alive, others))
    promise.within(slowest, 1.0, "with their replica its forks were gone in")
    promise.none_of(size * 2, "forks outlived their replica")


def test_a_supervisor_that_is_asked_to_end_does_so_in_order(run_dir: Path) -> None:
    with headgate.start(http_options=HTTP) as client:
        key, pids = key_of(client), instance_pids(key_of(client))
        os.kill(pid_of(key, "headgate-super"), signal.SIGTERM)
        eventually(lambda: not any(map(is_alive, pids)) and not os.path.exists(key), 2.0)
        with pytest.raises(headgate.InstanceError, match="the instance is over"):
            client.status()
