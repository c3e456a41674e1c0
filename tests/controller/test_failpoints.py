"""A controller that ends anywhere on its way through any change: its successor makes it good.

All operations times all failpoints, in memory and on virtual time; with processes and under load it is
tests/faults/test_fault_failpoints.py.
"""

from __future__ import annotations

import ast
import asyncio
import doctest
import errno
import functools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import virtual_time
from fake_instance import World
from msgspec.structs import replace
from operations import PASSES, RESTART

import headgate
from headgate.controller import failpoints
from headgate.controller.controller import ADOPT_S
from headgate.controller.failpoints import POINTS, Armed
from headgate.core.state import Goals, Snapshot

SECOND_S = 1.0
#: The replicas of the fake engine do not say hello, so that a new controller waits as long for them.
SILENT_S = ADOPT_S


class Ended(BaseException):
    """The process of the controller is gone: nothing below the failpoint is done any more."""


class Mortal:
    """Engine or store as a controller has it until it ends."""

    def __init__(self, thing: Any) -> None:
        self._thing = thing
        self.ended = False

    def __getattr__(self, name: str) -> Any:
        if self.ended:
            raise Ended
        return getattr(self._thing, name)


class MortalWorld(World):
    """An instance whose controller ends at a failpoint; `end_at` says at which."""

    end_at = ""
    ended_at: float | None = None

    async def start(self) -> None:
        engine, store = self.engine, self.store
        self.mortals = [Mortal(engine), Mortal(store)]
        self.engine, self.store = self.mortals  # type: ignore[assignment]
        try:
            await super().start()
        finally:
            self.engine, self.store = engine, store

    def crash(self) -> None:
        super().crash()
        for mortal in self.mortals:
            mortal.ended = True
        self.controller.publisher.close()

    def reach(self, point: str) -> None:
        if point == self.end_at:
            self.end_at, self.ended_at = "", self.loop.time()
            self.crash()
            raise Ended

    async def prepared(self) -> None:
        """Two backends and an endpoint."""
        await self.start()
        await self.create("b", num_replicas=2)
        await self.create("other")
        await self.call("create_endpoint", name="e", backend="b", route="/e", methods=["GET"])

    async def run(self, operation: str) -> None:
        """The operation, always as the same call."""
        call = f"the {operation}"
        match operation:
            case "create_backend":
                await self.create("new", "new code", call=call, num_replicas=2)
            case "update_backend":
                await self.update("b", call=call)
            case "scale_up":
                await self.configure("b", call=call, num_replicas=3)
            case "scale_down":
                await self.configure("b", call=call, num_replicas=1)
            case "limits":
                await self.configure("b", call=call, max_concurrent_queries=3)
            case "user_config":
                await self.call(
                    "update_backend_config", call=call, tag="b", user_config=b"new", has_user_config=True
                )
            case "delete_backend":
                await self.call(operation, call=call, tag="other")
            case "create_endpoint":
                await self.call(operation, call=call, name="f", backend="other", route="/f", methods=["GET"])
            case "delete_endpoint":
                await self.call(operation, call=call, name="e")
            case "set_traffic":
                await self.call(operation, call=call, endpoint="e", weights={"b": 0.5, "other": 0.5})
            case "shadow_traffic":
                await self.call(operation, call=call, endpoint="e", tag="other", proportion=0.5)

    async def check(self) -> None:
        """The world is as the goals say."""
        status = await self.status()
        assert status["waiting"] == [], status
        assert [(one["tag"], one["ready"]) for one in status["backends"]] == [
            (one["tag"], one["num_replicas"]) for one in status["backends"]
        ]
        listed = [one.id for view in self.snapshot.backends for one in view.replicas]
        assert sorted(listed) == sorted(self.living())
        assert self.store.load() == self.controller.goals
        blobs = {name for goal in self.controller.goals.backends for name in (goal.code, goal.user_config) if name}
        assert {path.name for path in Path(self.directory, "blobs").iterdir()} == blobs
        assert not list(Path(self.directory).rglob("*.new"))


def essence(goals: Goals) -> Goals:
    """Goals but for the numbers that a second try may raise, and the names of calls."""
    return Goals(
        tuple(replace(one, call="") for one in goals.endpoints),
        tuple(replace(one, version=0, config_version=0, call="") for one in goals.backends),
    )


def said(snapshot: Snapshot) -> tuple[Any, Any]:
    """What a snapshot says of the goals."""
    return snapshot.endpoints, {(one.tag, one.version, one.settings) for one in snapshot.backends}


def served(goals: Goals) -> tuple[Any, Any]:
    """What a snapshot of these goals says of them."""
    backends = {(one.tag, one.version, one.settings) for one in goals.backends}
    return tuple(one.endpoint for one in goals.endpoints), backends


@pytest.fixture(autouse=True)
def nothing_is_armed() -> Iterator[None]:
    yield
    failpoints.on_reach = None


def in_memory(directory: Path, main: Callable[[MortalWorld], Any]) -> None:
    directory.mkdir(exist_ok=True)

    async def run() -> None:
        asyncio.get_running_loop().set_exception_handler(_but_for_the_end)
        world = MortalWorld(directory)
        await world.prepared()
        await main(world)

    virtual_time.run(run(), limit_s=600.0)


def _but_for_the_end(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    if not isinstance(context.get("exception"), Ended):
        loop.default_exception_handler(context)


# --- which there are ---


def test_every_failpoint_of_the_sources_is_listed_and_every_listed_one_is_there_once() -> None:
    found = []
    package = Path(headgate.__file__).parent
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "reach":
                (argument,) = node.args
                found += [argument.value] if isinstance(argument, ast.Constant) else ["replica.ready", "drain.ended"]
    assert sorted(set(found)) == sorted(POINTS)
    assert len(POINTS) >= 20


@pytest.mark.parametrize("operation", PASSES)
def test_each_operation_passes_exactly_its_failpoints(operation: str, tmp_path: Path) -> None:
    passed: list[str] = []

    async def main(world: MortalWorld) -> None:
        failpoints.on_reach = passed.append
        await world.run(operation)
        await asyncio.sleep(SECOND_S)
        await world.check()

    in_memory(tmp_path, main)
    assert set(passed) == PASSES[operation]


def test_each_failpoint_is_on_the_way_of_some_operation() -> None:
    """A failpoint that nothing reaches shows nothing."""
    assert set().union(*PASSES.values(), RESTART) == set(POINTS)


# --- the end at each ---


@pytest.mark.parametrize("operation", PASSES)
def test_a_controller_that_ends_anywhere_is_made_good(operation: str, tmp_path: Path) -> None:
    goals: list[Goals] = []

    async def as_it_should_be(world: MortalWorld) -> None:
        await world.run(operation)
        goals.append(world.controller.goals)

    in_memory(tmp_path / "as it should be", as_it_should_be)
    for point in sorted(PASSES[operation]):
        try:
            in_memory(tmp_path / point, functools.partial(_ends_at, point, operation, goals[0]))
        except BaseException as error:
            error.add_note(f"ended at {point}")
            raise


async def _ends_at(point: str, operation: str, goals: Goals, world: MortalWorld) -> None:
    before, before_goals = set(world.living()), world.controller.goals
    failpoints.on_reach = world.reach
    world.end_at = point
    first = asyncio.ensure_future(world.run(operation))
    while world.ended_at is None:
        await asyncio.sleep(0.001)
    stored = world.store.load()
    assert said(world.snapshot) in (served(before_goals), served(stored)), "published before it was stored"
    started = len(world.engine.started)
    await world.start()
    failpoints.on_reach = None
    second = asyncio.ensure_future(world.run(operation))
    await asyncio.sleep(world.ended_at + SILENT_S + SECOND_S - world.loop.time())
    assert second.done()
    await second
    await world.check()
    assert essence(world.controller.goals) == essence(goals)
    if stored != before_goals:
        assert world.controller.goals == stored
        assert len(world.engine.started) == started, "started once more"
    concerned = {"update_backend": "b#", "scale_down": "b#0002", "delete_backend": "other#"}.get(operation, "-")
    assert {id for id in before if not id.startswith(concerned)} <= set(world.living())
    first.cancel()


@pytest.mark.parametrize("point", ["file.written", "blob.synced", "blob.written", "goals.synced", "goals.linked"])
def test_what_was_half_done_is_cleared_away_though_nobody_repeats_the_call(point: str, tmp_path: Path) -> None:
    async def main(world: MortalWorld) -> None:
        before = world.living(), world.store.load()
        failpoints.on_reach = world.reach
        world.end_at = point
        first = asyncio.ensure_future(world.run("create_backend"))
        while world.ended_at is None:
            await asyncio.sleep(0.001)
        await world.start()
        await asyncio.sleep(SILENT_S + SECOND_S)
        await world.check()
        assert (world.living(), world.store.load()) == before
        first.cancel()

    in_memory(tmp_path, main)


@pytest.mark.parametrize("point", sorted(RESTART))
def test_a_controller_that_ends_as_it_begins_is_made_good(point: str, tmp_path: Path) -> None:
    async def main(world: MortalWorld) -> None:
        before = world.living(), world.store.load()
        world.crash()
        failpoints.on_reach = world.reach
        world.end_at = point
        try:
            await world.start()
        except Ended:
            pass
        while world.ended_at is None:
            await asyncio.sleep(0.001)
        await world.start()
        await asyncio.sleep(SECOND_S)
        await world.check()
        assert (world.living(), world.store.load()) == before

    in_memory(tmp_path, main)


# --- how they are armed ---


def test_what_is_not_armed_does_nothing() -> None:
    assert not failpoints.arm("")
    failpoints.reach("goals.stored")


def test_what_is_armed_acts_at_its_point_and_only_there() -> None:
    assert failpoints.arm("goals.stored=raise")
    failpoints.reach("goals.synced")
    for _ in range(2):
        with pytest.raises(OSError, match=r"failpoint goals\.stored") as error:
            failpoints.reach("goals.stored")
        assert error.value.errno == errno.EIO


def test_the_nth_time() -> None:
    armed = Armed("goals.stored=raise:2")
    armed("goals.stored")
    with pytest.raises(OSError, match="failpoint"):
        armed("goals.stored")
    armed("goals.stored")


def test_a_file_is_obeyed_once_by_whoever_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "points"
    armed, successor = Armed(f"@{file}"), Armed(f"@{file}")
    armed("goals.stored")
    for _ in range(2):
        file.write_text("goals.stored=raise")
        armed("goals.synced")
        with pytest.raises(OSError, match="failpoint"):
            armed("goals.stored")
        assert not file.exists()
        successor("goals.stored")


@pytest.mark.parametrize("text", ["no.such=kill", "goals.stored=burn", "goals.stored", "goals.stored=kill:x"])
def test_what_cannot_be_understood_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="HEADGATE_FAILPOINTS"):
        failpoints.arm(text)


def test_kill_and_pause_are_signals_to_oneself(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    failpoints.arm("goals.stored=kill,goals.kept=pause")
    failpoints.reach("goals.stored")
    failpoints.reach("goals.kept")
    assert sent == [(os.getpid(), signal.SIGKILL), (os.getpid(), signal.SIGSTOP)]


def test_the_docstring_is_true() -> None:
    assert doctest.testmod(failpoints).failed == 0
