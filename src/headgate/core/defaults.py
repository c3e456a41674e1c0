"""A backend's settings: what its config says, and where it says nothing, what goes with its code.

What a single config field may hold is headgate/config.py. This stands apart from goals.py because a replica asks it
too, about code that only it has seen, and has no other use for all of that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headgate.core.state import Facts, Settings
from headgate.errors import ConfigError

#: Config fields whose name in Settings carries a unit.
_RENAMED = {"batch_wait_timeout": "batch_wait_timeout_s"}
#: Config fields of old that change nothing.
_IGNORED = frozenset({"graceful_shutdown_wait_loop_s"})

PLAIN_QUERIES = 8
ASYNC_QUERIES = 100


def resolve(given: Mapping[str, Any], facts: Facts) -> Settings:
    """Settings from the config fields that the user set; every other one gets its default.

    >>> resolve({"max_batch_size": 4}, Facts(accepts_batch=True)).max_concurrent_queries
    8

    Raises ConfigError for batches that the code does not accept.
    """
    fields = {_RENAMED.get(name, name): value for name, value in given.items() if name not in _IGNORED}
    if unknown := sorted(set(fields) - set(Settings.__struct_fields__)):
        raise ConfigError(f"BackendConfig has no field {unknown[0]!r}")
    batch = fields.pop("max_batch_size", None)
    if batch is not None and batch > 1 and not facts.accepts_batch:
        raise ConfigError(
            f"BackendConfig.max_batch_size is {batch}, but the backend takes one request at a time; "
            "mark the function or method that takes a list of requests with @accept_batch"
        )
    if fields.get("max_concurrent_queries") is None:
        plain = PLAIN_QUERIES if batch is None else 2 * batch
        fields["max_concurrent_queries"] = ASYNC_QUERIES if facts.is_async else plain
    return Settings(max_batch_size=1 if batch is None else batch, **fields)
