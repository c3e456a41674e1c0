"""headgate.start: its first act is to execute the supervisor, then it imports the rest.

That order is why `start` has a module of its own: the supervisor's imports take longest, and
everything here that is heavy, api.py first, is imported beside them.
"""

from __future__ import annotations

import os
import sys

from headgate.engine.ignition import strike
from headgate.signals import Held

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from headgate.api import Client
    from headgate.config import HTTPOptions

_UNSET: Any = object()


def start(
    detached: bool = False,
    http_host: Any = _UNSET,
    http_port: Any = _UNSET,
    http_middlewares: Any = _UNSET,
    http_options: HTTPOptions | Mapping[str, Any] | None = None,
    *,
    engine: str | None = None,
    namespace: str = "default",
    insecure: bool = False,
) -> Client:
    """Start an instance; returns when its proxies accept requests.

    detached       False: the instance ends with the client or this process. True: it lives until
                   `client.shutdown()`; one per namespace, others reach it by `connect(namespace)`
    http_options   an HTTPOptions or a dict of its fields; http_host, http_port and
                   http_middlewares are the deprecated way to say the same
    engine         "local": processes of this machine. "ray": the cluster that this process takes part in, or
                   that RAY_ADDRESS names, or a new one of this machine. None: as the environment variable
                   HEADGATE_ENGINE says, else "ray" if ray.init() was called in this process, else "local"
    insecure       True: also on a cluster that serves everybody who reaches it, without a token

    Raises ConfigError (an unknown or bad option, named) and InstanceError (the address cannot be
    bound, with its holder; a detached instance of that namespace runs already). After an error, and after
    Ctrl-C, nothing is left running.
    """
    given = {"host": http_host, "port": http_port, "middlewares": http_middlewares}
    old = {name: value for name, value in given.items() if value is not _UNSET}
    client = None
    try:
        with Held() as held:  # Ctrl-C waits but for where the start does
            spark = strike() if _is_here(engine) else None
            try:
                from headgate.engines import begin

                client = begin(
                    spark, old, http_options, detached=detached, namespace=namespace, insecure=insecure, held=held
                )
            finally:
                if spark is not None:
                    spark.quench()
        return client
    except BaseException:
        if client is not None:  # interrupted at the very end
            client._abandon()
        raise


def _is_here(engine: str | None) -> bool:
    """Whether the engine is that of this machine."""
    if engine == "local" or (engine is None and "ray" not in sys.modules and "HEADGATE_ENGINE" not in os.environ):
        return True  # without importing a thing
    from headgate.engines import LOCAL, choose

    return choose(engine) == LOCAL
