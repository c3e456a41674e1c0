"""Ray: the one file that imports it.

What headgate needs of a cluster, in small functions: its nodes, named actors, a key-value store, a
process's place in it. Nothing is decided here. The engine is ray_engine.py, what runs inside the
actors is headgate/actors.py, named by a dotted path so that this layer imports neither.

Rule: no call waits longer than its own deadline. When the cluster's head is away, Ray's calls wait
without end; those that may are made on a thread that can be left behind (aside.py): with `apart` on a
loop, with `within` where a thread may wait, with `beside` where nobody waits here.

An instance has a Ray namespace of its own, "headgate-1f3a90c2" or, if it is detached,
"headgate.<namespace>", where its actors have their names.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from importlib import import_module
from typing import Any, TypeVar

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from headgate.engine import aside
from headgate.errors import ControllerUnavailable, HeadgateError, InstanceError, RequestTimeout
from headgate.wire.messages import ReplicaSpec

T = TypeVar("T")


def _know_the_same_classes() -> None:
    """Have Ray's copy of cloudpickle know the classes that ours made or packed, and the other way round.

    A class of `__main__` travels by value and is recognised where it came from, by each copy only if that one
    packed it. A replica's classes come by ours, and its results and errors go by Ray's.
    """
    ours, rays = import_module("cloudpickle.cloudpickle"), import_module("ray.cloudpickle.cloudpickle")
    for name in ("_DYNAMIC_CLASS_TRACKER_BY_CLASS", "_DYNAMIC_CLASS_TRACKER_BY_ID"):
        known = getattr(ours, name, None)
        if known is not None and hasattr(rays, name):
            known.update(getattr(rays, name))
            setattr(rays, name, known)


_know_the_same_classes()

#: The longest that a call of the key-value store may take.
KV_S = 2.0
#: The longest that any other call may take that only asks.
ASK_S = 5.0
CONTROLLER = "controller"
_KV_NAMESPACE = b"headgate"
_MANY = 10_000  # calls at a time of one actor


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


def join_host(address: str) -> str:
    """The host part of a URL.

    >>> join_host("10.0.0.7"), join_host("fd00::7")
    ('10.0.0.7', '[fd00::7]')
    """
    return f"[{address}]" if ":" in address else address


def gcs_address() -> str:
    """ "host:port" of the cluster's head."""
    return str(ray.get_runtime_context().gcs_address)


def started_here() -> bool:
    """Whether this process started the cluster that it takes part in."""
    node = getattr(ray._private.worker, "_global_node", None)
    return node is not None and bool(node.is_head())


def shows_token() -> bool:
    """Whether this process shows a token to the clusters that it talks to, and so to one that it started."""
    return bool(ray._raylet.get_authentication_mode() != ray._raylet.AuthenticationMode.DISABLED)


@contextlib.contextmanager
def _same_sigterm() -> Iterator[None]:
    """Ray sets a handler of its own for SIGTERM: the program's comes back."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def start_local() -> None:
    """A cluster of this machine alone, which ends with this process."""
    with _same_sigterm():
        ray.init(address="local", include_dashboard=False, logging_level="WARNING")


def join(address: str) -> None:
    """Take part in the cluster at `address`."""
    with _same_sigterm():
        ray.init(address=address, logging_level="WARNING")


def leave() -> None:
    """The end of `start_local` and `join`."""
    ray.shutdown()


def is_second_life() -> bool:
    """Whether Ray made this actor anew after it had died."""
    return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def resolve(address: str) -> str:
    """ "host:port" of the cluster that "auto" or an address means. InstanceError if "auto" finds none."""
    if address != "auto":
        return address
    found = ray._private.services.find_gcs_addresses()
    if not found:
        raise InstanceError("RAY_ADDRESS=auto: no Ray runs on this machine; start a node with `ray start`")
    return str(next(iter(found)))


# --- deadlines ------------------------------------------------------------------------------


def beside(function: Callable[..., T], *arguments: Any) -> Future[T]:
    """`function(*arguments)` on a thread of its own; OSError for what Ray itself raises."""
    return aside.start(_translated, function, arguments, name="headgate-ray-call")


def _translated(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    try:
        return function(*arguments)
    except ray.exceptions.RayError as error:
        raise OSError(_first_line(error)) from None


async def apart(function: Callable[..., T], *arguments: Any, timeout_s: float = ASK_S) -> T:
    """As `beside`, from a loop. TimeoutError when it takes longer: it is left behind."""
    async with asyncio.timeout(timeout_s):
        return await asyncio.wrap_future(beside(function, *arguments))


def within(function: Callable[..., T], *arguments: Any, timeout_s: float = ASK_S) -> T:
    """As `beside`, from a thread that may wait. ControllerUnavailable when there is no answer in time."""
    return result_of(beside(function, *arguments), timeout_s)


def result_of(answer: Future[T], timeout_s: float = ASK_S) -> T:
    """What a call of `beside` gave. ControllerUnavailable when there is no answer in time."""
    try:
        return answer.result(timeout_s)
    except HeadgateError:
        raise
    except TimeoutError:
        raise away(f"no word within {timeout_s:g} s") from None
    except (OSError, RuntimeError) as error:
        raise away(_first_line(error)) from None


def away(what: str) -> ControllerUnavailable:
    """The error of whoever needs the cluster's head while it is away."""
    return ControllerUnavailable(
        f"the head of the Ray cluster does not answer ({what}); try again when it is back, `ray status` tells. What "
        "runs goes on serving, over HTTP and by handle.call()"
    )


# --- the key-value store ----------------------------------------------------------------------


def kv(method: str, *arguments: Any) -> Any:
    """Ray's `internal_kv_<method>` in headgate's key-value namespace. OSError when the head does not answer in time."""
    client = ray._private.worker.global_worker.gcs_client
    try:
        return getattr(client, f"internal_kv_{method}")(*arguments, namespace=_KV_NAMESPACE, timeout=KV_S)
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


def start_controller(origin: bytes, scope: str, node: str, *, detached: bool) -> Any:
    """Start an instance's controller, on that node if it lives; None if there is one already. InstanceError."""
    try:
        return (
            _class("headgate.actors:ControllerActor")
            .options(
                name=CONTROLLER,
                namespace=scope,
                lifetime="detached" if detached else None,
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=_MANY,
                scheduling_strategy=_on(node, soft=True),
            )
            .remote(origin)
        )
    except ray.exceptions.ActorAlreadyExistsError:
        return None
    except (ValueError, ray.exceptions.RayError) as error:
        raise InstanceError(_first_line(error)) from None


def start_agent(origin: bytes, scope: str, name: str, node: str) -> Any:
    """The agent of `node`, started if there is none. Ray restarts it by itself."""
    return (
        _class("headgate.actors:AgentActor")
        .options(
            name=name,
            namespace=scope,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=_MANY,
            scheduling_strategy=_on(node, soft=False),
        )
        .remote(origin)
    )


def start_replica(origin: bytes, scope: str, name: str, id: str, spec: ReplicaSpec) -> Any:
    """Start a replica of `spec`, whose resources are the user's ray_actor_options."""
    return (
        _class("headgate.actors:ReplicaActor")
        .options(
            **{"num_cpus": 1, **spec.resources},
            name=name,
            namespace=scope,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=_MANY,
        )
        .remote(origin, id, spec.backend)
    )


def start_courier(key: str, node: str) -> Any:
    """An actor of this process's own that makes calls whose arguments Ray has to resolve first."""
    return (
        _class("headgate.actors:CourierActor")
        .options(num_cpus=0, max_concurrency=_MANY, scheduling_strategy=_on(node, soft=True))
        .remote(key)
    )


def find(scope: str, name: str) -> Any:
    """The actor of that name, None if there is none. It may have died lately: Ray remembers it for a while."""
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
    if not ray.is_initialized():  # it was, and what this process started has ended with it
        return
    with contextlib.suppress(ray.exceptions.RayError, ValueError):
        ray.kill(actor, no_restart=True)


def kill_me(scope: str, name: str) -> None:
    """End the actor of that name, which this process is; from any of its threads."""
    actor = find(scope, name)
    if actor is not None:
        kill(actor)


def exit_actor() -> None:
    """Called in an actor's method: end the actor in an orderly way."""
    ray.actor.exit_actor()


def kill_process(node: str, pid: int) -> None:
    """SIGKILL to a process of a node that Ray holds for dead but that is only stopped."""
    ray.remote(_kill_process).options(num_cpus=0, max_retries=0, scheduling_strategy=_on(node, soft=False)).remote(pid)


def _kill_process(pid: int) -> None:
    with contextlib.suppress(OSError):
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            if file.read().startswith(b"ray::"):
                os.kill(pid, 9)


# --- calls of actors, and their ends ---------------------------------------------------------


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
    """Whether the instance has a controller that lives, or that Ray is making anew.

    True also if the cluster's head does not answer: nobody can tell then.
    """
    try:
        controller = within(find, scope, CONTROLLER)
    except ControllerUnavailable:
        return True
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


def cancel(answer: Any) -> None:
    """Nobody waits for this actor call any more. One that is not answered keeps a worker from an orderly end."""
    if ray.is_initialized():  # else nobody does by that
        ray.cancel(answer)


def _cause(error: BaseException) -> str:
    """Ray's reason for an actor's death, in one line, without its guesses at what may be behind it."""
    lines = [line.strip() for line in str(error).splitlines()]
    told = [line for line in lines if line.startswith("The actor is dead because")]
    line = (told or [line for line in lines if line] or [type(error).__name__])[-1]
    if "connection error code 2" in line or "Worker unexpectedly exits" in line:
        return "its process ended unexpectedly: killed, out of memory, or crashed; Ray's log of the worker may say more"
    if "killed by `ray.kill`" in line:
        return "killed by ray.kill"
    return line.removeprefix("The actor is dead because ").partition(" Some common causes include")[0]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


# --- refs ---------------------------------------------------------------------------------------


def is_ref(value: object) -> bool:
    """Whether it is a ref of Ray's."""
    return isinstance(value, ray.ObjectRef)


def get(refs: list[Any], timeout: float | None) -> list[Any]:
    """The values. RequestTimeout after `timeout` seconds.

    Raises what the first one ended with: the user's own exception, with Ray's, which tells where it came from,
    as its cause.
    """
    try:
        found: list[Any] = ray.get(refs, timeout=timeout)
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None)
        if not isinstance(cause, Exception):
            raise
        raise cause from error
    except ray.exceptions.GetTimeoutError:
        raise RequestTimeout(
            f"{len(refs)} results were not all there within {timeout:g} s; the requests go on"
        ) from None
    return found


def wait(refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
    """As ray.wait."""
    ready, rest = ray.wait(refs, num_returns=num_returns, timeout=timeout)
    return list(ready), list(rest)
