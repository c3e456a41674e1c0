"""The engines' contract on the fake engine, on virtual time, and on the local one, on real processes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import tiny
import virtual_time
from engine_contract import *  # noqa: F403 - the tests
from engine_contract import Play, Stage
from tiny import Instance

from headgate.engine.fake import FakeEngine
from headgate.engine.local import LocalEngine
from headgate.replica.callable import pack
from headgate.wire.control import Hub


def play_fake(scene: Callable[[Stage], Awaitable[None]]) -> None:
    async def main() -> None:
        engine = FakeEngine(7, asyncio.get_running_loop())
        stage = Stage(engine, lambda code: "raise: bad code" if code == "bad" else code)
        await engine.open(stage.hear)
        await scene(stage)
        await engine.close()
        assert engine.observe() == ()

    virtual_time.run(main())


def play_local(scene: Callable[[Stage], Awaitable[None]]) -> None:
    instance = Instance(main="tiny:supervise_replicas")
    try:
        instance.meet_controller()
        asyncio.run(_local(instance, scene))
        instance.end_controller(0)
        assert instance.ended(within_s=2.0) == 0
    finally:
        instance.close()


async def _local(instance: Instance, scene: Callable[[Stage], Awaitable[None]]) -> None:
    hub = Hub(instance.control, instance.token, lambda peer, message: None, lambda peer: None)
    engine = LocalEngine(instance.ask, hub, all_gpus=("0", "1"))
    stage = Stage(engine, lambda code: _blob(instance.directory, code))
    await engine.open(stage.hear)
    hub.open()
    await scene(stage)
    await engine.close()
    assert engine.observe() == ()
    hub.close()
    await asyncio.sleep(0)


def _blob(folder: str, code: str) -> str:
    path = Path(folder, code)
    path.write_bytes(pack(tiny.Bad if code == "bad" else tiny.good)[0])
    return str(path)


@pytest.fixture(params=[pytest.param(play_fake, id="fake"), pytest.param(play_local, id="local")])
def play(request: pytest.FixtureRequest) -> Play:
    """Plays a scene on an engine."""
    player: Play = request.param
    return player
