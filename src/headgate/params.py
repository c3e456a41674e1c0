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


def methods(name: str, value: object) -> Any:
    """An endpoint's methods; raises ArgumentError for what would arrive as a list and is none."""
    if not isinstance(value, list):
        raise ArgumentError(f"endpoint {name!r}: methods must be a list of str, got {value!r}")
    return value


def check_certificate(options: configs.HTTPOptions) -> None:
    """Raises ConfigError if the proxies could not serve HTTPS with these files."""
    if options.ssl_certfile is None:
        return
    import ssl

    for field in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(options, field)
        try:
            if path is not None:
                open(path, "rb").close()
        except OSError as error:
            raise ConfigError(f"HTTPOptions.{field}: cannot read {path!r}: {error.strerror}") from None
    try:  # an encrypted key is an error, as in the proxy: there is nobody to ask for its password
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            options.ssl_certfile, options.ssl_keyfile, password=lambda: ""
        )
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"HTTPOptions.ssl_certfile: {options.ssl_certfile!r} with the private key in "
            f"{options.ssl_keyfile or options.ssl_certfile!r} cannot be used: {error}; both must be PEM, belong "
            "together, and the key must not be encrypted"
        ) from None


def config(given: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that were set. Raises SerializationError if the user_config does not pickle."""
    fields = {name: value for name, value in given.items() if name != "user_config"}
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
    fields = dict(shown["settings"])
    if shown["user_config"] is not None:
        fields["user_config"] = pickle.loads(shown["user_config"])
    return configs.BackendConfig(**fields)
