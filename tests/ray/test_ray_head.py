"""While Ray's head is away, stopped or dead, no call of headgate's hangs and no loop stands still."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import needs
import pytest
from ray_cluster import RayCluster, prepare
from running import eventually, one_instance

import headgate

ray = needs.module("ray")

#: Each ends sooner: no deadline is longer than 5 s, and `connect` has two of them.
BOUND_S = 20.0
#: The longest that a loop may stand still; whoever waited on it would take seconds.
STILL_S = 1.0


@pytest.fixture(scope="module")
def cluster(clusters: Any) -> Iterator[RayCluster]:
    """A node whose head keeps its tables on disk, and takes no node for dead because it was away itself."""
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(prepare() / "gcs")}
    patience = {"health_check_failure_threshold": 1000}
    with clusters.own(num_cpus=4, environment=storage, _system_config=patience) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(cluster: RayCluster) -> Iterator[headgate.Client]:
    with one_instance(http_options={"location": None}) as client:
        yield client


@pytest.fixture
def client(whole: headgate.Client) -> Iterator[headgate.Client]:
    """With an endpoint "it", whose replica this process has never called by Ray."""
    whole.create_backend("it", lambda request: request.data, ray_actor_options={"num_cpus": 0})
    whole.create_endpoint("it", backend="it")
    yield whole
    eventually(lambda: is_deleted(whole), 60)
    whole._instance.home.actors.close()  # type: ignore[attr-defined]


def is_deleted(client: headgate.Client) -> bool:
    """Whether "it" is, or could be: the controller finds the head again in its own time."""
    try:
        if "it" in client.list_endpoints():
            client.delete_endpoint("it")
        if "it" in client.list_backends():
            client.delete_backend("it", force=True)
    except (headgate.ControllerUnavailable, headgate.InstanceError):
        return False
    return True


@contextlib.contextmanager
def stopped(cluster: RayCluster) -> Iterator[None]:
    pid = cluster.head.all_processes["gcs_server"][0].process.pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextlib.contextmanager
def killed(cluster: RayCluster) -> Iterator[None]:
    cluster.head.kill_gcs_server()
    try:
        yield
    finally:
        cluster.head.start_gcs_server()


@pytest.fixture(params=[stopped, killed])
def away(request: pytest.FixtureRequest, cluster: RayCluster, client: headgate.Client) -> Iterator[Callable[[], Any]]:
    """`with away():` the head is."""

    @contextlib.contextmanager
    def block() -> Iterator[None]:
        with request.param(cluster):
            yield
        eventually(answers, 30)

    yield block
    eventually(answers, 30)


def answers() -> bool:
    with ThreadPoolExecutor(1) as pool:
        return bool(pool.submit(ray.nodes).result())


def in_time(function: Callable[[], Any]) -> BaseException | None:
    """What it raised. It fails if that takes too long, and does not wait for it then."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(function).exception(BOUND_S)
    finally:
        pool.shutdown(wait=False)


def check(error: BaseException | None) -> None:
    assert isinstance(error, headgate.ControllerUnavailable), error
    assert "head of the" in str(error)
    assert "try again" in str(error)


def test_remote_fails_in_time_and_call_goes_on(client: headgate.Client, away: Callable[[], Any]) -> None:
    handle = client.get_handle("it")
    with away():
        check(in_time(lambda: handle.remote(1)))
        check(in_time(lambda: handle.remote(1)))  # again: nobody still waits for the first look
        assert handle.call(2) == 2
    assert ray.get(handle.remote(3)) == 3
    with away():
        assert ray.get(handle.remote(4)) == 4  # by now it is known


def test_an_awaited_remote_leaves_its_loop_alone(client: headgate.Client, away: Callable[[], Any]) -> None:
    stills = [0.0]

    async def tick() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.01)
            stills.append(time.monotonic() - before)

    async def ask() -> None:
        ticking = asyncio.create_task(tick())
        handle = client.get_handle("it", sync=False)
        assert await handle.call(0) == 0
        asked = await asyncio.gather(
            *(asyncio.wait_for(handle.remote(number), BOUND_S) for number in range(5)), return_exceptions=True
        )
        assert len(stills) > 100
        for error in asked:
            check(error)  # type: ignore[arg-type]
        assert await handle.call(1) == 1
        with pytest.raises(headgate.RequestTimeout):
            await handle.options(timeout_s=1.0).remote(2)
        ticking.cancel()

    with away():
        asyncio.run(ask())
    assert max(stills) < STILL_S

    async def after() -> Any:
        return await (await client.get_handle("it", sync=False).remote(3))

    assert asyncio.run(after()) == 3


def test_remote_with_a_ref_fails_in_time(client: headgate.Client, away: Callable[[], Any]) -> None:
    handle, ref = client.get_handle("it"), ray.put(7)
    with away():
        error = in_time(lambda: handle.remote(ref))
        assert error is None or isinstance(error, headgate.ControllerUnavailable), error
    assert ray.get(handle.remote(ref)) == 7


def test_start_and_connect_fail_in_time(away: Callable[[], Any]) -> None:
    with away():
        for detached in (False, True):
            check(in_time(lambda: headgate.start(detached=detached, http_options={"location": None})))  # noqa: B023
        check(in_time(lambda: headgate.connect("nowhere")))
    with pytest.raises(headgate.InstanceError, match="'nowhere'"):
        headgate.connect("nowhere")
