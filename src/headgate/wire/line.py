"""A control connection without an event loop, for a process that only makes calls.

A script that starts an instance, says what it serves and waits needs no more; asyncio would cost it a third
of its memory (docs/performance.md). One thread holds the connection: it answers pings, connects again when the
controller was replaced, repeats what was not answered, and learns of the instance's end. Snapshots and
commands are for a ControlClient (control.py).
"""

from __future__ import annotations

import itertools
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec

from headgate.core import framing
from headgate.errors import HeadgateError, InstanceError, ProtocolError
from headgate.wire import calling, greeting, messages
from headgate.wire.calling import OVER, SILENCE_S, TICK_S
from headgate.wire.own_thread import OwnThread, is_own

#: Before another try to connect, and after a connection that did not last.
RECONNECT_S = 0.02
_LASTING_S = 1.0
_READ_BYTES = 64 * 1024
_LEAVE_S = 2.0


class _Call:
    """One call; `done` is held until there is an outcome."""

    __slots__ = ("done", "given_up", "outcome", "request")

    def __init__(self, request: messages.Request) -> None:
        self.request = request
        self.outcome: messages.Response | HeadgateError | None = None
        self.given_up = False
        self.done = threading.Lock()
        self.done.acquire()

    def finish(self, outcome: messages.Response | HeadgateError) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self.done.release()


class Line:
    """Calls of the controller that listens on a unix socket; whoever makes one blocks until it is answered.

    path        where the controller listens: when nobody does, the instance is over
    hello       the first message of each connection
    on_gone     called once, on this line's thread, when the instance is over
    silence_s   for how long nothing may be received while calls wait
    """

    def __init__(
        self,
        path: str,
        token: bytes,
        hello: messages.Hello,
        on_gone: Callable[[], object] = lambda: None,
        silence_s: float = SILENCE_S,
    ) -> None:
        self.gone = False
        self.thread = OwnThread(self._run)
        self._path = path
        self._token = token
        self._hello = hello
        self._on_gone = on_gone
        self._silence_s = silence_s
        self._closed = False
        self._opened = threading.Event()  # it was connected, or never will be
        self._was_connected = False
        self._numbers = itertools.count(1)
        self._name = os.urandom(8).hex()
        self._new: deque[_Call] = deque()  # from any thread; what follows belongs to this line's
        self._calls: dict[int, _Call] = {}
        self._out = bytearray()
        self._heard = 0  # how often anything was received
        self._sock: socket.socket | None = None  # the connection, or what is to be one
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)

    # --- from any thread ---

    def start(self) -> None:
        """Begin to connect."""
        self.thread.start()

    def wait_connected(self, timeout_s: float | None = None) -> None:
        """Returns once it is connected. Raises InstanceError when there is nobody to connect to, and TimeoutError."""
        if not self._opened.wait(timeout_s):
            raise TimeoutError
        if not self._was_connected:
            raise InstanceError(f"no headgate instance listens on {self._path}")

    def call(self, method: str, params: dict[str, Any], timeout_s: float | None = None) -> Any:
        """The controller's answer, as ControlClient.call; TimeoutError after `timeout_s`."""
        call = _Call(calling.request(next(self._numbers), self._name, method, params))
        self._new.append(call)  # no lock: a finalizer may come here in the middle of another call
        self._wake()
        if self.gone:  # since nobody may have seen that call
            raise InstanceError(OVER)
        try:
            self._wait(call, timeout_s)
        finally:
            call.given_up = True
        if isinstance(call.outcome, HeadgateError):
            raise call.outcome
        assert call.outcome is not None
        if (error := calling.error_of(call.outcome)) is not None:
            raise error
        return msgspec.msgpack.decode(call.outcome.value)

    def _wait(self, call: _Call, timeout_s: float | None) -> None:
        end = None if timeout_s is None else time.monotonic() + timeout_s
        heard, silent = self._heard, 0
        while not call.done.acquire(timeout=TICK_S if end is None else max(0.0, min(TICK_S, end - time.monotonic()))):
            if end is not None and time.monotonic() >= end:
                raise TimeoutError
            heard, silent = self._heard, silent + 1 if self._heard == heard else 0
            if silent * TICK_S >= self._silence_s:
                raise calling.no_sign_of_life(call.request.method)

    def close(self) -> None:
        """Leave; the instance goes on. Calls without an answer fail.

        Returns when the thread has ended, but on a thread of headgate's own.
        """
        self._on_gone = lambda: None
        self._closed = True
        self._wake()
        if self._sock is not None:
            with suppress(OSError):  # a handshake goes on no longer, nor a connection that a fork holds too
                self._sock.shutdown(socket.SHUT_RDWR)
        if self.thread.is_alive() and not is_own():
            self.thread.join(_LEAVE_S)

    def _wake(self) -> None:
        with suppress(OSError):  # it is awake enough, or has ended
            self._waker.send(b"\0")

    # --- on the thread ---

    def _run(self) -> None:
        try:
            while (sock := self._connect()) is not None:
                began = time.monotonic()
                with sock:
                    self._serve(sock)
                if time.monotonic() - began < _LASTING_S:  # it did not last: do not spin
                    self._pause()
        finally:
            self._end()

    def _connect(self) -> socket.socket | None:
        """An authenticated connection; None when the instance is over, or was left."""
        while not self._closed:
            try:
                return self._dial()
            except (ConnectionRefusedError, FileNotFoundError):
                return None
            except (OSError, ProtocolError):  # the controller is being replaced, or no descriptor is left
                self._pause()
        return None

    def _dial(self) -> socket.socket:
        self._sock = sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._greet(sock)
        except BaseException:
            sock.close()
            raise
        return sock

    def _pause(self) -> None:
        """Wait before the next try, but not once this was closed."""
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        if not self._closed and poll.poll(RECONNECT_S * 1000):
            self._take_new()

    def _greet(self, sock: socket.socket) -> None:
        sock.settimeout(greeting.TIMEOUT_S)
        sock.connect(self._path)
        greeting.check_user(sock)
        nonce = os.urandom(greeting.NONCE_BYTES)
        sock.sendall(greeting.greeting(self._hello.id, nonce))
        answer = b""
        while len(answer) < greeting.ANSWER_BYTES:  # exactly: what follows is a frame's
            piece = sock.recv(greeting.ANSWER_BYTES - len(answer))
            if not piece:
                raise ProtocolError("the peer closed the connection in the middle of the handshake")
            answer += piece
        proof, _ = greeting.prove(answer, nonce, self._token, self._path)
        sock.sendall(proof)
        sock.setblocking(False)

    def _serve(self, sock: socket.socket) -> None:
        """Be connected; returns when the connection has ended, or is to end."""
        self._calls = {number: call for number, call in self._calls.items() if not call.given_up}
        self._out = bytearray(messages.framed(self._hello))
        for call in self._calls.values():
            self._out += messages.framed(call.request)
        self._was_connected = True
        self._opened.set()
        framer = framing.Framer()
        poll = select.poll()
        poll.register(self._woken, select.POLLIN)
        with suppress(OSError):  # the connection has ended
            while not self._closed:
                poll.register(sock, select.POLLIN | (select.POLLOUT if self._out else 0))
                for fd, event in poll.poll():
                    if fd == self._woken.fileno():
                        self._take_new()
                    elif event != select.POLLOUT and not self._receive(sock, framer):
                        return
                    elif self._out:
                        self._send(sock)

    def _take_new(self) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(_READ_BYTES)
        while self._new:
            call = self._new.popleft()
            if call.given_up:
                continue
            self._calls[call.request.id] = call
            self._out += messages.framed(call.request)

    def _send(self, sock: socket.socket) -> None:
        try:
            del self._out[: sock.send(self._out)]
        except BlockingIOError:
            pass
        except OSError:  # the connection has ended: what it has brought is read first
            self._out.clear()

    def _receive(self, sock: socket.socket, framer: framing.Framer) -> bool:
        """Take what has come; False if that was the end."""
        data = sock.recv(_READ_BYTES)
        self._heard += bool(data)
        try:
            for kind, _, _, _, _, source, start, end in framer.feed(data):
                if kind != framing.CONTROL:
                    raise ProtocolError(f"frame type {kind} on a control connection")
                self._take(messages.decode_from_controller(source[start:end]))
        except (ProtocolError, msgspec.MsgspecError) as error:
            import logging  # 6 ms that only this costs

            logging.getLogger("headgate.wire").error("a link broke the protocol and was closed: %s", error)
            return False
        return bool(data)

    def _take(self, message: messages.FromController) -> None:
        if isinstance(message, messages.Response):
            if (call := self._calls.pop(message.id, None)) is not None:
                call.finish(message)
        elif isinstance(message, messages.Ping):
            self._out += messages.framed(messages.Pong())

    def _end(self) -> None:
        self.gone = True
        self._opened.set()
        for call in (*self._calls.values(), *self._new):
            call.finish(InstanceError(OVER))
        self._woken.close()
        self._waker.close()
        self._on_gone()
