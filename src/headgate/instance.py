"""This process's membership in an instance: its headgate thread, its snapshot, its routers.

A process joins an instance once, however many clients and handles it has. One that started it makes calls only, as
long as it has no handle: they go over a line (wire/line.py), and there is no event loop. The first handle brings one,
on the headgate thread, with a connection of its own that follows the snapshots.

Clients and handles hold the Instance, and nothing else does: when the last of them is collected,
the membership ends. Threads therefore refer to it weakly.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from headgate.core.state import Endpoint, Snapshot
from headgate.errors import ControllerUnavailable, InstanceError
from headgate.wire import messages
from headgate.wire.calling import OVER, SILENCE_S, SILENT
from headgate.wire.home import Home
from headgate.wire.line import Line

if TYPE_CHECKING:
    from headgate.router import Router
    from headgate.routers import Routers
    from headgate.wire.control import ControlClient
    from headgate.wire.thread import HeadgateThread

_FIRST_SNAPSHOT_S = 10.0

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

    thread: HeadgateThread  # these three once there is a loop
    control: ControlClient
    _routers: Routers

    def __init__(self, home: Home, name: str, role: str = "client", *, by_line: str | None = None) -> None:
        self.home = home
        self.node = home.node
        self.name = name
        self.role = role
        self.pid = os.getpid()
        self.closed = False
        self._is_over = False
        self._is_begun = False
        self._line: Line | None = None
        self._following = [role == "client"]  # shared with `hello`, which must not hold self
        self._beginning = threading.Lock()  # of the loop
        self._ends: list[Callable[[], object]] = []
        self._when_gone: list[Callable[[], object]] = []
        self._watchers: set[Callable[[], object]] = set()
        if by_line is not None:
            hello = messages.Hello(role, name, self.pid, node=self.node)
            self._line = Line(by_line, home.token, hello, _weakly(self._gone))

    @property
    def key(self) -> str:
        """What tells this instance from others: the run directory, or "ray:<Ray namespace>"."""
        return self.home.key

    # --- joining ---

    def begin(self) -> None:
        """Start the thread that is to hold the connection; connecting it, which may be interrupted, is `join`'s."""
        self._is_begun = True
        if self._line is None:
            self._start_thread()
        else:
            self._line.start()
            self._ends.append(weakref.finalize(self, _leave_line, self._line, self.pid))

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
        if self._line is None:
            self._connect(report, on_message, timeout_s, routers)
        else:
            try:
                self._line.wait_connected(timeout_s)
            except BaseException:
                self._line.close()
                raise
        with _join_lock:
            _joined[self.key] = self

    def _start_thread(self) -> None:
        from headgate.wire.thread import HeadgateThread  # brings asyncio

        self.thread = HeadgateThread()
        self.thread.start()
        self._ends.append(self.thread.stop)

    def _connect(
        self,
        report: Callable[[], messages.Report | None] = lambda: None,
        on_message: Callable[[messages.FromController], None] = lambda message: None,
        timeout_s: float | None = None,
        routers: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Have the headgate thread connect. Raises InstanceError if nobody listens, and TimeoutError."""
        from headgate.routers import Routers, on_loop

        thread = self.thread
        self._routers = Routers(self.home.token, self.name, self.node, thread.loop)
        try:
            thread.connect(self._client(report, on_message, routers), timeout_s)
            self._ends.append(weakref.finalize(self, _leave, thread, self.control, self._routers, self.pid))
        except BaseException:
            if hasattr(self, "control"):
                on_loop(thread.loop, self.control.close)
                del self.control
            thread.stop()
            raise
        watch = getattr(self.home, "watch", None)
        if watch is not None:
            watch(self.control.end_threadsafe)

    def _client(
        self,
        report: Callable[[], messages.Report | None],
        on_message: Callable[[messages.FromController], None],
        routers: Callable[[], tuple[str, ...]],
    ) -> Callable[[], ControlClient]:
        """What makes the control client, which does not hold this."""
        from headgate.wire.control import ControlClient

        this = weakref.ref(self)

        def spread(snapshot: Snapshot) -> None:
            if (instance := this()) is not None:
                instance._spread(snapshot)

        gone = _weakly(self._gone) if self._line is None else _not_again  # the line says so too
        find, token = self.home.find, self.home.token
        hello = _hello(self.role, self.name, self.node, self._following, report, routers)

        def make() -> ControlClient:
            client = ControlClient(find, token, hello, on_message=on_message, on_snapshot=spread, on_gone=gone)
            if (instance := this()) is not None:
                instance.control = client  # before its first message comes
            return client

        return make

    @property
    def snapshot(self) -> Snapshot:
        """The snapshot in force in this process, once it follows."""
        return self.control.snapshot

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

    @property
    def is_on_own_thread(self) -> bool:
        """Whether this is called on a thread that holds a connection, which must not wait for itself."""
        own = [holder.thread for holder in (self._line, getattr(self, "thread", None)) if holder is not None]
        return threading.current_thread() in own

    def follow(self) -> None:
        """Have snapshots from now on; returns once the first is here. Raises ControllerUnavailable."""
        with self._beginning:
            if not hasattr(self, "control"):
                self._begin_loop()
        if not self._following[0]:
            self._following[0] = True
            self.thread.loop.call_soon_threadsafe(self.control.tell, messages.Follow())
        if not self.snapshot.version:
            try:
                self.thread.run(self.control.newer_than(0), _FIRST_SNAPSHOT_S)
            except TimeoutError:
                raise ControllerUnavailable(
                    f"the controller sent no snapshot within {_FIRST_SNAPSHOT_S:g} s; it is safe to try again"
                ) from None

    def _begin_loop(self) -> None:
        self._start_thread()
        try:
            self._connect(timeout_s=SILENCE_S)
        except TimeoutError:
            raise ControllerUnavailable(SILENT) from None

    # --- control calls ---

    def call(self, method: str, /, timeout_s: float | None = None, **params: Any) -> Any:
        """A call of the controller, from any thread but the headgate thread; blocks until answered.

        Raises what the controller raises; ControllerUnavailable when it gives no sign of life;
        InstanceError when the instance is over; TimeoutError.
        """
        self.check()
        if self._line is not None:
            return self._line.call(method, params, timeout_s)
        return self.thread.run(self.control.call(method, params), timeout_s)

    def check(self) -> None:
        """Raises InstanceError unless the instance is usable."""
        if not self.usable:
            raise InstanceError(OVER)

    # --- routers ---

    def _spread(self, snapshot: Snapshot) -> None:
        self._routers.spread(snapshot)
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
        router = self._routers.here(self.control.snapshot)
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


def _weakly(method: Callable[[], None]) -> Callable[[], None]:
    """`method`, called as long as its object lives, without holding it."""
    reference = weakref.WeakMethod(method)

    def call() -> None:
        if (bound := reference()) is not None:
            bound()

    return call


def _not_again() -> None:
    """What another thread does is not done on this one meanwhile."""


def _hello(
    role: str,
    name: str,
    node: str,
    following: list[bool],
    report: Callable[[], messages.Report | None],
    routers: Callable[[], tuple[str, ...]],
) -> Callable[[int], messages.Hello]:
    pid = os.getpid()
    return lambda version: messages.Hello(role, name, pid, following[0], version, report(), node, routers())


def _leave_line(line: Line, pid: int) -> None:
    if pid == os.getpid():  # a fork has none of these threads
        line.close()


def _leave(thread: HeadgateThread, control: ControlClient, routers: Routers, pid: int) -> None:
    if pid != os.getpid():
        return
    from headgate.routers import on_loop

    routers.close()
    on_loop(thread.loop, control.close)
    thread.stop()


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
