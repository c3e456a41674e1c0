"""wire/line.py, calls without an event loop: what survives the controller's restart, and what ends."""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from lone_controller import PATIENCE_S, TOKEN, ControllerOnThread, echo, no_answer, refuse

from headgate.core import framing
from headgate.errors import ArgumentError, ConfigError, ControllerUnavailable, HeadgateError, InstanceError
from headgate.wire import messages
from headgate.wire.greeting import TIMEOUT_S
from headgate.wire.line import Line

HELLO = messages.Hello("client", "me", os.getpid())


class World(ControllerOnThread):
    """A controller, and the lines to it."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.lines: list[Line] = []

    def line(self, **options: Any) -> Line:
        """One that is connected."""
        line = Line(self.path, TOKEN, HELLO, **options)
        self.lines.append(line)
        line.start()
        line.wait_connected(PATIENCE_S)
        return line

    def send(self, data: bytes) -> None:
        self.do(lambda: [peer.send(data) for peer in self.hub.peers])


@pytest.fixture
def world(short_dir: Path) -> Iterator[World]:
    world = World(short_dir)
    yield world
    for line in world.lines:
        line.close()
    world.close()


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


class Aside:
    """A call on a thread of its own: what became of it."""

    def __init__(self, line: Line, method: str = "method", **options: Any) -> None:
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=(line, method, options))
        self._thread.start()

    def _run(self, line: Line, method: str, options: dict[str, Any]) -> None:
        try:
            self.outcome = line.call(method, {"a": 1}, **options)
        except (HeadgateError, TimeoutError) as error:
            self.outcome = error

    def wait(self) -> Any:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.outcome


# --- calls ---


def test_it_says_hello_and_its_calls_are_answered(world: World) -> None:
    line = world.line()
    assert line.call("method", {"a": [1, None]}) == {"a": [1, None]}
    assert line.call("method", {}) == {}
    hello, first, second = world.heard
    assert hello == HELLO
    assert (first.method, first.id, second.id) == ("method", 1, 2)
    assert first.call != second.call


def test_calls_of_many_threads_get_their_own_answers(world: World) -> None:
    line = world.line()
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda n=number: found.append((n, line.call("method", {"n": n}))))  # type: ignore[misc]
        for number in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert sorted(found) == [(number, {"n": number}) for number in range(20)]


def test_what_the_controller_raises_is_raised(world: World) -> None:
    world.answer = refuse
    with pytest.raises(ConfigError, match="no"):
        world.line().call("method", {})


def test_what_cannot_travel_is_an_error_that_names_the_call(world: World) -> None:
    with pytest.raises(ArgumentError, match="method"):
        world.line().call("method", {"a": print})


def test_what_is_larger_than_any_buffer_travels(world: World) -> None:
    params = {"code": bytes(20_000_000)}
    assert world.line().call("method", params) == params


def test_a_call_may_be_given_up(world: World) -> None:
    world.answer = no_answer
    line = world.line()
    with pytest.raises(TimeoutError):
        line.call("method", {}, timeout_s=0.01)
    world.answer = echo
    assert line.call("method", {"a": 1}) == {"a": 1}


def test_a_ping_is_answered_and_other_messages_are_none_of_its_business(world: World) -> None:
    line = world.line()
    line.call("method", {})
    world.tell(messages.Goodbye())
    world.tell(messages.Ping())
    until(lambda: world.all_of(messages.Pong))
    assert line.call("method", {}) == {}


# --- silence ---


def test_a_controller_that_is_silent_while_a_call_waits_is_an_error(world: World) -> None:
    world.answer = no_answer
    line = world.line(silence_s=0.5)
    with pytest.raises(ControllerUnavailable, match=r"^method: the controller gave no sign of life"):
        line.call("method", {})


def test_a_call_waits_as_long_as_the_controller_gives_signs_of_life(world: World) -> None:
    world.answer = no_answer
    line = world.line(silence_s=0.75)
    call = Aside(line)
    for _ in range(10):
        time.sleep(0.125)
        world.tell(messages.Ping())
    [request] = world.all_of(messages.Request)
    world.tell(messages.Response(request.id))
    assert call.wait() is None


# --- the controller is replaced ---


def test_a_call_is_repeated_as_the_same_call_when_the_controller_is_replaced(world: World) -> None:
    world.answer = no_answer
    line = world.line()
    with pytest.raises(TimeoutError):
        line.call("given up", {}, timeout_s=0.01)
    call = Aside(line)
    until(lambda: len(world.all_of(messages.Request)) == 2)
    world.restart(echo)
    assert call.wait() == {"a": 1}
    given_up, first, again = world.all_of(messages.Request)
    assert given_up.method == "given up"
    assert first == again
    assert world.all_of(messages.Hello) == [HELLO, HELLO]


def test_a_broken_protocol_ends_the_connection_and_the_next_one_goes_on(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    line = world.line()
    broken = (
        framing.pack(framing.PING, 0, 0, 0, 0, 0),
        framing.pack(framing.CONTROL, 0, 0, 0, 0, 3) + b"odd",
        struct.pack("<I", 1) + bytes(16),
    )
    for number, data in enumerate(broken, 1):
        until(lambda: len(world.all_of(messages.Hello)) == number and len(world.hub.peers) == 1)  # noqa: B023
        world.send(data)
    until(lambda: len(world.all_of(messages.Hello)) == 4)
    assert line.call("method", {}) == {}
    assert caplog.text.count("a link broke the protocol and was closed") == 3


# --- the end ---


def test_where_nobody_listens_there_is_no_instance(short_dir: Path) -> None:
    gone: list[bool] = []
    line = Line(str(short_dir / "control.sock"), TOKEN, HELLO, lambda: gone.append(True))
    line.start()
    with pytest.raises(InstanceError, match=r"no headgate instance listens on .*control\.sock"):
        line.wait_connected(PATIENCE_S)
    line.thread.join(PATIENCE_S)
    assert gone == [True]


def test_who_does_not_hold_the_token_is_not_connected_to(world: World) -> None:
    line = Line(world.path, b"x" * 32, HELLO)
    line.start()
    with pytest.raises(TimeoutError):
        line.wait_connected(0.1)
    line.close()
    assert not line.thread.is_alive()
    with pytest.raises(InstanceError, match="no headgate instance"):
        line.wait_connected()


@contextmanager
def dialled(folder: Path) -> Iterator[tuple[Line, socket.socket]]:
    """A line, and the listener that it connects to, which greets nobody."""
    path = str(folder / "control.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        line = Line(path, TOKEN, HELLO)
        line.start()
        yield line, listener


def test_whoever_closes_in_the_middle_of_the_handshake_is_dialled_again(short_dir: Path) -> None:
    with dialled(short_dir) as (line, listener):
        for _ in range(3):
            listener.accept()[0].close()
        line.close()
    assert not line.thread.is_alive()


def test_who_leaves_does_not_wait_for_a_handshake(short_dir: Path) -> None:
    with dialled(short_dir) as (line, listener):
        with listener.accept()[0]:
            begun = time.monotonic()
            line.close()
            assert time.monotonic() - begun < TIMEOUT_S / 2
    assert not line.thread.is_alive()


def test_calls_fail_when_the_instance_is_over(world: World) -> None:
    world.answer = no_answer
    gone: list[threading.Thread] = []
    line = world.line(on_gone=lambda: gone.append(threading.current_thread()))
    call = Aside(line)
    until(lambda: world.all_of(messages.Request))
    world.end()
    assert isinstance(call.wait(), InstanceError)
    line.thread.join(PATIENCE_S)
    assert (line.gone, gone) == (True, [line.thread])
    with pytest.raises(InstanceError, match="the instance is over"):
        line.call("method", {})


def test_who_leaves_fails_its_calls_and_ends_its_thread(world: World) -> None:
    world.answer = no_answer
    gone: list[bool] = []
    line = world.line(on_gone=lambda: gone.append(True))
    call = Aside(line)
    until(lambda: world.all_of(messages.Request))
    line.close()
    assert isinstance(call.wait(), InstanceError)
    assert not line.thread.is_alive()
    assert gone == []
    line.close()


# --- what must not end it ---


def test_a_descriptor_that_is_missing_once_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    line = world.line()
    line.call("method", {})  # the controller knows it
    missing = [1]

    class Sockets:
        def __getattr__(self, name: str) -> Any:
            return getattr(socket, name)

        def socket(self, *given: Any) -> socket.socket:
            if missing:
                missing.pop()
                raise OSError(errno.EMFILE, "too many open files")
            return socket.socket(*given)

    monkeypatch.setattr("headgate.wire.line.socket", Sockets())
    world.restart(echo)
    until(lambda: not missing)
    assert line.call("method", {}) == {}
    assert not line.gone


def test_arguments_beyond_a_frame_are_an_error(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headgate.wire.calling.MOST_BYTES", 1000)
    line = world.line()
    with pytest.raises(ArgumentError, match=r"^create: its arguments take 2\d{3} bytes, and 1000 can be sent"):
        line.call("create", {"code": bytes(2000)})


def test_a_controller_that_only_ever_hangs_up_gives_no_sign_of_life(world: World) -> None:
    def hang_up(request: messages.Request) -> None:
        world.thread.loop.call_soon(lambda: [peer.close() for peer in list(world.hub.peers)])

    world.answer = hang_up
    line = world.line(silence_s=0.5)
    with pytest.raises(ControllerUnavailable, match=r"^method: the controller gave no sign of life"):
        line.call("method", {}, PATIENCE_S)
    assert len(world.all_of(messages.Request)) > 2


def test_what_was_given_up_before_it_could_be_sent_is_not_sent(world: World) -> None:
    line = world.line()
    line.call("method", {})
    world.stop()
    time.sleep(0.1)  # now the next handshake waits
    with pytest.raises(TimeoutError):
        line.call("create", {}, 0.2)
    world.start()
    assert line.call("method", {}) == {}
    assert [request.method for request in world.all_of(messages.Request)] == ["method", "method"]
