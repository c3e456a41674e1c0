"""A simulated replica: the product's worker, links, admission and batches, with user code that keeps a side log.

Only the outermost shell (replica/process.py: pickles, threads, the control connection) is played here.
What a request is to do, its text says: see `Task`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from msgspec.structs import replace
from simulation.sim_loop import ProcessLoop
from simulation.sim_wire import Listener, MemoryAcceptor, Network

from headgate import accept_batch
from headgate.core.state import Settings
from headgate.replica.callable import LoadedCallable
from headgate.replica.links import CallerLink
from headgate.replica.plain import PlainThread
from headgate.replica.plain_calls import PlainCalls
from headgate.replica.worker import Worker
from headgate.wire import messages
from headgate.wire.control import ControlClient

if TYPE_CHECKING:
    from simulation.sim_rules import Rules

CONTROL = "control"


class Task(Struct, frozen=True):
    """What a request asks of user code: "17;0.02;raise"."""

    id: str
    work_s: float
    mode: str

    @classmethod
    def of(cls, text: str) -> Task:
        id, work_s, mode, *_ = text.split(";")
        return cls(id, float(work_s), mode)


class Shell:
    """The control connection of a replica's process, from its first moment: what it says and is told.

    on_message   called with commands
    """

    def __init__(
        self, id: str, pid: int, node: str, loop: ProcessLoop, on_message: Callable[[messages.FromController], None]
    ) -> None:
        self.report: messages.Report | None = None
        self.fences: dict[str, int] = {}
        self.linked: dict[str, None] = {}
        self.replica: SimReplica | None = None
        self._hello = messages.Hello("replica", id, pid, node=node)
        self._on_message = on_message
        loop.within(self._open, loop)

    def _open(self, loop: ProcessLoop) -> None:
        self.control = ControlClient(
            find, b"", lambda version: replace(self._hello, report=self.report, routers=tuple(self.linked)),
            on_message=self._told,
        )  # fmt: skip
        loop.create_task(self.control.open())

    def say(self, report: messages.Report) -> None:
        """How it is from now on."""
        self.report = report
        self.control.tell(report)

    def link(self, name: str, is_linked: bool) -> None:
        """The first link of a process opens, or its last has ended."""
        if is_linked:
            self.linked[name] = None
        else:
            self.linked.pop(name, None)
        self.control.tell(messages.Linked(name, is_linked))

    def serve(self, replica: SimReplica) -> None:
        """It is ready."""
        self.replica = replica
        replica.worker.fence(self.fences)

    def _told(self, message: messages.FromController) -> None:
        if isinstance(message, messages.Fence):
            self.fences = message.peers
            if self.replica is not None:
                self.replica.worker.fence(message.peers)
            self.control.tell(messages.Fenced(message.number))
        else:
            self._on_message(message)


class SimReplica:
    """One replica that is ready.

    on_drained   called when it has nothing left to do
    on_linked    the worker's
    """

    def __init__(
        self,
        id: str,
        spec: messages.ReplicaSpec,
        loop: ProcessLoop,
        network: Network,
        rules: Rules,
        addresses: tuple[str, ...],
        on_drained: Callable[[], None],
        on_linked: Callable[[str, bool], None],
    ) -> None:
        self.id = id
        self.tag = spec.backend
        self.version = spec.version
        self.loop = loop
        self.rules = rules
        self.running: dict[str, Task] = {}  # user code is in these
        self.settings = spec.settings
        self.most = spec.settings.max_concurrent_queries  # that may run now: a limit that was lowered ends nothing
        self.most_batch = spec.settings.max_batch_size
        self.code = spec.code_path
        _replicas[loop] = self
        self.plain = SimPlain(self)
        self.worker = Worker(
            _loaded(spec.code_path), spec.settings, self.plain, on_drained=on_drained, on_linked=on_linked
        )
        self.worker.plain_calls = SimCalls(self.worker, self.plain)
        for address in addresses:
            listener: Any = Listener(network, loop, address)
            MemoryAcceptor(listener, b"", self._admit).open()

    async def _admit(self, end: Any, name: str, fds: list[Any]) -> None:
        page = fds[0] if fds else bytearray(4096)
        await self.rules.network.open_link(CallerLink(self.worker, name, page, None), end)

    def configure(self, settings: Settings) -> None:
        """New limits."""
        self.settings = settings
        slots = self.worker.admission
        self.most = max(settings.max_concurrent_queries, slots.held + slots.reserved)
        self.most_batch = max(settings.max_batch_size, self.most_batch)
        self.worker.configure(settings)

    # --- user code says ---

    def begin(self, tasks: list[Task]) -> None:
        """User code runs these, together if they are a batch."""
        self.rules.began(self, tasks)
        for task in tasks:
            self.running[task.id] = task

    def over(self, tasks: list[Task]) -> None:
        """It has returned, or raised."""
        for task in tasks:
            self.running.pop(task.id, None)
            self.rules.finished[task.id] = self.loop.time()


_replicas: dict[Any, SimReplica] = {}


def forget() -> None:
    """The simulation is over."""
    _replicas.clear()


async def find(error: Exception | None) -> str | None:
    """Where the controller is."""
    return CONTROL


class SimPlain(PlainThread):
    """The plain thread: user code's effects come when it begins, its answers when it has taken its time."""

    reads_links = False

    def __init__(self, replica: SimReplica) -> None:
        super().__init__()
        self.takes_s = 0.0
        self.tasks: list[Task] = []
        self._replica = replica
        self._waiting: deque[Iterator[None]] = deque()
        self._busy = False
        self.put = self._put  # type: ignore[method-assign]

    def _put(self, work: Callable[[], None]) -> None:
        def step() -> Iterator[None]:
            work()
            yield

        self.put_steps(step())

    def put_steps(self, steps: Iterator[None]) -> None:
        """User code runs in each step; what it has taken passes before the next."""
        self._waiting.append(steps)
        self._replica.loop.call_soon(self._next)

    def _next(self) -> None:
        if not self._busy and self._waiting:
            self._busy = True
            self._step(self._waiting.popleft())

    def _step(self, steps: Iterator[None]) -> None:
        self.takes_s, self.tasks = 0.0, []
        for _ in steps:
            self._replica.loop.call_later(self.takes_s, self._has_run, steps)
            return
        self._busy = False
        self._drain()
        self._next()

    def _has_run(self, steps: Iterator[None]) -> None:
        self._replica.over(self.tasks)
        self._drain()
        self._step(steps)

    def done(self, request: Any, outcome: Any) -> None:
        self._done.append((request, outcome))


class SimCalls(PlainCalls):
    """Calls of plain handlers, each of which takes its time."""

    def __init__(self, worker: Worker, plain: SimPlain) -> None:
        super().__init__(worker)
        self._plain = plain

    def _give(self, calls: Any) -> None:
        self._plain.put_steps(self.steps(calls))


# --- user code ---


async def _async(request: Any) -> str:
    return (await _run_async([Task.of(request.data)]))[0]


@accept_batch
async def _async_batch(requests: list[Any]) -> list[Any]:
    return await _run_async([Task.of(request.data) for request in requests])


def _plain(request: Any) -> str:
    return _run_plain([Task.of(request.data)])[0]


@accept_batch
def _plain_batch(requests: list[Any]) -> list[Any]:
    return _run_plain([Task.of(request.data) for request in requests])


async def _run_async(tasks: list[Task]) -> list[Any]:
    replica = _replicas[asyncio.get_running_loop()]
    replica.begin(tasks)
    try:
        await asyncio.sleep(max(task.work_s for task in tasks))
    finally:
        if not replica.loop.dead:
            replica.over(tasks)
    return _results(tasks)


def _run_plain(tasks: list[Task]) -> list[Any]:
    replica = _replicas[asyncio.get_running_loop()]
    replica.begin(tasks)
    replica.plain.tasks = tasks
    replica.plain.takes_s = max(task.work_s for task in tasks)
    return _results(tasks)


def _results(tasks: list[Task]) -> list[Any]:
    if any(task.mode == "raise" for task in tasks):
        raise ValueError("as the request asked")
    return [task.id for task in tasks]


KINDS = {"async": _async, "async-batch": _async_batch, "plain": _plain, "plain-batch": _plain_batch}
_known: dict[str, LoadedCallable] = {}


def _loaded(code: str) -> LoadedCallable:
    kind = code.split()[0]
    if kind not in _known:
        _known[kind] = LoadedCallable(KINDS[kind], (), kind)
        _known[kind].construct()
    return _known[kind]
