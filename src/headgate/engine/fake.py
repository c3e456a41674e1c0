"""The engine of tests and simulations: processes are objects, chance a seed, time what the clock says.

It keeps the same contract as the others (tests/engine/test_contract.py), so what is shown with it
about the controller holds for them. Its clock is an asyncio loop (a virtual one jumps from timer to
timer) or the `VirtualClock` below; the same seed and the same calls give the same events.

A spec whose `code_path` is "raise: why" fails to start with the error "why"; one whose
`user_config_path` is such a text fails to reconfigure; "hang" never becomes ready. Replicas go
where the fewest processes are.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from msgspec import Struct

from headgate.engine.interface import Event, Exited, NodesChanged, Process, Reported
from headgate.errors import InstanceError
from headgate.wire import messages


class Clock(Protocol):
    """What the fake needs of time; each asyncio loop is one."""

    def time(self) -> float: ...

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> object: ...


class VirtualClock:
    """Time that moves when told to.

    >>> clock = VirtualClock()
    >>> _ = clock.call_later(2.0, print, "two seconds on")
    >>> clock.advance(1.0)
    >>> clock.advance(1.0)
    two seconds on
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._count = 0
        self._timers: list[tuple[float, int, Callable[..., object], tuple[Any, ...]]] = []

    def time(self) -> float:
        """Seconds since the clock was made."""
        return self._now

    def call_later(self, delay: float, callback: Callable[..., object], *args: Any) -> None:
        """Call back when `delay` seconds have been advanced; ties in the order of asking."""
        self._count += 1
        heapq.heappush(self._timers, (self._now + delay, self._count, callback, args))

    def advance(self, seconds: float) -> None:
        """Let time pass, and everything that falls due in it happen."""
        until = self._now + seconds
        while self._timers and self._timers[0][0] <= until:
            self._now, _, callback, args = heapq.heappop(self._timers)
            callback(*args)
        self._now = until


class Habits(Struct, frozen=True):
    """How the fake's processes behave: (least, most) seconds, and chances in [0, 1]."""

    start_s: tuple[float, float] = (0.01, 0.5)
    answer_s: tuple[float, float] = (0.0, 0.01)
    drain_s: tuple[float, float] = (0.0, 0.2)
    death_s: tuple[float, float] = (0.0, 0.02)
    dies_while_starting: float = 0.0


class _Replica:
    def __init__(self, process: Process, spec: messages.ReplicaSpec | None) -> None:
        self.process = process
        self.phase = "starting"
        self.spec = spec
        self.config_version = spec.config_version if spec else 0
        self.dying = False


class FakeEngine:
    """Processes in memory. `crash`, `freeze`, `add_node` and `remove_node` are the faults that a test may add.

    nodes   the machines at first; the instance was started on the first one
    """

    def __init__(
        self,
        seed: int,
        clock: Clock,
        habits: Habits = Habits(),  # noqa: B008 - frozen
        nodes: Sequence[str] = ("local",),
    ) -> None:
        self._random = random.Random(seed)
        self._clock = clock
        self._habits = habits
        self._living: dict[str, _Replica] = {}
        self._frozen: set[str] = set()
        self._count = 0
        self._nodes = list(nodes)
        self._home = nodes[0]
        self._served: set[str] = set()
        self._on_event: Callable[[Event], None] = lambda event: None
        #: Everything that was told, for tests to look at.
        self.told: list[tuple[str, messages.FromController]] = []
        self.accepting = True

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Report to `on_event` from now on; what ran before goes on, and says again how it is."""
        self._on_event = on_event
        for replica in self._living.values():
            if replica.spec is not None and replica.phase != "starting":
                self._soon(self._habits.answer_s, replica, self._report, replica)

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        """A replica that becomes ready, or fails, after a while."""
        if not self._nodes:
            raise InstanceError(f"cannot start {spec.backend}: there is no node")
        replica = self._add("replica", spec.backend, spec, min(self._nodes, key=self._load))
        if self._random.random() < self._habits.dies_while_starting:
            self._soon(self._habits.start_s, replica, self._end, replica, "killed by SIGSEGV")
        else:
            self._soon(self._habits.start_s, replica, self._started, replica)
        return replica.process.id

    async def start_proxy(self, node: str) -> str:
        """A proxy that does nothing. Raises InstanceError for a node that is not there."""
        if node not in self._nodes:
            raise InstanceError(f"cannot start a proxy on node {node}: it is not in the cluster")
        self._served.add(node)
        name = "proxy" if node == "local" else f"proxy@{node[:8]}"
        return self._add("proxy", name, None, node).process.id

    def tell(self, id: str, message: messages.FromController) -> None:
        """The replica acts on it a moment later."""
        replica = self._living.get(id)
        if replica is None:
            return
        self.told.append((id, message))
        if isinstance(message, messages.Drain):
            self._soon(self._habits.answer_s, replica, self._drain, replica)
        elif isinstance(message, messages.Configure):
            self._soon(self._habits.answer_s, replica, self._configure, replica, message)

    def kill(self, id: str) -> None:
        """The process is gone a moment later."""
        self.crash(id, "killed by SIGKILL")

    def crash(self, id: str, cause: str = "killed by SIGSEGV") -> None:
        """A fault: the process dies."""
        replica = self._living.get(id)
        if replica is not None and not replica.dying:
            replica.dying = True
            self._later(self._habits.death_s, self._end, replica, cause)

    def freeze(self, id: str) -> None:
        """A fault: the process says nothing more, and does nothing but die."""
        self._frozen.add(id)

    def add_node(self, node: str) -> None:
        """Another machine may be used from now on."""
        self._nodes.append(node)
        self._clock.call_later(0.0, self._tell_nodes)

    def remove_node(self, node: str) -> None:
        """A fault: a machine is gone, and a moment later what ran there is known to be."""
        self._nodes.remove(node)
        self._served.discard(node)
        self._clock.call_later(0.0, self._tell_nodes)
        for id in [one.process.id for one in self._living.values() if one.process.node == node]:
            self.crash(id, "its node left the cluster")

    def _tell_nodes(self) -> None:
        self._on_event(NodesChanged())

    def stop_accepting(self) -> None:
        """Remembered in `accepting`."""
        self.accepting = False

    def observe(self) -> tuple[Process, ...]:
        """What lives, oldest first."""
        return tuple(replica.process for replica in self._living.values())

    def nodes(self) -> tuple[str, ...]:
        """Those at first, and what came and went since."""
        return tuple(self._nodes)

    @property
    def home_node(self) -> str:
        """The first of those at first."""
        return self._home

    def http_address(self, node: str) -> str | None:
        """Made up, once a proxy was started there."""
        return f"http://{node}:8000" if node in self._served else None

    async def close(self) -> None:
        """All are gone at once."""
        for replica in list(self._living.values()):
            self._end(replica, "killed by SIGKILL")

    # --- what the processes do ----------------------------------------------------------------

    def _load(self, node: str) -> int:
        return sum(one.process.node == node for one in self._living.values())

    def _add(self, kind: str, name: str, spec: messages.ReplicaSpec | None, node: str) -> _Replica:
        self._count += 1
        backend, version = (spec.backend, spec.version) if spec else ("", 0)
        id, pid = f"{name}#{self._count:04d}", 10_000 + self._count
        process = Process(id, kind, backend, version, pid, self._clock.time(), node)
        self._living[process.id] = replica = _Replica(process, spec)
        return replica

    def _later(self, range_s: tuple[float, float], act: Callable[..., object], *args: Any) -> None:
        self._clock.call_later(self._random.uniform(*range_s), act, *args)

    def _soon(
        self, range_s: tuple[float, float], replica: _Replica, act: Callable[..., object], *args: Any
    ) -> None:
        def if_it_can() -> None:
            if replica.process.id in self._living and replica.process.id not in self._frozen:
                act(*args)

        self._later(range_s, if_it_can)

    def _started(self, replica: _Replica) -> None:
        assert replica.spec is not None
        if replica.spec.code_path == "hang":
            return
        error = _error_in(replica.spec.code_path) or _error_in(replica.spec.user_config_path)
        if error:
            replica.phase = "failed"
            self._report(replica, error)
            self._later(self._habits.death_s, self._end, replica, "exited with status 1")
            return
        if replica.phase == "starting":
            replica.phase = "ready"
        self._report(replica)

    def _drain(self, replica: _Replica) -> None:
        if replica.phase in ("starting", "ready"):
            replica.phase = "draining"
            self._report(replica)
            self._soon(self._habits.drain_s, replica, self._drained, replica)

    def _drained(self, replica: _Replica) -> None:
        replica.phase = "drained"
        self._report(replica)

    def _configure(self, replica: _Replica, message: messages.Configure) -> None:
        error = _error_in(message.user_config_path)
        if not error:
            replica.config_version = message.config_version
        self._report(replica, error)

    def _report(self, replica: _Replica, error: str = "") -> None:
        process = replica.process
        address = f"fake/{process.id}" if replica.phase != "starting" else ""
        remote = f"tcp://{process.node}:{process.pid}" if address and process.node != "local" else ""
        report = messages.Report(
            process.backend,
            process.version,
            replica.phase,
            address,
            config_version=replica.config_version,
            error=error,
            remote=remote,
            node=process.node,
        )
        self._on_event(Reported(process.id, report))

    def _end(self, replica: _Replica, cause: str) -> None:
        if self._living.pop(replica.process.id, None) is not None:
            self._on_event(Exited(replica.process.id, cause))


def _error_in(path: str | None) -> str:
    kind, _, text = (path or "").partition(":")
    return text.strip() or "failed" if kind == "raise" else ""
