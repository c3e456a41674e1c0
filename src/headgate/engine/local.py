"""The engine of one machine: processes are forks of the supervisor.

The controller asks the supervisor for processes (engine/asks.py) and hears of their ends from it;
a replica, once forked, dials the control socket, says Hello and is told what to run. The spec also
travels to the supervisor as the child's note: so a controller that takes over knows what each
process runs, even one that had not yet been told.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator

import msgspec

from headgate.engine import asks, gpus
from headgate.engine.interface import Event, Exited, Process, Reported
from headgate.engine.supervised import Known, Supervised, spec_in
from headgate.errors import InstanceError
from headgate.wire import messages
from headgate.wire.control import Hub, Peer

NODE = "local"
#: How long `close` waits for killed processes to be gone.
_CLOSE_S = 5.0


class LocalEngine:
    """Processes of this machine. Takes replicas' reports from the hub and leaves it everything else.

    ask    the socket to the supervisor, ChildBoot.ask
    http   the URL of the instance's HTTP server
    """

    def __init__(
        self, ask: socket.socket, hub: Hub, http: str | None = None, all_gpus: tuple[str, ...] | None = None
    ) -> None:
        self._hub = hub
        self._http = http
        self._all_gpus = all_gpus
        self._line = asks.LoopLine(ask, lambda data: self._supervised.hear(data))
        self._supervised = Supervised(self._line.send, self._on_known, self._on_exit, NODE)
        self._peers: dict[str, Peer] = {}
        self._unsaid: dict[str, list[messages.FromController]] = {}
        self._early: dict[str, tuple[Peer, messages.Hello]] = {}
        self._changed = asyncio.Event()
        self._on_event: Callable[[Event], None] = lambda event: None

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Take over the supervisor's children and the hub's messages from replicas."""
        self._on_event = on_event
        self._to_controller, self._hub.on_message = self._hub.on_message, self._on_message
        self._gone_to_controller, self._hub.on_gone = self._hub.on_gone, self._on_gone
        self._line.open(asyncio.get_running_loop())
        await self._supervised.list()

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        """Fork a replica of `spec`; its GPUs are chosen here. Raises InstanceError."""
        spec = self._with_gpus(spec)
        return await self._supervised.fork("replica", spec.backend, messages.encode(spec))

    async def start_proxy(self, node: str) -> str:
        """Fork a proxy. Raises InstanceError."""
        if node != NODE:
            raise InstanceError(f"cannot start a proxy on node {node}: this instance has one machine")
        return await self._supervised.fork("proxy", "proxy")

    def tell(self, id: str, message: messages.FromController) -> None:
        """Send a message to a process, now or when it has dialed."""
        peer = self._peers.get(id)
        if peer is not None:
            peer.tell(message)
        elif id in self._supervised.known:
            self._unsaid.setdefault(id, []).append(message)

    def kill(self, id: str) -> None:
        """SIGKILL to the process's group."""
        self._supervised.kill(id)

    def stop_accepting(self) -> None:
        """Close the supervisor's copy of the HTTP listener."""
        self._supervised.close_listener()

    def observe(self) -> tuple[Process, ...]:
        """The supervisor's children but for the controller, oldest first."""
        return tuple(known.process for known in self._supervised.known.values())

    def nodes(self) -> tuple[str, ...]:
        """This machine."""
        return (NODE,)

    @property
    def home_node(self) -> str:
        """This machine."""
        return NODE

    def http_address(self, node: str) -> str | None:
        """What it was made with."""
        return self._http if node == NODE else None

    async def close(self) -> None:
        """Kill all processes and wait until they are reaped."""
        known = self._supervised.known
        for id in known:
            self.kill(id)
        try:
            async with asyncio.timeout(_CLOSE_S):
                while known:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:  # stuck in the kernel; the supervisor's end kills them again
            pass
        self._hub.on_message, self._hub.on_gone = self._to_controller, self._gone_to_controller
        self._line.close()
        self._supervised.leave()

    def _on_known(self, known: Known) -> None:
        early = self._early.pop(known.child.id, None)
        if early is not None:
            self._greet(*early)

    def _on_exit(self, id: str, cause: str) -> None:
        self._peers.pop(id, None)
        self._unsaid.pop(id, None)
        self._changed.set()
        self._on_event(Exited(id, cause))

    # --- the replicas -------------------------------------------------------------------------

    def _on_message(self, peer: Peer, message: messages.ToController) -> None:
        if peer.role == "replica" and isinstance(message, messages.Report | messages.Health):
            self._on_event(Reported(peer.id, message))
            return
        if isinstance(message, messages.Hello) and message.role in ("replica", "proxy"):
            if message.id in self._supervised.known:
                self._greet(peer, message)
            else:  # dialed before the supervisor's word on it was read
                self._early[message.id] = peer, message
        self._to_controller(peer, message)

    def _greet(self, peer: Peer, hello: messages.Hello) -> None:
        self._peers[hello.id] = peer
        spec = self._supervised.known[hello.id].spec
        if spec is not None:
            if hello.report is None:
                peer.tell(messages.Assign(spec))
            else:
                self._on_event(Reported(hello.id, hello.report))
        for message in self._unsaid.pop(hello.id, ()):
            peer.tell(message)

    def _on_gone(self, peer: Peer) -> None:
        if self._peers.get(peer.id) is peer:
            del self._peers[peer.id]
        if peer.id in self._early and self._early[peer.id][0] is peer:
            del self._early[peer.id]
        self._gone_to_controller(peer)

    # --- GPUs ---------------------------------------------------------------------------------

    def _with_gpus(self, spec: messages.ReplicaSpec) -> messages.ReplicaSpec:
        wanted = _num_gpus(spec)
        if wanted <= 0 or gpus.VARIABLE in dict(spec.env):
            return spec
        all_gpus = gpus.here() if self._all_gpus is None else self._all_gpus
        chosen = ",".join(gpus.pick(all_gpus, self._taken_gpus(), wanted))
        return msgspec.structs.replace(spec, env=(*spec.env, (gpus.VARIABLE, chosen)))

    def _taken_gpus(self) -> Iterator[tuple[str, float]]:
        supervised = self._supervised
        asked = (spec_in(fork.role, fork.note) for fork in supervised.asked())
        for spec in (*(known.spec for known in supervised.known.values()), *asked):
            if spec is not None and (wanted := _num_gpus(spec)) > 0:
                for name in dict(spec.env)[gpus.VARIABLE].split(","):
                    yield name, min(wanted, 1.0)


def _num_gpus(spec: messages.ReplicaSpec) -> float:
    return float(spec.resources.get("num_gpus") or 0)
