"""wire/control.py over real sockets on virtual time: what survives the controller's restart, and what ends."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import virtual_time
from lone_controller import TOKEN, LoneController, echo, no_answer

from headgate.core import deltas, framing
from headgate.core.state import Endpoint, Snapshot, Traffic
from headgate.errors import ArgumentError, ConfigError, EndpointNotFound, HeadgateError, InstanceError
from headgate.wire import messages
from headgate.wire.address import address_of, listen
from headgate.wire.control import RECONNECT_S, ControlClient, Hub, Peer
from headgate.wire.handshake import dial
from headgate.wire.home import DirectoryHome

Find = Callable[[Exception | None], Awaitable[str | None]]


class World(LoneController):
    """A controller, and one client."""

    def __init__(self, folder: Path, find: Find | None = None) -> None:
        super().__init__(folder)
        self.told: list[Any] = []
        self.snapshots: list[int] = []
        self.ends = 0
        self.client = ControlClient(
            find or DirectoryHome(str(folder), TOKEN).find,
            TOKEN,
            lambda version: messages.Hello("client", "me", os.getpid(), True, version),
            on_message=self.told.append,
            on_snapshot=lambda snapshot: self.snapshots.append(snapshot.version),
            on_gone=self._end,
        )

    def _end(self) -> None:
        self.ends += 1

    def publish(self, version: int) -> None:
        self.tell(messages.Publish(version, msgspec.Raw(msgspec.msgpack.encode(Snapshot(version=version)))))

    def change(self, base: int, version: int, *names: str) -> None:
        """Publish what changed: further endpoints."""
        endpoints = tuple(Endpoint(name, None, ("GET",), Traffic(())) for name in names)
        delta = deltas.Delta(base, version, True, endpoints)
        self.tell(messages.PublishChange(version, msgspec.Raw(msgspec.msgpack.encode(delta))))

    def requests(self) -> list[messages.Request]:
        return self.all_of(messages.Request)

    async def until(self, true: Callable[[], Any]) -> None:
        while not true():
            await asyncio.sleep(0.001)


@pytest.fixture
def play(short_dir: Path) -> Callable[[Callable[[World], Awaitable[None]]], None]:
    """Plays a scene with a client that is connected."""

    def play(scene: Callable[[World], Awaitable[None]]) -> None:
        async def main() -> None:
            world = World(short_dir)
            try:
                await world.client.open()
                await scene(world)
            finally:
                world.client.close()
                world.end()
                await asyncio.sleep(0.1)  # the links end

        virtual_time.run(main(), limit_s=60.0)

    return play


Play = Callable[[Callable[[World], Awaitable[None]]], None]


# --- calls ------------------------------------------------------------------------------------------


def test_a_call_is_answered_after_a_hello(play: Play) -> None:
    async def scene(world: World) -> None:
        assert await world.client.call("echo", {"a": [1, "é"]}) == {"a": [1, "é"]}
        hello, request = world.heard
        assert hello == messages.Hello("client", "me", os.getpid(), True, 0)
        assert request.method == "echo"

    play(scene)


def test_answers_find_their_calls_in_any_order(play: Play) -> None:
    async def scene(world: World) -> None:
        kept: list[messages.Request] = []

        def keep(request: messages.Request) -> None:
            kept.append(request)

        world.answer = keep
        calls = [asyncio.ensure_future(world.client.call("echo", {"n": n})) for n in range(3)]
        await world.until(lambda: len(kept) == 3)
        for request in reversed(kept):
            for peer in world.hub.peers:
                peer.tell(messages.Response(99, msgspec.Raw(b"\x01")))  # nobody asked
                peer.tell(messages.Response(request.id, msgspec.Raw(request.params)))
                peer.tell(messages.Response(request.id, msgspec.Raw(b"\x02")))  # too late
        assert await asyncio.gather(*calls) == [{"n": n} for n in range(3)]

    play(scene)


@pytest.mark.parametrize("error", [ConfigError, EndpointNotFound, ArgumentError, InstanceError])
def test_an_error_comes_back_as_what_it_was(play: Play, error: type[HeadgateError]) -> None:
    async def scene(world: World) -> None:
        world.answer = lambda request: messages.Response(request.id, error=(error.__name__, "it is so"))
        with pytest.raises(error, match=r"^it is so$") as raised:
            await world.client.call("any", {})
        assert type(raised.value) is error
        world.answer = echo
        assert await world.client.call("echo", {}) == {}

    play(scene)


def test_an_error_that_is_not_known_here_is_still_one_of_ours(play: Play) -> None:
    async def scene(world: World) -> None:
        world.answer = lambda request: messages.Response(request.id, error=("FromTheFuture", "it is so"))
        with pytest.raises(HeadgateError, match="it is so"):
            await world.client.call("any", {})

    play(scene)


@pytest.mark.parametrize("value", [object(), 2**70, "\ud800"], ids=["object", "number", "text"])
def test_what_cannot_be_sent_is_an_error_at_once(play: Play, value: object) -> None:
    async def scene(world: World) -> None:
        with pytest.raises(ArgumentError, match="any: an argument cannot be sent to the controller"):
            await world.client.call("any", {"a": value})
        assert await world.client.call("echo", {}) == {}
        assert [request.method for request in world.requests()] == ["echo"]

    play(scene)


def test_calls_without_an_answer_are_repeated_to_the_next_controller_and_only_those(play: Play) -> None:
    async def scene(world: World) -> None:
        assert await world.client.call("first", {}) == {}
        world.answer = no_answer
        calls = [asyncio.ensure_future(world.client.call(name, {"n": name})) for name in ("second", "third")]
        await world.until(lambda: len(world.requests()) == 3)
        before = world.requests()[1:]

        world.restart(echo)

        assert await asyncio.gather(*calls) == [{"n": "second"}, {"n": "third"}]
        assert world.requests()[3:] == before  # the same ids: whoever has done it already can tell
        assert len({request.call for request in world.requests()}) == 3

    play(scene)


def test_a_call_lives_through_controllers_that_end_at_once(play: Play) -> None:
    async def scene(world: World) -> None:
        world.answer = no_answer
        call = asyncio.ensure_future(world.client.call("echo", {}))
        for _ in range(5):
            seen = len(world.requests())
            await world.until(lambda seen=seen: len(world.requests()) > seen)
            world.restart(no_answer)
        world.answer = echo

        assert await call == {}
        assert not world.ends

    play(scene)


def test_a_call_made_while_no_controller_runs_waits_for_the_next(play: Play) -> None:
    async def scene(world: World) -> None:
        world.stop()
        await asyncio.sleep(0.2)
        call = asyncio.ensure_future(world.client.call("echo", {"a": 1}))
        await asyncio.sleep(0.2)
        world.start()

        assert await call == {"a": 1}

    play(scene)


def test_a_call_that_was_given_up_is_not_repeated(play: Play) -> None:
    async def scene(world: World) -> None:
        world.answer = no_answer
        call = asyncio.ensure_future(world.client.call("forgotten", {}))
        await world.until(world.requests)
        call.cancel()
        await asyncio.wait([call])
        world.restart(echo)

        assert await world.client.call("echo", {}) == {}
        assert [request.method for request in world.requests()] == ["forgotten", "echo"]

    play(scene)


# --- snapshots and messages ---------------------------------------------------------------------------


def test_only_a_newer_snapshot_is_taken_and_each_is_acknowledged_with_what_is_in_force(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        for version in (3, 3, 2, 5, 4):
            world.publish(version)
        await world.until(lambda: len(world.heard) == 6)

        assert world.snapshots == [3, 5]
        assert world.client.snapshot.version == 5
        assert [message.version for message in world.heard[1:]] == [3, 3, 3, 5, 5]

    play(scene)


def test_changes_add_up_to_the_newest_snapshot(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        world.publish(3)
        world.change(3, 4, "one")
        world.change(4, 5, "two")
        world.change(4, 5, "again")  # one that is no newer is not looked at
        await world.until(lambda: len(world.heard) == 5)

        assert world.snapshots == [3, 4, 5]
        assert [message.version for message in world.heard[1:]] == [3, 4, 5, 5]
        assert [one.name for one in world.client.snapshot.endpoints] == ["one", "two"]

    play(scene)


def test_who_cannot_use_a_change_keeps_what_it_has_and_connects_anew(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        world.publish(3)
        await world.client.newer_than(2)
        world.change(4, 5, "one")
        await world.until(lambda: len(world.heard) == 3)

        assert world.heard[2] == messages.Hello("client", "me", os.getpid(), True, 3)
        assert world.snapshots == [3]
        assert not world.client.snapshot.endpoints
        world.publish(5)
        await world.client.newer_than(4)

    play(scene)


def test_whoever_waits_for_a_newer_snapshot_waits_no_longer_than_that(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        waiting = [asyncio.ensure_future(world.client.newer_than(version)) for version in (0, 4)]
        world.publish(3)
        await waiting[0]
        assert not waiting[1].done()
        world.publish(4)
        await asyncio.sleep(0.01)
        assert not waiting[1].done()
        world.publish(5)
        await waiting[1]
        await world.client.newer_than(4)

    play(scene)


def test_the_next_controller_is_told_which_snapshot_is_in_force(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        world.publish(7)
        await world.client.newer_than(6)
        world.restart(echo)
        await world.until(lambda: len(world.heard) == 3)

        assert world.heard[2] == messages.Hello("client", "me", os.getpid(), True, 7)
        assert world.gone == ["me"]

    play(scene)


def test_a_ping_is_answered_and_the_rest_handed_on(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        [peer] = world.hub.peers
        for message in (messages.Ping(), messages.Drain(2.0), messages.Goodbye()):
            peer.tell(message)
        await world.until(lambda: len(world.heard) == 2 and len(world.told) == 2)

        assert world.heard[1] == messages.Pong()
        assert world.told == [messages.Drain(2.0), messages.Goodbye()]

    play(scene)


# --- the end --------------------------------------------------------------------------------------------


def test_once_nobody_listens_the_instance_is_over_for_everybody_who_waits(play: Play) -> None:
    async def scene(world: World) -> None:
        world.answer = no_answer
        call = asyncio.ensure_future(world.client.call("any", {}))
        waiting = asyncio.ensure_future(world.client.newer_than(0))
        await world.until(world.requests)
        world.end()

        with pytest.raises(InstanceError, match="the instance is over"):
            await call
        await waiting
        assert world.client.gone
        assert world.ends == 1
        with pytest.raises(InstanceError, match="the instance is over"):
            await world.client.call("any", {})
        await world.client.newer_than(0)

    play(scene)


def test_whoever_leaves_is_not_told_that_it_is_over(play: Play) -> None:
    async def scene(world: World) -> None:
        world.answer = no_answer
        call = asyncio.ensure_future(world.client.call("any", {}))
        await world.until(world.requests)
        world.client.close()

        with pytest.raises(InstanceError):
            await call
        await world.until(lambda: world.gone == ["me"])
        assert world.ends == 0
        assert not world.hub.peers

    play(scene)


def test_where_nobody_listens_there_is_nothing_to_open(short_dir: Path) -> None:
    ends: list[bool] = []
    client = ControlClient(
        DirectoryHome(str(short_dir), TOKEN).find,
        TOKEN,
        lambda version: messages.Hello("client", "me", 1),
        on_gone=lambda: ends.append(True),
    )
    with pytest.raises(InstanceError, match="no headgate instance listens on"):
        virtual_time.run(client.open())
    assert ends == [True]


def test_whoever_knows_that_the_instance_is_over_ends_it_for_this_process_from_any_thread(play: Play) -> None:
    async def scene(world: World) -> None:
        world.answer = no_answer
        call = asyncio.ensure_future(world.client.call("any", {}))
        await world.until(world.requests)
        await asyncio.to_thread(world.client.end_threadsafe)

        with pytest.raises(InstanceError, match="the instance is over"):
            await call
        await world.until(lambda: world.gone == ["me"])
        world.client.over()
        assert world.ends == 1

    play(scene)


def test_the_end_is_the_end_though_a_connection_is_just_being_made(play: Play) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        world.stop()
        await asyncio.sleep(0.5)
        world.client.over()
        world.start()
        await asyncio.sleep(0.5)
        assert not world.hub.peers

    play(scene)


# --- finding the controller -----------------------------------------------------------------------------


class Finder:
    """Finds what it is told to, and keeps what it was asked with and when."""

    def __init__(self, found: Callable[[], str | None]) -> None:
        self.found = found
        self.asked: list[Exception | None] = []
        self.at: list[float] = []

    async def __call__(self, error: Exception | None) -> str | None:
        self.asked.append(error)
        self.at.append(asyncio.get_running_loop().time())
        return self.found()


def finding(folder: Path, finder: Finder, scene: Callable[[World], Awaitable[None]]) -> None:
    async def main() -> None:
        world = World(folder, finder)
        try:
            await scene(world)
        finally:
            world.client.close()
            world.end()
            await asyncio.sleep(0.1)

    virtual_time.run(main(), limit_s=60.0)


def test_a_finder_is_told_what_the_last_try_ended_with_and_nobody_spins(short_dir: Path) -> None:
    finder = Finder(lambda: str(short_dir / "nobody"))

    async def scene(world: World) -> None:
        opening = asyncio.ensure_future(world.client.open())
        await asyncio.sleep(1.0)
        assert 10 <= len(finder.asked) <= 1.0 / RECONNECT_S + 1
        finder.found = lambda: world.path
        await opening
        assert await world.client.call("echo", {"a": 1}) == {"a": 1}
        assert finder.asked[0] is None
        assert {type(error) for error in finder.asked[1:]} == {FileNotFoundError}

    finding(short_dir, finder, scene)


def test_a_finder_that_cannot_tell_is_asked_again_and_not_in_a_spin(short_dir: Path) -> None:
    def cannot_tell() -> str | None:
        raise OSError("no key-value store")

    finder = Finder(cannot_tell)

    async def scene(world: World) -> None:
        opening = asyncio.ensure_future(world.client.open())
        await asyncio.sleep(1.0)
        assert 10 <= len(finder.asked) <= 1.0 / RECONNECT_S + 1
        finder.found = lambda: world.path
        await opening
        assert [str(error) for error in finder.asked[1:]] == ["no key-value store"] * (len(finder.asked) - 1)

    finding(short_dir, finder, scene)


@pytest.mark.parametrize("tries", [0, 1, 3])
def test_a_finder_may_say_at_any_time_that_the_instance_is_over(short_dir: Path, tries: int) -> None:
    finder = Finder(lambda: str(short_dir / "nobody") if len(finder.asked) <= tries else None)

    async def scene(world: World) -> None:
        with pytest.raises(InstanceError, match="no headgate instance listens on" if tries else "is over"):
            await world.client.open()
        assert world.ends == 1
        assert len(finder.asked) == tries + 1

    finding(short_dir, finder, scene)


def test_a_controller_that_comes_back_elsewhere_is_found_there(short_dir: Path) -> None:
    finder = Finder(lambda: str(short_dir / "control.sock"))

    async def scene(world: World) -> None:
        await world.client.open()
        world.answer = no_answer
        call = asyncio.ensure_future(world.client.call("echo", {"a": 1}))
        await world.until(world.requests)
        world.end()
        elsewhere = listen("tcp://127.0.0.1:0")
        world.listener = elsewhere
        finder.found = lambda: address_of(elsewhere)
        world.answer = echo
        world.start()
        assert await call == {"a": 1}
        [peer] = world.hub.peers
        assert not peer.is_local

    finding(short_dir, finder, scene)


def test_a_hub_listens_in_several_places_and_knows_who_is_on_its_own_node(short_dir: Path) -> None:
    async def main() -> None:
        listeners = [listen(address) for address in (str(short_dir / "s"), "@headgate-test-hub", "tcp://127.0.0.1:0")]
        peers: dict[str, Peer] = {}
        hub = Hub(listeners, TOKEN, lambda peer, message: peers.__setitem__(peer.id, peer), lambda peer: None)
        hub.open()
        clients = []
        for number, listener in enumerate(listeners):
            place = address_of(listener)
            finder = Finder(lambda place=place: place)
            hello = messages.Hello("client", str(number), 1)
            clients.append(ControlClient(finder, TOKEN, lambda version, hello=hello: hello))
            await clients[-1].open()
        while len(peers) < len(clients):
            await asyncio.sleep(0.001)
        assert [peers[str(number)].is_local for number in range(3)] == [True, True, False]
        for client in clients:
            client.close()
        hub.close()
        assert all(listener.fileno() < 0 for listener in listeners)
        await asyncio.sleep(0.1)

    asyncio.run(main())


# --- strangers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (framing.HEADER.pack(0, framing.CALL, 0, 0, 0, 0), "frame type 1 on a control connection"),
        (framing.HEADER.pack(2, framing.CONTROL, 0, 0, 0, 0) + b"\x93\x01", "not a control message"),
        (framing.HEADER.pack(8, framing.CONTROL, 0, 0, 0, 0) + b"\x92\xa5other\x01", "not a control message"),
    ],
)
def test_a_peer_that_says_nonsense_is_cut_off_and_nobody_else(
    play: Play, caplog: pytest.LogCaptureFixture, sent: bytes, why: str
) -> None:
    async def scene(world: World) -> None:
        await world.until(lambda: world.heard)
        sock, _ = await dial(world.path, TOKEN, "odd")
        with sock:
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, sent)
            with caplog.at_level(logging.ERROR, "headgate"):
                try:
                    assert await loop.sock_recv(sock, 1) == b""
                except ConnectionResetError:
                    pass
        assert why in caplog.text
        assert await world.client.call("echo", {}) == {}
        assert world.gone == []  # it never said Hello
        assert len(world.hub.peers) == 1

    play(scene)


def test_whoever_does_not_hold_the_token_is_refused_with_a_line_in_the_log(
    play: Play, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene(world: World) -> None:
        with caplog.at_level(logging.WARNING, "headgate"):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(world.path)
                sock.sendall(b"\x80\x05." * 100)
                await world.until(lambda: "refused a connection" in caplog.text)
        assert await world.client.call("echo", {}) == {}

    play(scene)


def test_descriptors_that_come_with_a_control_connection_are_closed(play: Play) -> None:
    async def scene(world: World) -> None:
        read, write = os.pipe()
        sock, _ = await dial(world.path, TOKEN, "odd", [write])
        os.close(write)
        await world.until(lambda: len(world.hub.peers) == 2)
        assert os.read(read, 1) == b""  # nobody holds the other end
        os.close(read)
        sock.close()

    play(scene)
