"""Refs among the arguments of a call: what is called gets their values.

headgate's own refs delay the call on the way (`submit_with_refs`), so that `remote` returns at
once. Refs of the engine are resolved before the call is made (`settle`), or by a courier
(reservations.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from time import monotonic
from typing import Any

from headgate.background import in_background
from headgate.calls import Call
from headgate.errors import HeadgateError, InstanceError, RequestTimeout
from headgate.refs import ObjectRef, get

#: Types of data that are neither refs nor requests.
PLAIN = frozenset((type(None), bool, int, float, str, bytes, bytearray, list, tuple, dict))

_LATE = "the request passed its deadline while it waited for its arguments"


def has_refs(data: object, kwargs: dict[str, Any]) -> bool:
    """Whether an argument is a ref of headgate's own, so that the call has to wait for it."""
    return isinstance(data, ObjectRef) or (
        bool(kwargs) and any(isinstance(value, ObjectRef) for value in kwargs.values())
    )


# --- on the way ---


def submit_with_refs(call: Call, data: Any, kwargs: dict[str, Any]) -> None:
    """Submit `call` once every ref among its arguments has its value; returns at once.

    If one ends with an error, so does the call.
    """
    call.assigned = True  # nobody waits for that
    refs = [ref for ref in (data, *kwargs.values()) if isinstance(ref, ObjectRef)]
    if all(ref._call.done for ref in refs):
        _fill_and_submit(call, data, kwargs)
        return
    if call.expires is not None:
        call.lane.run(call.lane.expire, call)
    _when_done(refs, partial(in_background, partial(_fill_and_submit, call, data, kwargs)))


def _when_done(refs: list[ObjectRef], then: Callable[[], object]) -> None:
    while refs:
        if not refs[-1]._call.done:
            refs[-1]._call.on_done(partial(_when_done, refs, then))
            return
        refs.pop()
    then()


def _fill_and_submit(call: Call, data: Any, kwargs: dict[str, Any]) -> None:
    try:
        raw = data._call.pass_on() if isinstance(data, ObjectRef) and not kwargs else None
        if raw is not None:
            call.fill_encoded(raw)  # passed on as it came, never rebuilt here
        else:
            call.fill(_value(data), {name: _value(value) for name, value in kwargs.items()})
        call.lane.put(call)
    except HeadgateError as error:
        try:
            call.lane.run(call.on_failure, error)
        except InstanceError:  # that loop has ended, and nobody there to be told
            call.on_failure(error)


def _value(argument: Any) -> Any:
    return argument._outcome() if isinstance(argument, ObjectRef) else argument


# --- before ---

IsRef = Callable[[Any], bool]


def is_own(value: object) -> bool:
    """Whether it is a ref of headgate's own."""
    return isinstance(value, ObjectRef)


def any_ref(is_ref: IsRef, data: Any, kwargs: dict[str, Any]) -> bool:
    """Whether an argument is such a ref."""
    return is_ref(data) or (bool(kwargs) and any(map(is_ref, kwargs.values())))


def settle(call: Call, is_ref: IsRef, data: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The arguments with such refs replaced by their values; blocks until all are here.

    Raises what a ref ends with, and RequestTimeout at the call's deadline.
    """
    found = [value for value in (data, *kwargs.values()) if is_ref(value)]
    try:
        values = get(found, _remaining(call))
    except RequestTimeout:
        if _is_late(call):
            raise RequestTimeout(_LATE) from None
        raise
    return _replaced(is_ref, data, kwargs, values)


async def settle_here(call: Call, is_ref: IsRef, data: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """As `settle`, awaiting them on the running loop."""
    try:
        async with asyncio.timeout(_remaining(call)) as limit:
            values = [await value for value in (data, *kwargs.values()) if is_ref(value)]
    except TimeoutError:
        if limit.expired():
            raise RequestTimeout(_LATE) from None
        raise
    return _replaced(is_ref, data, kwargs, values)


def _remaining(call: Call) -> float | None:
    return None if call.expires is None else call.expires - monotonic()


def _is_late(call: Call) -> bool:
    return call.expires is not None and call.expires <= monotonic()


def _replaced(is_ref: IsRef, data: Any, kwargs: dict[str, Any], values: list[Any]) -> tuple[Any, dict[str, Any]]:
    rest = iter(values)
    first, *others = [next(rest) if is_ref(value) else value for value in (data, *kwargs.values())]
    return first, dict(zip(kwargs, others, strict=True))
