"""How a controller begins and ends: connections, events and calls that come while it looks around."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
import virtual_time
from fake_instance import FACTS, START_S, FakeNode, TextStore
from fake_peers import FakePeer

from headgate.controller.controller import ADOPT_S
from headgate.controller.serving import serve
from headgate.controller.takeover import Takeover
from headgate.engine.interface import Appeared, Process, Reported
from headgate.errors import InstanceError
from headgate.wire import messages


class FakeHub:
    """Hands on what peers say once it is open."""

    def __init__(self) -> None:
        self.is_open = False
        self.on_message: Callable[[Any, Any], None]
        self.on_gone: Callable[[Any], None]

    def open(self) -> None:
        self.is_open = True

    def close(self) -> None:
        self.is_open = False

    def hears(self, peer: Any, message: Any) -> None:
        if self.is_open:
            self.on_message(peer, message)


class Site:
    """An engine and a client; `begin` starts controllers, one after another."""

    def __init__(self, directory: Path) -> None:
        self.engine = FakeNode(asyncio.get_running_loop())
        self.store = TextStore(str(directory))
        self.incarnation = 0
        self.hub = FakeHub()
        self.client = FakePeer("client", "driver", lambda peer, message: self.hub.hears(peer, message))
        self.engine.hears = lambda peer, message: self.hub.hears(peer, message)
        self.engine.gone = lambda peer: self.hub.on_gone(peer)

    def begin(self) -> asyncio.Task[None]:
        """A controller, whose life the task is."""
        self.incarnation += 1
        self.hub = FakeHub()
        return asyncio.create_task(
            serve(self.engine, self.store, self.hub, incarnation=self.incarnation, location="HeadOnly")
        )

    async def begin_with_client(self) -> asyncio.Task[None]:
        """A controller that the client has a connection to."""
        serving = self.begin()
        await asyncio.sleep(0)
        self.client.hello()
        return serving

    async def begin_and_lose(self, num_replicas: int = 1) -> None:
        """A controller that had a backend made, and ended."""
        serving = await self.begin_with_client()
        await self.create(num_replicas)
        await self.lose(serving)

    async def lose(self, serving: asyncio.Task[None]) -> None:
        """The controller ends, and all others live on."""
        self.engine._on_event = lambda event: None
        serving.cancel()
        await asyncio.wait([serving])

    async def create(self, num_replicas: int = 1) -> None:
        given = {"num_replicas": num_replicas}
        await self.client.call("create_backend", tag="b", code=b"code", facts=FACTS, given=given)

    def living(self) -> list[str]:
        return [process.id for process in self.engine.observe()]

    def reports(self, id: str, phase: str = "ready") -> Reported:
        return Reported(id, messages.Report("b", 1, phase, f"fake/{id}"))


Test = Callable[[Site], Coroutine[Any, Any, None]]


def site(test: Test) -> Callable[[Path], None]:
    def run(tmp_path: Path) -> None:
        async def main() -> None:
            await test(Site(tmp_path))

        virtual_time.run(main(), limit_s=600.0)

    functools.update_wrapper(run, test)
    del run.__wrapped__
    return run


def now() -> float:
    return asyncio.get_running_loop().time()


@site
async def test_it_serves_until_the_instance_was_shut_down(site: Site) -> None:
    serving = await site.begin_with_client()
    ready = await site.client.call("wait_ready")
    assert (ready["ready"], ready["http"], ready["incarnation"]) == (True, "http://local:8000", 1)
    await site.create(2)
    (proxy,) = site.engine.peers.values()
    await site.client.call("shutdown")
    await asyncio.wait_for(serving, 1.0)

    assert site.living() == []
    assert not site.hub.is_open
    told = len(proxy.told), len(site.client.told)
    await asyncio.sleep(10.0)
    assert (len(proxy.told), len(site.client.told)) == told


@site
async def test_what_connects_and_calls_while_the_engine_opens_is_heard_once_it_has(site: Site) -> None:
    await site.begin_and_lose(2)
    before = site.living()

    site.engine.opens_s = 0.5
    begun = now()
    site.begin()
    await asyncio.sleep(0)
    for peer in (site.client, *site.engine.peers.values()):
        peer.hello(has=peer.snapshots[-1].version)
    replicas = [FakePeer("replica", id, site.client._hears) for id in before if id.startswith("b#")]
    for replica in replicas:
        replica.hello(follows=False)
    known = await site.client.call("start_info")
    assert (known["ready"], known["incarnation"], now()) == (False, 2, begun)
    backends = await site.client.call("list_backends")

    assert list(backends) == ["b"]
    assert now() == pytest.approx(begun + 0.5)  # nobody had to be waited for
    assert site.living() == before
    assert [one.id for one in site.client.snapshots[-1].backends[0].replicas] == [one.id for one in replicas]
    assert (await site.client.call("wait_ready"))["ready"]


@site
async def test_a_process_that_is_silent_has_its_time(site: Site) -> None:
    await site.begin_and_lose()
    before = site.living()
    site.engine.freeze("b#0002")

    begun = now()
    await site.begin_with_client()
    await site.client.call("list_backends")
    assert now() == pytest.approx(begun + ADOPT_S)
    assert site.living() == before


@pytest.mark.parametrize("left_s", [0.75, 0.05])
def test_a_controller_that_is_held_up_while_it_takes_over_hears_what_was_said_meanwhile(
    left_s: float, tmp_path: Path
) -> None:
    @site
    async def test(site: Site) -> None:
        await _held_up_while_it_takes_over(site, left_s)

    test(tmp_path)


async def _held_up_while_it_takes_over(site: Site, left_s: float) -> None:
    await site.begin_and_lose()

    site.engine.freeze("b#0002")  # it will say how it is when we have it say so
    known = len(site.client.snapshots)
    await site.begin_with_client()
    await asyncio.sleep(ADOPT_S - left_s)
    loop: Any = asyncio.get_running_loop()
    loop.now += 4.0
    loop.call_later(0.001, site.engine._on_event, site.reports("b#0002"))  # it has come, and is not read yet
    await site.client.call("list_backends")
    assert [len(one.backends[0].replicas) for one in site.client.snapshots[known:]] == [1]


@site
async def test_who_ends_while_the_engine_opens_is_not_waited_for_and_replaced(site: Site) -> None:
    await site.begin_and_lose()

    site.engine.opens_s = 0.5
    begun = now()
    await site.begin_with_client()
    for id in site.living():
        site.engine.crash(id)
    await site.client.call("list_backends")
    assert now() == pytest.approx(begun + 0.5)
    await site.client.call("wait_ready")
    await asyncio.sleep(2 * START_S)
    assert [id.partition("#")[0] for id in site.living()] == ["proxy", "b"]


@site
async def test_a_shutdown_that_comes_while_the_engine_opens_ends_what_it_finds(site: Site) -> None:
    await site.begin_and_lose()

    site.engine.opens_s = 0.5
    serving = site.begin()
    await asyncio.sleep(0)
    for peer in (site.client, *site.engine.peers.values()):
        peer.hello()
    await site.client.call("shutdown")
    await asyncio.wait_for(serving, 1.0)
    assert site.living() == []


@site
async def test_an_engine_that_cannot_open_is_an_error_and_nothing_stays_open(site: Site) -> None:
    async def fail(on_event: Any) -> None:
        raise InstanceError("no supervisor")

    site.engine.open = fail  # type: ignore[method-assign]
    with pytest.raises(InstanceError, match="no supervisor"):
        await site.begin()
    assert not site.hub.is_open


@site
async def test_a_replica_that_appears_late_is_one_of_those_that_run(site: Site) -> None:
    await site.begin_and_lose()
    (late,) = [one for one in site.engine.observe() if one.kind == "replica"]
    hidden = site.engine._living.pop(late.id)

    await site.begin_with_client()
    for proxy in site.engine.peers.values():
        proxy.hello()
    site.engine._living[late.id] = hidden
    site.engine._on_event(Appeared(late))
    site.engine._on_event(site.reports(late.id))
    await site.client.call("list_backends")

    assert [one.id for one in site.client.snapshots[-1].backends[0].replicas] == [late.id]
    assert len(site.engine.started) == 1


@site
async def test_one_that_appears_when_its_place_is_taken_may_finish_what_it_has(site: Site) -> None:
    await site.begin_with_client()
    await site.create()
    late = await site.engine.start_replica(site.engine.started[0])
    (process,) = [one for one in site.engine.observe() if one.id == late]
    site.engine._on_event(Appeared(process))
    site.engine._on_event(site.reports(late))
    await asyncio.sleep(0.1)
    assert (late, "Drain") in [(id, type(message).__name__) for id, message in site.engine.told]
    await asyncio.sleep(2.0)
    assert late not in site.living()


@site
async def test_a_proxy_that_appears_is_not_started_again(site: Site) -> None:
    site.engine.proxies_s = 0.2
    serving = site.begin()
    await asyncio.sleep(0.3)
    (proxy,) = site.engine.observe()
    await site.lose(serving)
    hidden = site.engine._living.pop(proxy.id)

    site.engine.opens_s = 0.1
    site.begin()
    await asyncio.sleep(0)
    site.engine._on_event(Appeared(proxy))
    site.engine._living[proxy.id] = hidden
    site.engine.peers[proxy.id].hello()
    site.client.hello()
    assert (await site.client.call("wait_ready"))["ready"]
    assert site.living() == [proxy.id]


# --- who is waited for ---


def test_all_that_was_found_is_to_speak() -> None:
    takeover = Takeover()
    takeover.said("early")
    assert not takeover.is_complete
    takeover.found("early")
    takeover.found("late")
    takeover.looked = True
    assert not takeover.is_complete
    takeover.said("late")
    assert takeover.is_complete


def test_afterwards_nobody_is_remembered() -> None:
    takeover = Takeover()
    takeover.looked = True
    takeover.found("silent")
    takeover.end()
    takeover.said("silent")
    assert (takeover.is_complete, takeover.over) == (True, True)
    assert not takeover._said


def test_a_process_says_where_it_is() -> None:
    assert Process("b#1", "replica", "b", 1, 7, 0.0).node == "local"
