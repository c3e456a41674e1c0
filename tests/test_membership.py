"""A process's membership in an instance: by which home, and how it ends."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
from lone_controller import TOKEN, ControllerOnThread

from headgate import instance as instances
from headgate.core.state import Snapshot
from headgate.errors import ControllerUnavailable, InstanceError
from headgate.instance import Instance
from headgate.wire import messages
from headgate.wire.control import Peer
from headgate.wire.home import DirectoryHome, Home
from headgate.wire.own_thread import is_own


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


class Controller(ControllerOnThread):
    """Whoever follows gets a snapshot."""

    def hear(self, peer: Peer, message: messages.ToController) -> None:
        super().hear(peer, message)
        if isinstance(message, messages.Hello) and message.follows:
            snapshot = msgspec.Raw(msgspec.msgpack.encode(Snapshot(version=1)))
            peer.tell(messages.Publish(1, snapshot))

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """It does nothing inside the block."""
        lock = threading.Lock()
        with lock:
            self.thread.loop.call_soon_threadsafe(lambda: lock.acquire() and lock.release())
            yield


@pytest.fixture
def controller(short_dir: Path) -> Iterator[Controller]:
    controller = Controller(short_dir)
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
    hello = controller.heard[0]
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


# --- by a line ---


def test_calls_need_no_event_loop_and_the_first_follower_brings_one(
    controller: Controller, short_dir: Path
) -> None:
    instance = Instance(DirectoryHome(str(short_dir), TOKEN), "me", by_line=str(short_dir / "control.sock"))
    instance.join(timeout_s=5.0)
    assert instances.joined(str(short_dir)) is instance
    assert instance.call("method", a=1) == {"a": 1}
    assert not hasattr(instance, "thread")
    instance.follow()
    assert (instance.snapshot.version, instance.thread.alive) == (1, True)
    assert instance.call("method", a=2) == {"a": 2}
    follows = [message.follows for message in controller.heard if isinstance(message, messages.Hello)]
    assert follows == [False, True]
    instance.leave()
    assert not instance.thread.alive
    with pytest.raises(InstanceError, match="the instance is over"):
        instance.call("method")


def test_who_cannot_follow_now_may_later(controller: Controller, short_dir: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(instances, "SILENCE_S", 0.05)
    instance = Instance(DirectoryHome(str(short_dir), TOKEN), "me", by_line=str(short_dir / "control.sock"))
    instance.join()
    with controller.held_up(), pytest.raises(ControllerUnavailable, match="no sign of life"):
        instance.follow()
    assert (instance.usable, instance.call("method", a=1)) == (True, {"a": 1})
    monkeypatch.undo()
    instance.follow()
    assert instance.snapshot.version == 1
    instance.leave()


def test_a_line_keeps_no_membership_alive(controller: Controller, short_dir: Path) -> None:
    instance = Instance(DirectoryHome(str(short_dir), TOKEN), "me", by_line=str(short_dir / "control.sock"))
    instance.join()
    [thread] = [each for each in threading.enumerate() if each.name == "headgate"]
    known = weakref.ref(instance)
    gc.disable()
    try:
        del instance
        assert known() is None
        assert not thread.is_alive()
    finally:
        gc.enable()


def test_the_end_of_the_line_is_the_end_of_the_instance(short_dir: Path) -> None:
    controller = Controller(short_dir)
    instance = Instance(DirectoryHome(str(short_dir), TOKEN), "me", by_line=str(short_dir / "control.sock"))
    instance.join()
    found: SimpleQueue[tuple[bool, bool]] = SimpleQueue()
    instance.when_gone(lambda: found.put((instance.usable, is_own())))
    instance.call("method")  # it has heard of this process
    controller.close()
    assert found.get(timeout=5.0) == (False, True)
    instance.leave()
