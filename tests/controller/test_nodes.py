"""Several nodes: where proxies run, who reaches which, and what happens when a node comes or leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from fake_instance import Decorated, Test, World, on_virtual_time
from fake_peers import FakePeer

from headgate.controller.proxies import EARLY, Proxies
from headgate.errors import InstanceError
from headgate.wire import messages
from headgate.wire.address import is_loopback


def cluster(
    location: str | None = "EveryNode", nodes: tuple[str, ...] = ("n1", "n2")
) -> Callable[[Test], Decorated]:
    """Run a test with an instance that was started on the first of `nodes`, on virtual time."""

    return on_virtual_time(lambda directory: World(directory, location=location, nodes=nodes))


def now() -> float:
    return asyncio.get_running_loop().time()


def places(world: World) -> list[str]:
    """The nodes where proxies run."""
    return [one.node for one in world.engine.observe() if one.kind == "proxy"]


# --- every node ---


@cluster()
async def test_each_node_has_a_proxy(world: World) -> None:
    await world.call("wait_ready")
    status = await world.status()

    assert places(world) == ["n1", "n2"]
    assert [(one["node"], one["address"], one["state"]) for one in status["proxies"]] == [
        ("n1", "http://n1:8000", "ready"),
        ("n2", "http://n2:8000", "ready"),
    ]
    assert status["waiting"] == []


@cluster()
async def test_a_node_that_joins_gets_one(world: World) -> None:
    await world.call("wait_ready")
    world.engine.add_node("n3")
    await asyncio.sleep(0.01)

    assert places(world) == ["n1", "n2", "n3"]
    assert (await world.status())["ready"]
    await world.create()
    (third,) = [peer for peer in world.engine.peers.values() if peer.node == "n3"]
    assert [view.tag for view in third.snapshots[-1].backends] == ["b"]


@cluster()
async def test_the_proxy_of_a_node_that_left_is_forgotten(world: World) -> None:
    await world.call("wait_ready")
    world.engine.remove_node("n2")
    await asyncio.sleep(30.0)

    assert places(world) == ["n1"]
    status = await world.status()
    assert (status["ready"], status["waiting"], len(status["proxies"])) == (True, [], 1)
    await world.create()


@cluster()
async def test_a_node_that_comes_back_gets_one_at_once(world: World) -> None:
    await world.call("wait_ready")
    world.engine.broken_proxy, world.engine.broken_node = "killed by SIGSEGV", "n2"
    for id, peer in list(world.engine.peers.items()):
        if peer.node == "n2":
            world.engine.crash(id)
    await asyncio.sleep(5.0)
    world.engine.remove_node("n2")
    await asyncio.sleep(0.1)
    assert (await world.status())["waiting"] == []

    world.engine.broken_proxy = ""
    world.engine.add_node("n2")
    await asyncio.sleep(0.01)
    assert places(world) == ["n1", "n2"]


@cluster()
async def test_each_node_has_a_back_off_of_its_own(world: World) -> None:
    world.engine.broken_proxy, world.engine.broken_node = "exited with status 1", "n2"
    await asyncio.sleep(0.05)
    (first,) = [id for id, peer in world.engine.peers.items() if peer.node == "n1"]
    await asyncio.sleep(3.0)
    (text,) = (await world.status())["waiting"]
    assert text.startswith("1 of 2 HTTP proxies are up; node n2: failures in a row: 5, the last: exited with")
    assert "next try in" in text

    world.engine.crash(first)
    await asyncio.sleep(0.01)
    assert places(world) == ["n1"]
    world.engine.broken_proxy = ""
    await asyncio.sleep(4.0)
    assert places(world) == ["n1", "n2"]
    assert (await world.status())["ready"]


@cluster()
async def test_a_start_names_the_node_whose_proxy_does_not_come_up(world: World) -> None:
    world.engine.broken_proxy, world.engine.broken_node = "port 8000 is in use", "n2"
    with pytest.raises(InstanceError, match="proxy on node n2 does not start: port 8000 is in use"):
        await world.call("wait_ready")


@cluster()
async def test_a_node_that_is_late_is_named(world: World) -> None:
    world.engine.proxies_s = 1.0
    await asyncio.sleep(0.5)
    assert (await world.status())["waiting"] == [
        "0 of 2 HTTP proxies are up; node n1: it starts",
        "0 of 2 HTTP proxies are up; node n2: it starts",
    ]
    assert not (await world.status())["ready"]


@cluster()
async def test_a_node_that_leaves_while_its_proxy_starts_is_no_error(world: World) -> None:
    world.engine.proxies_s = 1.0
    await asyncio.sleep(0.5)
    world.engine.remove_node("n2")
    await world.call("wait_ready")
    assert places(world) == ["n1"]


# --- the home node only ---


@cluster("HeadOnly")
async def test_the_proxy_is_where_the_instance_was_started(world: World) -> None:
    await world.call("wait_ready")
    assert places(world) == ["n1"]


@cluster("HeadOnly")
async def test_a_lost_home_node_is_waited_for_and_the_status_says_so(world: World) -> None:
    await world.call("wait_ready")
    world.engine.remove_node("n1")
    await asyncio.sleep(30.0)
    assert places(world) == []
    status = await world.status()
    assert status["waiting"] == ["the HTTP proxy waits for its node n1, which has left the cluster"]
    assert (status["ready"], status["proxies"]) == (False, [])
    await world.create()

    world.engine.add_node("n1")
    await world.call("wait_ready")
    assert places(world) == ["n1"]
    assert (await world.status())["waiting"] == []


@cluster(None)
async def test_without_a_server_no_proxy_runs_and_nothing_is_waited_for(world: World) -> None:
    ready = await world.call("wait_ready")
    assert (ready["http"], places(world)) == (None, [])
    world.engine.remove_node("n1")
    await asyncio.sleep(1.0)
    assert (await world.status())["waiting"] == []
    assert (await world.status())["ready"]


@cluster()
async def test_at_the_end_proxies_of_all_nodes_finish_and_none_is_started_again(world: World) -> None:
    await world.call("wait_ready")
    begun = now()
    await world.call("shutdown")
    assert now() - begun < 1.0
    assert world.engine.observe() == ()


# --- which proxy a process is told ---


async def told(world: World, node: str) -> str | None:
    peer = FakePeer("client", f"client of {node}", world.hears, node=node)
    peer.hello(follows=False)
    answer: str | None = (await peer.call("start_info"))["http"]
    assert (await peer.call("wait_ready"))["http"] == answer
    return answer


@cluster()
async def test_a_process_is_told_the_proxy_of_its_node(world: World) -> None:
    await world.call("wait_ready")
    assert await told(world, "n1") == "http://n1:8000"
    assert await told(world, "n2") == "http://n2:8000"


@cluster("HeadOnly")
async def test_where_there_is_none_it_is_told_that_of_the_home_node(world: World) -> None:
    await world.call("wait_ready")
    assert await told(world, "n2") == "http://n1:8000"


@cluster("HeadOnly", nodes=("127.0.0.1", "n2"))
async def test_an_address_that_only_the_home_node_reaches_is_told_nobody_else(world: World) -> None:
    await world.call("wait_ready")
    assert await told(world, "127.0.0.1") == "http://127.0.0.1:8000"
    assert await told(world, "n2") is None


def test_loopback_addresses_are_known() -> None:
    assert all(map(is_loopback, ["http://127.0.0.3:1", "https://[::1]:8000", "http://localhost:80"]))
    assert all(map(is_loopback, ["127.0.0.1:6379", "[::1]:6379", "localhost:6379"]))
    assert not any(map(is_loopback, ["http://10.0.0.7:1", "http://[fd00::1]:80", "http://head:80"]))
    assert not any(map(is_loopback, ["10.0.0.7:6379", "[fd00::1]:6379", "head:6379", ""]))


# --- early connections ---


@cluster()
async def test_a_proxy_may_connect_before_its_start_is_answered(world: World) -> None:
    world.engine.proxies_s = 1.0
    await world.call("wait_ready")
    assert now() == pytest.approx(1.0)
    await world.create()


@cluster()
async def test_early_connections_that_come_to_nothing_are_forgotten(world: World) -> None:
    proxies = Proxies(world.engine, "EveryNode")
    first = FakePeer("proxy", "first", node="n1")
    proxies.joined(first)
    proxies.left(first)
    proxies.adopt("first", 7, "n1", now())
    assert proxies.peers() == [None]

    peers = [FakePeer("proxy", f"p{number}", node="n2") for number in range(EARLY + 1)]
    for peer in peers:
        proxies.joined(peer)
    proxies.left(FakePeer("proxy", "p1"))
    proxies.adopt("p0", 8, "n2", now())
    proxies.adopt("p1", 9, "n2", now())
    assert proxies.peers() == [None, None, peers[1]]


# --- replicas ---


@cluster("NoServer")
async def test_routers_of_other_nodes_learn_how_to_reach_a_replica(world: World) -> None:
    await world.create(num_replicas=2)
    first, second = world.view().replicas
    assert (first.node, first.address, first.remote) == ("n1", "fake/b#0001", "tcp://n1:10001")
    assert (second.node, second.remote) == ("n2", "tcp://n2:10002")
    assert [one["node"] for one in (await world.status())["replicas"]] == ["n1", "n2"]


@cluster("NoServer")
async def test_the_replicas_of_a_node_that_left_come_back_elsewhere(world: World) -> None:
    await world.create(num_replicas=2)
    world.engine.remove_node("n2")
    await asyncio.sleep(1.0)
    assert [one.node for one in world.view().replicas] == ["n1", "n1"]


@cluster("NoServer")
async def test_what_a_replica_waits_for_is_told_and_creating_it_waits(world: World) -> None:
    world.engine.waits_for["b#0001"] = "for 2 CPUs: the freest node has 1 free"
    creating = asyncio.ensure_future(world.create(code="hang"))
    await asyncio.sleep(60.0)
    status = await world.status()

    assert not creating.done()
    assert [one["waits_for"] for one in status["replicas"]] == ["for 2 CPUs: the freest node has 1 free"]
    assert status["waiting"] == [
        "backend 'b' version 1: 0 of 1 replicas are ready, 1 starting "
        "(replica b#0001 waits for 2 CPUs: the freest node has 1 free)"
    ]
    creating.cancel()


@cluster("NoServer")
async def test_a_replica_that_connects_says_where_it_is(world: World) -> None:
    await world.create()
    replica = FakePeer("replica", "b#0001", world.hears, node="n7")
    replica.pid = 77
    replica.say(messages.Hello("replica", "b#0001", 77, node="n7"))
    await asyncio.sleep(0.01)
    (one,) = (await world.status())["replicas"]
    assert (one["pid"], one["node"]) == (77, "n7")
