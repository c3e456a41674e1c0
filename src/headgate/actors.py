"""What runs inside Ray's workers: the bodies of the actors, named in engine/cluster.py.

Each starts headgate's own threads and loops in its worker and leaves Ray's loop to Ray: what an actor's
methods do is to begin, to end, and to hand arguments and results of `handle.remote()` over. Everything
else goes over wire/.

Rule: nothing but Exception leaves a method. KeyboardInterrupt would end the actor's loop in silence,
SystemExit its worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from headgate import eventloop, logs
from headgate.engine import cluster, leash, ray_agents, ray_records, raylet
from headgate.engine.node import Node
from headgate.engine.ray_home import ClusterHome
from headgate.engine.ray_watch import ControllerWatch
from headgate.errors import BackendError, HeadgateError, InstanceError

if TYPE_CHECKING:
    from headgate.handle import AsyncServeHandle
    from headgate.replica.process import Replica

log = logs.get("actors")

#: How long Ray may take to end a replica's process once it has left.
_EXIT_S = 3.0


class ControllerActor:
    """The controller: the one of the local engine, with the cluster as its engine and its store.

    Ray makes it anew after it died, with the same arguments; it then goes on from what is stored.
    """

    def __init__(self, origin: bytes) -> None:
        self._origin = ray_records.unpack_origin(origin)
        self._started: Future[None] = Future()
        _begin(self._origin, "controller")
        threading.Thread(target=self._run, name="headgate-controller", daemon=True).start()

    async def started(self) -> None:
        """Returns when it listens. Raises what keeps it from that."""
        await asyncio.shield(asyncio.wrap_future(self._started))

    async def forever(self) -> None:
        """Never returns: whoever calls it hears of this actor's end."""
        await asyncio.get_running_loop().create_future()

    async def pid(self) -> int:
        """The worker's process."""
        return os.getpid()

    def _run(self) -> None:
        try:
            eventloop.run(self._serve())
        except BaseException as error:
            log.exception("the controller failed")
            self._tell(error)
            if cluster.is_second_life() or not isinstance(error, HeadgateError):
                os._exit(1)  # Ray makes another, which goes on from what is stored
        else:
            cluster.kill_me(self._origin.scope, cluster.CONTROLLER)

    async def _serve(self) -> None:
        from headgate.controller import on_ray

        await on_ray.control(self._origin, lambda: self._tell(None))

    def _tell(self, error: BaseException | None) -> None:
        if self._started.done():
            return
        if error is None:
            self._started.set_result(None)
        else:
            self._started.set_exception(_portable(error))


class AgentActor:
    """Starts the supervisor of its node, or finds it, and ends it with the instance."""

    def __init__(self, origin: bytes) -> None:
        self._origin = ray_records.unpack_origin(origin)
        _begin(self._origin, "agent")
        self._node = Node(self._origin, cluster.node_id(), cluster.node_address())
        self._raylet = raylet.raylet_pid()
        threading.Thread(target=self._follow_newest, daemon=True).start()
        ControllerWatch(self._origin.scope, self._over).begin()

    async def open(self, port: int, meeting: bytes) -> str:
        """Have the supervisor run, with a listener on `port`: the URL of the proxy to be."""
        return await asyncio.to_thread(self._node.open, port, ray_records.unpack_meeting(meeting), self._raylet)

    async def follow(self, meeting: bytes) -> None:
        """The controller listens elsewhere now."""
        await asyncio.to_thread(self._node.follow, ray_records.unpack_meeting(meeting))

    def _follow_newest(self) -> None:
        """Where the controller listens now; an agent of a second life may have missed it."""
        with contextlib.suppress(OSError):
            meeting = ray_records.Records(self._origin.scope).meeting()
            if meeting is not None:
                self._node.catch_up(meeting)

    async def end(self) -> None:
        """End the supervisor and its processes."""
        await asyncio.to_thread(self._node.end)

    async def forever(self) -> None:
        """Never returns: whoever calls it hears of this actor's end."""
        await asyncio.get_running_loop().create_future()

    def _over(self) -> None:
        def end() -> None:
            self._node.end()
            _forget(self._origin)
            cluster.kill_me(self._origin.scope, ray_agents.name_of(cluster.node_id()))

        threading.Thread(target=end, daemon=True).start()


class ReplicaActor:
    """One replica, on threads of its own in this worker."""

    def __init__(self, origin: bytes, id: str, backend: str) -> None:
        from headgate.replica.place import Place
        from headgate.replica.process import Replica

        self._origin = ray_records.unpack_origin(origin)
        _begin(self._origin, "replica", backend, id)
        self._home = home = ClusterHome(self._origin, when_over=self._over)
        name = f"{self._origin.instance}-{id.rpartition('#')[2]}"
        place = Place(
            home=home,
            id=id,
            backend=backend,
            expose=bool(self._origin.http.get("expose_tracebacks")),
            listen=[f"@headgate-{name}", f"tcp://{cluster.join_host(cluster.node_address())}:0"],
            read_blob=home.read_blob,
            over=self._over,
        )
        self._replica: Replica = Replica(place)
        self._leaving: asyncio.Event | None = None
        os.register_at_fork(after_in_child=leash.die_with_parent)  # it is no group's leader that could be killed whole
        threading.Thread(target=self._run, name="headgate-replica", daemon=True).start()

    async def serve(self, token: int, data: Any, kwargs: dict[str, Any]) -> Any:
        """The arguments of a request whose slot was reserved over the wire: its result."""
        replica = self._replica
        try:
            return await asyncio.wrap_future(replica.claim(token, data, kwargs))
        except asyncio.CancelledError:
            replica.give_up(token)
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit) as error:
            raise BackendError(f"{type(error).__name__}: {error}") from None
        finally:
            replica.answered(token)

    async def forever(self) -> None:
        """Returns when it is to end: whoever calls it hears of this actor's end, however it comes."""
        self._leaving = self._leaving or asyncio.Event()
        await self._leaving.wait()

    async def leave(self) -> None:
        """End once the answers that are under way have been sent."""
        if self._leaving is not None:
            self._leaving.set()
        self._home.unwatch()
        last_resort = threading.Timer(_EXIT_S, os._exit, (0,))  # Ray waits for whoever holds a ref of this process
        last_resort.daemon = True
        last_resort.start()
        cluster.exit_actor()

    def _run(self) -> None:
        try:
            self._replica.run()
        except BaseException:
            log.exception("the replica failed")
            os._exit(1)

    def _over(self) -> None:
        _forget(self._origin)
        os._exit(0)


class CourierActor:
    """Makes calls whose arguments Ray resolves first, for the one process that started it."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._handles: dict[str, AsyncServeHandle] = {}

    async def call(
        self, endpoint: str, missing_ok: bool, options: dict[str, Any], names: list[str], *values: Any
    ) -> Any:
        """The answer of an endpoint. `names` are those of the keyword arguments, the last of `values`."""
        from headgate.handle import AsyncServeHandle, _unpickled

        known = repr((endpoint, missing_ok, options))
        handle = self._handles.get(known)
        if handle is None:
            handle = _unpickled(AsyncServeHandle, endpoint, missing_ok, options, self._key)
            self._handles[known] = handle
        return await handle.call(values[0], **dict(zip(names, values[1:], strict=True)))

    async def forever(self) -> None:
        """Never returns: whoever calls it hears of this actor's end."""
        await asyncio.get_running_loop().create_future()


def _begin(origin: ray_records.Origin, role: str, backend: str = "", id: str = "") -> None:
    """What every worker of an instance does first."""
    raylet.end_with_raylet()
    logs.configure(backend=backend, replica=id)
    sys.setswitchinterval(0.0005)
    known = set(sys.path)
    sys.path.extend(entry for entry in origin.path if entry not in known and os.path.exists(entry))
    if role == "replica":
        with contextlib.suppress(OSError):
            os.chdir(origin.cwd)


def _forget(origin: ray_records.Origin) -> None:
    """What an instance that is over still has in the cluster's store, unless its name is another's by now."""
    records = ray_records.Records(origin.scope)
    with contextlib.suppress(OSError):
        if records.origin() == origin:
            records.clear()


def _portable(error: BaseException) -> BaseException:
    return error if isinstance(error, HeadgateError) else InstanceError(f"{type(error).__name__}: {error}")
