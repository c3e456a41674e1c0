"""What the local engine promises beyond the contract: a controller that takes over, GPUs, causes."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import tiny

from headgate.core.state import Settings
from headgate.engine.interface import Event, Exited, Reported
from headgate.engine.local import LocalEngine
from headgate.errors import InstanceError
from headgate.replica.callable import pack
from headgate.wire import messages
from headgate.wire.control import Hub, Peer


@pytest.fixture
def instance() -> Iterator[tiny.Instance]:
    instance = tiny.Instance(main="tiny:supervise_replicas")
    try:
        instance.meet_controller()
        yield instance
    finally:
        instance.close()


class Controller:
    """One incarnation, as far as an engine sees it."""

    def __init__(self, instance: tiny.Instance) -> None:
        self.told: list[Event] = []
        self.heard: list[tuple[str, messages.ToController]] = []
        self.hub = Hub(instance.control.dup(), instance.token, self._hear, lambda peer: None)
        self.engine = LocalEngine(instance.ask, self.hub, "http://127.0.0.1:8000", all_gpus=("0", "1"))

    def _hear(self, peer: Peer, message: messages.ToController) -> None:
        self.heard.append((peer.id, message))

    async def open(self) -> None:
        await self.engine.open(self.told.append)
        self.hub.open()

    async def until_ready(self, id: str) -> messages.Report:
        async with asyncio.timeout(20.0):
            while True:
                for event in self.told:
                    message = event.message if isinstance(event, Reported) else None
                    if event.id == id and isinstance(message, messages.Report) and message.phase == "ready":
                        return message
                await asyncio.sleep(0.002)

    async def leave(self) -> None:
        """What remains of a controller that was killed: nothing that speaks."""
        self.hub.close()
        self.engine._line.close()
        await asyncio.sleep(0)


def spec_in(instance: tiny.Instance, num_gpus: float | None = None) -> messages.ReplicaSpec:
    path = Path(instance.directory, "good")
    path.write_bytes(pack(tiny.good)[0])
    resources = {"num_cpus": 2} if num_gpus is None else {"num_gpus": num_gpus}
    return messages.ReplicaSpec("iris", 4, str(path), Settings(), resources=resources)


def kill_controller(instance: tiny.Instance) -> None:
    os.kill(tiny.controller_of(instance), signal.SIGKILL)
    instance.meet_controller()


def test_a_controller_that_takes_over_finds_the_same_replicas_and_hears_from_them(
    instance: tiny.Instance,
) -> None:
    async def main() -> None:
        first = Controller(instance)
        await first.open()
        id = await first.engine.start_replica(spec_in(instance, num_gpus=1))
        await first.until_ready(id)
        before = first.engine.observe()
        await first.leave()
        kill_controller(instance)

        second = Controller(instance)
        await second.open()
        assert second.engine.observe() == before
        assert (await second.until_ready(id)).version == 4
        assert [event for event in second.told if isinstance(event, Exited)] == []
        with pytest.raises(InstanceError, match="2 GPUs, 1 of them free"):
            await second.engine.start_replica(spec_in(instance, num_gpus=2))
        await second.engine.close()
        await second.leave()

    asyncio.run(main())


def test_a_replica_that_was_not_told_what_to_run_is_told_by_the_next_controller(
    instance: tiny.Instance,
) -> None:
    forked = instance.fork("replica", "iris", messages.encode(spec_in(instance)))
    kill_controller(instance)

    async def main() -> None:
        controller = Controller(instance)
        await controller.open()
        assert (await controller.until_ready(forked.id)).version == 4
        await controller.engine.close()
        await controller.leave()

    asyncio.run(main())


def test_gpus_are_given_by_environment_and_come_back(instance: tiny.Instance) -> None:
    async def main() -> None:
        controller = Controller(instance)
        await controller.open()
        engine = controller.engine
        spec = spec_in(instance, num_gpus=1)
        ids = await asyncio.gather(engine.start_replica(spec), engine.start_replica(spec))
        with pytest.raises(InstanceError, match="0 of them free"):
            await engine.start_replica(spec)
        chosen = msgspec.structs.replace(spec, env=(("CUDA_VISIBLE_DEVICES", "7"),))
        ids.append(await engine.start_replica(chosen))

        engine.kill(ids[0])
        while len(engine.observe()) == 3:
            await asyncio.sleep(0.002)
        await engine.start_replica(spec)
        await engine.close()
        await controller.leave()

    asyncio.run(main())


def test_an_environment_too_long_to_pass_on_is_an_error(instance: tiny.Instance) -> None:
    async def main() -> None:
        controller = Controller(instance)
        await controller.open()
        long = msgspec.structs.replace(spec_in(instance), env=(("X", "x" * 200_000),))
        with pytest.raises(InstanceError, match="cannot start iris: its env is longer"):
            await controller.engine.start_replica(long)
        await controller.engine.close()
        await controller.leave()

    asyncio.run(main())


def test_what_is_not_the_engine_s_goes_on_to_the_controller(instance: tiny.Instance) -> None:
    async def main() -> None:
        controller = Controller(instance)
        await controller.open()
        id = await controller.engine.start_replica(spec_in(instance))
        await controller.until_ready(id)
        assert [type(message) for peer, message in controller.heard if peer == id] == [messages.Hello]
        controller.engine.tell(id, messages.Ping())
        while not any(isinstance(message, messages.Pong) for _, message in controller.heard):
            await asyncio.sleep(0.002)
        await controller.engine.close()
        await controller.leave()

    asyncio.run(main())


def test_there_is_one_node_whose_address_is_known(instance: tiny.Instance) -> None:
    async def main() -> None:
        controller = Controller(instance)
        await controller.open()
        engine = controller.engine
        assert engine.http_address(engine.home_node) == "http://127.0.0.1:8000"
        assert engine.http_address("elsewhere") is None
        with pytest.raises(InstanceError, match="one machine"):
            await engine.start_proxy("elsewhere")
        await engine.close()
        await controller.leave()

    asyncio.run(main())
