"""What calls return before they are answered: ObjectRef, and get and wait for several.

A ref keeps the answer as bytes until somebody asks, and rebuilds the value on the asker's thread.
An answer that nobody asks for, error or not, is dropped in silence.

On Ray, `remote` returns refs of Ray's own: get and wait take those too.

A ref may be waited for on any thread and any event loop. The one way to wait for ever would be
to block the loop that the answer has to come through: that raises instead.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Generator, Sequence
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn, overload

from headgate.background import in_background
from headgate.calls import Call
from headgate.errors import (
    ArgumentError,
    ConfigError,
    InstanceError,
    RequestTimeout,
    SerializationError,
)
from headgate.reservations import Refs, refs_here

if TYPE_CHECKING:
    from concurrent.futures import Future


class ObjectRef:
    """The answer of `handle.remote(...)` to come.

    It may be passed to `remote` and `call` of any handle, which then get its value.
    """

    __slots__ = ("__weakref__", "_call", "_error", "_known", "_value")

    def __init__(self, call: Call) -> None:
        self._call = call
        self._known = False
        self._value: Any = None
        self._error: Exception | None = None

    def result(self, timeout: float | None = None) -> Any:
        """Block until the answer is here, and return it; raises what the handler raised.

        RequestTimeout (a TimeoutError) when `timeout` seconds pass first: the request goes on.
        """
        try:
            if not self._call.done:
                block_until(self._call, timeout)
            return self._outcome()
        finally:
            del self  # else an error raised here refers to this frame, which refers to the error

    def __await__(self) -> Generator[Any, None, Any]:
        try:
            if not self._call.done:
                yield from until_done(self._call).__await__()
            return self._outcome()
        finally:
            del self  # as in `result`

    def future(self) -> Future[Any]:
        """The answer as a concurrent.futures.Future; cancelling it cancels the request."""
        from concurrent.futures import Future

        future: Future[Any] = Future()
        self._call.on_done(lambda: in_background(partial(self._fulfil, future)))
        future.add_done_callback(lambda ended: self.cancel() if ended.cancelled() else None)
        return future

    def cancel(self) -> bool:
        """Give the request up: `result` raises RequestCancelled. False if it was answered already.

        A request that waits never runs, an `async def` handler is cancelled, a plain one runs to its
        end and its result is thrown away.
        """
        if self._call.done:
            return False
        self._call.lane.cancel(self._call)
        return True

    def _outcome(self) -> Any:
        if not self._known:
            try:
                self._value = self._call.take()
            except Exception as error:  # noqa: BLE001 - the error of the user's handler, to be raised below
                self._error = error
            self._known = True
            self._call.raw = None
        if self._error is not None:
            try:
                raise self._error.with_traceback(None)
            finally:
                del self  # as in `result`
        return self._value

    def _fulfil(self, future: Future[Any]) -> None:
        if future.set_running_or_notify_cancel():
            try:
                value = self._outcome()
            except Exception as error:  # noqa: BLE001 - as `result` would raise it
                future.set_exception(error)
            else:
                future.set_result(value)

    def __repr__(self) -> str:
        state = "done" if self._call.done else "pending"
        return f"<ObjectRef of endpoint {self._call.target.endpoint!r}, {state}>"

    def __reduce__(self) -> NoReturn:
        raise SerializationError(
            "an ObjectRef cannot leave its process: pass it to remote(...) as an argument of its own, not "
            "inside another object, or pass its value, headgate.get(ref)"
        )


@overload
def get(refs: ObjectRef, timeout: float | None = None) -> Any: ...
@overload
def get(refs: Sequence[Any], timeout: float | None = None) -> list[Any]: ...
@overload
def get(refs: Any, timeout: float | None = None) -> Any: ...
def get(refs: Any, timeout: float | None = None) -> Any:
    """The value of a ref, or the list of the values of several; blocks until all are here.

    Raises what a handler raised, and RequestTimeout (a TimeoutError) when `timeout` seconds pass
    first: the requests go on, and get may be called again. Takes refs of headgate's and of Ray's.
    """
    try:
        if isinstance(refs, ObjectRef):
            return refs.result(timeout)
        found, engine = _checked(refs, "get")
        if engine is not None:
            values = _get_both(engine, found, timeout)
            return values if isinstance(refs, Sequence) else values[0]
        if timeout is None:
            return [ref.result() for ref in found]
        until = monotonic() + timeout
        return [ref.result(max(0.0, until - monotonic())) for ref in found]
    finally:
        del refs  # as in ObjectRef.result


def _get_both(engine: Refs, refs: list[Any], timeout: float | None) -> list[Any]:
    """The values of refs of which some are the engine's own."""
    until = None if timeout is None else monotonic() + timeout
    rest = iter(engine.get([ref for ref in refs if not isinstance(ref, ObjectRef)], _in_future(timeout)))

    def value(ref: Any) -> Any:
        if isinstance(ref, ObjectRef):
            return ref.result(None if until is None else max(0.0, until - monotonic()))
        return next(rest)

    return [value(ref) for ref in refs]


def wait(refs: Sequence[Any], num_returns: int = 1, timeout: float | None = None) -> tuple[list[Any], list[Any]]:
    """Block until `num_returns` of `refs` are answered, or `timeout` seconds have passed.

    Returns (ready, not ready), both in the order of `refs`; of those that are ready at most
    `num_returns` are in the first list. An error counts as an answer. All refs are headgate's, or
    all are Ray's.
    """
    given, engine = _checked(refs, "wait")
    if len(set(given)) != len(given):
        raise ConfigError("wait needs each ref once")
    if isinstance(num_returns, bool) or not isinstance(num_returns, int) or not 1 <= num_returns <= len(given):
        raise ConfigError(f"num_returns must be an integer from 1 to the {len(given)} refs, got {num_returns!r}")
    if engine is not None:
        return _wait_for_others(engine, given, num_returns, timeout)
    if sum(ref._call.done for ref in given) < num_returns:
        _block_until_some([ref._call for ref in given], num_returns, timeout)
    ready = [ref for ref in given if ref._call.done][:num_returns]
    chosen = set(ready)
    return ready, [ref for ref in given if ref not in chosen]


def _wait_for_others(
    engine: Refs, refs: list[Any], num_returns: int, timeout: float | None
) -> tuple[list[Any], list[Any]]:
    own = next((ref for ref in refs if isinstance(ref, ObjectRef)), None)
    if own is not None:
        other = next(ref for ref in refs if not isinstance(ref, ObjectRef))
        raise ArgumentError(
            f"headgate.wait needs refs of one kind, got {_kind(own)} and {_kind(other)}; wait for each kind by itself"
        )
    return engine.wait(refs, num_returns, _in_future(timeout))


def _in_future(timeout: float | None) -> float | None:
    return None if timeout is None else max(0.0, timeout)


def _kind(ref: object) -> str:
    return f"{type(ref).__module__.partition('.')[0]}.{type(ref).__qualname__}"


def _checked(refs: Any, caller: str) -> tuple[list[Any], Refs | None]:
    """The refs, and what knows of those that are not headgate's own if there are any."""
    found = list(refs) if isinstance(refs, Sequence) and not isinstance(refs, str | bytes) else [refs]
    engine = None
    for ref in found:
        if not isinstance(ref, ObjectRef):
            engine = refs_here()
            if engine is None or not engine.is_ref(ref):
                hint = "; await the handle's remote() first" if asyncio.iscoroutine(ref) else ""
                raise ArgumentError(f"headgate.{caller} needs ObjectRefs, got {type(ref).__name__}{hint}")
    return found, engine


# --- waiting ---


def block_until(call: Call, timeout: float | None = None) -> None:
    """Block this thread until the call is done. RequestTimeout after `timeout` seconds."""
    _refuse_deadlock(call)
    lock = threading.Lock()
    lock.acquire()
    call.on_done(lock.release)
    if timeout is None:
        lock.acquire()
    elif not lock.acquire(timeout=max(0.0, min(timeout, threading.TIMEOUT_MAX))):
        call.forget(lock.release)
        raise RequestTimeout(
            f"no answer from endpoint {call.target.endpoint!r} within the {timeout:g} s that the caller waited; "
            "the request goes on"
        )


def _block_until_some(calls: list[Call], number: int, timeout: float | None) -> None:
    for call in calls:
        _refuse_deadlock(call)
    ended: SimpleQueue[None] = SimpleQueue()
    waiter = partial(ended.put, None)
    for call in calls:
        call.on_done(waiter)
    until = None if timeout is None else monotonic() + timeout
    try:
        for _ in range(number):
            ended.get(timeout=None if until is None else max(0.0, until - monotonic()))
    except Empty:
        pass
    finally:
        for call in calls:
            call.forget(waiter)


def _refuse_deadlock(call: Call) -> None:
    if not call.done and asyncio._get_running_loop() is call.lane.loop:
        raise InstanceError(
            "this would wait for ever: the answer comes through the event loop that runs here; `await` the "
            "ref instead, or use a handle with sync=True"
        )


def until_done(call: Call) -> asyncio.Future[None]:
    """A future of the running loop that is there once the call is done."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()
    if loop is call.lane.loop:
        call.on_done(partial(wake, future))
    else:
        call.on_done(partial(_wake_elsewhere, loop, future))
    return future


def wake(future: asyncio.Future[None]) -> None:
    """Set a future that may have been cancelled; on its loop."""
    if not future.done():
        future.set_result(None)


def _wake_elsewhere(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(wake, future)
    except RuntimeError:  # closed: nobody waits there any more
        pass
