"""A Client's arguments as parameters of control calls, and answers as the values that users know.

What only this process can tell (is it a str, does it pickle) is refused here; whether it goes with the
instance's goals is decided by the controller (core/goals.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any

from headgate import config as configs
from headgate.errors import ArgumentError, ConfigError, HeadgateError, SerializationError

#: Fields that old programs set and that mean nothing here.
_IGNORED = frozenset({"graceful_shutdown_wait_loop_s"})
#: Settings whose name carries a unit that the config field's does not.
_RENAMED = {"batch_wait_timeout_s": "batch_wait_timeout"}


def text(what: str, value: object) -> str:
    """`value`, a str that is not empty and travels; raises ArgumentError or ConfigError."""
    if not isinstance(value, str):
        raise ArgumentError(f"{what} must be a str, got {type(value).__name__}")
    if not value:
        raise ConfigError(f"{what} must not be empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{what} must be text that UTF-8 can encode, got {value!a}") from None
    return value


def number(value: object) -> Any:
    """A number as msgpack carries it; what is none as text, which the controller refuses by its name."""
    if value is None or isinstance(value, bool | str | float):
        return value
    try:
        return float(value)  # type: ignore[arg-type]  # ints of any size, numpy's numbers, fractions
    except (TypeError, ValueError, OverflowError):
        return repr(value)


def weights(policy: object) -> dict[str, Any]:
    """A traffic policy as it travels; raises ArgumentError if it is no dict."""
    if not isinstance(policy, Mapping):
        raise ArgumentError(
            f"the traffic policy must be a dict of backend tag -> share, got {type(policy).__name__}"
        )
    return {tag if isinstance(tag, str) else repr(tag): number(share) for tag, share in policy.items()}


def route(name: str, value: object) -> str | None:
    """An endpoint's route; raises ArgumentError unless it is None or a str that starts with "/"."""
    if value is None:
        return None
    if not isinstance(value, str) or not value.startswith("/"):
        raise ArgumentError(f'endpoint {name!r}: route must be a str that starts with "/", got {value!r}')
    return text(f"endpoint {name!r}: route", value)


def methods(name: str, value: object) -> list[str]:
    """An endpoint's methods; raises ArgumentError unless they are a list of str."""
    if not isinstance(value, list) or not all(isinstance(method, str) for method in value):
        raise ArgumentError(f"endpoint {name!r}: methods must be a list of str, got {value!r}")
    return [text(f"endpoint {name!r}: a method", method) for method in value]


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that were set. Raises SerializationError if the user_config does not pickle."""
    fields = {name: value for name, value in given.items() if name != "user_config" and name not in _IGNORED}
    packed = pack("user_config", given["user_config"]) if "user_config" in given else None
    return {"given": fields, "user_config": packed}


def pack(what: str, value: object) -> bytes:
    """A value as a pickle; classes and functions of `__main__` travel by value."""
    import cloudpickle

    try:
        packed: bytes = cloudpickle.dumps(value, protocol=5)
    except HeadgateError:
        raise
    except Exception as error:  # whatever an object's __reduce__ raises
        raise SerializationError(
            f"{what} cannot be sent to other processes ({type(error).__name__}: {error}); "
            "leave out open files, locks and connections"
        ) from error
    return packed


def backend_config(shown: Mapping[str, Any]) -> configs.BackendConfig:
    """The config that the controller describes."""
    fields = {_RENAMED.get(name, name): value for name, value in shown["settings"].items()}
    if shown["user_config"] is not None:
        fields["user_config"] = pickle.loads(shown["user_config"])
    return configs.BackendConfig(**fields)
