"""This process's membership in an instance: its headgate thread, its snapshot, its routers.

A process joins an instance once, however many clients and handles it has. Routers are made when
a handle is first used: one on the headgate thread for sync handles, one for each event loop of
the user's that has an async handle. Each follows the newest snapshot; a router and its links end
with their loop. A loop that was just closed says nothing: what it has left open is found when the
next router is made, the next snapshot comes, or the membership ends.

Clients and handles hold the Instance, and nothing else does: when the last of them is collected,
the membership ends. The headgate thread therefore refers to it weakly.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from headgate.core.state import Endpoint, Snapshot
from headgate.errors import ControllerUnavailable, InstanceError
from headgate.wire import messages
from headgate.wire.control import OVER, ControlClient
from headgate.wire.home import Home
from headgate.wire.pending import SILENCE_S, SILENT
from headgate.wire.thread import HeadgateThread

if TYPE_CHECKING:
    from headgate.router import Router
    from headgate.wire.replica_link import ReplicaLink

_FIRST_SNAPSHOT_S = 10.0

#: Of this process; asked in each call, which a system call would make longer.
_pid = os.getpid()
_joined: WeakValueDictionary[str, Instance] = WeakValueDictionary()
_join_lock = threading.Lock()


def _note_pid() -> None:
    global _pid
    _pid = os.getpid()


os.register_at_fork(after_in_child=_note_pid)


class Instance:
    """A running instance, as one process takes part in it.

    home   the way to it
    key    tells it from other instances
    name   this process's id in the instance
    node   of this process
    """

    def __init__(self, home: Home, name: str, role: str = "client") -> None:
        self.home = home
        self.node = home.node
        self.name = name
        self.role = role
        self.pid = os.getpid()
        self.thread = HeadgateThread()
        self.control: ControlClient
        self.closed = False
        self._following = [role == "client"]  # shared with `hello`, which must not hold self
        self._routers: _Routers = {}
        self._leave: Callable[[], object] = self.thread.stop
        self._when_gone: list[Callable[[], object]] = []
        self._watchers: set[Callable[[], object]] = set()

    @property
    def key(self) -> str:
        """What tells this instance from others: the run directory, or "ray:<Ray namespace>"."""
        return self.home.key

    # --- joining ---

    def join(
        self,
        report: Callable[[], messages.Report | None] = lambda: None,
        on_message: Callable[[messages.FromController], None] = lambda message: None,
        timeout_s: float | None = None,
        routers: Callable[[], tuple[str, ...]] = tuple,
    ) -> None:
        """Start the headgate thread and connect. Raises InstanceError if nobody listens, and TimeoutError."""
        try:
            if not self.thread.alive:
                self.thread.start()
            self.thread.connect(self._client(report, on_message, routers), timeout_s)
            self._leave = weakref.finalize(self, _leave, self.thread, self.control, self._routers, self.pid)
        except BaseException:
            if hasattr(self, "control"):
                _on(self.thread.loop, self.control.close)
            self.thread.stop()
            raise
        with _join_lock:
            _joined[self.key] = self
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
        this = weakref.ref(self)

        def spread(snapshot: Snapshot) -> None:
            if (instance := this()) is not None:
                instance._spread(snapshot)

        def gone() -> None:
            if (instance := this()) is not None:
                instance._gone()

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
        """The snapshot in force in this process."""
        return self.control.snapshot

    @property
    def usable(self) -> bool:
        """False once it was left, is over, or belongs to the process that this one was forked from."""
        return not self.closed and not self.control.gone and self.pid == _pid

    def when_gone(self, function: Callable[[], object]) -> None:
        """Call `function` once the instance is over or was left, on any thread, perhaps more than once."""
        self._when_gone.append(function)
        if hasattr(self, "control") and self.control.gone:
            function()

    def _gone(self) -> None:
        for function in self._when_gone:
            function()

    def follow(self) -> None:
        """Have snapshots from now on; returns once the first is here. Raises ControllerUnavailable."""
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

    # --- control calls ---

    def call(self, method: str, /, timeout_s: float | None = None, **params: Any) -> Any:
        """A call of the controller, from any thread but the headgate thread; blocks until answered.

        Raises what the controller raises; ControllerUnavailable when it gives no sign of life;
        InstanceError when the instance is over; TimeoutError.
        """
        self.check()
        return self.thread.run(self.control.call(method, params), timeout_s)

    def check(self) -> None:
        """Raises InstanceError unless the instance is usable."""
        if not self.usable:
            raise InstanceError(OVER)

    # --- routers ---

    def _spread(self, snapshot: Snapshot) -> None:
        _end_closed(self._routers)
        for loop, (router, _) in list(self._routers.items()):
            if loop is self.thread.loop:
                router.follow(snapshot)
            else:
                with contextlib.suppress(RuntimeError):  # it was closed just now
                    loop.call_soon_threadsafe(router.follow, snapshot)

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
        loop = asyncio.get_running_loop()
        router, _ = self._routers.get(loop, (None, None))
        if router is None or router.closed:
            from headgate.router import Router  # 5 ms and 1 MB that only requests cost, not control calls

            _end_closed(self._routers)
            router = Router(self.home.token, self.name, node=self.node)
            is_users = loop is not self.thread.loop
            self._routers[loop] = router, LoopEnd(partial(_end, router, self._routers)) if is_users else None
            if self.closed:  # since whoever wants it has asked: `leave` may not have seen it
                router.close()
                return router
        if router.snapshot is not self.control.snapshot:
            router.follow(self.control.snapshot)
        return router

    def endpoint(self, name: str) -> Endpoint | None:
        """The endpoint of that name in the snapshot in force."""
        for endpoint in self.snapshot.endpoints:
            if endpoint.name == name:
                return endpoint
        return None

    # --- leaving ---

    def leave(self) -> None:
        """Close routers and connection and end the headgate thread; the instance goes on. Idempotent."""
        if self.closed:
            return
        self.closed = True
        with _join_lock:
            if _joined.get(self.key) is self:
                del _joined[self.key]
        self._leave()
        close = getattr(self.home, "close", None)
        if close is not None:
            close()
        self._gone()


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


def _leave(
    thread: HeadgateThread,
    control: ControlClient,
    routers: _Routers,
    pid: int,
) -> None:
    if pid != os.getpid():  # a fork has none of these threads
        return
    for loop, (router, _) in list(routers.items()):
        _on(loop, router.close)
    _end_closed(routers)
    _on(thread.loop, control.close)
    thread.stop()


def _on(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    try:
        loop.call_soon_threadsafe(function)
    except RuntimeError:  # that loop was closed
        pass


def _end(router: Router, routers: _Routers) -> None:
    """The loop of `router` ends: nothing here is to hold either of them."""
    router.close()
    if routers.get(router.loop, (None, None))[0] is router:
        del routers[router.loop]


def _end_closed(routers: _Routers) -> None:
    """End those whose loops were closed without a word to anybody; on any thread."""
    for loop in [loop for loop in list(routers) if loop.is_closed()]:
        router, _ = routers.pop(loop, (None, None))
        if router is not None:  # else another thread has it
            _end_without_loop(router)


def _end_without_loop(router: Router) -> None:
    router.closed = True  # nothing is dialled any more
    for backend in list(router.backends.values()):
        for link in list(backend.links.values()):
            _end_link_without_loop(link)
    with contextlib.suppress(RuntimeError):  # a task cannot be cancelled any more
        router.close()


def _end_link_without_loop(link: ReplicaLink) -> None:
    """As `discard`, and then what the loop would have done in its next turn.

    uvloop's transports are closed with it. asyncio's would keep the socket, and warn of it when it is collected.
    """
    transport = link._transport
    with contextlib.suppress(RuntimeError):  # the transport has no loop to tell
        link.discard()
    link.discard()
    lose = getattr(transport, "_call_connection_lost", link.connection_lost)
    lose(None)


class LoopEnd:
    """Calls `close` when the running loop ends; perhaps twice.

    asyncio.run first cancels all tasks that there are. What they begin in their last moments comes too
    late for that, and is ended when async generators are shut down, which is next.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._until_cancelled())
        self._task._log_destroy_pending = False  # type: ignore[attr-defined]  # a loop may just close
        self._task.add_done_callback(lambda task: close())  # a `finally` is not run if it is cancelled before it began
        self._generator = self._until_shut_down(close)
        with contextlib.suppress(StopIteration):  # it has come to its yield, and the loop knows it
            self._generator.asend(None).send(None)

    def now(self) -> None:
        """Do not wait for the loop's end."""
        self._task.cancel()

    @staticmethod
    async def _until_cancelled() -> None:
        await asyncio.get_running_loop().create_future()

    @staticmethod
    async def _until_shut_down(close: Callable[[], object]) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            close()


#: What each loop has: its router, and what sees its end if it is the user's.
_Routers = dict[asyncio.AbstractEventLoop, "tuple[Router, LoopEnd | None]"]


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
