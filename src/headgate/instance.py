"""A running instance, as this process takes part in it.

A process joins an instance once, however many clients and handles it has. One that started it makes calls only, as
long as it has no handle: they go over a line, and there is no event loop (line_membership.py). The first handle
brings one, on the headgate thread, with a connection of its own that follows the snapshots (loop_membership.py).
Whoever did not start it begins with that, and its calls go there too.

Clients and handles hold the Instance, and nothing else does: when the last of them is collected,
the membership ends. Threads therefore refer to it weakly.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec
from weakref import WeakValueDictionary

from headgate.core.state import Endpoint, Snapshot
from headgate.errors import ControllerUnavailable, InstanceError
from headgate.line_membership import LineMembership
from headgate.membership import Part
from headgate.wire import messages
from headgate.wire.calling import OVER, SILENCE_S, SILENT
from headgate.wire.home import Home

if TYPE_CHECKING:
    from headgate.loop_membership import LoopMembership
    from headgate.router import Router
    from headgate.wire.control import ControlClient
    from headgate.wire.thread import HeadgateThread

P = ParamSpec("P")

#: Of this process; asked in each call, which a system call would make longer.
_pid = os.getpid()
_joined: WeakValueDictionary[str, Instance] = WeakValueDictionary()
_join_lock = threading.RLock()  # a client may be collected, and leave, while its thread holds it


def _note_pid() -> None:
    global _pid
    _pid = os.getpid()


os.register_at_fork(after_in_child=_note_pid)


class Instance:
    """A running instance, as one process takes part in it.

    home       the way to it
    key        tells it from other instances
    name       this process's id in the instance
    node       of this process
    by_line    the path of the socket where its controller listens: calls go over a line then, and the rest, which
               needs an event loop, begins with `follow`
    """

    _by_loop: LoopMembership  # once there is to be a loop
    _part: Part  # once it has joined

    def __init__(self, home: Home, name: str, role: str = "client", *, by_line: str | None = None) -> None:
        self.home = home
        self.node = home.node
        self.name = name
        self.role = role
        self.pid = os.getpid()
        self.closed = False
        self._is_over = False
        self._is_begun = False
        self._has_loop = False  # that is connected
        self._beginning = threading.Lock()  # of the loop
        self._ends: list[Callable[[], object]] = []
        self._when_gone: list[Callable[[], object]] = []
        self._watchers: set[Callable[[], object]] = set()
        self._me = messages.Hello(role, name, self.pid, node=self.node)
        self._by_line: LineMembership | None = None
        if by_line is not None:
            self._by_line = LineMembership(by_line, home.token, self._me, _weakly(self._gone))

    @property
    def key(self) -> str:
        """What tells this instance from others: the run directory, or "ray:<Ray namespace>"."""
        return self.home.key

    # --- joining ---

    def begin(self) -> None:
        """Start the thread that is to hold the connection; connecting it, which may be interrupted, is `join`'s."""
        self._is_begun = True
        if self._by_line is None:
            self._begin_loop()
        else:
            self._begin(self._by_line)

    def _begin_loop(self) -> None:
        from headgate.loop_membership import LoopMembership  # brings asyncio

        gone = _weakly(self._gone) if self._by_line is None else _not_again  # the line says so too
        membership = LoopMembership(self.home, self._me, _weakly(self._spread), gone)
        self._begin(membership)
        self._by_loop = membership

    def _begin(self, membership: LineMembership | LoopMembership) -> None:
        membership.begin()
        self._ends.append(weakref.finalize(self, membership.leave))

    def join(
        self,
        report: Callable[[], messages.Report | None] = lambda: None,
        on_message: Callable[[messages.FromController], None] = lambda message: None,
        timeout_s: float | None = None,
        routers: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Connect. Raises InstanceError if nobody listens, and TimeoutError."""
        if not self._is_begun:
            self.begin()
        self._part = Part(report, on_message, routers)
        if self._by_line is None:
            self._join_by_loop(timeout_s)
        else:
            self._by_line.join(timeout_s)
        with _join_lock:
            _joined[self.key] = self

    def _join_by_loop(self, timeout_s: float | None) -> None:
        self._by_loop.join(self._part, timeout_s)
        self._has_loop = True

    def follow(self) -> None:
        """Have snapshots from now on; returns once the first is here. Raises ControllerUnavailable."""
        with self._beginning:
            if not self._has_loop:
                self._begin_loop()
                try:
                    self._join_by_loop(SILENCE_S)
                except TimeoutError:
                    raise ControllerUnavailable(SILENT) from None
        self._by_loop.follow()

    # --- what it is like ---

    @property
    def thread(self) -> HeadgateThread:
        """The headgate thread, once there is a loop."""
        return self._by_loop.thread

    @property
    def control(self) -> ControlClient:
        """The connection that follows the snapshots, once there is a loop."""
        return self._by_loop.control

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot in force in this process, once it follows."""
        return self._by_loop.control.snapshot

    @property
    def usable(self) -> bool:
        """False once it was left, is over, or belongs to the process that this one was forked from."""
        return not self.closed and not self._is_over and self.pid == _pid

    def when_gone(self, function: Callable[[], object]) -> None:
        """Call `function` once the instance is over or was left, on any thread, perhaps more than once."""
        self._when_gone.append(function)
        if self._is_over:
            function()

    def _gone(self) -> None:
        self._is_over = True
        for function in self._when_gone:
            function()

    # --- control calls ---

    def call(self, method: str, /, timeout_s: float | None = None, **params: Any) -> Any:
        """A call of the controller, from any thread but the headgate thread; blocks until answered.

        Raises what the controller raises; ControllerUnavailable when it gives no sign of life;
        InstanceError when the instance is over; TimeoutError.
        """
        self.check()
        membership = self._by_line or self._by_loop
        return membership.call(method, params, timeout_s)

    def check(self) -> None:
        """Raises InstanceError unless the instance is usable."""
        if not self.usable:
            raise InstanceError(OVER)

    # --- routers ---

    def _spread(self, snapshot: Snapshot) -> None:
        self._by_loop.routers.spread(snapshot)
        for watcher in list(self._watchers):
            watcher()

    def watch(self, watcher: Callable[[], object]) -> None:
        """Call `watcher()` after each new snapshot, on the headgate thread, until `unwatch`."""
        self._watchers.add(watcher)

    def unwatch(self, watcher: Callable[[], object]) -> None:
        """The end of `watch`."""
        self._watchers.discard(watcher)

    def router(self) -> Router:
        """The router of the running loop, following the newest snapshot."""
        router = self._by_loop.router()
        if self.closed:  # since whoever wants it has asked: `leave` may not have seen it
            router.close()
        return router

    def endpoint(self, name: str) -> Endpoint | None:
        """The endpoint of that name in the snapshot in force."""
        for endpoint in self.snapshot.endpoints:
            if endpoint.name == name:
                return endpoint
        return None

    # --- leaving ---

    def leave(self) -> None:
        """Close routers and connections and end the threads; the instance goes on. Idempotent."""
        if self.closed:
            return
        self.closed = True
        with _join_lock:
            if _joined.get(self.key) is self:
                del _joined[self.key]
        for end in reversed(self._ends):
            end()
        close = getattr(self.home, "close", None)
        if close is not None:
            close()
        self._gone()


def _weakly(method: Callable[P, None]) -> Callable[P, None]:
    """`method`, called as long as its object lives, without holding it."""
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> None:
        if (bound := reference()) is not None:
            bound(*args, **kwargs)

    return call


def _not_again() -> None:
    """What another thread does is not done on this one meanwhile."""


def joined(key: str) -> Instance | None:
    """The membership that this process already has in the instance of that key."""
    with _join_lock:
        instance = _joined.get(key)
    return instance if instance is not None and instance.usable else None


def own() -> Instance | None:
    """The instance that this process is a replica of."""
    with _join_lock:
        for instance in _joined.values():
            if instance.role == "replica" and instance.usable:
                return instance
    return None


def join(home: Home) -> Instance:
    """Take part in a running instance, once per process.

    Raises InstanceError if it does not run, and ControllerUnavailable if nobody answers there.
    """
    known = joined(home.key)
    if known is not None:
        return known
    instance = Instance(home, f"client-{os.getpid()}-{os.urandom(4).hex()}")
    try:
        instance.join(timeout_s=SILENCE_S)
    except TimeoutError:
        raise ControllerUnavailable(SILENT) from None
    return instance
