"""A whole instance on one virtual clock: a controller that may be killed, routers, replicas, and who uses them.

    history   lines of text, the commands of `World.do`; a seed stands for one (sim_history.py)
    outcome   what happened, as lines; and `rules.broken`, which must be empty

Real: the controller with its calls, peers, publisher and store, the control connections of all processes, routers
and their links, and in the replicas links, worker, admission and batches. Played: processes and the kernel
(sim_loop.py, sim_wire.py), the engine (headgate.engine.fake), disk, user code.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import Any

from simulation import sim_replica
from simulation.sim_loop import Clock, Ended, ProcessLoop
from simulation.sim_replica import CONTROL, Shell, SimReplica
from simulation.sim_rules import Asked, Change, Rules
from simulation.sim_wire import Network, hub

from headgate.controller import failpoints
from headgate.controller.controller import Controller
from headgate.controller.serving import serve
from headgate.controller.shelf import Shelf
from headgate.controller.store import Store
from headgate.core.state import Snapshot
from headgate.engine.fake import FakeEngine, Habits, _Replica
from headgate.engine.interface import Event, Reported
from headgate.errors import HeadgateError
from headgate.router import Router
from headgate.wire import messages
from headgate.wire.control import ControlClient, Hub, Peer

#: After the last command everything is mended, and all must be well within this time.
REST_S = 120.0
HABITS = Habits(start_s=(0.02, 0.3), answer_s=(0.0, 0.004), drain_s=(0.0, 0.0), death_s=(0.0, 0.01))
FACTS = {
    "async": {"is_async": True, "accepts_batch": False},
    "async-batch": {"is_async": True, "accepts_batch": True},
    "plain": {"is_async": False, "accepts_batch": False},
    "plain-batch": {"is_async": False, "accepts_batch": True},
}


class MemoryShelf(Shelf):
    """A disk that outlives controllers; `full` refuses to write. Blobs are texts, and are found by what they say."""

    where = "memory"
    scheme = "memory"

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.full = False

    def names(self) -> list[str]:
        return list(self.values)

    def read(self, name: str) -> bytes | None:
        return self.values.get(name)

    def write(self, name: str, data: bytes, sync: bool = True) -> None:
        if self.full:
            raise OSError(28, "No space left on device")
        self.values[name] = data

    def remove(self, name: str) -> None:
        self.values.pop(name, None)

    def path(self, name: str) -> str:
        return self.values.get(name, b"").decode()


class ShelfDoor(Shelf):
    """The disk as one controller reaches it: with its end nothing is written any more, whatever unwinds there."""

    where, scheme = MemoryShelf.where, MemoryShelf.scheme

    def __init__(self, shelf: MemoryShelf, loop: ProcessLoop) -> None:
        self._shelf = shelf
        self._loop = loop

    def _open(self) -> MemoryShelf:
        if self._loop.dead:
            raise Ended
        return self._shelf

    def names(self) -> list[str]:
        return self._open().names()

    def read(self, name: str) -> bytes | None:
        return self._open().read(name)

    def write(self, name: str, data: bytes, sync: bool = True) -> None:
        self._open().write(name, data, sync)

    def remove(self, name: str) -> None:
        self._open().remove(name)

    def path(self, name: str) -> str:
        return self._open().path(name)


class SimEngine(FakeEngine):
    """The fake engine, whose replicas serve and whose proxies route.

    Messages to one process arrive in the order in which they were sent, and events in that in which they happened.
    """

    def __init__(self, world: World, seed: int, nodes: tuple[str, ...]) -> None:
        super().__init__(seed, world.loop, HABITS, nodes)
        self.world = world
        self.loops: dict[str, ProcessLoop] = {}
        self.replicas: dict[str, SimReplica] = {}
        self.proxies: dict[str, SimRouter] = {}
        self.used: set[str] = set()
        self.brittle: dict[str, int] = {}
        self.draining_since: dict[str, float] = {}
        self.reported: set[str] = set()  # to the controller that is there now
        self.shells: dict[str, Shell] = {}
        self._heard = 0.0
        self._on_event = self._emit
        self._tell: Callable[[Event], None] = lambda event: None  # the controller that is there now

    # --- the seam ---

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        living = {id: one.spec for id, one in self._living.items() if one.spec is not None}
        used = set(self.used)
        id = await super().start_replica(spec)
        self.world.rules.starts(id, spec, living, used)
        if self.world.rules.forced[spec.backend]:
            self.world.rules.excused.add(id)
        return id

    async def start_proxy(self, node: str) -> str:
        id = await super().start_proxy(node)
        self.proxies[id] = SimRouter(self.world, id, "proxy", node, self.loops[id])
        return id

    def kill(self, id: str) -> None:
        if id in self._living:
            self.world.leaves(id, "is ended")
            tag = self._living[id].process.backend
            spent = self.world.time() - self.draining_since.get(id, -1e9)
            if not self._living[id].dying and spent < self.world.rules.patience.get(tag, 20.0) - 0.01:
                self.world.rules.gently.add(id)
        super().kill(id)

    # --- processes ---

    def _add(self, kind: str, name: str, spec: messages.ReplicaSpec | None, node: str) -> _Replica:
        replica = super()._add(kind, name, spec, node)
        id = replica.process.id
        self.loops[id] = self.world.new_process(id, replica.process.pid)
        self.used.add(id)
        if spec is not None:
            told = partial(self._told, replica)
            self.shells[id] = Shell(id, replica.process.pid, node, self.loops[id], told)
        if spec is not None:
            self.world.say(f"start {id} (v{spec.version})")
        return replica

    def _told(self, replica: _Replica, message: messages.FromController) -> None:
        if isinstance(message, messages.Drain):
            self._drain(replica)
        elif isinstance(message, messages.Configure):
            self._configure(replica, message)

    def _soon(self, range_s: tuple[float, float], replica: _Replica, act: Callable[..., object], *args: Any) -> None:
        loop = self.loops[replica.process.id]
        loop.call_later(self._random.uniform(*range_s), act, *args)

    def _started(self, replica: _Replica) -> None:
        id, spec = replica.process.id, replica.spec
        assert spec is not None
        if self.brittle.get(spec.backend):
            self.brittle[spec.backend] -= 1
            self._end(replica, "killed by SIGSEGV")
            return
        kind = spec.code_path.split()[0] if spec.code_path else ""
        if kind in FACTS and not (spec.user_config_path or "").startswith("raise:"):
            process = replica.process
            addresses = [f"fake/{id}"]
            if process.node != "local":
                addresses.append(f"tcp://{process.node}:{process.pid}")
            self.replicas[id] = SimReplica(
                id, spec, self.loops[id], self.world.network, self.world.rules, tuple(addresses),
                lambda: self._drained(replica), self.shells[id].link,
            )  # fmt: skip
            self.shells[id].serve(self.replicas[id])
        super()._started(replica)

    def _drain(self, replica: _Replica) -> None:
        if replica.phase in ("starting", "ready"):
            replica.phase = "draining"
            self._report(replica)
            if one := self.replicas.get(replica.process.id):
                one.worker.drain()
            else:
                self._drained(replica)

    def _configure(self, replica: _Replica, message: messages.Configure) -> None:
        id = replica.process.id
        if (message.user_config_path or "").startswith("raise:"):
            self.world.rules.excused.add(id)
        super()._configure(replica, message)
        if id in self.replicas:
            self.replicas[id].configure(message.settings)

    def _end(self, replica: _Replica, cause: str) -> None:
        id = replica.process.id
        if id in self._living:
            self.world.rules.dead[id] = self.world.time()
            if replica.phase == "ready":
                self.world.rules.died_of[replica.process.backend].add(replica.process.version)
            self.replicas.pop(id, None)
            self.shells.pop(id, None)
            proxy = self.proxies.pop(id, None)
            if proxy is not None:
                self.world.rules.vanished(proxy)
            self.world.network.died(self.loops[id], replica.process.pid)
            super()._end(replica, cause)

    def freeze(self, id: str) -> None:
        self.world.rules.frozen_until[id] = float("inf")
        self.loops[id].freeze()

    def thaw(self, id: str) -> None:
        """The process goes on."""
        if self.loops[id].frozen:
            self.world.rules.frozen_until[id] = self.world.time()
            self.loops[id].thaw()

    def living(self, tag: str) -> list[str]:
        """The replicas of a backend, oldest first."""
        return [one.process.id for one in self._living.values() if one.process.backend == tag]

    def serving(self) -> list[str]:
        """Replicas that are ready, for all that anybody can know."""
        return [
            id
            for id, one in self._living.items()
            if one.phase == "ready" and not one.dying and id in self.reported and not self.loops[id].frozen
            and id not in self.world.rules.excused
        ]  # fmt: skip

    # --- events ---

    def _emit(self, event: Event) -> None:
        if not isinstance(event, Reported):
            self._tell(event)
            return
        report = event.message
        assert isinstance(report, messages.Report)
        if report.error or report.phase == "failed":
            self.world.rules.excused.add(event.id)
        self.shells[event.id].say(report)

    def hear(self, controller: ProcessLoop, on_event: Callable[[Event], None]) -> None:
        """Tell this controller from now on of ends and of nodes; replicas report themselves."""
        self.reported.clear()

        def tell(event: Event) -> None:
            self._heard = max(self._heard, self.world.time() + self.world.network.delay_s())
            self.world.loop.call_at(self._heard, controller.call_soon, on_event, event)

        self._tell = tell


class Door:
    """The engine as one controller reaches it, as LocalEngine does: replicas report on its control connections.

    With the controller's end all that it asks for ends.
    """

    def __init__(self, engine: SimEngine, loop: ProcessLoop, hub: Hub) -> None:
        self._engine = engine
        self._loop = loop
        self._hub = hub
        self._peers: dict[str, Peer] = {}
        self._unsaid: dict[str, list[messages.FromController]] = {}

    def __getattr__(self, name: str) -> Any:
        if self._loop.dead:
            raise Ended
        return getattr(self._engine, name)

    async def open(self, on_event: Callable[[Event], None]) -> None:
        self._on_event = on_event
        self._to_controller, self._gone_to_controller = self._hub.on_message, self._hub.on_gone
        self._hub.on_message, self._hub.on_gone = self._on_message, self._on_gone
        self._engine.hear(self._loop, on_event)
        await asyncio.sleep(self._engine.world.network.delay_s())

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        await asyncio.sleep(self._engine.world.network.delay_s())
        id = await self._engine.start_replica(spec)
        await asyncio.sleep(self._engine.world.network.delay_s())
        return id

    async def start_proxy(self, node: str) -> str:
        id = await self._engine.start_proxy(node)
        await asyncio.sleep(self._engine.world.network.delay_s())
        return id

    def tell(self, id: str, message: messages.FromController) -> None:
        if self._loop.dead:
            raise Ended
        if isinstance(message, messages.Drain):
            self._engine.world.leaves(id, "drains")
            self._engine.draining_since.setdefault(id, self._engine.world.time())
        if id in self._peers:
            self._peers[id].tell(message)
        elif id in self._engine.loops:
            self._unsaid.setdefault(id, []).append(message)

    # --- control connections ---

    def _on_message(self, peer: Peer, message: messages.ToController) -> None:
        if peer.role == "replica" and isinstance(message, messages.Report):
            self._report(peer.id, message)
            return
        if isinstance(message, messages.Hello) and message.role in ("replica", "proxy"):
            self._peers[message.id] = peer
            if message.report is not None:
                self._report(message.id, message.report)
            for unsaid in self._unsaid.pop(message.id, ()):
                peer.tell(unsaid)
        self._to_controller(peer, message)

    def _report(self, id: str, report: messages.Report) -> None:
        if report.phase == "ready":
            self._engine.reported.add(id)
        self._on_event(Reported(id, report))

    def _on_gone(self, peer: Peer) -> None:
        if self._peers.get(peer.id) is peer:
            del self._peers[peer.id]
        self._gone_to_controller(peer)


class SimRouter:
    """A process with a router: a proxy or a client."""

    def __init__(self, world: World, name: str, role: str, node: str, loop: ProcessLoop) -> None:
        self.world = world
        self.name = name
        self.role = role
        self.node = node
        self.loop = loop
        self.calls: list[tuple[Change | None, str, dict[str, Any]]] = []
        self._thawed = -1e9
        self._calling = False
        loop.within(self._begin)

    def _begin(self) -> None:
        chance = random.Random(f"{self.world.seed} {self.name}")
        self.router = Router(b"", self.name, node=self.node, chance=chance.random)
        self.control = ControlClient(sim_replica.find, b"", self._hello, on_snapshot=self._follow)
        self.loop.create_task(self.control.open())

    def _hello(self, version: int) -> messages.Hello:
        pid = self.world.rules.pid_of(self.loop)
        return messages.Hello(self.role, self.name, pid, follows=True, snapshot_version=version, node=self.node)

    def _follow(self, snapshot: Snapshot) -> None:
        self.world.follows(self, self.router.snapshot, snapshot)
        self.router.follow(snapshot)

    @property
    def connected(self) -> bool:
        """Whether its control connection stands, and it has been able to listen for a while."""
        link = self.control._link
        awake = not self.loop.frozen and self.world.time() - self._thawed > 3.0
        return awake and link is not None and not link.closed and self.control._connected_at < self.world.time() - 0.1

    def was_frozen_since(self, moment: float) -> bool:
        return self.loop.frozen or self._thawed >= moment

    def freeze(self) -> None:
        self.loop.freeze()

    def thaw(self) -> None:
        if self.loop.frozen:
            self._thawed = self.world.time()
            self.loop.thaw()

    # --- requests ---

    def ask(self, one: Asked, deadline_s: float | None, cancel_s: float | None) -> None:
        """As this process: a request."""
        router, rules = self.router, self.world.rules
        one.asked_at = self.loop.time()
        one.asked_by = router.snapshot.version
        endpoint = router.endpoints.get(one.name)
        if endpoint is None:
            one.state, one.outcome = "over", "404"
            rules.answers["404"] += 1
            return
        rules.open[self][one] = None
        self.world.asked += 1
        one.serial = self.world.asked
        if deadline_s is not None:
            one.deadline = self.loop.time() + deadline_s
        due = one.deadline
        router.submit(endpoint, one)
        one.due = min(due, one.deadline)
        line: Any = one.backend
        rules.submitted(one, line.view.settings.max_queued_requests if line is not None else None)
        if cancel_s is not None:
            self.loop.call_later(cancel_s, self._cancel, one)

    def _cancel(self, one: Asked) -> None:
        if one.state != "over":
            self.world.rules.cancelled(one)
            self.router.cancel(one)

    # --- control calls, one after the other ---

    def call(self, change: Change | None, method: str, **params: Any) -> None:
        self.calls.append((change, method, params))
        if not self._calling:
            self._calling = True
            self.loop.call_soon(lambda: self.loop.create_task(self._make_calls()))

    async def _make_calls(self) -> None:
        while self.calls:
            change, method, params = self.calls.pop(0)
            if change is not None:
                change.issued = self.loop.time()
            name = f"{self.name}: {method} {params.get('tag') or params.get('name') or params.get('endpoint')}"
            try:
                await self.control.call(method, params)
            except HeadgateError as error:
                self.world.call_failed(name, error)
                if change is not None and type(error).__name__ != "ControllerUnavailable":
                    change.ended = self.loop.time()
                    if change.says is not None:  # nothing was changed
                        change.of = f"nothing ({change.of})"
            else:
                self.world.say(f"{name}: done")
                if change is not None:
                    change.ended = change.confirmed = self.loop.time()
            if params.get("force"):
                self.world.rules.forced[params["tag"]] -= 1
        self._calling = False


class World:
    """One simulation.

    seed     of everything that chance decides: how long messages and starts take, which replica is chosen
    slow_s   how long messages take
    """

    def __init__(self, seed: int, *, nodes: int = 1, clients: int = 1, slow_s: float = 0.0005) -> None:
        self.seed = seed
        self.clock = Clock()
        self.said: list[str] = []
        self.errors: list[str] = []
        self.loop = ProcessLoop(self.clock, "world", self._error)
        self.network = Network(self.loop, random.Random(f"{seed} network"), slow_s)
        self.rules = Rules(self.network)
        self.shelf = MemoryShelf()
        self.loops: list[ProcessLoop] = [self.loop]
        names = ("local", *(f"node{n}" for n in range(2, nodes + 1)))
        self.engine = SimEngine(self, seed, names)
        self.incarnation = 0
        self.controller: ProcessLoop | None = None
        self.controller_object: Controller | None = None
        self.clients: dict[str, SimRouter] = {}
        self.trap: tuple[str, int] | None = None
        self.asked = 0
        self._requests = 0
        self._codes = 0
        self._answered: dict[str, int] = {}
        self._n_clients = clients

    def time(self) -> float:
        return self.clock.now

    def say(self, line: str) -> None:
        """Something that whoever reads the history wants to know."""
        self.said.append(f"{self.time():.3f} {line}")

    def _error(self, what: str, error: BaseException | None) -> None:
        self.errors.append(f"{what}: {type(error).__name__}: {error}")
        self.rules.breaks("no bugs", self.errors[-1])

    # --- processes ---

    def new_process(self, name: str, pid: int) -> ProcessLoop:
        loop = ProcessLoop(self.clock, name, self._error)
        loop.probe = lambda pid: pid not in self.network.processes
        self.network.processes[pid] = loop
        self.loops.append(loop)
        return loop

    def begin(self) -> None:
        """The controller, then the clients."""
        self.start_controller()
        for number in range(1, self._n_clients + 1):
            name = f"c{number}"
            loop = self.new_process(name, 100 + number)
            self.clients[name] = SimRouter(self, name, "client", "local", loop)

    def start_controller(self) -> None:
        if self.controller is not None:
            return
        self.incarnation += 1
        loop = self.controller = self.new_process(f"controller {self.incarnation}", 1000 + self.incarnation)
        connections = hub(self.network, loop, CONTROL)
        door: Any = Door(self.engine, loop, connections)
        serving = serve(
            door, Store(ShelfDoor(self.shelf, loop)), connections, incarnation=self.incarnation, location="HeadOnly"
        )
        loop.within(loop.create_task, serving)

    def kill_controller(self, after_s: float = 0.02) -> None:
        """kill -9; the next one starts a moment later."""
        loop = self.controller
        if loop is None:
            return
        self.say("the controller is killed")
        self.controller = None
        self.network.died(loop, 1000 + self.incarnation)
        self.loop.call_later(after_s, self.start_controller)
        if asyncio._get_running_loop() is loop:
            raise Ended

    def reach(self, point: str) -> None:
        """A controller has come to one of headgate.controller.failpoints."""
        if self.trap is not None and self.trap[0] == point and asyncio._get_running_loop() is self.controller:
            self.trap = (point, self.trap[1] - 1)
            if self.trap[1] <= 0:
                self.trap = None
                self.say(f"at {point}:")
                self.kill_controller()

    def routers(self) -> list[SimRouter]:
        return [*self.clients.values(), *self.engine.proxies.values()]

    # --- what the rules look at ---

    def leaves(self, id: str, how: str) -> None:
        if id not in self.engine._living or self.engine._living[id].dying or self.engine.loops[id].frozen:
            return
        if id in self.engine.proxies:
            return
        self.say(f"{id} {how}")
        self.rules.leaves(id, how, [each for each in self.routers() if each.connected], self.engine.replicas.get(id))

    def follows(self, router: SimRouter, old: Snapshot, new: Snapshot) -> None:
        if new.version not in self.rules._snapshots:
            listed = {f"{view.tag} v{view.version}": [one.id for one in view.replicas] for view in new.backends}
            views = ", ".join(f"{view} [{' '.join(ids)}]" for view, ids in listed.items())
            self.say(f"publish {new.version >> 32}.{new.version & 0xFFFFFFFF}: {views or 'nothing'}")
        self.rules.follows(router, old, new, self.engine.serving())

    def call_failed(self, name: str, error: HeadgateError) -> None:
        self.say(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
        if "bug of headgate" in str(error):
            self.rules.breaks("no bugs", str(error))

    # --- commands ---

    def do(self, line: str) -> None:
        """One command of a history."""
        command, *words = line.split()
        named = dict(word.split("=", 1) for word in words if "=" in word)
        plain = [word for word in words if "=" not in word]
        getattr(self, f"do_{command}")(*plain, **named)

    def do_wait(self, seconds: str) -> None:
        self.clock.run(self.clock.now + float(seconds))

    def _given(self, tag: str, fields: dict[str, str]) -> dict[str, Any]:
        given = _given(fields)
        patience = self.rules.patience
        patience[tag] = min(patience.get(tag, 20.0), given.get("graceful_shutdown_timeout_s", 20.0))
        return given

    def _code(self, kind: str) -> str:
        self._codes += 1
        return {"raise": "raise: no weights", "hang": "hang"}.get(kind, f"{kind} code{self._codes}")

    def _client(self, name: str) -> SimRouter:
        return self.clients[name]

    def do_create(self, tag: str, kind: str = "async", by: str = "c1", **fields: str) -> None:
        if fields.get("idempotent"):
            self.rules.idempotent.add(tag)
        code = self._code(kind)
        self._client(by).call(
            self.rules.issued(f"code {tag}", code), "create_backend",
            tag=tag, code=code.encode(), facts=FACTS.get(kind, FACTS["async"]), given=self._given(tag, fields),
        )  # fmt: skip

    def do_update(self, tag: str, kind: str = "async", by: str = "c1", **fields: str) -> None:
        code = self._code(kind)
        self._client(by).call(
            self.rules.issued(f"code {tag}", code), "update_backend",
            tag=tag, code=code.encode(), facts=FACTS.get(kind, FACTS["async"]), given=self._given(tag, fields),
        )  # fmt: skip

    def do_config(self, tag: str, by: str = "c1", user: str = "", **fields: str) -> None:
        blob = {"user_config": (f"raise: {user}" if user == "raise" else user).encode(), "has_user_config": True}
        given = self._given(tag, fields)
        self._client(by).call(None, "update_backend_config", tag=tag, given=given, **(blob if user else {}))

    def do_delete(self, tag: str, force: str = "", by: str = "c1") -> None:
        if force:
            self.rules.forced[tag] += 1
            self.rules.excused.update(self.engine.living(tag))
        self._client(by).call(self.rules.issued(f"code {tag}", None), "delete_backend", tag=tag, force=bool(force))

    def do_endpoint(self, name: str, tag: str, by: str = "c1") -> None:
        self._client(by).call(
            self.rules.issued(name, {tag}), "create_endpoint", name=name, backend=tag, route=None, methods=["GET"]
        )

    def do_drop(self, name: str, by: str = "c1") -> None:
        self._client(by).call(self.rules.issued(name, None), "delete_endpoint", name=name)

    def do_traffic(self, name: str, by: str = "c1", **weights: str) -> None:
        shares = {tag: float(share) for tag, share in weights.items()}
        tags = {tag for tag, share in shares.items() if share > 0}
        self._client(by).call(self.rules.issued(name, tags), "set_traffic", endpoint=name, weights=shares)

    def do_shadow(self, name: str, tag: str, share: str, by: str = "c1") -> None:
        self._client(by).call(None, "shadow_traffic", endpoint=name, tag=tag, proportion=float(share))

    def do_ask(
        self, who: str, name: str, count: str = "1", work: str = "0.01", deadline: str = "", cancel: str = "",
        mode: str = "", size: str = "", every: str = "0",
    ) -> None:  # fmt: skip
        """Requests, at once or one every so often; the last of them may be cancelled."""
        routers = {router.role if router.role == "proxy" else router.name: router for router in self.routers()}
        router = routers.get(who)
        if router is None:
            return
        for number in range(int(count)):
            self._requests += 1
            cancelled = float(cancel) if cancel and number == int(count) - 1 else None
            with_mode = mode if number == int(count) - 1 else ""
            one = Asked(self.rules, str(self._requests), router, name, float(work), with_mode, bool(size))
            self.rules.requests[one.id] = one
            one.backend = None
            router.loop.call_later(
                number * float(every), router.ask, one, float(deadline) if deadline else None, cancelled
            )

    def _some(self, tag: str, number: str) -> str | None:
        living = self.engine.living(tag)
        return living[int(number) % len(living)] if living else None

    def do_die(self, tag: str, number: str = "0") -> None:
        if (id := self._some(tag, number)) is not None:
            self.say(f"{id} dies")
            self.engine.crash(id)

    def do_freeze(self, tag: str, number: str = "0") -> None:
        if tag in self.clients:
            self.clients[tag].freeze()
        elif (id := self._some(tag, number)) is not None:
            self.say(f"{id} freezes")
            self.rules.excused.add(id)
            self.engine.freeze(id)

    def do_thaw(self, tag: str = "") -> None:
        for router in self.routers():
            router.thaw()
        for id in self.engine.loops:
            self.engine.thaw(id)
        if self.controller is not None:
            self.controller.thaw()

    def do_freeze_controller(self) -> None:
        if self.controller is not None:
            self.say("the controller freezes")
            self.controller.freeze()

    def do_freeze_proxy(self) -> None:
        for router in self.engine.proxies.values():
            router.freeze()

    def do_die_proxy(self) -> None:
        for id in list(self.engine.proxies):
            self.engine.crash(id)

    def do_cut(self, who: str, tag: str, number: str = "0") -> None:
        """Break the link of a router to a replica."""
        id = self._some(tag, number)
        for router in self.routers():
            if who == (router.role if router.role == "proxy" else router.name):
                for end in list(self.network.ends):
                    link = end.link
                    if end.loop is router.loop and getattr(getattr(link, "replica", None), "id", None) == id:
                        self.say(f"the link from {router.name} to {id} is cut")
                        self.rules.cut.add(link)
                        end.cut()

    def do_cut_control(self, who: str) -> None:
        """Break the control connection of a process."""
        router = self.clients.get(who)
        for end in list(self.network.ends):
            if router is not None and end.loop is router.loop and end.link is router.control._link:
                self.say(f"the control connection of {who} is cut")
                end.cut()

    def do_brittle(self, tag: str, count: str) -> None:
        """The next replicas of a backend die while they start."""
        self.engine.brittle[tag] = int(count)

    def do_kill_controller(self, after: str = "0.02") -> None:
        self.kill_controller(float(after))

    def do_trap(self, point: str, nth: str = "1") -> None:
        """Kill the controller when it comes to that point."""
        self.trap = (point, int(nth))

    def do_disk(self, state: str) -> None:
        self.shelf.full = state == "full"

    def do_mend(self) -> None:
        """Nothing fails any more; time passes until all is well, or should be."""
        self.trap = None
        self.shelf.full = False
        self.engine.brittle.clear()
        self.do_thaw()
        until = self.time() + REST_S
        unmet = ["?"]
        while unmet and self.time() < until:
            self.clock.run(self.time() + 0.5)
            unmet = self._unmet()
        self.rules.at_the_end(unmet)

    # --- the end ---

    def _unmet(self) -> list[str]:
        """What is not yet as it should be."""
        if self.controller is None:
            return ["there is no controller"]
        found = [f"{router.name} waits for its calls: {router.calls}" for router in self.routers() if router._calling]
        newest = max(router.router.snapshot.version for router in self.routers())
        found += [
            f"{router.name} follows {router.router.snapshot.version}, not {newest}"
            for router in self.routers()
            if router.router.snapshot.version != newest
        ]
        found += [f"request {one.id} is {one.state}" for waiting in self.rules.open.values() for one in waiting][:3]
        found += self._fleet_unmet()
        return found

    def _fleet_unmet(self) -> list[str]:
        goals = Store(self.shelf).load()
        found = []
        wanted: list[str] = []
        snapshot = next(iter(self.clients.values())).router.snapshot
        listed = {view.tag: [one.id for one in view.replicas] for view in snapshot.backends}
        for goal in goals.backends:
            ready = [
                id
                for id in self.engine.living(goal.tag)
                if (one := self.engine.replicas.get(id)) is not None
                and one.version == goal.version
                and one.settings == goal.settings
                and self.engine._living[id].config_version == goal.config_version
            ]
            if len(ready) != goal.settings.num_replicas:
                found.append(f"{goal.tag} v{goal.version}: {len(ready)} of {goal.settings.num_replicas} replicas")
            if sorted(listed.get(goal.tag, [])) != sorted(ready):
                found.append(f"{goal.tag}: listed are {listed.get(goal.tag)}, ready are {ready}")
            wanted += ready
        extra = [one.id for one in self.engine.observe() if one.kind == "replica" and one.id not in wanted]
        if extra:
            found.append(f"nobody wants {', '.join(extra)}")
        return found

    def close(self) -> None:
        """Nothing of it runs any more."""
        for loop in self.loops:
            loop.dead = True
        for loop in self.loops:
            for task in list(loop.tasks):
                try:
                    task.get_coro().close()
                except BaseException:  # noqa: BLE001 - code of a dead process that insists on going on
                    pass
        sim_replica.forget()

    def answers(self) -> str:
        """How requests have ended since this was asked last."""
        new = {what: count - self._answered.get(what, 0) for what, count in sorted(self.rules.answers.items())}
        self._answered = dict(self.rules.answers)
        return ", ".join(f"{what} x{count}" for what, count in new.items() if count)


def _given(fields: dict[str, str]) -> dict[str, Any]:
    numbers: dict[str, Any] = {}
    for name, value in fields.items():
        if name == "idempotent":
            numbers[name] = True
        else:
            numbers[name] = float(value) if name.endswith("_s") or "timeout" in name else int(value)
    return numbers


class _Ears(logging.Handler):
    """What the product itself takes for a bug."""

    def __init__(self, rules: Rules) -> None:
        super().__init__(logging.ERROR)
        self._rules = rules

    def emit(self, record: logging.LogRecord) -> None:
        if record.name != "headgate.replica" and "cannot" not in record.getMessage():
            error = record.exc_info[1] if record.exc_info else None
            if not isinstance(error, Ended):
                self._rules.breaks("no bugs", f"{record.name}: {record.getMessage()} {error!r}")


def play(world: World, act: Callable[[], None]) -> None:
    """Do something in a world, with all of the product that it needs in place."""
    logger = logging.getLogger("headgate")
    ears = _Ears(world.rules)
    before = logger.level, logger.propagate, failpoints.on_reach, failpoints.arm
    was_collecting = gc.isenabled()
    gc.disable()
    logger.addHandler(ears)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    failpoints.arm = lambda text: False
    failpoints.on_reach = world.reach
    try:
        with world.network.installed():
            try:
                world.loop.within(world.begin)
                act()
            finally:
                world.close()
    finally:
        logger.removeHandler(ears)
        logger.setLevel(before[0])
        logger.propagate, failpoints.on_reach, failpoints.arm = before[1:]
        if was_collecting:
            gc.enable()


