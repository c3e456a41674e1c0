"""What every engine promises, interface.py: scenes to be played on each of them.

tests/engine/test_contract.py plays them on the fake engine (virtual time) and the local one,
tests/ray/test_ray_contract.py on a real Ray cluster. Each has a fixture `play` and imports the tests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from headgate.core.state import Settings
from headgate.engine.interface import Engine, Event, Exited, Reported
from headgate.errors import InstanceError
from headgate.wire import messages

PATIENCE_S = 20.0


class Stage:
    """An open engine, what it has told, and the specs that it understands."""

    def __init__(self, engine: Engine, code: Callable[[str], str]) -> None:
        self.engine = engine
        self.code = code
        self.told: list[Event] = []
        self._more = asyncio.Event()

    def hear(self, event: Event) -> None:
        self.told.append(event)
        self._more.set()

    async def until(self, true: Callable[[Event], bool]) -> Event:
        """The first event, told already or to come, that is it."""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := [event for event in self.told if true(event)]):
                self._more.clear()
                await self._more.wait()
        return found[0]

    async def phase(self, id: str, phase: str) -> messages.Report:
        def is_it(event: Event) -> bool:
            message = event.message if isinstance(event, Reported) else None
            report = message if isinstance(message, messages.Report) else None
            return isinstance(event, Reported) and event.id == id and report is not None and report.phase == phase

        event = await self.until(is_it)
        assert isinstance(event, Reported)
        assert isinstance(event.message, messages.Report)
        return event.message

    async def exit(self, id: str) -> Exited:
        event = await self.until(lambda event: isinstance(event, Exited) and event.id == id)
        assert isinstance(event, Exited)
        return event

    def spec(self, backend: str = "iris", version: int = 1, *, code: str = "good") -> messages.ReplicaSpec:
        return messages.ReplicaSpec(backend, version, self.code(code), Settings())


Play = Callable[[Callable[[Stage], Awaitable[None]]], None]


def test_a_replica_starts_becomes_ready_and_is_observed(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        id = await stage.engine.start_replica(stage.spec(version=3))
        [process] = stage.engine.observe()
        assert (process.id, process.kind) == (id, "replica")
        assert (process.backend, process.version) == ("iris", 3)
        assert (process.pid > 0 and process.node in stage.engine.nodes()) or process.waits_for
        report = await stage.phase(id, "ready")
        assert (report.backend, report.version, report.error) == ("iris", 3, "")
        assert report.address

    play(scene)


def test_ids_name_the_backend_and_are_never_used_again(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        ids = []
        for _ in range(3):
            ids.append(await stage.engine.start_replica(stage.spec()))
            stage.engine.kill(ids[-1])
            await stage.exit(ids[-1])
        assert len(set(ids)) == 3
        assert all(id.startswith("iris#") for id in ids)

    play(scene)


def test_a_replica_that_cannot_start_says_why_and_ends(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        id = await stage.engine.start_replica(stage.spec(code="bad"))
        assert "bad code" in (await stage.phase(id, "failed")).error
        stage.engine.kill(id)
        await stage.exit(id)
        assert stage.engine.observe() == ()

    play(scene)


def test_a_killed_replica_is_told_once_and_observed_no_more(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        id = await stage.engine.start_replica(stage.spec())
        await stage.phase(id, "ready")
        stage.engine.kill(id)
        stage.engine.kill(id)
        assert "killed" in (await stage.exit(id)).cause
        assert stage.engine.observe() == ()
        stage.engine.kill(id)
        stage.engine.tell(id, messages.Drain(1.0))
        other = await stage.engine.start_replica(stage.spec())
        await stage.phase(other, "ready")
        assert [event.id for event in stage.told if isinstance(event, Exited)] == [id]

    play(scene)


def test_a_replica_that_is_told_to_drain_reports_drained_and_stays(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        id = await stage.engine.start_replica(stage.spec())
        await stage.phase(id, "ready")
        stage.engine.tell(id, messages.Drain(1.0))
        await stage.phase(id, "drained")
        assert [process.id for process in stage.engine.observe()] == [id]

    play(scene)


def test_new_settings_are_taken_and_told(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        id = await stage.engine.start_replica(stage.spec())
        await stage.phase(id, "ready")
        stage.engine.tell(id, messages.Configure(Settings(max_concurrent_queries=3), 5))

        def is_it(event: Event) -> bool:
            message = event.message if isinstance(event, Reported) else None
            return isinstance(message, messages.Report) and message.config_version == 5

        event = await stage.until(is_it)
        assert isinstance(event, Reported)
        assert event.id == id

    play(scene)


def test_what_is_told_before_a_replica_can_hear_is_not_lost(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        id = await stage.engine.start_replica(stage.spec())
        stage.engine.tell(id, messages.Drain(1.0))
        await stage.until(lambda event: _phase(event) in ("draining", "drained"))
        assert [process.id for process in stage.engine.observe()] == [id]

    play(scene)


def _phase(event: Event) -> str:
    message = event.message if isinstance(event, Reported) else None
    return message.phase if isinstance(message, messages.Report) else ""


def test_many_start_at_once(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = stage.engine
        ids = await asyncio.gather(*(engine.start_replica(stage.spec(f"b{n}")) for n in range(8)))
        for id in ids:
            await stage.phase(id, "ready")
        processes = engine.observe()
        assert [process.id for process in processes] == sorted(ids, key=lambda id: id.rpartition("#")[2])
        assert len({process.pid for process in processes}) == 8
        assert [p.started_at for p in processes] == sorted(p.started_at for p in processes)

    play(scene)


def test_a_proxy_starts_on_the_node_it_is_wanted_on_and_ends(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        engine = stage.engine
        id = await engine.start_proxy(engine.home_node)
        assert proxies(engine) == [id]
        [process] = engine.observe()
        assert (process.kind, process.node, process.backend, process.version) == ("proxy", engine.home_node, "", 0)
        address = engine.http_address(engine.home_node)
        assert address is None or address.startswith("http://")
        engine.kill(id)
        assert "killed" in (await stage.exit(id)).cause
        assert proxies(engine) == []
        assert await engine.start_proxy(engine.home_node) != id

    play(scene)


def proxies(engine: Engine) -> list[str]:
    return [process.id for process in engine.observe() if process.kind == "proxy"]


def test_there_is_no_proxy_on_a_node_that_is_not_there(play: Play) -> None:
    async def scene(stage: Stage) -> None:
        assert stage.engine.home_node in stage.engine.nodes()
        assert stage.engine.http_address("nowhere") is None
        with pytest.raises(InstanceError, match="nowhere"):
            await stage.engine.start_proxy("nowhere")
        assert stage.engine.observe() == ()

    play(scene)
