"""Handles: an endpoint, called from Python.

A sync handle may be used on any thread; its requests go through the headgate thread. An async
handle sends from the loop that it is used on. Both are immutable: `options` returns a new one.

A handle pickles. Where it is unpickled it finds its instance again when it is first used: in a
replica by the replica's own membership, elsewhere by joining.

What travels is calls.py, reservations.py where replicas are actors; what `remote` returns is refs.py.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from headgate.arguments import PLAIN, any_ref, has_refs, is_own, settle, settle_here, submit_with_refs
from headgate.calls import Call, Options, Target
from headgate.errors import ArgumentError, ConfigError
from headgate.lanes import Lane, no_endpoint
from headgate.reach import Reach
from headgate.refs import ObjectRef, block_until, wake
from headgate.reservations import Actors, Reservation, claim, send_courier

if TYPE_CHECKING:
    from headgate.instance import Instance

log = logging.getLogger("headgate.handle")

_KEEP: Any = object()
_H = TypeVar("_H", bound="_Handle")


class _Handle:
    """What both kinds of handles share."""

    __slots__ = ("_reach", "_target")

    def __init__(self, reach: Reach, target: Target) -> None:
        self._reach = reach
        self._target = target

    @property
    def endpoint_name(self) -> str:
        """The endpoint that this handle calls."""
        return self._target.endpoint

    def options(
        self: _H,
        *,
        method_name: str | None = _KEEP,
        shard_key: str | None = _KEEP,
        http_method: str | None = _KEEP,
        http_headers: dict[str, str] | None = _KEEP,
        timeout_s: float | None = _KEEP,
    ) -> _H:
        """A handle that calls with these options; what is not named stays as it is here.

        method_name    the method of the backend's class, instead of `__call__`
        shard_key      requests of one key go to the same backend of the endpoint's traffic
        http_method    the request's `method`, "GET" if nothing is said
        http_headers   the request's `headers`
        timeout_s      then the call raises RequestTimeout; one that still waits is never started
        """
        given = {
            "method_name": method_name, "shard_key": shard_key, "http_method": http_method,
            "http_headers": http_headers, "timeout_s": timeout_s,
        }  # fmt: skip
        changes = {name: _check(name, value) for name, value in given.items() if value is not _KEEP}
        options = msgspec.structs.replace(self._target.options, **changes)
        return type(self)(self._reach, Target(self._target.endpoint, self._target.missing_ok, options))

    def __repr__(self) -> str:
        return f"{type(self).__name__}(endpoint={self._target.endpoint!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        target = self._target
        known = (target.endpoint, target.missing_ok, msgspec.structs.asdict(target.options))
        return _unpickled, (type(self), *known, self._reach.key)


class ServeHandle(_Handle):
    """Calls an endpoint and blocks; on any thread, many at a time."""

    __slots__ = ()

    def remote(self, data: Any = None, /, **kwargs: Any) -> Any:
        """Send a request; returns once a replica is assigned, the ref of its answer.

        On the local engine that is a headgate.ObjectRef, on Ray a ray.ObjectRef: headgate.get and
        headgate.wait take both.

        The handler finds `data` as `request.data`, the keyword arguments as `request.query_params`.
        A ref among the arguments is replaced by its value first; `remote` then returns at once.
        (On Ray it waits for refs of an instance on the local engine.)

        Raises what keeps the request from being assigned: EndpointNotFound, BackendOverloaded,
        RequestTimeout, SerializationError, InstanceError.
        """
        lane = self._reach.lane_of_thread()
        if lane.actors is not None:
            return self._reserve(lane, lane.actors, data, kwargs)
        call, sent = self._start(lane, data, kwargs)
        if not sent:
            _assign(call)
        return ObjectRef(call)

    def _reserve(self, lane: Lane, actors: Actors, data: Any, kwargs: dict[str, Any]) -> Any:
        """`remote` where replicas are actors."""
        call = Reservation(lane, self._target)
        if has_refs(data, kwargs):
            data, kwargs = settle(call, is_own, data, kwargs)
        if any_ref(actors.is_ref, data, kwargs):
            return send_courier(actors, self._reach.key, self._target, data, kwargs)
        call.fill(_portable(data) if _is_request(data) else data, kwargs)
        _assign(call)
        return claim(actors, call)

    def call(self, data: Any = None, /, **kwargs: Any) -> Any:
        """Send a request and return its answer; raises what the handler raised. Arguments as `remote`'s."""
        call, sent = self._start(self._reach.lane_of_thread(), data, kwargs)
        if sent:
            try:
                block_until(call)
            except KeyboardInterrupt:
                call.lane.cancel(call)
                raise
        else:
            lock = threading.Lock()
            lock.acquire()
            call.on_done(lock.release)
            call.lane.put(call)
            _acquire(lock, call)
        return call.take()

    def _start(self, lane: Lane, data: Any, kwargs: dict[str, Any]) -> tuple[Call, bool]:
        """A call to be submitted; True: it is on its way already, since it waits for refs."""
        call = Call(lane, self._target)
        if not kwargs and type(data) in PLAIN:
            call.fill(data, kwargs)
            return call, False
        if lane.actors is not None and any_ref(lane.actors.is_ref, data, kwargs):
            data, kwargs = settle(call, lane.actors.is_ref, data, kwargs)
        if has_refs(data, kwargs):
            submit_with_refs(call, data, kwargs)
            return call, True
        call.fill(_portable(data) if _is_request(data) else data, kwargs)
        return call, False


class AsyncServeHandle(_Handle):
    """Calls an endpoint from an event loop, any that runs: `await handle.remote(...)`."""

    __slots__ = ()

    async def remote(self, data: Any = None, /, **kwargs: Any) -> Any:
        """As ServeHandle.remote; await the ref that it returns for the answer."""
        lane = await self._reach.lane_here()
        if _is_request(data):
            data = await _with_body(data)
        if lane.actors is not None:
            return await self._reserve(lane, lane.actors, data, kwargs)
        call = Call(lane, self._target)
        self._start(call, data, kwargs)
        await _assigned(call)
        return ObjectRef(call)

    async def _reserve(self, lane: Lane, actors: Actors, data: Any, kwargs: dict[str, Any]) -> Any:
        """`remote` where replicas are actors."""
        call = Reservation(lane, self._target)
        if has_refs(data, kwargs):
            data, kwargs = await settle_here(call, is_own, data, kwargs)
        if any_ref(actors.is_ref, data, kwargs):
            return await asyncio.to_thread(send_courier, actors, self._reach.key, self._target, data, kwargs)
        call.fill(data, kwargs)
        lane.submit(call)
        await _assigned(call)
        return claim(actors, call)

    async def call(self, data: Any = None, /, **kwargs: Any) -> Any:
        """Send a request and return its answer; as ServeHandle.call. Cancelling it cancels the request."""
        lane = self._reach.lane_at_hand() or await self._reach.lane_here()
        call = lane.awaited(self._target)
        if kwargs or type(data) not in PLAIN:
            await self._send(call, lane, data, kwargs)
        else:
            call.fill(data, kwargs)
            lane.submit(call)
        if not call.done:
            try:
                await call
            except asyncio.CancelledError:
                lane.cancel(call)
                raise
        return call.take()

    async def _send(self, call: Call, lane: Lane, data: Any, kwargs: dict[str, Any]) -> None:
        """Fill and submit a call with arguments that may have to be waited for."""
        if _is_request(data):
            data = await _with_body(data)
        if lane.actors is not None and any_ref(lane.actors.is_ref, data, kwargs):
            data, kwargs = await settle_here(call, lane.actors.is_ref, data, kwargs)
        self._start(call, data, kwargs)

    def _start(self, call: Call, data: Any, kwargs: dict[str, Any]) -> None:
        if has_refs(data, kwargs):
            submit_with_refs(call, data, kwargs)
        else:
            call.fill(data, kwargs)
            call.lane.submit(call)


def make_handle(
    instance: Instance, endpoint: str, missing_ok: bool = False, sync: bool = True
) -> ServeHandle | AsyncServeHandle:
    """A handle of `endpoint`. EndpointNotFound, a KeyError, if it is not there and that is not ok."""
    if not isinstance(endpoint, str):
        raise ArgumentError(f"endpoint must be a str, got {type(endpoint).__name__}")
    instance.follow()
    if not missing_ok and instance.endpoint(endpoint) is None:
        raise no_endpoint(instance, endpoint)
    _warn_of_context(endpoint, sync)
    kind = ServeHandle if sync else AsyncServeHandle
    return kind(Reach(instance.key, instance), Target(endpoint, missing_ok, Options()))


def _unpickled(kind: type[_H], endpoint: str, missing_ok: bool, options: dict[str, Any], key: str) -> _H:
    return kind(Reach(key), Target(endpoint, missing_ok, Options(**options)))


def _warn_of_context(endpoint: str, sync: bool) -> None:
    in_loop = asyncio._get_running_loop() is not None
    if sync and in_loop:
        log.warning(
            "the handle of endpoint %r is a sync one, made where an event loop runs: its calls block that "
            "loop; get_handle(..., sync=False) gives one to await",
            endpoint,
        )
    elif not sync and not in_loop:
        log.warning(
            "the handle of endpoint %r is an async one, made where no event loop runs: its calls must be "
            "awaited; get_handle(..., sync=True) gives one for plain code",
            endpoint,
        )


def _check(name: str, value: Any) -> Any:
    if value is None:
        return None
    if name == "timeout_s":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArgumentError(f"timeout_s must be a number of seconds, got {type(value).__name__}")
        if not 0 < value < float("inf"):
            raise ConfigError(f"timeout_s must be a number of seconds > 0, got {value}")
        return float(value)
    if name == "http_headers":
        fits = isinstance(value, dict) and all(isinstance(each, str) for pair in value.items() for each in pair)
        if not fits:
            raise ArgumentError(f"http_headers must be a dict of str to str, got {value!r}")
        return dict(value)
    if not isinstance(value, str):
        raise ArgumentError(f"{name} must be a str, got {type(value).__name__}")
    return value


def _assign(call: Call) -> None:
    """Submit a call from a thread and wait until it is assigned; raises what keeps it from that."""
    lock = threading.Lock()
    lock.acquire()
    call.on_assignment = lock.release
    call.lane.put(call)
    _acquire(lock, call)
    if not call.assigned:
        call.take()


async def _assigned(call: Call) -> None:
    """As `_assign`, for a call that was submitted on this loop."""
    if not (call.assigned or call.done):
        future = call.lane.loop.create_future()
        call.on_assignment = partial(wake, future)
        try:
            await future
        except asyncio.CancelledError:
            call.lane.cancel(call)
            raise
    if not call.assigned:
        call.take()


def _acquire(lock: threading.Lock, call: Call) -> None:
    """Wait for the lock; a Ctrl-C meanwhile gives the call up."""
    try:
        lock.acquire()
    except KeyboardInterrupt:
        call.lane.cancel(call)
        raise


def _is_request(data: object) -> bool:
    """Whether it is a Starlette Request; Starlette is not imported to find out that it is not."""
    requests = sys.modules.get("starlette.requests")
    return requests is not None and isinstance(data, requests.Request)


async def _with_body(request: Any) -> Any:
    await request.body()
    return _portable(request)


def _portable(request: Any) -> Any:
    from headgate.replica.request import portable

    return portable(request)
