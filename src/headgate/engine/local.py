"""The engine of one machine: processes are forks of the supervisor.

The controller asks the supervisor for processes (engine/asks.py) and hears of their ends from it;
a replica, once forked, dials the control socket, says Hello and is told what to run. The spec also
travels to the supervisor as the child's note: so a controller that takes over knows what each
process runs, even one that had not yet been told.
"""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections import deque
from collections.abc import Callable, Iterator
from os import WIFSIGNALED, waitstatus_to_exitcode

import msgspec

from headgate.engine import asks, gpus
from headgate.engine.interface import Event, Exited, Process, Reported
from headgate.errors import InstanceError
from headgate.wire import messages
from headgate.wire.control import Hub, Peer

_decode_spec = msgspec.msgpack.Decoder(messages.ReplicaSpec).decode
#: How long `close` waits for killed processes to be gone.
_CLOSE_S = 5.0


class _Known:
    """A process: as the supervisor told of it, its connection, and what waits to be said to it."""

    def __init__(self, child: asks.Child) -> None:
        self.child = child
        self.spec = _decode_spec(child.note) if child.role == "replica" else None
        self.peer: Peer | None = None
        self.unsaid: list[messages.FromController] = []

    def process(self) -> Process:
        version = self.spec.version if self.spec else 0
        backend = self.spec.backend if self.spec else ""
        child = self.child
        return Process(child.id, child.role, backend, version, child.pid, child.started)


class LocalEngine:
    """Processes of this machine. Takes replicas' reports from the hub and leaves it everything else.

    ask   the socket to the supervisor, ChildBoot.ask
    """

    def __init__(self, ask: socket.socket, hub: Hub, all_gpus: tuple[str, ...] | None = None) -> None:
        self._ask = ask
        self._hub = hub
        self._all_gpus = all_gpus
        self._known: dict[str, _Known] = {}
        self._early: dict[str, tuple[Peer, messages.Hello]] = {}
        self._forks: dict[int, tuple[asks.Fork, asyncio.Future[str]]] = {}
        self._count = 0
        self._outbox: deque[bytes] = deque()
        self._listed: asyncio.Future[None] | None = None
        self._changed = asyncio.Event()
        self._on_event: Callable[[Event], None] = lambda event: None
        self._loop: asyncio.AbstractEventLoop

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Take over the supervisor's children and the hub's messages from replicas."""
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._to_controller, self._hub.on_message = self._hub.on_message, self._on_message
        self._gone_to_controller, self._hub.on_gone = self._hub.on_gone, self._on_gone
        self._ask.setblocking(False)
        self._loop.add_reader(self._ask.fileno(), self._read)
        self._listed = self._loop.create_future()
        self._send(asks.List())
        await self._listed

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        """Fork a replica of `spec`; its GPUs are chosen here. Raises InstanceError."""
        spec = self._with_gpus(spec)
        return await self._fork("replica", spec.backend, messages.encode(spec))

    async def start_proxy(self) -> str:
        """Fork a proxy. Raises InstanceError."""
        return await self._fork("proxy", "proxy", b"")

    def tell(self, id: str, message: messages.FromController) -> None:
        """Send a message to a process, now or when it has dialed."""
        known = self._known.get(id)
        if known is None:
            return
        if known.peer is None:
            known.unsaid.append(message)
        else:
            known.peer.tell(message)

    def kill(self, id: str) -> None:
        """SIGKILL to the process's group."""
        self._send(asks.Kill(id))

    def stop_accepting(self) -> None:
        """Close the supervisor's copy of the HTTP listener."""
        self._send(asks.CloseListener())

    def observe(self) -> tuple[Process, ...]:
        """The supervisor's children but for the controller, oldest first."""
        return tuple(known.process() for known in self._known.values())

    def nodes(self) -> tuple[str, ...]:
        """This machine."""
        return ("local",)

    async def close(self) -> None:
        """Kill all processes and wait until they are reaped."""
        for id in self._known:
            self.kill(id)
        try:
            async with asyncio.timeout(_CLOSE_S):
                while self._known:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:  # stuck in the kernel; the supervisor's end kills them again
            pass
        self._hub.on_message, self._hub.on_gone = self._to_controller, self._gone_to_controller
        self._loop.remove_reader(self._ask.fileno())
        self._loop.remove_writer(self._ask.fileno())
        for _, answer in self._forks.values():
            answer.cancel()

    # --- the supervisor -----------------------------------------------------------------------

    async def _fork(self, role: str, name: str, note: bytes) -> str:
        self._count += 1
        fork = asks.Fork(self._count, role, name, note)
        if len(asks.encode(fork)) > asks.MAX_ASK_BYTES:
            raise InstanceError(f"cannot start {name}: its env is longer than {asks.MAX_ASK_BYTES} bytes")
        answer: asyncio.Future[str] = self._loop.create_future()
        self._forks[fork.n] = fork, answer
        self._send(fork)
        return await answer

    def _send(self, ask: asks.Ask) -> None:
        self._outbox.append(asks.encode(ask))
        self._flush()

    def _flush(self) -> None:
        while self._outbox:
            try:
                self._ask.send(self._outbox[0])
            except BlockingIOError:
                self._loop.add_writer(self._ask.fileno(), self._flush)
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                    raise
                return  # the supervisor is gone, and so is this process in a moment
            self._outbox.popleft()
        self._loop.remove_writer(self._ask.fileno())

    def _read(self) -> None:
        while True:
            try:
                data = self._ask.recv(asks.MAX_ASK_BYTES * 2)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._loop.remove_reader(self._ask.fileno())
                return
            self._hear(asks.decode_answer(data))

    def _hear(self, answer: asks.Answer) -> None:
        match answer:
            case asks.Forked():
                self._forked(answer)
            case asks.Child():
                self._know(answer)
            case asks.Listed():
                if self._listed is not None and not self._listed.done():
                    self._listed.set_result(None)
            case asks.Exited():
                self._known.pop(answer.id, None)
                self._early.pop(answer.id, None)
                self._changed.set()
                self._on_event(Exited(answer.id, cause_of(answer.status)))

    def _forked(self, forked: asks.Forked) -> None:
        fork, answer = self._forks.pop(forked.n)
        if forked.error:
            if not answer.done():
                answer.set_exception(InstanceError(f"cannot start {fork.name}: {forked.error}"))
            return
        self._know(asks.Child(forked.id, fork.role, fork.name, forked.pid, forked.started, fork.note))
        if not answer.done():
            answer.set_result(forked.id)

    def _know(self, child: asks.Child) -> None:
        self._known[child.id] = _Known(child)
        early = self._early.pop(child.id, None)
        if early is not None:
            self._greet(*early)

    # --- the replicas -------------------------------------------------------------------------

    def _on_message(self, peer: Peer, message: messages.ToController) -> None:
        if peer.role == "replica" and isinstance(message, messages.Report | messages.Health):
            self._on_event(Reported(peer.id, message))
            return
        if isinstance(message, messages.Hello) and message.role in ("replica", "proxy"):
            if message.id in self._known:
                self._greet(peer, message)
            else:  # dialed before the supervisor's word on it was read
                self._early[message.id] = peer, message
        self._to_controller(peer, message)

    def _greet(self, peer: Peer, hello: messages.Hello) -> None:
        known = self._known[hello.id]
        known.peer = peer
        if known.spec is not None:
            if hello.report is None:
                peer.tell(messages.Assign(known.spec))
            else:
                self._on_event(Reported(hello.id, hello.report))
        unsaid, known.unsaid = known.unsaid, []
        for message in unsaid:
            peer.tell(message)

    def _on_gone(self, peer: Peer) -> None:
        known = self._known.get(peer.id)
        if known is not None and known.peer is peer:
            known.peer = None
        if peer.id in self._early and self._early[peer.id][0] is peer:
            del self._early[peer.id]
        self._gone_to_controller(peer)

    # --- GPUs ---------------------------------------------------------------------------------

    def _with_gpus(self, spec: messages.ReplicaSpec) -> messages.ReplicaSpec:
        if spec.num_gpus <= 0 or gpus.VARIABLE in dict(spec.env):
            return spec
        all_gpus = gpus.here() if self._all_gpus is None else self._all_gpus
        chosen = ",".join(gpus.pick(all_gpus, self._taken_gpus(), spec.num_gpus))
        return msgspec.structs.replace(spec, env=(*spec.env, (gpus.VARIABLE, chosen)))

    def _taken_gpus(self) -> Iterator[tuple[str, float]]:
        asked = (_decode_spec(fork.note) for fork, _ in self._forks.values() if fork.role == "replica")
        for spec in (*(known.spec for known in self._known.values()), *asked):
            if spec is not None and spec.num_gpus > 0:
                for name in dict(spec.env)[gpus.VARIABLE].split(","):
                    yield name, min(spec.num_gpus, 1.0)


def cause_of(status: int) -> str:
    """What waitpid() said, for people.

    >>> cause_of(9), cause_of(256)
    ('killed by SIGKILL', 'exited with status 1')
    """
    code = waitstatus_to_exitcode(status)
    if not WIFSIGNALED(status):
        return f"exited with status {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal
        return f"killed by signal {-code}"
