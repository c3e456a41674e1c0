"""The engines' contract on a real Ray cluster: the test process stands in for the controller's actor."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from engine_contract import *  # noqa: F403 - the tests
from engine_contract import Play, Stage

from headgate.config import HTTPOptions
from headgate.launch import portable
from headgate.replica.callable import pack
from headgate.wire import address
from headgate.wire.control import Hub


def good(request: Any) -> str:
    return "good"


class Bad:
    def __init__(self) -> None:
        raise RuntimeError("bad code")

    def __call__(self, request: Any) -> None: ...


def controller() -> type:
    """What replicas and agents watch, so as to end with it; a local class travels by value."""

    class Controller:
        async def forever(self) -> None:
            await asyncio.get_running_loop().create_future()

    return Controller


@pytest.fixture(scope="module", autouse=True)
def one_node(clusters: Any) -> None:
    clusters.one_node()


@pytest.fixture
def play() -> Iterator[Play]:
    """Plays a scene on the Ray engine."""
    import ray

    from headgate.engine import cluster, ray_records

    name = os.urandom(4).hex()
    origin = ray_records.Origin(
        f"headgate-{name}", name, "default", os.urandom(32), False,
        cluster.node_id(), cluster.node_address(), portable(HTTPOptions(port=0)),
    )  # fmt: skip
    records = ray_records.Records(origin.scope)
    records.put("origin", ray_records.pack(origin))
    actor = (
        ray.remote(controller())
        .options(name=cluster.CONTROLLER, namespace=origin.scope, num_cpus=0, max_concurrency=100)
        .remote()
    )
    yield lambda scene: asyncio.run(_play(scene, origin, records))
    ray.kill(actor)
    records.clear()


async def _play(scene: Callable[[Stage], Awaitable[None]], origin: Any, records: Any) -> None:
    from headgate.engine import ray_records
    from headgate.engine.ray_engine import RayEngine

    listeners = [address.listen(f"@headgate-{origin.instance}-test"), address.listen("tcp://127.0.0.1:0")]
    unix, tcp = (address.address_of(each) for each in listeners)
    meeting = ray_records.Meeting(unix, tcp, origin.home, 1)
    records.put("meeting", ray_records.pack(meeting))
    hub = Hub(listeners, origin.token, lambda peer, message: None, lambda peer: None)
    engine = RayEngine(origin, hub, meeting)

    def code(name: str) -> str:
        records.put(f"{ray_records.STORE}blobs/{name}", pack(Bad if name == "bad" else good)[0])
        return f"ray:blobs/{name}"

    stage = Stage(engine, code)
    await engine.open(stage.hear)
    hub.open()
    try:
        await scene(stage)
    finally:
        await engine.close()
        hub.close()
    assert engine.observe() == ()
    await asyncio.sleep(0)
