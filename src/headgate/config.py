"""What users may set: every field with its default, its limits and its unit.

A field is one line in the body of its class, `name = Field(default, check, unit)`. It is checked
when it is set, so that an object of these classes never holds a value that cannot be used, and
each error names the field. Adding a field is adding its line.

Defaults that depend on the backend's code (`max_concurrent_queries`) stay None here;
core/goals.py resolves them.
"""

from __future__ import annotations

import enum
import math
import numbers
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Generic, TypeVar, overload

from headgate.errors import ArgumentError, ConfigError

__all__ = [
    "BackendConfig",
    "DeploymentMode",
    "HTTPOptions",
    "accept_batch",
    "accepts_batch",
    "as_backend_config",
    "as_http_options",
    "check_env",
    "check_ray_actor_options",
]

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])

#: Values cross processes as msgpack, whose integers have 64 bits.
MAX_INTEGER = 2**63 - 1
KIB, MIB, GIB = 2**10, 2**20, 2**30
_MARK = "__headgate_accept_batch__"
_VISIBLE = re.compile("[!-~]+").fullmatch


class DeploymentMode(enum.StrEnum):
    """On which nodes a proxy runs."""

    NoServer = "NoServer"
    HeadOnly = "HeadOnly"
    EveryNode = "EveryNode"

    def __repr__(self) -> str:
        return f"DeploymentMode.{self.name}"


# -- Checks: the value as it is kept, or `_Refused` with what is wanted instead. --------------------


class _Refused(Exception):
    """A check's verdict; its text completes "must be ..."."""


Check = Callable[[object], T]


def _number(value: object) -> int | float | None:
    """The finite number that `value` is or spells, else None. A bool is not a number."""
    if isinstance(value, numbers.Integral):
        return None if isinstance(value, bool) else int(value)
    if not isinstance(value, (str, numbers.Real)):
        return None
    try:
        return int(value) if isinstance(value, str) else _finite(value)
    except ValueError:
        return _finite(value)


def _finite(value: Any) -> float | None:
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def integer(low: int, high: int | None = None) -> Check[int]:
    """Accepts whole numbers of low..high, both included."""
    top = MAX_INTEGER if high is None else high
    both = f"an integer from {low} to {top}"
    wants = f"an integer >= {low}" if high is None else both

    def check(value: object) -> int:
        found = _number(value)
        if found is None or found != int(found) or found < low:
            raise _Refused(wants)
        if found > top:
            raise _Refused(both)
        return int(found)

    return check


def positive(value: object) -> float:
    found = _finite(_number(value) or 0)
    if found is None or found <= 0:
        raise _Refused("a number > 0")
    return found


def not_negative(value: object) -> float:
    number = _number(value)
    found = None if number is None else _finite(number)
    if found is None or found < 0:
        raise _Refused("a number >= 0")
    return found


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise _Refused("True or False")
    return value


def anything(value: object) -> Any:
    return value


def text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise _Refused("a string that is not empty")
    return value


def token(value: object) -> str:
    """A secret that fits into a header; a newline left over from reading a file would never match."""
    if not isinstance(value, str) or not _VISIBLE(value):
        raise _Refused("a string of visible ASCII characters without spaces")
    return value


def file_path(value: object) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path:
        raise _Refused("a path (str or os.PathLike)")
    return path


def addresses(value: object) -> str:
    """Comma-separated; a list is joined. "*" is everybody, "" nobody."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if not isinstance(value, str):
        raise _Refused("a comma-separated string or a list of addresses")
    return value


def middleware_list(value: object) -> list[Any]:
    # Starlette is not imported here (27 ms); what marks its Middleware is the class it will build.
    if not isinstance(value, (list, tuple)) or not all(hasattr(item, "cls") for item in value):
        raise _Refused("a list of starlette.middleware.Middleware")
    return list(value)


def deployment_mode(value: Any) -> DeploymentMode:
    try:
        return DeploymentMode(value)
    except ValueError:
        raise _Refused(" or ".join(repr(mode.value) for mode in DeploymentMode)) from None


def optional(check: Check[T]) -> Check[T | None]:
    """Accepts None too."""

    def checked(value: object) -> T | None:
        if value is None:
            return None
        try:
            return check(value)
        except _Refused as refused:
            raise _Refused(f"{refused} or None") from None

    return checked


# -- Fields and the classes made of them. -------------------------------------------------------------


class Field(Generic[T]):
    """One thing that users may set. `secret` keeps its value out of reprs and errors."""

    def __init__(self, default: object, check: Check[T], unit: str = "", *, secret: bool = False) -> None:
        self.name = ""
        self.default = default
        self.check = check
        self.unit = unit
        self.secret = secret

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, options: None, owner: type) -> Field[T]: ...
    @overload
    def __get__(self, options: _Options, owner: type) -> T: ...
    def __get__(self, options: _Options | None, owner: type) -> Field[T] | T:
        if options is None:
            return self
        value: T = options._values[self.name]
        return value

    def __set__(self, options: _Options, value: object) -> None:
        try:
            checked = self.check(value)
        except _Refused as refused:
            unit = f" ({self.unit})" if self.unit else ""
            got = f"a {type(value).__name__} that is not shown" if self.secret else _short(value)
            where = f"{type(options).__name__}.{self.name}"
            raise ConfigError(f"{where} must be {refused}{unit}, got {got}") from None
        options._values[self.name] = checked
        options._given.add(self.name)

    def show(self, value: object) -> str:
        return "'***'" if self.secret and value is not None else repr(value)


class _Options:
    """Named values, each checked when it is set; equal when all values are."""

    _fields: ClassVar[dict[str, Field[Any]]] = {}
    #: Other names under which a field may be set and read.
    _aliases: ClassVar[dict[str, str]] = {}
    _values: dict[str, Any]
    _given: set[str]

    def __init_subclass__(cls) -> None:
        own = {name: field for name, field in vars(cls).items() if isinstance(field, Field)}
        cls._fields = {**cls._fields, **own}

    def __init__(self, /, **values: Any) -> None:
        self._fill(values)

    def _fill(self, values: Mapping[Any, Any]) -> None:
        defaults = {name: field.check(field.default) for name, field in self._fields.items()}
        self.__dict__.update(_values=defaults, _given=set())
        for name, value in values.items():
            canonical = self._canonical(name)
            if canonical in self._given:
                raise ConfigError(f"{type(self).__name__}.{canonical} is given twice, once as an alias of it")
            setattr(self, name, value)

    @classmethod
    def _canonical(cls, name: object) -> str:
        if isinstance(name, str):
            name = cls._aliases.get(name, name)
            if name in cls._fields:
                return name
        raise cls._unknown(name)

    @classmethod
    def _unknown(cls, name: object) -> ConfigError:
        from difflib import get_close_matches  # 3 ms that only an error costs

        close = get_close_matches(str(name), cls._fields, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(cls._fields)}"
        return ConfigError(f"{cls.__name__} has no field {_short(name)}; {hint}")

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, self._canonical(name), value)

    def __getattr__(self, name: str) -> Any:  # only what ordinary lookup did not find
        if name in self._aliases:
            return getattr(self, self._aliases[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}", name=name, obj=self)

    @property
    def given(self) -> dict[str, Any]:
        """The fields that were set, or whose value was changed in place, under their canonical names."""
        return {
            name: value
            for name, value in self._values.items()
            if name in self._given or value != self._fields[name].default
        }

    def to_dict(self) -> dict[str, Any]:
        """Every field and its value."""
        return dict(self._values)

    def __repr__(self) -> str:
        shown = (f"{name}={self._fields[name].show(value)}" for name, value in self._values.items())
        return f"{type(self).__name__}({', '.join(shown)})"

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return all(_same(value, other._values[name]) for name, value in self._values.items())

    __hash__ = None  # type: ignore[assignment]  # it can change

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.given)


def _same(one: object, other: object) -> bool:
    try:
        return one is other or bool(one == other)
    except Exception:  # noqa: BLE001 - arrays have no single truth: those that pickle alike are equal
        return _pickled(one) == _pickled(other)


def _pickled(value: object) -> object:
    import pickle

    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001 - whatever an object's __reduce__ raises; it is equal to itself only
        return object()


Kind = TypeVar("Kind", bound=_Options)


def _rebuild(kind: type[Kind], values: Mapping[Any, Any]) -> Kind:
    """Checks again: what comes from a pickle, and what was appended to a list in place."""
    options = kind()
    options._fill(values)
    return options


class BackendConfig(_Options):
    """How a backend runs. An update changes only the fields that are `given`.

    `graceful_shutdown_wait_loop_s` is accepted from old programs and ignored: draining ends the
    moment the last request does. A backend's config always shows its default.

    >>> BackendConfig(num_replicas="2").given
    {'num_replicas': 2}
    >>> BackendConfig(num_replicas=0)
    Traceback (most recent call last):
    headgate.errors.ConfigError: BackendConfig.num_replicas must be an integer >= 1, got 0
    """

    num_replicas = Field(1, integer(1))
    max_batch_size = Field(None, optional(integer(1)), "requests")
    batch_wait_timeout = Field(0.0, not_negative, "seconds")
    max_concurrent_queries = Field(None, optional(integer(1)), "requests")
    user_config = Field(None, anything)
    max_queued_requests = Field(None, optional(integer(0)), "requests")
    request_timeout_s = Field(None, optional(positive), "seconds")
    idempotent = Field(False, boolean)
    graceful_shutdown_timeout_s = Field(20.0, positive, "seconds")
    graceful_shutdown_wait_loop_s = Field(2.0, positive, "seconds")
    health_check_period_s = Field(10.0, positive, "seconds")
    health_check_timeout_s = Field(30.0, positive, "seconds")

    _aliases: ClassVar[dict[str, str]] = {
        "experimental_graceful_shutdown_timeout_s": "graceful_shutdown_timeout_s",
        "experimental_graceful_shutdown_wait_loop_s": "graceful_shutdown_wait_loop_s",
        "batch_wait_timeout_s": "batch_wait_timeout",  # as core.state.Settings calls it
    }


class HTTPOptions(_Options):
    """Where the proxies listen, and what they put up with from clients."""

    host = Field("127.0.0.1", optional(text))
    port = Field(8000, integer(0, 65535))
    middlewares = Field([], middleware_list)
    location = Field("HeadOnly", optional(deployment_mode))
    #: The head's length travels in 16 bits (core/framing.py).
    max_head_bytes = Field(32 * KIB, integer(1, 60_000), "bytes")
    max_header_fields = Field(100, integer(1))
    max_target_bytes = Field(8 * KIB, integer(1), "bytes")
    max_body_bytes = Field(100 * MIB, integer(0), "bytes")
    max_buffered_bytes = Field(1 * GIB, integer(1), "bytes")
    head_timeout_s = Field(10.0, positive, "seconds")
    body_timeout_s = Field(30.0, positive, "seconds")
    write_timeout_s = Field(30.0, positive, "seconds")
    keep_alive_timeout_s = Field(75.0, positive, "seconds")
    max_connections = Field(10_000, integer(1))
    expose_tracebacks = Field(False, boolean)
    forwarded_allow_ips = Field("127.0.0.1", addresses)
    admin_token = Field(None, optional(token), secret=True)
    ssl_certfile = Field(None, optional(file_path))
    ssl_keyfile = Field(None, optional(file_path))

    @property
    def serves(self) -> bool:
        """Whether any proxy runs at all."""
        return self.host is not None and self.location not in (None, DeploymentMode.NoServer)


def as_backend_config(config: object) -> BackendConfig:
    """A BackendConfig of its own from None, a dict or a BackendConfig."""
    return _as(BackendConfig, "config", config)


def as_http_options(options: object) -> HTTPOptions:
    """HTTPOptions of its own from None, a dict or HTTPOptions; the fields fit together."""
    found = _as(HTTPOptions, "http_options", options)
    if found.ssl_keyfile is not None and found.ssl_certfile is None:
        raise ConfigError("HTTPOptions.ssl_keyfile is set without ssl_certfile; set both to serve HTTPS")
    return found


def _as(kind: type[Kind], argument: str, value: object) -> Kind:
    if value is None:
        return kind()
    if isinstance(value, kind):
        return _rebuild(type(value), value.given)
    if isinstance(value, dict):
        return _rebuild(kind, value)
    raise ArgumentError(f"{argument} must be a dict or {kind.__name__}, got {_kind(value)}")


# -- What create_backend takes beside its config. -----------------------------------------------------

_OWNED_OPTIONS = ("lifetime", "name", "max_restarts", "placement_group")
_AMOUNTS = ("num_cpus", "num_gpus", "memory", "object_store_memory")


def check_ray_actor_options(options: object) -> dict[str, Any]:
    """A copy of the options of a replica's actor; {} for None. Fields not known here are left to Ray."""
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ArgumentError(f"ray_actor_options must be a dict, got {_kind(options)}")
    for name in _OWNED_OPTIONS:
        if name in options:
            raise ConfigError(f"ray_actor_options must not contain {name!r}: headgate sets it; leave it out")
    for name in _AMOUNTS:
        if name in options:
            _check_amount(f"ray_actor_options[{name!r}]", options[name])
    resources = options.get("resources")
    if resources is not None and not isinstance(resources, dict):
        raise ArgumentError(f"ray_actor_options['resources'] must be a dict, got {_kind(resources)}")
    for name, amount in (resources or {}).items():
        _check_amount(f"ray_actor_options['resources'][{name!r}]", amount)
    return dict(options)


def _check_amount(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentError(f"{where} must be a number >= 0, got {_short(value)} ({_kind(value)})")
    amount = _finite(value)
    if amount is None or amount < 0:
        raise ConfigError(f"{where} must be a number >= 0, got {_short(value)}")


def check_env(env: object) -> dict[str, str]:
    """A copy of the environment variables for a replica; {} for None."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise ArgumentError(f"env must be a dict of str to str, got {_kind(env)}")
    for name, value in env.items():
        if not isinstance(name, str):
            raise ArgumentError(f"env: the name {_short(name)} must be a str, got {_kind(name)}")
        if not isinstance(value, str):
            raise ArgumentError(f"env[{name!r}] must be a str, got {_kind(value)}; write it as a string")
        if not name or "=" in name or "\0" in name:
            raise ConfigError(f"env: {_short(name)} cannot name a variable: empty, or contains '=' or NUL")
        if "\0" in value:
            raise ConfigError(f"env[{name!r}] must not contain a NUL character")
    return dict(env)


# -- Batches. -----------------------------------------------------------------------------------------


def accept_batch(f: F) -> F:
    """Mark a function or method: it takes a list of requests and returns as many results, in order."""
    if isinstance(f, type):
        raise ArgumentError(f"@accept_batch marks functions and methods; put it on {f.__name__}.__call__")
    if not callable(f):
        raise ArgumentError(f"@accept_batch marks functions and methods, got {_kind(f)}")
    try:
        setattr(f, _MARK, True)
    except AttributeError:
        raise ArgumentError(f"@accept_batch cannot mark {_short(f)}; wrap it in your own function") from None
    return f


def accepts_batch(f: object) -> bool:
    """Whether `f`, or the `__call__` of the class or object `f`, is marked by `accept_batch`."""
    if getattr(f, _MARK, False) is True:
        return True
    return callable(f) and getattr(f.__call__, _MARK, False) is True


def _kind(value: object) -> str:
    return type(value).__name__


def _short(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an int of more digits than Python prints
        shown = f"a very large {_kind(value)}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
