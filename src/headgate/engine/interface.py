"""The seam: what the controller needs of the place where processes live.

An engine starts processes, passes messages to and from replicas, and says which processes exist.
It decides nothing: which replica to start, drain or kill is core/reconcile.py's. Each engine obeys
tests/engine/test_contract.py; local.py is this machine, ray_engine.py a cluster, fake.py memory and virtual time.

Events come in the order in which things happened, from the engine's event loop and never from
inside one of its plain methods. `Exited` is the last event of a process, comes exactly once,
and only when the process is gone: whatever it had started is provably over.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from headgate.wire import messages


class Process(Struct, frozen=True):
    """A process that exists. `started_at` is monotonic time; a proxy has no backend and version 0.

    waits_for   why it has not begun to run yet, for people: "for 2 CPUs, which are busy"; pid is 0 until then
    """

    id: str
    kind: str  # "replica" or "proxy"
    backend: str
    version: int
    pid: int
    started_at: float
    node: str = "local"
    waits_for: str = ""


class Reported(Struct, frozen=True):
    """A replica said how it is: at each change of its state, and on each reconnect."""

    id: str
    message: messages.Report | messages.Health


class Exited(Struct, frozen=True):
    """A process is gone; `cause` is for people: "killed by SIGKILL", "exited with status 1"."""

    id: str
    cause: str


class NodesChanged(Struct, frozen=True):
    """`nodes()` answers differently now. What ran on a node that left ends with an `Exited` each."""


class Appeared(Struct, frozen=True):
    """A process that ran before `open` is known only now: its node could not be asked until now."""

    process: Process


Event = Reported | Exited | NodesChanged | Appeared


class Engine(Protocol):
    """Where the processes of one instance live."""

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Take over what runs already, then report.

        `observe` is complete when this returns, but for nodes that cannot be asked yet: what runs there appears.
        """

    async def start_replica(self, spec: messages.ReplicaSpec) -> str:
        """Start a process that runs `spec`: its id, which was never used before.

        Returns before the replica is ready; that comes as `Reported`. Raises InstanceError when
        there is no room for it: resources that are missing, no more processes.
        """

    async def start_proxy(self, node: str) -> str:
        """Start an HTTP proxy on the listener of that node: its id.

        If one is found there that the engine did not know of, that one's id. Raises InstanceError.
        """

    def tell(self, id: str, message: messages.FromController) -> None:
        """Send a message to a process, as soon as it can be reached; nothing happens if it is gone."""

    def kill(self, id: str) -> None:
        """End a process and all that it forked, at once; `Exited` follows. Nothing happens if it is gone."""

    def stop_accepting(self) -> None:
        """Let go of the HTTP listeners: once the proxies have closed theirs, connecting is refused."""

    def observe(self) -> tuple[Process, ...]:
        """The processes that exist now, oldest first."""

    def nodes(self) -> tuple[str, ...]:
        """The living machines that the engine may use."""

    @property
    def home_node(self) -> str:
        """The machine on which the instance was started, whether it lives or not."""

    def http_address(self, node: str) -> str | None:
        """The URL of the proxy on that machine, once it is known; None without one."""

    async def close(self) -> None:
        """End all processes; returns when they are gone."""
