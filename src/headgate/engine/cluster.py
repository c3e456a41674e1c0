"""Ray: the one file that imports it.

What headgate needs of a cluster, in small functions: its nodes, named actors, a key-value store, a
process's place in it. Nothing is decided here. The engine is ray_engine.py, what runs inside the
actors is headgate/actors.py, named by a dotted path so that this layer imports neither.

Rule: no call waits longer than its own deadline. When the cluster's head is away, Ray's calls wait
without end; those that may are made on a thread that can be left behind (`apart`).

An instance has a Ray namespace of its own ("headgate-1f3a90c2", or "headgate.<namespace>" if it is
detached), where its actors have their names, and the keys "<Ray namespace>/..." of one key-value namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import select
import sys
import threading
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, TypeVar

import msgspec
import ray
from msgspec import Struct
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headgate.errors import InstanceError, RequestTimeout

T = TypeVar("T")

#: The longest that a call of the key-value store may take.
KV_S = 2.0
#: The longest that any other call may take that only asks.
ASK_S = 5.0
CONTROLLER = "controller"
#: What begins the names of goals and blobs among an instance's records.
STORE = "store/"
_KV_NAMESPACE = b"headgate"
_MANY = 10_000  # calls at a time of one actor
_KNOWN = 10_000  # replicas whose actors a process remembers
_LOOK_S = 0.05  # how soon a process that found nobody looks again where the controller is
_AGAIN_S = 0.2  # how soon it asks again whether a controller that Ray cannot reach is gone for good
_PROBE_S = 20.0


class Origin(Struct, frozen=True):
    """What every process of an instance on Ray is told.

    scope    the instance's Ray namespace
    home     id of the node where start was called
    http     fields of HTTPOptions without the middlewares, which cloudpickle packed
    path     sys.path and working directory of the driver
    """

    scope: str
    instance: str
    namespace: str
    token: bytes
    detached: bool
    home: str
    http: dict[str, Any]
    middlewares: bytes = b""
    path: tuple[str, ...] = ()
    cwd: str = "/"


class Meeting(Struct, frozen=True):
    """Where a controller listens: `unix` for processes of its own node, `tcp` for all others."""

    unix: str
    tcp: str
    node: str
    incarnation: int


pack = msgspec.msgpack.encode
_unpack_origin = msgspec.msgpack.Decoder(Origin).decode
_unpack_meeting = msgspec.msgpack.Decoder(Meeting).decode


# --- this process -----------------------------------------------------------------------------


def is_initialized() -> bool:
    """Whether this process takes part in a cluster."""
    return bool(ray.is_initialized())


def node_id() -> str:
    """The node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def node_address() -> str:
    """That node's address in the cluster."""
    return str(ray.util.get_node_ip_address())


def gcs_address() -> str:
    """ "host:port" of the cluster's head."""
    return str(ray.get_runtime_context().gcs_address)


def started_here() -> bool:
    """Whether this process started the cluster that it takes part in."""
    node = getattr(ray._private.worker, "_global_node", None)
    return node is not None and bool(node.is_head())


def start_local() -> None:
    """A cluster of this machine alone, which ends with this process."""
    ray.init(address="local", include_dashboard=False, logging_level="WARNING")


def join(address: str) -> None:
    """Take part in the cluster at `address`."""
    ray.init(address=address, logging_level="WARNING")


def leave() -> None:
    """The end of `start_local` and `join`."""
    ray.shutdown()


def end_with_raylet() -> None:
    """End this process when its node's raylet ends, which Ray itself does not see to if that was killed."""
    raylet = os.getppid()
    try:
        fd = os.pidfd_open(raylet)
    except OSError:
        os._exit(1)

    def wait() -> None:
        poll = select.poll()
        poll.register(fd, select.POLLIN)
        while not poll.poll():
            pass
        os._exit(1)

    threading.Thread(target=wait, name="headgate-raylet", daemon=True).start()


async def apart(function: Callable[..., T], *arguments: Any, timeout_s: float = ASK_S) -> T:
    """`function(*arguments)` on a thread of its own. TimeoutError when it takes longer: it is left behind."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(value: Any, error: BaseException | None) -> None:
        if not answer.done():
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

    def run() -> None:
        value, problem = None, None
        try:
            value = function(*arguments)
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            problem = error
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, value, problem)

    threading.Thread(target=run, name="headgate-ray-call", daemon=True).start()
    async with asyncio.timeout(timeout_s):
        return await answer


# --- the key-value store ----------------------------------------------------------------------


class Records:
    """What one instance keeps in the cluster. OSError when the cluster's head does not answer in time."""

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._prefix = f"{scope}/".encode()

    def get(self, name: str) -> bytes | None:
        """The value, None if there is none."""
        found: bytes | None = self._try("internal_kv_get", self._key(name))
        return found

    def has(self, name: str) -> bool:
        """Whether there is a value."""
        return bool(self._try("internal_kv_exists", self._key(name)))

    def put(self, name: str, value: bytes) -> None:
        """Keep a value, instead of the one before."""
        self._try("internal_kv_put", self._key(name), value, True)

    def remove(self, name: str) -> None:
        """Forget a value; nothing happens if there is none."""
        self._try("internal_kv_del", self._key(name), False)

    def names(self) -> list[str]:
        """The names of all values."""
        found = self._try("internal_kv_keys", self._prefix)
        return sorted(key.decode()[len(self._prefix) :] for key in found)

    def clear(self) -> None:
        """Forget everything."""
        self._try("internal_kv_del", self._prefix, True)

    @staticmethod
    def scopes() -> set[str]:
        """The Ray namespaces of all instances that keep something."""
        found = Records("")._try("internal_kv_keys", b"")
        return {key.decode().partition("/")[0] for key in found}

    def origin(self) -> Origin | None:
        """What was told to the instance's processes, None if there is no such instance."""
        found = self.get("origin")
        return None if found is None else _unpack_origin(found)

    def meeting(self) -> Meeting | None:
        """Where the controller listens; None when the instance is over."""
        found = self.get("meeting")
        return None if found is None else _unpack_meeting(found)

    def _key(self, name: str) -> bytes:
        return self._prefix + name.encode()

    def _try(self, method: str, *arguments: Any) -> Any:
        client = ray._private.worker.global_worker.gcs_client
        try:
            return getattr(client, method)(*arguments, namespace=_KV_NAMESPACE, timeout=KV_S)
        except (ray.exceptions.RayError, RuntimeError, AttributeError) as error:
            raise OSError(f"the cluster's key-value store does not answer: {_first_line(error)}") from None


# --- nodes ------------------------------------------------------------------------------------


def nodes() -> dict[str, dict[str, float]]:
    """id -> total resources of each living node, the head's first."""
    living = [node for node in ray.nodes() if node["Alive"]]
    living.sort(key=lambda node: "node:__internal_head__" not in node["Resources"])
    return {node["NodeID"]: dict(node["Resources"]) for node in living}


def addresses() -> dict[str, str]:
    """id -> address of each living node."""
    return {node["NodeID"]: str(node["NodeManagerAddress"]) for node in ray.nodes() if node["Alive"]}


def free() -> dict[str, dict[str, float]]:
    """id -> resources of each node that nobody uses now."""
    found: Mapping[str, Mapping[str, float]] = ray._private.state.available_resources_per_node()
    return {node: dict(amounts) for node, amounts in found.items()}


# --- actors -----------------------------------------------------------------------------------


def _class(path: str) -> Any:
    module, _, name = path.partition(":")
    return ray.remote(getattr(import_module(module), name))


def _on(node: str, *, soft: bool) -> Any:
    return NodeAffinitySchedulingStrategy(node, soft=soft)


def start_controller(origin: Origin) -> Any:
    """Start an instance's controller. InstanceError if its Ray namespace has one already."""
    try:
        return (
            _class("headgate.actors:ControllerActor")
            .options(
                name=CONTROLLER,
                namespace=origin.scope,
                lifetime="detached" if origin.detached else None,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=_MANY,
                scheduling_strategy=_on(origin.home, soft=True),
            )
            .remote(pack(origin))
        )
    except ValueError as error:
        raise InstanceError(str(error)) from None


def start_agent(origin: Origin, name: str, node: str) -> Any:
    """The agent of `node`, started if there is none. Ray restarts it by itself."""
    return (
        _class("headgate.actors:AgentActor")
        .options(
            name=name,
            namespace=origin.scope,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=_MANY,
            scheduling_strategy=_on(node, soft=False),
        )
        .remote(pack(origin))
    )


def start_replica(origin: Origin, id: str, backend: str, options: Mapping[str, Any]) -> Any:
    """Start a replica; `options` are the user's ray_actor_options."""
    return (
        _class("headgate.actors:ReplicaActor")
        .options(
            **{"num_cpus": 1, **options},
            name=id,
            namespace=origin.scope,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=_MANY,
        )
        .remote(pack(origin), id, backend)
    )


def start_courier(key: str, node: str) -> Any:
    """An actor of this process's own that makes calls whose arguments Ray has to resolve first."""
    return (
        _class("headgate.actors:CourierActor")
        .options(num_cpus=0, max_concurrency=_MANY, scheduling_strategy=_on(node, soft=True))
        .remote(key)
    )


def find(scope: str, name: str) -> Any:
    """The actor of that name, None if there is none. It may have died lately."""
    try:
        return ray.get_actor(name, namespace=scope)
    except ValueError:
        return None


def listed(scope: str) -> list[str]:
    """The names of an instance's actors that live or wait for their resources."""
    found = ray.util.list_named_actors(all_namespaces=True)
    return sorted(each["name"] for each in found if each["namespace"] == scope)


def kill(actor: Any) -> None:
    """End an actor for good, or its start."""
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor, no_restart=True)


def kill_me(scope: str, name: str) -> None:
    """End the actor of that name, which this process is; from any of its threads."""
    actor = find(scope, name)
    if actor is not None:
        kill(actor)


def kill_process(node: str, pid: int) -> None:
    """SIGKILL to a process of a node that Ray holds for dead but that is only stopped."""
    ray.remote(_kill_process).options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node, soft=False)).remote(pid)


def _kill_process(pid: int) -> None:
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if file.read().startswith(b"ray::"):
                os.kill(pid, 9)


async def ask(answer: Any, timeout_s: float = ASK_S) -> Any:
    """The outcome of an actor call. TimeoutError; InstanceError when there is none because of Ray."""
    try:
        async with asyncio.timeout(timeout_s):
            return await asyncio.wrap_future(answer.future())
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.RayError as error:
        raise InstanceError(_first_line(error)) from None


def wait_for(answer: Any, timeout_s: float) -> Any:
    """The outcome of an actor call, from a thread that may wait. InstanceError when there is none because of Ray."""
    try:
        return ray.get(answer, timeout=timeout_s)
    except ray.exceptions.RayTaskError as error:
        raise error.as_instanceof_cause() from None
    except ray.exceptions.GetTimeoutError:
        raise InstanceError(f"the cluster did not do it within {timeout_s:g} s") from None
    except ray.exceptions.RayError as error:
        raise InstanceError(_first_line(error)) from None


def is_alive(scope: str) -> bool:
    """Whether the instance has a controller that lives, or that Ray is making anew."""
    controller = find(scope, CONTROLLER)
    if controller is None:
        return False
    try:
        ray.get(controller.pid.remote(), timeout=ASK_S)
    except ray.exceptions.ActorUnavailableError:
        return True
    except ray.exceptions.GetTimeoutError:
        return True
    except ray.exceptions.RayActorError:
        return False
    return True


def when_over(answer: Any, then: Callable[[str, bool], None]) -> None:
    """Call `then(why, for_good)` on some thread once the actor of this never-ending call is gone.

    for_good   False: Ray cannot reach it, and does not know more
    """

    def look(future: Any) -> None:
        error = None if future.cancelled() else future.exception()
        if isinstance(error, ray.exceptions.RayActorError) and not isinstance(
            error, ray.exceptions.ActorUnavailableError
        ):
            then(_cause(error), True)
        else:
            then(_first_line(error) if error else "its call ended", not isinstance(error, ray.exceptions.RayError))

    answer.future().add_done_callback(look)


def watch_controller(scope: str, then: Callable[[], None]) -> None:
    """Call `then()` on some thread once the controller is gone for good; never while it is only restarted."""

    def look(why: str, for_good: bool) -> None:
        if for_good:
            then()
        else:
            timer = threading.Timer(_AGAIN_S, watch_controller, (scope, then))
            timer.daemon = True
            timer.start()

    if not ray.is_initialized():
        return
    controller = find(scope, CONTROLLER)
    if controller is None:
        then()
    else:
        when_over(controller.forever.remote(), look)


def _cause(error: BaseException) -> str:
    """Ray's reason for an actor's death, in one line."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line.startswith("The actor is dead because")]
    return (told or [line for line in lines if line] or [type(error).__name__])[-1].removeprefix(
        "The actor is dead because "
    )


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def join_host(address: str) -> str:
    """The host part of a URL."""
    return f"[{address}]" if ":" in address else address


def exit_actor() -> None:
    """Called in an actor's method: end the actor in an orderly way."""
    ray.actor.exit_actor()


# --- how a process reaches its instance -------------------------------------------------------


class ClusterHome:
    """The home (wire/home.py) of a process that takes part in Ray.

    when_over   called on some thread once the controller is gone for good
    """

    def __init__(self, origin: Origin, when_over: Callable[[], None] | None = None) -> None:
        self.origin = origin
        self.key = f"ray:{origin.scope}"
        self.token = origin.token
        self.node = node_id()
        self.actors = RayActors(origin.scope, self.node)
        self._records = Records(origin.scope)
        self._over = False
        self._when_over = when_over
        self._told: list[Callable[[], None]] = []

    async def find(self, error: Exception | None) -> str | None:
        """Where the controller listens; None once the instance is over."""
        if error is not None:
            await asyncio.sleep(_LOOK_S)
        if self._over:
            return None
        try:
            meeting = await apart(self._records.meeting, timeout_s=KV_S)
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
            watch_controller(self.origin.scope, self._is_over)

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
    """The home of the instance whose key is "ray:<scope>". InstanceError if it does not run."""
    scope = key.partition(":")[2]
    if not ray.is_initialized():
        raise InstanceError(
            f"the instance {scope!r} runs on a Ray cluster, and this process takes part in none; "
            "call ray.init(...) first"
        )
    origin = Records(scope).origin()
    if origin is None:
        raise InstanceError(f"the instance {scope!r} does not run on this cluster any more; start a new one")
    return ClusterHome(origin)


class RayActors:
    """`handle.remote()` on Ray: the calls of actors that carry a reservation (headgate/reservations.py)."""

    def __init__(self, scope: str, node: str) -> None:
        self._scope = scope
        self._node = node
        self._replicas: dict[str, Any] = {}
        self._couriers: dict[str, Any] = {}
        self._lock = threading.Lock()

    def is_ref(self, value: object) -> bool:
        """Whether it is a ref of Ray's."""
        return isinstance(value, ray.ObjectRef)

    def serve(self, replica_id: str, token: int, data: Any, kwargs: dict[str, Any]) -> Any:
        """Call a replica with the arguments of a reserved request: the ref of its result."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            replica = ray.get_actor(replica_id, namespace=self._scope)
            if len(self._replicas) >= _KNOWN:
                self._replicas.clear()
            self._replicas[replica_id] = replica
        return replica.serve.remote(token, data, kwargs)

    def courier(
        self, key: str, endpoint: str, missing_ok: bool, options: dict[str, Any], data: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Call an endpoint with arguments that Ray resolves first: the ref of its result."""
        with self._lock:
            courier = self._couriers.get(key)
            if courier is None:
                courier = self._couriers[key] = start_courier(key, self._node)
                when_over(courier.forever.remote(), lambda why, for_good: self._drop(key, for_good))
        return courier.call.remote(endpoint, missing_ok, options, list(kwargs), data, *kwargs.values())

    def _drop(self, key: str, for_good: bool) -> None:
        if for_good:
            self._couriers.pop(key, None)

    def get(self, refs: list[Any], timeout: float | None) -> list[Any]:
        """The values. RequestTimeout after `timeout` seconds; raises what the first one ended with."""
        try:
            found: list[Any] = ray.get(refs, timeout=timeout)
        except ray.exceptions.GetTimeoutError:
            raise RequestTimeout(
                f"{len(refs)} results were not all there within {timeout:g} s; the requests go on"
            ) from None
        return found

    def wait(self, refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        """As ray.wait."""
        ready, rest = ray.wait(refs, num_returns=num_returns, timeout=timeout)
        return list(ready), list(rest)

    def cancel(self, ref: Any) -> None:
        """Give a request up."""
        ray.cancel(ref)


# --- who may connect --------------------------------------------------------------------------

_PROBE = """
import sys
from ray._raylet import GcsClient
try:
    GcsClient(address=sys.argv[1]).internal_kv_get(b"headgate", namespace=b"headgate", timeout=4)
    print("open")
except Exception as error:
    print("closed" if type(error).__name__ == "AuthenticationError" else repr(error))
"""


def answers_strangers(address: str) -> bool:
    """Whether the cluster at `address` serves a process without its token. InstanceError if it does not answer."""
    said = _probe(address, without_token=True)
    if said in ("open", "closed"):
        return said == "open"
    raise InstanceError(f"the cluster at {address} does not answer: {said}")


def check_token(address: str) -> None:
    """InstanceError if the cluster at `address` does not answer, or does not take this process's token."""
    said = _probe(address, without_token=False)
    if said == "closed":
        raise InstanceError(
            f"the cluster at {address} asks for a token, and this process has a wrong one or none: set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, before ray is imported"
        )
    if said != "open":
        raise InstanceError(f"the cluster at {address} does not answer: {said}")


def _probe(address: str, *, without_token: bool) -> str:
    import subprocess

    environment = dict(os.environ)
    if without_token:
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
        environment.update(HOME="/nonexistent", RAY_AUTH_MODE="disabled")
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE, address],
            env=environment, capture_output=True, text=True, timeout=_PROBE_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"no word within {_PROBE_S:g} s"
    return (done.stdout.strip().splitlines() or ["no answer"])[-1]


def is_loopback(address: str) -> bool:
    """Whether "host:port" leads to this machine only."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shows_token() -> bool:
    """Whether this process shows a token to the clusters that it talks to, and so to one that it started."""
    mode = ray._raylet.get_authentication_mode()
    return str(getattr(mode, "name", mode)).upper() != "DISABLED"
