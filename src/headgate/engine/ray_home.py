"""How a process that takes part in Ray reaches an instance there: a home (wire/home.py), and its actors.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

from headgate.engine import cluster, ray_access
from headgate.engine.ray_records import STORE, Origin, Records, actor_name
from headgate.engine.ray_watch import ControllerWatch
from headgate.errors import HeadgateError, InstanceError, ReplicaDied

_KNOWN = 10_000  # replicas whose actors a process remembers
_LOOK_S = 0.05  # how soon a process that found nobody looks again where the controller is


class ClusterHome:
    """The home (wire/home.py) of a process that takes part in Ray.

    when_over   called on some thread once the controller is gone for good
    """

    def __init__(self, origin: Origin, when_over: Callable[[], None] | None = None) -> None:
        self.origin = origin
        self.key = f"ray:{origin.scope}"
        self.token = origin.token
        self.node = cluster.node_id()
        self.actors = RayActors(origin.scope, self.node)
        self._records = Records(origin.scope)
        self._over = False
        self._when_over = when_over
        self._told: list[Callable[[], None]] = []
        self._watch: ControllerWatch | None = None

    async def find(self, error: Exception | None) -> str | None:
        """Where the controller listens; None once the instance is over."""
        if error is not None:
            await asyncio.sleep(_LOOK_S)
        if self._over:
            return None
        try:
            meeting = await cluster.apart(self._records.meeting, timeout_s=cluster.KV_S)
        except TimeoutError:
            raise OSError("the cluster's key-value store does not answer") from None
        if meeting is None:
            return None
        return meeting.unix if meeting.node == self.node else meeting.tcp

    def watch(self, then: Callable[[], None]) -> None:
        """Call `then()` on some thread once the instance is over."""
        self._told.append(then)
        if self._over:
            then()
        elif len(self._told) == 1:
            self._watch = ControllerWatch(self.origin.scope, self._is_over)
            self._watch.begin()

    def unwatch(self) -> None:
        """The end of `watch`."""
        if self._watch is not None:
            self._watch.end()

    def close(self) -> None:
        """This process leaves the instance."""
        self.unwatch()
        self.actors.close()

    def read_blob(self, path: str) -> bytes:
        """The content behind "ray:<name>", which Store.path gave."""
        found = self._records.get(STORE + path.partition(":")[2])
        if found is None:
            raise FileNotFoundError(path)
        return found

    def _is_over(self) -> None:
        self._over = True
        for then in self._told:
            then()
        if self._when_over is not None:
            self._when_over()


def home(key: str) -> ClusterHome:
    """The home of the instance whose key is "ray:<scope>".

    InstanceError if it does not run, ControllerUnavailable if the cluster's head does not answer.
    """
    scope = key.partition(":")[2]
    ray_access.take_part(may_start=False)
    try:
        origin = Records(scope).origin()
    except OSError as error:
        raise cluster.away(str(error)) from None
    if origin is None:
        raise InstanceError(f"the instance {scope!r} does not run on this cluster any more; start a new one")
    return ClusterHome(origin)


class RayActors:
    """`handle.remote()` on Ray: the calls of actors that carry a reservation (headgate/reservations.py).

    An actor has to be found, or a courier started, before the first call of it: by the cluster's head, which
    may be away. Each is a future therefore, and only one thread waits for each, however many calls do.
    """

    def __init__(self, scope: str, node: str) -> None:
        self._scope = scope
        self._node = node
        self._replicas: dict[str, Future[Any]] = {}
        self._couriers: dict[str, Future[Any]] = {}
        self._lock = threading.Lock()

    is_ref = staticmethod(cluster.is_ref)
    get = staticmethod(cluster.get)
    wait = staticmethod(cluster.wait)

    def ready(self, replica_id: str, then: Callable[[HeadgateError | None], None]) -> bool:
        """Whether the replica's actor is known; if not, `then(None)` once it is, or `then(why not)`."""
        found = self._replica(replica_id)
        if found.done() and _problem(replica_id, found) is None:
            return True
        found.add_done_callback(lambda _: then(_problem(replica_id, found)))
        return False

    def serve(self, replica_id: str, token: int, data: Any, kwargs: dict[str, Any]) -> Any:
        """Call a replica with the arguments of a reserved request: the ref of its result."""
        replica = cluster.result_of(self._replica(replica_id))
        if replica is None:
            raise ReplicaDied(f"replica {replica_id} is gone")
        return replica.serve.remote(token, data, kwargs)

    def _replica(self, id: str) -> Future[Any]:
        found = self._replicas.get(id)
        if found is not None:  # without the lock, as almost always
            return found
        with self._lock:
            found = self._replicas.get(id)
            if found is None:
                if len(self._replicas) >= _KNOWN:
                    del self._replicas[next(iter(self._replicas))]
                found = self._replicas[id] = cluster.beside(cluster.find, self._scope, actor_name(id))
                found.add_done_callback(partial(_keep_if_found, self._replicas, id))
        return found

    def courier(
        self, key: str, endpoint: str, missing_ok: bool, options: dict[str, Any], data: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Call an endpoint with arguments that Ray resolves first: the ref of its result."""
        with self._lock:
            started = self._couriers.get(key)
            if started is None:
                started = self._couriers[key] = cluster.beside(self._start_courier, key)
                started.add_done_callback(partial(_keep_if_found, self._couriers, key))
        courier = cluster.result_of(started)
        return courier.call.remote(endpoint, missing_ok, options, list(kwargs), data, *kwargs.values())

    def _start_courier(self, key: str) -> Any:
        courier = cluster.start_courier(key, self._node)
        cluster.when_over(courier.forever.remote(), lambda why, for_good: self._drop(key, for_good))
        return courier

    def _drop(self, key: str, for_good: bool) -> None:
        if for_good:
            self._couriers.pop(key, None)

    def close(self) -> None:
        """End the couriers, and with them the calls that they carry."""
        with self._lock:
            couriers, self._couriers = self._couriers, {}
        for started in couriers.values():
            started.add_done_callback(_end)


def _problem(replica_id: str, found: Future[Any]) -> HeadgateError | None:
    """Why that replica's actor cannot be called."""
    error = found.exception()
    if error is not None:
        return cluster.away(str(error))
    return ReplicaDied(f"replica {replica_id} is gone") if found.result() is None else None


def _keep_if_found(known: dict[str, Future[Any]], name: str, answer: Future[Any]) -> None:
    """The next call looks again for what was not there, or could not be asked for."""
    if (answer.exception() is not None or answer.result() is None) and known.get(name) is answer:
        known.pop(name, None)


def _end(started: Future[Any]) -> None:
    if started.exception() is None:
        cluster.kill(started.result())
