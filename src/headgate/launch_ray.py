"""Bring an instance to life on a Ray cluster, and take it down with it.

What launch.py is to one machine. The controller is an actor that this process starts; all else is the
controller's doing. If it is not detached it belongs to this process, and Ray ends it when this process ends,
however that happens; the rest of the instance ends when it sees that.

Rule: nobody joins a cluster by accident that strangers may command. Who can reach a cluster without a
token can run any code on it, and so can whoever reaches this instance's actors.
"""

from __future__ import annotations

import os
import sys
import threading
import warnings
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from headgate import params
from headgate.engine import cluster, directory, ray_access
from headgate.engine.ray_home import ClusterHome
from headgate.engine.ray_records import Origin, Records, pack
from headgate.engine.ray_watch import ControllerWatch
from headgate.errors import InstanceError
from headgate.launch import portable

if TYPE_CHECKING:
    from headgate.config import HTTPOptions

#: How long Ray may take to take note of the controller's actor.
ASKED_S = 10.0
#: The longest that it may take to be there.
START_S = 60.0
#: How long it may take to end once it was told or killed.
DYING_S = 10.0

_warned = False


class LaunchedOnRay:
    """A controller that this process started: its instance, and its end."""

    def __init__(self, origin: Origin, actor: object, owns_ray: bool) -> None:
        self.home = ClusterHome(origin)
        self._actor = actor
        self._owns_ray = owns_ray
        self._gone = threading.Event()
        ControllerWatch(origin.scope, self._gone.set).begin()

    def kill(self, number: int = 0) -> None:
        """End the controller at once, for good; the others end when they see it."""
        cluster.kill(self._actor)

    def reap(self) -> None:
        """The instance is over: Ray has seen to it."""

    def collect(self, timeout_s: float = DYING_S) -> bool:
        """Wait for the controller's end, and leave a cluster that was started for it; False if it lives on."""
        if not self._gone.wait(timeout_s):
            return False
        if self._owns_ray:
            self._owns_ray = False
            cluster.leave()
        return True


def launch(options: HTTPOptions, namespace: str, detached: bool, insecure: bool) -> LaunchedOnRay:
    """Start the controller on the cluster of this process, or on one that is started for it.

    Raises InstanceError or ControllerUnavailable, and leaves nothing then.
    """
    was_there = cluster.is_initialized()
    owns_ray = ray_access.take_part(may_start=not detached)
    try:
        _check_head()
        _check_open(insecure)
        origin = _origin(options, namespace, detached)
        return LaunchedOnRay(origin, _start(origin), owns_ray)
    except BaseException:
        if not was_there:
            cluster.leave()
        raise


def _check_head() -> None:
    """ControllerUnavailable if the cluster's head does not answer."""
    try:
        Records("").has("")
    except OSError as error:
        raise cluster.away(str(error)) from None


def _check_open(insecure: bool) -> None:
    """Refuse a cluster that serves strangers, unless told otherwise."""
    global _warned
    address = cluster.gcs_address()
    if insecure:
        return
    if cluster.started_here():
        if not cluster.shows_token() and not _warned:
            _warned = True
            warnings.warn(
                "Ray's token authentication is off in the cluster that this process started: whoever reaches "
                "this machine's ports can run code here; set RAY_AUTH_MODE=token",
                stacklevel=5,
            )
        return
    if not ray_access.is_loopback(address) and ray_access.answers_strangers(address):
        raise InstanceError(
            f"the cluster at {address} serves everybody who can reach it, without a token: whoever does can run code "
            "on all its nodes. Start it with RAY_AUTH_MODE=token and a RAY_AUTH_TOKEN, or say insecure=True "
            "if its network is closed"
        )


def _origin(options: HTTPOptions, namespace: str, detached: bool) -> Origin:
    instance = os.urandom(4).hex()
    return Origin(
        scope=scope_of(namespace) if detached else f"headgate-{instance}",
        instance=instance,
        namespace=namespace,
        token=os.urandom(32),
        detached=detached,
        home=cluster.node_id(),
        address=cluster.node_address(),
        http=portable(options),
        middlewares=params.pack("http_options: middlewares", options.middlewares) if options.middlewares else b"",
        path=tuple(os.path.abspath(entry) for entry in sys.path),
        cwd=os.getcwd(),
    )


def scope_of(namespace: str) -> str:
    """The Ray namespace of a detached instance; one that is no plain name stands as its digest.

    >>> scope_of("default")
    'headgate.default'
    """
    return "headgate." + directory.name_of(namespace).removeprefix("d-")


def _start(origin: Origin) -> object:
    if origin.detached and cluster.is_alive(origin.scope):
        raise _runs_already(origin.namespace)
    actor = _controller(origin)
    try:
        cluster.wait_for(actor.started.remote(), START_S)
    except BaseException:
        cluster.kill(actor)
        raise
    return actor


def _controller(origin: Origin) -> Any:
    starting = cluster.beside(_ask_for_controller, origin)
    try:
        actor = cluster.result_of(starting, ASKED_S)
    except BaseException:
        starting.add_done_callback(_end_late)
        raise
    if actor is None:
        raise _runs_already(origin.namespace)
    return actor


def _ask_for_controller(origin: Origin) -> Any:
    return cluster.start_controller(pack(origin), origin.scope, origin.home, detached=origin.detached)


def _end_late(starting: Future[Any]) -> None:
    """Nobody has waited so long for it."""
    if starting.exception() is None and starting.result() is not None:
        cluster.kill(starting.result())


def _runs_already(namespace: str) -> InstanceError:
    return InstanceError(
        f"a detached instance of namespace {namespace!r} runs already on this cluster; use "
        f"headgate.connect({namespace!r}), or give this one another namespace"
    )
