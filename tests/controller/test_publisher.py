"""A snapshot is in force when every process follows it, or was dealt with."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import virtual_time
from fake_peers import FakePeer
from msgspec.structs import replace

from headgate.controller.publisher import HELD_UP_S, PATIENCE_S, Publisher
from headgate.core.state import BackendView, ReplicaAddress, Settings, Snapshot
from headgate.wire import messages
from headgate.wire.greeting import wire_name


class World:
    """A publisher and what it called."""

    def __init__(self, first: int = 0) -> None:
        self.silent: list[str] = []
        self.changes = 0
        self.publisher = Publisher(
            first, on_silent=lambda peer: self.silent.append(peer.id), on_change=self.changed
        )

    def changed(self) -> None:
        self.changes += 1

    def peer(self, role: str = "client", id: str = "c", *, has: int = 0, silent: bool = False) -> FakePeer:
        peer = FakePeer(role, id, self.hears)
        peer.silent = silent
        self.publisher.join(peer, has)
        return peer

    def hears(self, peer: FakePeer, message: Any) -> None:
        if isinstance(message, messages.Ack):
            self.publisher.acked(peer, message.version)
        elif isinstance(message, messages.Fenced):
            self.publisher.fenced(peer, message.number)

    def replica(self, id: str = "b#1", *, silent: bool = False, routers: tuple[str, ...] = ()) -> FakePeer:
        replica = FakePeer("replica", id, self.hears)
        replica.silent = silent
        self.publisher.join_replica(replica, routers)
        return replica


def listing(*ids: str) -> Snapshot:
    replicas = tuple(ReplicaAddress(id, f"/run/{id}", 1) for id in ids)
    return Snapshot(backends=(BackendView("b", 1, Settings(), replicas),), ready=True)


async def check_it_catches_up(world: World, client: FakePeer, version: int, replica: FakePeer) -> None:
    """Once a fenced process acknowledges the version it follows, and the replica's fence is gone."""
    client.silent = False
    client.say(messages.Ack(version))
    await asyncio.sleep(0.001)
    assert replica.fences()[-1] == {}
    assert world.publisher.follows(client)


def now() -> float:
    return asyncio.get_running_loop().time()


def on_virtual_time(main: Coroutine[Any, Any, None]) -> None:
    virtual_time.run(main)


def test_a_snapshot_reaches_all_and_is_in_force_at_once() -> None:
    async def main() -> None:
        world = World()
        peers = [world.peer(id=str(number)) for number in range(3)]
        version = world.publisher.publish(listing("b#1"))
        await world.publisher.in_force(version)

        assert now() == 0.0
        assert [peer.snapshots for peer in peers] == [[replace(listing("b#1"), version=1)]] * 3

    on_virtual_time(main())


def test_what_says_nothing_new_is_not_sent() -> None:
    async def main() -> None:
        world = World()
        peer = world.peer()
        versions = [world.publisher.publish(listing("b#1")) for _ in range(3)]

        assert versions == [1, 1, 1]
        assert len(peer.snapshots) == 1

    on_virtual_time(main())


def test_versions_grow_through_restarts() -> None:
    async def main() -> None:
        old, new = World(first=1 << 32), World(first=2 << 32)
        assert old.publisher.publish(listing()) < new.publisher.publish(listing())

    on_virtual_time(main())


def test_whoever_joins_later_gets_the_newest() -> None:
    async def main() -> None:
        world = World()
        world.publisher.publish(listing("b#1"))
        world.publisher.publish(listing("b#2"))
        peer = world.peer()
        assert not world.publisher.follows(peer)
        await world.publisher.in_force(2)

        assert [snapshot.version for snapshot in peer.snapshots] == [2]
        assert world.publisher.follows(peer)

    on_virtual_time(main())


def sent(peer: FakePeer) -> list[type]:
    """In which form each snapshot came."""
    return [type(one) for one in peer.told if isinstance(one, messages.Publish | messages.PublishChange)]


def test_a_connection_carries_all_of_it_once_and_then_what_changes() -> None:
    async def main() -> None:
        world = World()
        first = world.peer(id="first")
        for number in range(1, 4):
            world.publisher.publish(listing(f"b#{number}"))
        late = world.peer(id="late", has=2)  # what it has it was sent on another connection
        await world.publisher.in_force(world.publisher.publish(listing("b#4")))

        whole, change = messages.Publish, messages.PublishChange
        assert sent(first) == [whole, change, change, change]
        assert sent(late) == [whole, change]
        assert first.snapshots[2:] == late.snapshots == [
            replace(listing("b#3"), version=3),
            replace(listing("b#4"), version=4),
        ]

    on_virtual_time(main())


def test_what_no_delta_can_say_is_sent_whole() -> None:
    async def main() -> None:
        world = World()
        peer = world.peer()
        (one,) = listing("b#1").backends
        two = replace(one, tag="c")
        for backends in ((one, two), (two, one), (two,)):
            await world.publisher.in_force(world.publisher.publish(Snapshot(backends=backends)))

        assert sent(peer) == [messages.Publish, messages.Publish, messages.PublishChange]
        assert peer.snapshots[-1].backends == (two,)

    on_virtual_time(main())


def test_whoever_joins_before_the_first_gets_nothing_yet() -> None:
    async def main() -> None:
        world = World()
        peer = world.peer()
        await world.publisher.in_force(0)
        assert not peer.snapshots
        assert not world.publisher.follows(peer)

    on_virtual_time(main())


def test_a_silent_client_is_fenced_after_two_seconds_until_it_has_caught_up() -> None:
    async def main() -> None:
        world = World()
        replica = world.replica()
        client = world.peer(id="slow", silent=True)
        version = world.publisher.publish(listing("b#1"))
        await world.publisher.in_force(version)

        assert now() == PATIENCE_S
        assert replica.fences() == [{}, {"slow": version}]
        newcomer = world.replica("b#2")
        assert newcomer.fences() == [{"slow": version}]
        await check_it_catches_up(world, client, version, replica)

    on_virtual_time(main())


def test_a_change_is_in_force_only_when_replicas_have_their_fences() -> None:
    """Else what a frozen process does first when it wakes could still be taken by a replica of the old split."""

    async def main() -> None:
        world = World()
        quick, slow = world.replica("b#1"), world.replica("b#2", silent=True)
        world.peer(id="frozen", silent=True)
        waiter = asyncio.ensure_future(world.publisher.in_force(world.publisher.publish(listing("b#1"))))
        await asyncio.sleep(PATIENCE_S + 0.1)
        assert quick.fences() == slow.fences() == [{}, {"frozen": 1}]
        assert not waiter.done()
        slow.silent = False
        slow.say(messages.Fenced(1))
        await waiter
        assert now() < PATIENCE_S + 0.2

    on_virtual_time(main())


@pytest.mark.parametrize("leaves", [True, False])
def test_a_replica_that_does_not_take_a_fence_holds_up_nobody_for_long(leaves: bool) -> None:
    async def main() -> None:
        world = World()
        replica = world.replica(silent=True)
        world.peer(id="frozen", silent=True)
        version = world.publisher.publish(listing("b#1"))
        if leaves:
            asyncio.get_running_loop().call_later(PATIENCE_S + 0.5, world.publisher.leave, replica)
        await world.publisher.in_force(version)
        assert now() == (PATIENCE_S + 0.5 if leaves else 2 * PATIENCE_S)

    on_virtual_time(main())


def test_a_fenced_client_that_leaves_is_fenced_no_more() -> None:
    async def main() -> None:
        world = World()
        replica = world.replica()
        client = world.peer(id="slow", silent=True)
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        world.publisher.leave(client)

        assert replica.fences()[-1] == {}

    on_virtual_time(main())


def test_a_silent_proxy_is_reported_once_and_waited_for_until_it_is_gone() -> None:
    async def main() -> None:
        world = World()
        proxy = world.peer("proxy", "proxy#1", silent=True)
        world.publisher.publish(listing("b#1"))
        waiter = asyncio.ensure_future(world.publisher.in_force(1))
        await asyncio.sleep(PATIENCE_S + 3.0)
        world.publisher.publish(listing("b#2"))
        await asyncio.sleep(PATIENCE_S + 3.0)

        assert world.silent == ["proxy#1"]
        assert not waiter.done()
        world.publisher.leave(proxy)
        await waiter

    on_virtual_time(main())


def test_each_snapshot_has_its_own_two_seconds() -> None:
    async def main() -> None:
        world = World()
        replica = world.replica()
        client = world.peer(id="slow", silent=True)
        world.publisher.publish(listing("b#1"))
        await asyncio.sleep(1.5)
        world.publisher.publish(listing("b#2"))
        world.publisher.acked(client, 1)
        await world.publisher.in_force(2)

        assert now() == 1.5 + PATIENCE_S
        assert replica.fences()[-1] == {"slow": 2}

    on_virtual_time(main())


def test_nobody_waits_for_whoever_has_gone() -> None:
    async def main() -> None:
        world = World()
        client = world.peer(silent=True)
        waiter = asyncio.ensure_future(world.publisher.in_force(world.publisher.publish(listing())))
        await asyncio.sleep(0.5)
        world.publisher.leave(client)
        await waiter
        assert now() == 0.5

    on_virtual_time(main())


# --- routed ---


def test_a_replica_is_routed_until_nobody_can_follow_a_snapshot_that_lists_it() -> None:
    async def main() -> None:
        world = World()
        quick, slow = world.peer(id="quick"), world.peer(id="slow")
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        assert world.publisher.routed(["b#1"])

        slow.silent = True
        world.publisher.publish(listing("b#2"))
        await asyncio.sleep(0.1)
        assert world.publisher.routed(["b#1"])  # slow may not have taken the new one
        assert world.publisher.routed(["b#2"])  # quick has

        before = world.changes
        world.publisher.acked(slow, 2)
        assert not world.publisher.routed(["b#1"])
        assert world.changes > before
        assert world.publisher.follows(quick)

    on_virtual_time(main())


def test_a_fenced_process_holds_back_no_replica() -> None:
    async def main() -> None:
        world = World()
        client = world.peer()
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        client.silent = True
        await world.publisher.in_force(world.publisher.publish(listing("b#2")))

        assert not world.publisher.routed(["b#1"])

    on_virtual_time(main())


def test_a_process_that_skipped_a_snapshot_may_have_used_it() -> None:
    async def main() -> None:
        world, ids = World(), ("b#1", "b#2", "b#3")
        client = world.peer()
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        client.silent = True
        world.publisher.publish(listing("b#2"))
        world.publisher.publish(listing("b#3"))
        assert world.publisher.routed(ids) == set(ids)

        world.publisher.acked(client, 3)
        assert world.publisher.routed(ids) == {"b#3"}

    on_virtual_time(main())


def test_a_process_with_a_snapshot_of_an_earlier_controller_may_use_any_replica() -> None:
    async def main() -> None:
        world = World(first=2 << 32)
        client = world.peer(has=(1 << 32) + 5)
        assert world.publisher.routed(["b#1"])
        await world.publisher.in_force(world.publisher.publish(listing("b#2")))

        assert not world.publisher.routed(["b#1"])
        assert world.publisher.follows(client)

    on_virtual_time(main())


@pytest.mark.parametrize("role", ["client", "replica"])
def test_an_early_process_that_never_answers_is_fenced(role: str) -> None:
    async def main() -> None:
        world = World(first=2 << 32)
        world.peer(role, has=(1 << 32) + 5, silent=True)
        await world.publisher.in_force(world.publisher.publish(listing("b#2")))

        assert now() == PATIENCE_S
        assert not world.publisher.routed(["b#1"])

    on_virtual_time(main())


def test_a_replica_is_told_the_fences_when_it_comes_back() -> None:
    """An earlier controller may have left some in it."""

    async def main() -> None:
        world = World()
        replica = world.replica()
        assert replica.fences() == [{}]

    on_virtual_time(main())


def test_a_controller_that_was_held_up_hears_before_it_judges() -> None:
    async def main() -> None:
        world = World()
        proxy = world.peer("proxy", "proxy#1", silent=True)
        version = world.publisher.publish(listing("b#1"))
        await asyncio.sleep(PATIENCE_S - 0.1)
        loop: Any = asyncio.get_running_loop()
        loop.now += 4.0  # its acknowledgement has come, and is not read yet
        loop.call_later(0.001, world.publisher.acked, proxy, version)
        await world.publisher.in_force(version)
        await asyncio.sleep(PATIENCE_S)
        assert world.silent == []

        world.publisher.publish(listing("b#2"))
        begun = now()
        loop.now += 4.0
        await asyncio.sleep(HELD_UP_S + 0.001)
        assert world.silent == ["proxy#1"]  # nothing came
        assert now() < begun + 4.0 + 2 * HELD_UP_S

    on_virtual_time(main())


# --- strangers: processes that have links to replicas, and do not follow ---

LATER = 2 << 32


def test_a_process_that_only_replicas_know_of_is_waited_for_and_then_fenced() -> None:
    """It has been frozen since before the controller's restart, say."""

    async def main() -> None:
        world = World(first=LATER)
        replica, other = world.replica("b#1", routers=("frozen",)), world.replica("b#2")
        assert world.publisher.routed(["b#9"])  # it may follow any snapshot of before
        version = world.publisher.publish(listing("b#1"))
        await world.publisher.in_force(version)

        assert now() == PATIENCE_S
        assert replica.fences()[-1] == other.fences()[-1] == {"frozen": version}
        assert not world.publisher.routed(["b#9"])
        begun = now()
        await world.publisher.in_force(world.publisher.publish(listing("b#2")))
        assert now() == begun  # it is fenced already

    on_virtual_time(main())


@pytest.mark.parametrize("id", ["frozen", "a name that is too long to be sent in a greeting" * 2])
def test_a_stranger_that_comes_back_is_fenced_until_it_has_caught_up(id: str) -> None:
    async def main() -> None:
        world = World(first=LATER)
        replica = world.replica(routers=(wire_name(id),))
        version = world.publisher.publish(listing("b#1"))
        await world.publisher.in_force(version)
        client = world.peer(id=id, has=(1 << 32) + 5, silent=True)
        assert replica.fences()[-1] in ({wire_name(id): version}, {id: version})
        assert len(client.told) == 1
        await check_it_catches_up(world, client, version, replica)

    on_virtual_time(main())


def test_a_stranger_that_says_hello_in_time_costs_no_time() -> None:
    async def main() -> None:
        world = World(first=LATER)
        replica = world.replica(routers=("client",))
        version = world.publisher.publish(listing("b#1"))
        waiter = asyncio.ensure_future(world.publisher.in_force(version))
        await asyncio.sleep(0.02)
        assert not waiter.done()
        world.peer(id="client", has=(1 << 32) + 5)
        await waiter
        assert now() == pytest.approx(0.02)
        await asyncio.sleep(PATIENCE_S + 1.0)
        assert replica.fences() == [{}]

    on_virtual_time(main())


def test_a_stranger_is_fenced_up_to_the_newest_snapshot_however_many_there_are() -> None:
    async def main() -> None:
        world = World(first=LATER)
        replica = world.replica(routers=("frozen",))
        for number in range(5):
            world.publisher.publish(listing(f"b#{number}"))
        await world.publisher.in_force(LATER + 1)
        assert now() == PATIENCE_S
        assert replica.fences()[-1] == {"frozen": LATER + 5}
        for number in range(50):
            await world.publisher.in_force(world.publisher.publish(listing(f"b#{number}")))
        assert [len(one.pending) for one in world.publisher._followers.values()] == [1]

    on_virtual_time(main())


def test_replicas_that_leave_after_the_end_leave_nothing_behind() -> None:
    async def main() -> None:
        world = World(first=LATER)
        replica = world.replica(routers=("frozen",))
        world.publisher.publish(listing("b#1"))
        world.publisher.close()
        world.publisher.leave(replica)
        assert not world.publisher._followers

    on_virtual_time(main())


def test_a_process_that_follows_is_no_stranger() -> None:
    async def main() -> None:
        world = World()
        world.peer(id="client")
        replica = world.replica(routers=("client",))
        world.publisher.linked(replica, "client", True)
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        assert now() == 0.0

    on_virtual_time(main())


@pytest.mark.parametrize("how", ["its last link ends", "its last replica ends"])
def test_a_stranger_without_links_is_forgotten(how: str) -> None:
    async def main() -> None:
        world = World(first=LATER)
        first, last = world.replica("b#1"), world.replica("b#2", routers=("gone",))
        world.publisher.linked(first, "gone", True)
        world.publisher.linked(first, "gone", True)  # a Hello may have said it already
        version = world.publisher.publish(listing("b#1"))
        waiter = asyncio.ensure_future(world.publisher.in_force(version))
        world.publisher.linked(first, "gone", False)
        world.publisher.linked(first, "gone", False)
        await asyncio.sleep(0.1)
        assert not waiter.done()
        if how == "its last link ends":
            world.publisher.linked(last, "gone", False)
        else:
            world.publisher.leave(last)
        await waiter
        assert now() == pytest.approx(0.1)
        await asyncio.sleep(PATIENCE_S + 1.0)
        assert first.fences() == [{}]
        assert "gone" not in world.publisher._linked
        assert not world.publisher._followers

    on_virtual_time(main())


def test_the_fence_of_a_stranger_goes_with_its_last_link() -> None:
    async def main() -> None:
        world = World(first=LATER)
        replica = world.replica(routers=("gone",))
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        assert replica.fences()[-1] == {"gone": LATER + 1}
        world.publisher.linked(replica, "gone", False)
        assert replica.fences()[-1] == {}

    on_virtual_time(main())


def test_whoever_loses_its_connection_but_keeps_its_links_is_a_stranger_from_then_on() -> None:
    async def main() -> None:
        world = World()
        replica = world.replica()
        client = world.peer(id="client")
        world.publisher.linked(replica, "client", True)
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        await asyncio.sleep(0.1)
        world.publisher.leave(client)
        await world.publisher.in_force(1)
        assert now() == pytest.approx(0.1)  # it has that one
        await world.publisher.in_force(world.publisher.publish(listing("b#2")))
        assert now() == pytest.approx(0.1 + PATIENCE_S)
        assert replica.fences()[-1] == {"client": 2}

        again = world.peer(id="client", has=1)
        await asyncio.sleep(0.001)
        assert world.publisher.follows(again)
        assert replica.fences()[-1] == {}

    on_virtual_time(main())


def test_a_fence_outlasts_the_connection_as_long_as_there_are_links() -> None:
    async def main() -> None:
        world = World()
        replica = world.replica(routers=())
        client = world.peer(id="slow", silent=True)
        world.publisher.linked(replica, "slow", True)
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        world.publisher.leave(client)
        assert replica.fences()[-1] == {"slow": 1}
        world.publisher.linked(replica, "slow", False)
        assert replica.fences()[-1] == {}

    on_virtual_time(main())


def test_of_two_connections_of_one_process_the_end_of_one_makes_no_stranger() -> None:
    """The old one may end after the new one has said Hello."""

    async def main() -> None:
        world = World()
        replica = world.replica(routers=("client",))
        old = world.peer(id="client", silent=True)
        world.peer(id="client")
        world.publisher.leave(old)
        await world.publisher.in_force(world.publisher.publish(listing("b#1")))
        assert now() == 0.0
        assert replica.fences() == [{}]

    on_virtual_time(main())
