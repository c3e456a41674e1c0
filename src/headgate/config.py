"""What users may set: every field with its default, its limits and its unit.

A field is one line in the body of its class, `name = Field(default, check, unit)`. It is checked
when it is set, so that an object of these classes never holds a value that cannot be used, and
each error names the field. Adding a field is adding its line. The checks are checks.py, what
fields do is options.py.

Defaults that depend on the backend's code (`max_concurrent_queries`) stay None here;
core/goals.py resolves them.
"""

from __future__ import annotations

import enum
import numbers
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

from headgate.checks import (
    Refused,
    addresses,
    anything,
    boolean,
    file_path,
    finite,
    integer,
    json_value,
    kind_of,
    middleware_list,
    not_negative,
    optional,
    positive,
    short,
    text,
    token,
)
from headgate.errors import ArgumentError, ConfigError
from headgate.options import Field, Options, convert

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

F = TypeVar("F", bound=Callable[..., Any])

KIB, MIB, GIB = 2**10, 2**20, 2**30
_MARK = "__headgate_accept_batch__"


class DeploymentMode(enum.StrEnum):
    """On which nodes a proxy runs."""

    NoServer = "NoServer"
    HeadOnly = "HeadOnly"
    EveryNode = "EveryNode"

    def __repr__(self) -> str:
        return f"DeploymentMode.{self.name}"


def deployment_mode(value: Any) -> DeploymentMode:
    try:
        return DeploymentMode(value)
    except ValueError:
        raise Refused(" or ".join(repr(mode.value) for mode in DeploymentMode)) from None


class BackendConfig(Options):
    """How a backend runs. An update changes only the fields that are `given`.

    `graceful_shutdown_wait_loop_s` is accepted from old programs and ignored: draining ends the
    moment the last request does. A backend's config always shows its default.

    A replica that has served `max_requests` requests (and up to a tenth more, so that not all are
    worn out at once), or whose memory has grown beyond `max_rss_bytes`, is replaced: a new one is ready
    first, then it drains and nothing is lost. One replica of a backend leaves at a time, so one that
    waits for its turn goes on serving beyond these figures.

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
    max_requests = Field(None, optional(integer(1)), "requests")
    max_rss_bytes = Field(None, optional(integer(1)), "bytes")

    _aliases: ClassVar[dict[str, str]] = {
        "experimental_graceful_shutdown_timeout_s": "graceful_shutdown_timeout_s",
        "experimental_graceful_shutdown_wait_loop_s": "graceful_shutdown_wait_loop_s",
        "batch_wait_timeout_s": "batch_wait_timeout",  # as core.state.Settings calls it
    }


class HTTPOptions(Options):
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
    return convert(BackendConfig, "config", config)


def as_http_options(options: object) -> HTTPOptions:
    """HTTPOptions of its own from None, a dict or HTTPOptions; the fields fit together."""
    found = convert(HTTPOptions, "http_options", options)
    if found.ssl_keyfile is not None and found.ssl_certfile is None:
        raise ConfigError("HTTPOptions.ssl_keyfile is set without ssl_certfile; set both to serve HTTPS")
    return found


# -- What create_backend takes beside its config. -----------------------------------------------------

_OWNED_OPTIONS = ("lifetime", "name", "max_restarts", "placement_group")
_AMOUNTS = ("num_cpus", "num_gpus", "memory", "object_store_memory")


def check_ray_actor_options(options: object) -> dict[str, Any]:
    """A copy of the options of a replica's actor, as JSON holds them; {} for None.

    Fields not known here are left to Ray.
    """
    if options is None:
        return {}
    if not isinstance(options, dict):
        raise ArgumentError(f"ray_actor_options must be a dict, got {kind_of(options)}")
    for name in _OWNED_OPTIONS:
        if name in options:
            raise ConfigError(f"ray_actor_options must not contain {name!r}: headgate sets it; leave it out")
    for name in _AMOUNTS:
        if name in options:
            _check_amount(f"ray_actor_options[{name!r}]", options[name])
    resources = options.get("resources")
    if resources is not None and not isinstance(resources, dict):
        raise ArgumentError(f"ray_actor_options['resources'] must be a dict, got {kind_of(resources)}")
    for name, amount in (resources or {}).items():
        _check_amount(f"ray_actor_options['resources'][{name!r}]", amount)
    return {name: _as_json(name, value) for name, value in options.items()}


def _as_json(name: object, value: object) -> Any:
    """The value of an option as it travels and is stored."""
    if not isinstance(name, str):
        raise ArgumentError(f"ray_actor_options: the name {short(name)} must be a str, got {kind_of(name)}")
    try:
        return json_value(value)
    except (Refused, RecursionError) as error:
        why = error if isinstance(error, Refused) else "it contains itself, or is nested too deeply"
        raise ArgumentError(
            f"ray_actor_options[{name!r}] must consist of what JSON can hold (None, booleans, numbers, strings, "
            f"lists, and dicts with strings as keys): {why}"
        ) from None


def _check_amount(where: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentError(f"{where} must be a number >= 0, got {short(value)} ({kind_of(value)})")
    amount = finite(value)
    if amount is None or amount < 0:
        raise ConfigError(f"{where} must be a number >= 0, got {short(value)}")


def check_env(env: object) -> dict[str, str]:
    """A copy of the environment variables for a replica; {} for None."""
    if env is None:
        return {}
    if not isinstance(env, Mapping):
        raise ArgumentError(f"env must be a dict of str to str, got {kind_of(env)}")
    for name, value in env.items():
        if not isinstance(name, str):
            raise ArgumentError(f"env: the name {short(name)} must be a str, got {kind_of(name)}")
        if not isinstance(value, str):
            raise ArgumentError(f"env[{name!r}] must be a str, got {kind_of(value)}; write it as a string")
        if not name or "=" in name or "\0" in name:
            raise ConfigError(f"env: {short(name)} cannot name a variable: empty, or contains '=' or NUL")
        if "\0" in value:
            raise ConfigError(f"env[{name!r}] must not contain a NUL character")
    return dict(env)


# -- Batches. -----------------------------------------------------------------------------------------


def accept_batch(f: F) -> F:
    """Mark a function or method: it takes a list of requests and returns as many results, in order."""
    if isinstance(f, type):
        raise ArgumentError(f"@accept_batch marks functions and methods; put it on {f.__name__}.__call__")
    if not callable(f):
        raise ArgumentError(f"@accept_batch marks functions and methods, got {kind_of(f)}")
    try:
        setattr(f, _MARK, True)
    except AttributeError:
        raise ArgumentError(f"@accept_batch cannot mark {short(f)}; wrap it in your own function") from None
    return f


def accepts_batch(f: object) -> bool:
    """Whether `f`, or the `__call__` of the class or object `f`, is marked by `accept_batch`."""
    if getattr(f, _MARK, False) is True:
        return True
    return callable(f) and getattr(f.__call__, _MARK, False) is True
