"""A node of a cluster: its supervisor with the package's agent, and the test as the controller elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator

import pytest
from tiny import Node, eventually

from headgate.core.state import Settings
from headgate.engine import asks
from headgate.engine.supervised import Supervised
from headgate.wire import address, home, messages
from headgate.wire.control import Hub, Peer

PATIENCE_S = 10.0
NOTE = messages.encode(messages.ReplicaSpec("iris", 1, "code", Settings()))


@pytest.fixture
def node() -> Iterator[Node]:
    node = Node(watch=os.getpid())
    try:
        yield node
    finally:
        node.close()


class Controller:
    """The hub that an agent dials, and what is known by way of it."""

    def __init__(self, node: Node, *, beside: bool = True) -> None:
        self.node = node
        self.hellos: list[messages.Hello] = []
        self.ends: dict[str, str] = {}
        self.peer: Peer | None = None
        self.supervised = Supervised(self._send, on_exit=self._on_exit, node=node.ID)
        self._unix = f"@headgate-test-{node.instance}"
        self._tcp = "tcp://127.0.0.1:0"
        self._beside = beside
        self._changed = asyncio.Event()

    def open(self) -> None:
        """Listen, at the same addresses each time."""
        listeners = [address.listen(self._unix), address.listen(self._tcp)]
        self._tcp = address.address_of(listeners[1])
        self._hub = Hub(listeners, self.node.token, self._on_message, self._on_gone)
        self._hub.open()
        where = self.node.ID if self._beside else "elsewhere"
        home.write_controller(self.node.directory, self._unix, self._tcp, where)

    def _send(self, data: bytes) -> None:
        if self.peer is not None:
            self.peer.tell(messages.Ask(data))

    def _on_message(self, peer: Peer, message: messages.ToController) -> None:
        if isinstance(message, messages.Hello):
            self.hellos.append(message)
            self.peer = peer
        elif isinstance(message, messages.Answer) and peer is self.peer:
            self.supervised.hear(message.data)
        self._changed.set()

    def _on_gone(self, peer: Peer) -> None:
        if peer is self.peer:
            self.peer = None

    def _on_exit(self, id: str, cause: str) -> None:
        self.ends[id] = cause
        self._changed.set()

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not true():
                self._changed.clear()
                await self._changed.wait()

    async def meet(self) -> messages.Hello:
        """The next Hello; everything is listed again then."""
        await self.until(lambda: bool(self.hellos))
        await self.supervised.list()
        return self.hellos.pop(0)

    async def leave(self) -> None:
        self._hub.close()
        self.peer = None
        await asyncio.sleep(0.01)


def play(node: Node, scene: Callable[[Controller], Awaitable[None]], *, beside: bool = True) -> None:
    async def main() -> None:
        controller = Controller(node, beside=beside)
        controller.open()
        try:
            await scene(controller)
        finally:
            await controller.leave()

    asyncio.run(main())


async def dial(port: int) -> str:
    """The id of the proxy that answers there."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        return (await asyncio.wait_for(reader.read(100), PATIENCE_S)).decode()
    finally:
        writer.close()


def ended(node: Node) -> int | None:
    """The wait status of its supervisor, once it has ended."""
    found: list[int] = []

    def look() -> bool:
        pid, status = os.waitpid(node.pid, os.WNOHANG)
        found.extend([status] if pid else [])
        return bool(pid)

    return found[0] if eventually(look, within_s=3.0) else None


@pytest.mark.parametrize("beside", [True, False], ids=["unix", "tcp"])
def test_an_agent_hands_on_what_is_asked_and_answered(node: Node, beside: bool) -> None:
    async def scene(controller: Controller) -> None:
        hello = await controller.meet()
        assert (hello.role, hello.id, hello.node) == ("agent", "agent@4f1d0e2b", node.ID)
        assert hello.pid in node.processes()
        assert controller.peer is not None
        assert controller.peer.is_local == beside

        supervised = controller.supervised
        assert supervised.known == {}
        id = await supervised.fork("proxy", "proxy@4f1d0e2b")
        assert id == "proxy@4f1d0e2b#0001"
        assert await dial(node.port) == id
        process = supervised.known[id].process
        assert (process.kind, process.node) == ("proxy", node.ID)
        assert process.pid in node.processes()

        supervised.kill(id)
        await controller.until(lambda: id in controller.ends)
        assert controller.ends == {id: "killed by SIGKILL"}

    play(node, scene, beside=beside)


def test_once_the_supervisor_and_the_proxy_have_closed_the_listener_connecting_is_refused(node: Node) -> None:
    async def scene(controller: Controller) -> None:
        await controller.meet()
        id = await controller.supervised.fork("proxy", "proxy")
        controller.supervised.close_listener()
        controller.supervised.kill(id)
        await controller.until(lambda: id in controller.ends)
        with pytest.raises(ConnectionRefusedError):
            await dial(node.port)

    play(node, scene)


def test_many_asks_at_once_are_all_answered(node: Node) -> None:
    async def scene(controller: Controller) -> None:
        await controller.meet()
        supervised = controller.supervised
        ids = await asyncio.gather(*(supervised.fork("replica", f"b{number}", NOTE) for number in range(20)))
        assert [id.partition("#")[0] for id in ids] == [f"b{number}" for number in range(20)]
        for _ in range(2000):  # far more than a socket takes
            controller._send(asks.encode(asks.List()))
        for id in ids:
            supervised.kill(id)
        await controller.until(lambda: len(controller.ends) == 20)

    play(node, scene)


@pytest.mark.parametrize("beside", [True, False], ids=["unix", "tcp"])
def test_a_controller_that_comes_back_is_dialed_again_and_finds_the_same_processes(node: Node, beside: bool) -> None:
    async def scene(controller: Controller) -> None:
        first = await controller.meet()
        id = await controller.supervised.fork("proxy", "proxy")
        ends = await controller.supervised.fork("replica", "short", NOTE)
        pid, ends_pid = (controller.supervised.known[each].process.pid for each in (id, ends))
        await controller.leave()
        os.kill(ends_pid, signal.SIGKILL)  # nobody can be told
        await asyncio.to_thread(eventually, lambda: ends_pid not in node.processes())
        assert await dial(node.port) == id

        controller.open()
        assert (await controller.meet()).pid == first.pid
        assert {known.process.pid for known in controller.supervised.known.values()} == {pid}
        assert list(controller.ends) == [ends]
        assert await controller.supervised.fork("replica", "next", NOTE) == "next#0003"

    play(node, scene, beside=beside)


def test_a_killed_agent_is_replaced_and_the_proxy_survives(node: Node) -> None:
    async def scene(controller: Controller) -> None:
        first = await controller.meet()
        id = await controller.supervised.fork("proxy", "proxy")
        pid = controller.supervised.known[id].process.pid
        os.kill(first.pid, signal.SIGKILL)
        assert await dial(node.port) == id

        assert (await controller.meet()).pid != first.pid
        assert controller.supervised.known[id].process.pid == pid
        assert await dial(node.port) == id
        assert controller.ends == {}

    play(node, scene)


@pytest.mark.parametrize("how", ["emptied", "removed", "emptied while the controller is away"])
def test_when_the_instance_is_over_everything_on_the_node_ends(node: Node, how: str) -> None:
    async def scene(controller: Controller) -> None:
        await controller.meet()
        await controller.supervised.fork("proxy", "proxy")
        await controller.supervised.fork("holds_the_gil", "busy")
        assert len(node.processes()) == 4
        if "away" in how:
            await controller.leave()
        if "emptied" in how:
            home.write_controller(node.directory)
        else:
            os.unlink(os.path.join(node.directory, "controller"))
        assert await asyncio.to_thread(ended, node) == 0

    play(node, scene)
    assert node.processes() == set()
    assert not os.path.exists(node.directory)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", node.port))


def test_an_agent_without_a_controller_waits_for_one(node: Node) -> None:
    assert not eventually(lambda: os.waitpid(node.pid, os.WNOHANG)[0], within_s=0.7)

    async def scene(controller: Controller) -> None:
        assert (await controller.meet()).role == "agent"

    play(node, scene)
