"""A process's membership in an instance: by which home, and how it ends."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from headgate import instance as instances
from headgate.errors import InstanceError
from headgate.instance import Instance
from headgate.wire import messages
from headgate.wire.address import listen
from headgate.wire.control import Hub, Peer
from headgate.wire.home import DirectoryHome, Home
from headgate.wire.thread import HeadgateThread

TOKEN = b"t" * 32


class FarHome:
    """A home of another node that may learn that the instance is over."""

    key = "ray:tests"
    token = TOKEN
    node = "n0de"

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[Callable[[], None]] = []

    async def find(self, error: Exception | None) -> str | None:
        return self.address

    def watch(self, on_over: Callable[[], None]) -> None:
        self.told.append(on_over)


class Controller:
    """Whoever listens; keeps what it hears."""

    def __init__(self, address: str) -> None:
        self.heard: list[messages.ToController] = []
        self.thread = HeadgateThread("controller")
        self.thread.start()
        self.hub: Hub = Hub(listen(address), TOKEN, self._hear, lambda peer: None)
        self._call(self.hub.open)

    def _hear(self, peer: Peer, message: messages.ToController) -> None:
        self.heard.append(message)

    def _call(self, function: Callable[[], None]) -> None:
        async def run() -> None:
            function()

        self.thread.run(run(), 5.0)

    def close(self) -> None:
        self._call(self.hub.close)
        self.thread.stop()


@pytest.fixture
def controller(short_dir: Path) -> Iterator[Controller]:
    controller = Controller(str(short_dir / "control.sock"))
    yield controller
    controller.close()


@pytest.fixture
def far(short_dir: Path) -> FarHome:
    return FarHome(str(short_dir / "control.sock"))


def test_a_process_joins_once_by_the_key_of_its_home(controller: Controller, short_dir: Path) -> None:
    home: Home = DirectoryHome(str(short_dir), TOKEN)
    instance = instances.join(home)
    assert (instance.key, instance.node, instance.home) == (str(short_dir), "local", home)
    assert instances.join(DirectoryHome(str(short_dir), TOKEN)) is instance
    assert instances.joined(str(short_dir)) is instance
    instance.leave()
    assert instances.joined(str(short_dir)) is None


def test_it_says_which_node_it_is_on(controller: Controller, far: FarHome) -> None:
    instance = instances.join(far)
    while not controller.heard:
        pass
    [hello] = controller.heard
    assert isinstance(hello, messages.Hello)
    assert (hello.role, hello.node) == ("client", "n0de")
    assert instances.joined("ray:tests") is instance
    instance.leave()


def test_a_home_may_end_the_membership(controller: Controller, far: FarHome) -> None:
    instance = instances.join(far)
    [over] = far.told
    gone: list[bool] = []
    instance.when_gone(lambda: gone.append(instance.usable))
    over()
    while not gone:
        pass
    assert gone == [False]
    with pytest.raises(InstanceError, match="the instance is over"):
        instance.check()
    over()
    instance.leave()
    over()


def test_a_home_that_watches_keeps_no_membership_alive(controller: Controller, far: FarHome) -> None:
    instance = Instance(far, "me")
    instance.join()
    thread, known = instance.thread, weakref.ref(instance)
    gc.disable()
    try:
        del instance
        assert known() is None
        assert not thread.alive
    finally:
        gc.enable()
