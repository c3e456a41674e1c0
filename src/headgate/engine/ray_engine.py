"""The engine of a Ray cluster: replicas are actors, proxies children of a supervisor on each node.

Ray places an actor, gives it its resources, names it and tells of its end. What passes between the
controller and a replica goes over wire/, as on the local engine: an actor dials, says Hello and is told what to
run. What is running is found again by a new controller in Ray's list of named actors; what each of
them runs stands beside it in the cluster's store.

An actor's end is heard from three sides: its connection ends, a call to it that never returns fails, its
node leaves. `Exited` follows when it can neither be reached nor come back.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from headgate import logs
from headgate.core import placement
from headgate.engine import cluster, ray_agents
from headgate.engine.interface import Event, Exited, NodesChanged, Process, Reported
from headgate.engine.ray_records import Meeting, Origin, Records, actor_name, pack
from headgate.errors import HeadgateError, InstanceError
from headgate.wire import messages
from headgate.wire.control import Hub, Peer

log = logs.get("ray")

#: How often the nodes are looked at.
LOOK_S = 1.0
#: How long a replica whose connection ended may stay away before it is given up.
LOST_S = 3.0
#: How long what Ray holds for dead may stay connected before its process is killed by its pid.
STUCK_S = 1.0
#: How long a drained replica may take to hand its last answers over to Ray.
LEAVE_S = 1.0
_START_S = 10.0
#: When a replica that waits for its resources is spoken of in the log: nobody else says why a call does not return.
_SAY_FIRST_S, _SAY_AGAIN_S = 5.0, 30.0
_CLOSE_S = 10.0
_BLOCK = 100  # ids
_COUNT = "count"
_decode_spec = msgspec.msgpack.Decoder(messages.ReplicaSpec).decode


class _Replica:
    """An actor, its connection, and what waits to be said to it."""

    def __init__(self, id: str, spec: messages.ReplicaSpec, now: float) -> None:
        self.id = id
        self.spec = spec
        self.actor: Any = None  # until Ray has been asked for it
        self.peer: Peer | None = None
        self.unsaid: list[messages.FromController] = []
        self.phase = ""
        self.killed = False
        self.dead = ""  # why, as soon as Ray says so
        self.waits_for = "for Ray to place it"
        self.say_at = now + _SAY_FIRST_S
        self.process = Process(id, "replica", spec.backend, spec.version, 0, now, "")


class RayEngine:
    """Processes of a cluster. Takes replicas' and agents' words from the hub and leaves it everything else."""

    def __init__(self, origin: Origin, hub: Hub, meeting: Meeting) -> None:
        self._origin = origin
        self._hub = hub
        self._meeting = meeting
        self._records = Records(origin.scope)
        self._agents = ray_agents.Agents(origin, self._records, self._tell_event)
        self._known: dict[str, _Replica] = {}
        self._early: list[tuple[Peer, messages.ToController]] | None = []  # until it is known what runs
        self._numbering = asyncio.Lock()
        self._nodes: dict[str, dict[str, float]] = {}
        self._next = self._last = 0
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._on_event: Callable[[Event], None] = lambda event: None
        self._loop: asyncio.AbstractEventLoop

    # --- the start ---

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Take over the actors of an earlier controller and the hub's messages from replicas and agents."""
        self._loop = asyncio.get_running_loop()
        self._on_event = on_event
        self._to_controller, self._hub.on_message = self._hub.on_message, self._on_message
        self._gone_to_controller, self._hub.on_gone = self._hub.on_gone, self._on_gone
        self._nodes = await cluster.apart(cluster.nodes)
        await self._agents.load()
        names = await cluster.apart(cluster.listed, self._origin.scope)
        agents = [name for name in names if name.startswith(ray_agents.PREFIX)]
        for name in names:
            if name != cluster.CONTROLLER and name not in agents:
                await self._adopt(name)
        early, self._early = self._early, None
        for peer, message in early or ():
            self._on_message(peer, message)
        await self._agents.tell(agents, self._meeting)
        self._spawn(self._look())

    async def _adopt(self, name: str) -> None:
        actor = await cluster.apart(cluster.find, self._origin.scope, name)
        stored = await cluster.apart(self._records.get, name)
        if actor is None or stored is None:
            return
        spec = _decode_spec(stored)
        id = f"{spec.backend}#{name.rpartition('#')[2]}"
        known = self._known[id] = _Replica(id, spec, self._loop.time())
        known.actor = actor
        self._watch(known)

    # --- replicas ---

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        """Have Ray start an actor; it may wait for resources that others have now. Raises InstanceError."""
        await self._check_place(placement.demand(spec.resources))
        try:
            known = await self._new(spec)
        except (TimeoutError, OSError) as error:
            raise InstanceError(f"the cluster's head does not answer ({error or 'no word in time'})") from None
        try:
            await cluster.apart(self._records.put, actor_name(known.id), messages.encode(spec))
            known.actor = await cluster.apart(
                cluster.start_replica, pack(self._origin), self._origin.scope, actor_name(known.id), known.id, spec,
                timeout_s=_START_S,
            )
        except (TimeoutError, OSError) as error:
            del self._known[known.id]
            self._loop.call_later(_START_S, lambda: self._spawn(self._disown(known.id)))  # it may still come
            raise InstanceError(f"the cluster's head does not answer ({error or 'no word in time'})") from None
        except (ValueError, TypeError) as error:  # options that Ray does not take
            del self._known[known.id]
            raise InstanceError(f"ray_actor_options are refused by Ray: {error}") from None
        self._watch(known)
        if known.killed:
            self._kill(known)
        return known.id

    async def _check_place(self, wanted: Mapping[str, float]) -> None:
        lacks = placement.lacking(wanted, self._nodes)
        if lacks:
            with contextlib.suppress(TimeoutError, OSError):  # a node may have joined just now
                self._nodes = await cluster.apart(cluster.nodes)
            lacks = placement.lacking(wanted, self._nodes)
        if lacks:
            raise InstanceError(f"ray_actor_options cannot be given: {lacks}")

    async def _new(self, spec: messages.ReplicaSpec) -> _Replica:
        """A replica under an id that was never used; ids are taken from the store many at a time."""
        async with self._numbering:
            if self._next == self._last:
                stored = await cluster.apart(self._records.get, _COUNT)
                self._next = max(int(stored or b"0"), self._next)
                await cluster.apart(self._records.put, _COUNT, str(self._next + _BLOCK).encode())
                self._last = self._next + _BLOCK
            self._next += 1
            id = f"{spec.backend}#{self._next:04d}"
            known = self._known[id] = _Replica(id, spec, self._loop.time())
            return known

    def tell(self, id: str, message: messages.FromController) -> None:
        """Send a message to a replica, now or when it has dialed."""
        known = self._known.get(id)
        if known is None:
            return
        if known.peer is None:
            known.unsaid.append(message)
        else:
            known.peer.tell(message)

    def kill(self, id: str) -> None:
        """End a process; a replica that is drained may hand over its last answers before."""
        supervised = self._agents.peer_of(id)
        if supervised is not None:
            supervised.kill(id)
        known = self._known.get(id)
        if known is None:
            return
        known.killed = True
        if known.actor is None:  # its start sees to it
            return
        if known.phase == "drained":
            known.actor.leave.remote()
            self._loop.call_later(LEAVE_S, self._kill, known)
        else:
            self._kill(known)

    def _kill(self, known: _Replica) -> None:
        if known.id in self._known:
            self._spawn(self._try(cluster.kill, known.actor))

    # --- an actor's end ---

    def _watch(self, known: _Replica) -> None:
        def look(why: str, for_good: bool) -> None:
            with contextlib.suppress(RuntimeError):  # this loop has ended
                self._loop.call_soon_threadsafe(self._ray_said, known, why, for_good)

        cluster.when_over(known.actor.forever.remote(), look)

    def _ray_said(self, known: _Replica, why: str, for_good: bool) -> None:
        if self._known.get(known.id) is not known:
            return
        if for_good or known.peer is None:
            known.dead = why
        if known.peer is None:
            self._exited(known)
        elif for_good:
            self._loop.call_later(STUCK_S, self._insist, known)
        else:
            self._loop.call_later(LOOK_S, self._watch, known)

    def _insist(self, known: _Replica) -> None:
        """Ray has killed it, and it is still connected: it is stopped, and Ray's kill did not reach it."""
        if known.peer is not None and known.id in self._known:
            process = known.process
            self._spawn(self._try(cluster.kill_process, process.node, process.pid))
            self._loop.call_later(LOST_S, self._give_up, known)

    def _lost(self, known: _Replica) -> None:
        if known.peer is None:
            self._give_up(known)

    def _give_up(self, known: _Replica) -> None:
        if self._known.get(known.id) is known:
            if known.actor is not None:
                self._kill(known)
            known.dead = known.dead or f"its connection ended and it did not come back within {LOST_S:g} s"
            self._exited(known)

    def _exited(self, known: _Replica) -> None:
        if self._known.pop(known.id, None) is not None:
            self._spawn(self._try(self._records.remove, actor_name(known.id)))
            self._changed.set()
            self._tell_event(Exited(known.id, known.dead or "it ended"))

    def _tell_event(self, event: Event) -> None:
        self._on_event(event)

    # --- the hub ---

    def _on_message(self, peer: Peer, message: messages.ToController) -> None:
        if self._early is not None and peer.role in ("agent", "replica"):
            self._early.append((peer, message))
        elif peer.role == "replica" and isinstance(message, messages.Report | messages.Health):
            self._reported(peer, message)
        elif isinstance(message, messages.Answer):
            self._agents.answer(peer, message.data)
        elif not isinstance(message, messages.Hello) or self._met(peer, message):
            self._to_controller(peer, message)

    def _met(self, peer: Peer, hello: messages.Hello) -> bool:
        """Somebody has dialed; False if nobody wants them."""
        if hello.role == "agent":
            self._agents.hello(peer, hello)
        return hello.role != "replica" or self._greet(peer, hello)

    def _reported(self, peer: Peer, message: messages.Report | messages.Health) -> None:
        known = self._known.get(peer.id)
        if known is not None and known.peer is peer:
            if isinstance(message, messages.Report):
                known.phase = message.phase
            self._tell_event(Reported(peer.id, message))

    def _greet(self, peer: Peer, hello: messages.Hello) -> bool:
        known = self._known.get(hello.id)
        if known is None or known.dead:
            self._spawn(self._disown(hello.id))
            peer.close()
            return False
        known.peer = peer
        known.waits_for = ""
        known.process = msgspec.structs.replace(known.process, pid=hello.pid, node=hello.node)
        if hello.report is None:
            peer.tell(messages.Assign(known.spec))
        else:
            known.phase = hello.report.phase
            self._tell_event(Reported(hello.id, hello.report))
        unsaid, known.unsaid = known.unsaid, []
        for message in unsaid:
            peer.tell(message)
        return True

    async def _disown(self, id: str) -> None:
        """A replica that nobody knows any more."""
        with contextlib.suppress(TimeoutError):
            actor = await cluster.apart(cluster.find, self._origin.scope, actor_name(id))
            if actor is not None:
                await cluster.apart(cluster.kill, actor)

    def _on_gone(self, peer: Peer) -> None:
        if peer.role == "agent":
            self._agents.gone(peer)
        known = self._known.get(peer.id)
        if known is not None and known.peer is peer:
            known.peer = None
            if known.dead:
                self._exited(known)
            else:
                self._loop.call_later(LOST_S, self._lost, known)
        self._gone_to_controller(peer)

    # --- nodes ---

    def nodes(self) -> tuple[str, ...]:
        """The living nodes, the head's first."""
        return tuple(self._nodes)

    @property
    def home_node(self) -> str:
        """The node where start was called; if that has left, one that has come back at its address."""
        mine = f"node:{self._origin.address}"
        if self._origin.home in self._nodes:
            return self._origin.home
        return next((node for node, has in self._nodes.items() if mine in has), self._origin.home)

    def http_address(self, node: str) -> str | None:
        """The URL of the proxy on that node."""
        return self._agents.address(node)

    async def _look(self) -> None:
        """Follow the nodes, and see what replicas without a process wait for."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                self._see(await cluster.apart(cluster.nodes))
                unborn = [one for one in self._known.values() if not one.process.pid]
                if unborn:
                    self._see_waiting(unborn, await cluster.apart(cluster.free))
            except (TimeoutError, OSError, RuntimeError) as error:
                log.debug("the cluster's head does not answer: %s", error)

    def _see(self, nodes: dict[str, dict[str, float]]) -> None:
        before, self._nodes = self._nodes, nodes
        for node in before.keys() - nodes.keys():
            log.warning("node %s left the cluster", node[:8])
            self._agents.left(node)
            for known in [one for one in self._known.values() if one.process.node == node]:
                known.dead = known.dead or "its node left the cluster"
                if known.peer is None:
                    self._exited(known)
        if before.keys() != nodes.keys():
            self._tell_event(NodesChanged())

    def _see_waiting(self, unborn: list[_Replica], free: Mapping[str, Mapping[str, float]]) -> None:
        for known in unborn:
            wanted = placement.demand(known.spec.resources)
            known.waits_for = placement.lacking(wanted, self._nodes) or placement.busy(wanted, free)
            if known.waits_for and (now := self._loop.time()) >= known.say_at:
                known.say_at = now + _SAY_AGAIN_S
                log.warning("replica %s waits %s", known.id, known.waits_for)

    # --- all of it ---

    def observe(self) -> tuple[Process, ...]:
        """The actors that live or wait for their resources, and the proxies."""
        replicas = (
            msgspec.structs.replace(known.process, waits_for=known.waits_for) for known in self._known.values()
        )
        return (*replicas, *self._agents.observe())

    async def start_proxy(self, node: str) -> str:
        """A proxy on that node. Raises InstanceError."""
        if node not in self._nodes:
            raise InstanceError(f"there is no node {node!r} in the cluster, or it has left")
        return await self._agents.start_proxy(node, self._meeting)

    def stop_accepting(self) -> None:
        """Have all nodes' supervisors close their listeners."""
        self._agents.stop_accepting()

    async def close(self) -> None:
        """End all actors but the controller; returns when they are gone."""
        for id in list(self._known):
            self.kill(id)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
                while self._known:
                    self._changed.clear()
                    await self._changed.wait()
        names = await cluster.apart(cluster.listed, self._origin.scope)
        for name in names:
            if name.startswith("replica#"):
                await self._disown(name)
        await self._agents.close([name for name in names if name.startswith(ray_agents.PREFIX)])
        for task in list(self._tasks):
            task.cancel()
        self._hub.on_message, self._hub.on_gone = self._to_controller, self._gone_to_controller

    async def _try(self, function: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(TimeoutError, OSError, HeadgateError):
            await cluster.apart(function, *arguments)

    def _spawn(self, coroutine: Any) -> None:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
