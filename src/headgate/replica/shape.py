"""What a callable is: async or plain, batched or not, with a request or without; and a class's methods.

Looks through what wraps it: partials, bound methods, decorators that used functools.wraps.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

from headgate.config import accepts_batch

#: Methods that headgate calls, and requests do not.
HOOKS = ("reconfigure", "check_health")


def own(kind: type, name: str) -> Any:
    """The attribute as it stands in the class or a base of it; nothing of the metaclass, nothing bound."""
    for base in kind.__mro__:
        if name in base.__dict__:
            return base.__dict__[name]
    return None


def public_methods(kind: type) -> list[str]:
    """The methods of a class that requests could call."""
    names = {name for base in kind.__mro__[:-1] for name in base.__dict__ if not name.startswith("_")}
    return [name for name in names if name not in HOOKS and callable(getattr(kind, name, None))]


def _layers(target: Any) -> list[Any]:
    """A callable and what it wraps: partials, bound methods, functools.wraps, objects with `__call__`."""
    layers: list[Any] = []
    while target is not None and not any(target is layer for layer in layers):
        layers.append(target)
        inner = inspect.getattr_static(target, "__wrapped__", None)
        if isinstance(target, functools.partial | functools.partialmethod):
            inner = target.func
        elif isinstance(target, staticmethod | classmethod | types.MethodType):
            inner = target.__func__
        elif inner is None and not inspect.isroutine(target) and not isinstance(target, type):
            inner = own(type(target), "__call__")
        target = inner
    return layers


def is_async(target: Any) -> bool:
    """Whether what it returns is to be awaited, or iterated over with `async for`."""
    return any(inspect.iscoroutinefunction(layer) or inspect.isasyncgenfunction(layer) for layer in _layers(target))


def is_batched(target: Any) -> bool:
    """Whether it was marked with accept_batch."""
    return any(accepts_batch(layer) for layer in _layers(target))


def takes_request(target: Any, extra: int = 0) -> bool | None:
    """Whether to call it with a request; None if it can be called neither with one nor without.

    extra     how many arguments come before the request
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # some builtins do not tell
        return True
    for count, answer in ((1, True), (0, False)):
        try:
            signature.bind(*(None,) * (count + extra))
        except TypeError:
            continue
        return answer
    return None


def awaitable(function: Callable[..., Any]) -> Callable[..., Any]:
    """A plain wrapper of an `async def`, or an async generator function, as one that can be awaited."""

    async def call(*arguments: Any) -> Any:
        result = function(*arguments)
        return await result if inspect.isawaitable(result) else result

    return call


def name_of(target: Any) -> str:
    """What people call it."""
    return getattr(target, "__qualname__", None) or type(target).__qualname__
