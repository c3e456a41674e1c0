"""The fake engine's own promises: the same seed tells the same story, and faults come when asked for."""

from __future__ import annotations

import asyncio

import pytest

from headgate.core.state import Settings
from headgate.engine.fake import FakeEngine, Habits, VirtualClock
from headgate.engine.interface import Event, Exited, NodesChanged, Reported
from headgate.errors import InstanceError
from headgate.wire import messages

SPEC = messages.ReplicaSpec("iris", 1, "code", Settings())


def story(seed: int, habits: Habits = Habits()) -> list[tuple[float, Event]]:  # noqa: B008 - frozen
    """What is told of ten replicas, of which some are drained or killed while they start."""
    clock = VirtualClock()
    engine = FakeEngine(seed, clock, habits)
    told: list[tuple[float, Event]] = []

    async def begin() -> None:
        await engine.open(lambda event: told.append((clock.time(), event)))
        for number in range(10):
            id = await engine.start_replica(SPEC)
            if number % 3 == 1:
                engine.tell(id, messages.Drain(1.0))
            if number % 3 == 2:
                engine.kill(id)

    asyncio.run(begin())
    clock.advance(10.0)
    return told


def begun(engine: FakeEngine, spec: messages.ReplicaSpec = SPEC) -> tuple[str, list[Event]]:
    """The id of a replica that is started, and what is told from before that on."""
    told: list[Event] = []

    async def begin() -> str:
        await engine.open(told.append)
        return await engine.start_replica(spec)

    return asyncio.run(begin()), told


@pytest.mark.parametrize("seed", range(5))
def test_the_same_seed_tells_the_same_story(seed: int) -> None:
    assert story(seed) == story(seed)
    assert story(seed) != story(seed + 100)


@pytest.mark.parametrize("seed", range(50))
def test_nothing_is_heard_of_a_process_after_its_end(seed: int) -> None:
    gone: set[str] = set()
    for _, event in story(seed, Habits(dies_while_starting=0.3)):
        assert isinstance(event, Reported | Exited)
        assert event.id not in gone
        if isinstance(event, Exited):
            gone.add(event.id)


def test_some_die_while_starting_if_that_is_their_habit() -> None:
    told = story(1, Habits(dies_while_starting=1.0))
    assert "killed by SIGSEGV" in [event.cause for _, event in told if isinstance(event, Exited)]


def test_a_frozen_process_says_nothing_and_can_be_killed() -> None:
    clock = VirtualClock()
    engine = FakeEngine(0, clock)
    id, told = begun(engine)
    engine.freeze(id)
    clock.advance(60.0)
    assert told == []
    assert [process.id for process in engine.observe()] == [id]

    engine.kill(id)
    engine.kill(id)
    clock.advance(60.0)
    assert told == [Exited(id, "killed by SIGKILL")]


def test_one_that_hangs_never_becomes_ready() -> None:
    clock = VirtualClock()
    engine = FakeEngine(0, clock)
    _, told = begun(engine, messages.ReplicaSpec("iris", 1, "hang", Settings()))
    clock.advance(3600.0)
    assert told == []


def test_a_user_config_that_raises_is_told_and_not_in_force() -> None:
    clock = VirtualClock()
    engine = FakeEngine(0, clock)
    id, told = begun(engine)
    clock.advance(1.0)
    engine.tell(id, messages.Configure(Settings(), 1, "raise: bad user_config"))
    clock.advance(1.0)
    engine.tell(id, messages.Configure(Settings(), 2, "good"))
    clock.advance(1.0)

    reports = [event.message for event in told if isinstance(event, Reported)]
    assert [(r.phase, r.config_version, r.error) for r in reports if isinstance(r, messages.Report)] == [
        ("ready", 0, ""),
        ("ready", 0, "bad user_config"),
        ("ready", 2, ""),
    ]


def test_another_controller_hears_again_how_replicas_are() -> None:
    clock = VirtualClock()
    engine = FakeEngine(0, clock)

    async def begin() -> str:
        return await engine.start_replica(SPEC)

    id = asyncio.run(begin())
    clock.advance(1.0)
    told: list[Event] = []
    asyncio.run(engine.open(told.append))
    assert told == []
    clock.advance(1.0)
    assert [event.id for event in told if isinstance(event, Reported)] == [id]
    assert len(told) == 1


def test_replicas_are_spread_over_the_nodes() -> None:
    engine = FakeEngine(0, VirtualClock(), nodes=("a", "b"))

    async def begin() -> None:
        await engine.start_proxy("a")
        for _ in range(5):
            await engine.start_replica(SPEC)

    asyncio.run(begin())
    assert engine.home_node == "a"
    assert [process.node for process in engine.observe()] == ["a", "b", "a", "b", "a", "b"]
    assert [process.id for process in engine.observe()][:2] == ["proxy@a#0001", "iris#0002"]


def test_what_ran_on_a_node_that_left_ends() -> None:
    clock = VirtualClock()
    engine = FakeEngine(0, clock, nodes=("a", "b"))
    told: list[Event] = []

    async def begin() -> list[str]:
        await engine.open(told.append)
        return [await engine.start_replica(SPEC), await engine.start_replica(SPEC), await engine.start_proxy("b")]

    stays, replica, proxy = asyncio.run(begin())
    assert (engine.http_address("a"), engine.http_address("b")) == (None, "http://b:8000")
    clock.advance(1.0)
    told.clear()
    engine.remove_node("b")
    assert told == []
    assert engine.nodes() == ("a",)
    assert engine.http_address("b") is None
    clock.advance(1.0)
    assert NodesChanged() in told
    ended = {event.id: event.cause for event in told if isinstance(event, Exited)}
    assert ended == dict.fromkeys((proxy, replica), "its node left the cluster")
    assert [process.id for process in engine.observe()] == [stays]


def test_a_node_that_came_is_used_and_one_that_is_not_there_is_not() -> None:
    clock = VirtualClock()
    engine = FakeEngine(0, clock, nodes=("a",))
    told: list[Event] = []

    async def begin() -> None:
        await engine.open(told.append)
        with pytest.raises(InstanceError, match="node b"):
            await engine.start_proxy("b")
        engine.add_node("b")
        assert engine.nodes() == ("a", "b")
        await engine.start_proxy("b")
        engine.remove_node("a")
        engine.remove_node("b")
        with pytest.raises(InstanceError, match="no node"):
            await engine.start_replica(SPEC)

    asyncio.run(begin())
    clock.advance(1.0)
    assert told.count(NodesChanged()) == 3
    assert engine.home_node == "a"


def test_a_replica_elsewhere_says_where_other_nodes_reach_it() -> None:
    clock = VirtualClock()
    engine = FakeEngine(0, clock, nodes=("a",))
    _, told = begun(engine)
    clock.advance(1.0)
    [event] = told
    assert isinstance(event, Reported)
    assert isinstance(event.message, messages.Report)
    assert event.message.node == "a"
    assert event.message.remote.startswith("tcp://a:")


def test_the_clock_calls_in_order_and_a_call_may_set_another() -> None:
    clock = VirtualClock()
    seen: list[tuple[str, float]] = []
    clock.call_later(2.0, lambda: seen.append(("b", clock.time())))
    clock.call_later(1.0, lambda: clock.call_later(0.5, lambda: seen.append(("a", clock.time()))))
    clock.call_later(2.0, lambda: seen.append(("c", clock.time())))
    clock.advance(3.0)
    assert seen == [("a", 1.5), ("b", 2.0), ("c", 2.0)]
    assert clock.time() == 3.0
