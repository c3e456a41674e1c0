"""headgate: serve models and functions behind HTTP and Python handles.

>>> import headgate
>>> headgate.BackendConfig(num_replicas=2).num_replicas
2

Everything public is a name of this module; each is imported when it is first used, so that
`import headgate` costs little and never imports Ray, Starlette or a user's framework.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # as typing has it, without its import: what runs before the supervisor does is kept bare


def _unsupported(system: str, implementation: str, version: tuple[object, ...]) -> str | None:
    """Why headgate cannot run there, in one line."""
    if system != "linux":
        return f"headgate runs on Linux only, not on {system}: it needs pidfd, memfd and fd passing"
    if implementation != "cpython" or version[:2] < (3, 11):
        found = f"{implementation} {version[0]}.{version[1]}"
        return f"headgate needs CPython 3.11 or newer, not {found}"
    return None


if problem := _unsupported(sys.platform, sys.implementation.name, sys.version_info):
    raise ImportError(problem)

__version__ = "0.1.0.dev0"

_HOMES = {
    "headgate.api": ("Client",),
    "headgate.engines": ("connect",),
    "headgate.config": ("BackendConfig", "DeploymentMode", "HTTPOptions", "accept_batch"),
    "headgate.refs": ("ObjectRef", "get", "wait"),
    "headgate.replica.context": (
        "ReplicaContext", "get_current_backend_tag", "get_current_replica_tag", "get_replica_context",
    ),
    "headgate.replica.request": ("ServeRequest",),
    "headgate.starting": ("start",),
    "headgate.errors": (
        "ArgumentError", "BackendError", "BackendOverloaded", "BackendStartError", "ConfigError",
        "ControllerUnavailable", "EndpointNotFound", "HeadgateError", "InstanceError", "ProtocolError",
        "RayServeException", "ReplicaDied", "RequestCancelled", "RequestError", "RequestTimeout",
        "SerializationError",
    ),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

if TYPE_CHECKING:
    from typing import Any

    from headgate.api import Client
    from headgate.config import BackendConfig, DeploymentMode, HTTPOptions, accept_batch
    from headgate.engines import connect
    from headgate.errors import (
        ArgumentError,
        BackendError,
        BackendOverloaded,
        BackendStartError,
        ConfigError,
        ControllerUnavailable,
        EndpointNotFound,
        HeadgateError,
        InstanceError,
        ProtocolError,
        RayServeException,
        ReplicaDied,
        RequestCancelled,
        RequestError,
        RequestTimeout,
        SerializationError,
    )
    from headgate.refs import ObjectRef, get, wait
    from headgate.replica.context import (
        ReplicaContext,
        get_current_backend_tag,
        get_current_replica_tag,
        get_replica_context,
    )
    from headgate.replica.request import ServeRequest
    from headgate.starting import start

__all__ = [
    "ArgumentError",
    "BackendConfig",
    "BackendError",
    "BackendOverloaded",
    "BackendStartError",
    "Client",
    "ConfigError",
    "ControllerUnavailable",
    "DeploymentMode",
    "EndpointNotFound",
    "HTTPOptions",
    "HeadgateError",
    "InstanceError",
    "ObjectRef",
    "ProtocolError",
    "RayServeException",
    "ReplicaContext",
    "ReplicaDied",
    "RequestCancelled",
    "RequestError",
    "RequestTimeout",
    "SerializationError",
    "ServeRequest",
    "accept_batch",
    "connect",
    "get",
    "get_current_backend_tag",
    "get_current_replica_tag",
    "get_replica_context",
    "start",
    "wait",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'headgate' has no attribute {name!r}")
    __import__(home)  # importlib's import_module would itself take 2 ms to import, before the supervisor is executed
    value = globals()[name] = getattr(sys.modules[home], name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
