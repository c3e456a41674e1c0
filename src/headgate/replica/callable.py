"""A backend's code: packed by the driver, loaded and looked into by the replica.

A function or class travels as a cloudpickle: by reference if its module can be imported, by
value if not (`__main__`, notebooks, local functions); an import path travels as its text. The
driver's `sys.path` and working directory stand outside of the pickle, because they have to be
in force before it is read.

`load` never runs the constructor: `LoadedCallable.construct` does, on the thread that the worker
chooses. What user code raises while it starts becomes a BackendStartError with its traceback
here and nowhere else. What a callable is for is found out in shape.py; calls are made by worker.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import pickle
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from headgate.config import accept_batch
from headgate.core.state import Facts
from headgate.errors import (
    ArgumentError,
    BackendStartError,
    ConfigError,
    EndpointNotFound,
    HeadgateError,
    SerializationError,
)
from headgate.replica import shape
from headgate.wire.payload import error_text

_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*(:[^\W\d]\w*(\.[^\W\d]\w*)*|\.[^\W\d]\w*)").fullmatch
#: Files whose frames tell a user nothing.
_OWN_FRAMES = (os.path.dirname(os.path.dirname(__file__)) + os.sep, importlib.__file__, "<frozen importlib")


class Code(msgspec.Struct, frozen=True, array_like=True):
    """A backend's code on its way: `pickled` holds (object or None, init_args).

    A function that was marked with accept_batch elsewhere than in its own module is marked again
    where it is loaded, as it may travel by reference.
    """

    name: str
    path: str | None
    sys_path: list[bytes]  # bytes, as file names need not be Unicode
    cwd: bytes
    pickled: bytes
    accepts_batch: bool = False


class Method(msgspec.Struct, frozen=True):
    """Something to be called for requests.

    function        takes one request, a list of them (`accepts_batch`), or nothing (not `takes_request`);
                    if `is_async`, what it returns is to be awaited
    """

    name: str
    function: Callable[..., Any]
    is_async: bool
    accepts_batch: bool
    takes_request: bool


# -- In the driver ----------------------------------------------------------------------------------


def pack(target: object, init_args: tuple[object, ...] = ()) -> tuple[bytes, Facts | None]:
    """A backend's code as bytes, and what is known of it (nothing yet of an import path).

    Raises ArgumentError (neither function nor class nor import path; not callable with one request),
    ConfigError (init args on a function) and SerializationError (does not pickle).
    """
    if isinstance(target, str):
        if _PATH(target) is None:
            raise ArgumentError(f'backend code {target!r} is no import path; write "module:name"')
        name, path, facts = target, target, None
    else:
        check_code(target, init_args)
        name, path, facts = shape.name_of(target), None, facts_of(target)
    try:
        cwd = os.getcwd()
    except FileNotFoundError:  # it was deleted
        cwd = "/"
    code = Code(
        name=name,
        path=path,
        sys_path=[os.fsencode(os.path.join(cwd, entry)) for entry in sys.path],
        cwd=os.fsencode(cwd),
        pickled=_pickle((None if path else target, tuple(init_args)), name),
        accepts_batch=facts is not None and facts.accepts_batch,
    )
    return msgspec.msgpack.encode(code), facts


def check_code(target: object, init_args: tuple[object, ...] = ()) -> None:
    """The errors of `pack` for an object that is there; also used for what an import path led to."""
    if not callable(target):
        raise ArgumentError(
            f"backend code must be a function, a class or an import path, got {type(target).__name__}"
        )
    if isinstance(target, type):
        stored = shape.own(target, "__call__")
        if stored is None and not shape.public_methods(target):
            raise ArgumentError(
                f"backend class {shape.name_of(target)!r} has no __call__(self, request) and no other method that a "
                "request could call; define one"
            )
        has_self = hasattr(type(stored), "__get__") and not isinstance(stored, staticmethod | classmethod)
        if stored is not None and shape.takes_request(target.__call__, extra=int(has_self)) is None:
            raise ArgumentError(_cannot_be_called(f"{shape.name_of(target)}.__call__"))
        return
    if init_args:
        raise ConfigError(
            f"backend code {shape.name_of(target)!r} is a function, which takes no init args; got {len(init_args)}"
        )
    if shape.takes_request(target) is None:
        raise ArgumentError(_cannot_be_called(shape.name_of(target)))


def facts_of(target: Any) -> Facts:
    """What a function or class tells about itself; of a class, `__call__`'s kind counts."""
    if isinstance(target, type):
        target = shape.own(target, "__call__")
        target = getattr(target, "__func__", target)  # static and class methods
    return Facts(is_async=shape.is_async(target), accepts_batch=shape.is_batched(target))


def _cannot_be_called(name: str) -> str:
    return (
        f"backend code {name!r} must be callable with one positional argument, the request; "
        "give further parameters a default"
    )


def _pickle(value: tuple[object, tuple[object, ...]], name: str) -> bytes:
    import cloudpickle  # 10 ms; never needed in the proxy or the controller

    try:
        return cloudpickle.dumps(value, protocol=5)  # type: ignore[no-any-return]
    except HeadgateError:
        raise
    except Exception as error:  # whatever a captured object's __reduce__ raises
        raise SerializationError(
            f"backend code {name!r} or its init args cannot be sent to a replica ({error_text(error)}); "
            "open files, locks and connections belong in the constructor"
        ) from error


# -- In the replica ---------------------------------------------------------------------------------


def load(blob: bytes) -> LoadedCallable:
    """The code that `pack` made, imported or unpickled, in the driver's `sys.path` and directory.

    Raises BackendStartError (naming the module if one is missing, with the traceback), and the
    errors of `check_code` for what an import path leads to.
    """
    code = msgspec.msgpack.decode(blob, type=Code)
    _enter(code)
    try:
        target, init_args = pickle.loads(code.pickled)
        if code.path is not None:
            target = _import(code.path)
    except BackendStartError:
        raise
    except ModuleNotFoundError as error:
        what = f"backend code {code.name!r} needs the module {error.name!r}, which the replica cannot find"
        raise start_error(what, error) from error
    except BaseException as error:  # a module's top level may raise anything, SystemExit too
        raise start_error(f"backend code {code.name!r} cannot be loaded", error) from error
    check_code(target, init_args)
    if code.accepts_batch and inspect.isfunction(target):
        accept_batch(target)
    return LoadedCallable(target, init_args, code.name)


def start_error(what: str, error: BaseException) -> BackendStartError:
    """`what`, the exception, and the user's traceback, as one error."""
    return BackendStartError(f"{what}: {error_text(error)}\n\n{user_traceback(error)}")


class LoadedCallable:
    """A backend's function or class in its replica. For a class, `construct` comes first.

    facts     as `facts_of`
    """

    def __init__(self, target: Any, init_args: tuple[Any, ...], name: str) -> None:
        self.name = name
        self.facts = facts_of(target)
        self.is_class = isinstance(target, type)
        self.instance: Any = None if self.is_class else target
        self._target = target
        self._init_args = init_args
        self._methods: dict[str, Method] = {}

    @property
    def has_reconfigure(self) -> bool:
        """Whether the class has a `reconfigure`."""
        return self._has("reconfigure")

    @property
    def has_check_health(self) -> bool:
        """Whether the class has a `check_health`."""
        return self._has("check_health")

    @property
    def is_callable(self) -> bool:
        """Whether there is a `__call__`; a class may have other methods only."""
        return self._has("__call__")

    def construct(self) -> None:
        """Build the instance of a class; BackendStartError with the traceback of what it raises."""
        if not self.is_class:
            return
        try:
            self.instance = self._target(*self._init_args)
        except BaseException as error:  # SystemExit must not end the replica
            raise start_error(f"the constructor of backend code {self.name!r} raised", error) from error

    def hook(self, name: str) -> Method | None:
        """`reconfigure` or `check_health`, or None if the class has none."""
        return self._describe(name) if name in shape.HOOKS and self._has(name) else None

    def method(self, name: str | None = None) -> Method:
        """The method that a request asks for, `__call__` by default.

        Raises EndpointNotFound (404) for one that is not there or not for requests: `_private`,
        `reconfigure`, `check_health`, properties, and whatever only the instance holds.
        """
        known = self._methods.get(name or "__call__")
        if known is not None:
            return known
        name = name or "__call__"
        if (name.startswith("_") and name != "__call__") or name in shape.HOOKS or not self._has(name):
            raise EndpointNotFound(
                f"backend code {self.name!r} has no method {name!r} that a request may call; "
                + ("define it in the class" if self.is_class else "it is a function, leave the method out")
            )
        self._methods[name] = method = self._describe(name)
        return method

    def _has(self, name: str) -> bool:
        if not self.is_class:
            return name == "__call__"
        found = shape.own(self._target, name)
        callables = (staticmethod, classmethod, functools.partialmethod)
        return isinstance(found, callables) or (callable(found) and not isinstance(found, type))

    def _describe(self, name: str) -> Method:
        function = getattr(self.instance, name) if self.is_class else self.instance
        is_async = shape.is_async(function)
        returns_coroutine = inspect.iscoroutinefunction(function)
        return Method(
            name=name,
            function=shape.awaitable(function) if is_async and not returns_coroutine else function,
            is_async=is_async,
            accepts_batch=shape.is_batched(function),
            takes_request=shape.takes_request(function) is not False,
        )


def user_traceback(error: BaseException) -> str:
    """The traceback as text, its causes included, without headgate's own frames."""
    shown = traceback.TracebackException.from_exception(error)
    pending = [shown]
    while pending:  # a tree: each exception is in it once
        part = pending.pop()
        part.stack[:] = [f for f in part.stack if not f.filename.startswith(_OWN_FRAMES)] or part.stack[-1:]
        pending += [each for each in (part.__cause__, part.__context__, *(part.exceptions or ())) if each]
    return "".join(shown.format()).rstrip("\n")


def _enter(code: Code) -> None:
    """Make the driver's import path and working directory this process's own."""
    sys.path[:] = list(dict.fromkeys([*map(os.fsdecode, code.sys_path), *sys.path]))
    with contextlib.suppress(OSError):  # on another node the directory may not exist
        os.chdir(code.cwd)
    importlib.invalidate_caches()


def _import(path: str) -> Any:
    module_name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    target: Any = importlib.import_module(module_name)
    for name in attribute.split("."):
        if not hasattr(target, name):
            raise BackendStartError(
                f"backend code {path!r}: module {module_name!r} ({getattr(target, '__file__', None)}) "
                f"has no {attribute!r}"
            )
        target = getattr(target, name)
    return target
