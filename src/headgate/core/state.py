"""The nouns that everything speaks of: endpoints, backends, replicas, and the snapshot routers follow.

All frozen values. They are msgspec Structs rather than dataclasses because defining one costs
a twentieth of the time at import, and because they cross processes as msgpack without a second
description of each.

Two views of one world:
- `Goals` is what users asked for: written by the controller alone, stored, never seen by a router.
- `Snapshot` is what a router needs to send a request: the endpoints, and for each backend its
  limits and the replicas that may get traffic now. A router obeys the newest one it was given.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct


class Settings(Struct, frozen=True):
    """A backend's config with every default resolved. Times in seconds."""

    num_replicas: int = 1
    max_batch_size: int = 1
    batch_wait_timeout_s: float = 0.0
    max_concurrent_queries: int = 8
    max_queued_requests: int | None = None
    request_timeout_s: float | None = None
    idempotent: bool = False
    graceful_shutdown_timeout_s: float = 20.0
    health_check_period_s: float = 10.0
    health_check_timeout_s: float = 30.0
    max_requests: int | None = None
    max_rss_bytes: int | None = None


class Facts(Struct, frozen=True):
    """What loading a backend's code tells about it."""

    is_async: bool = False
    accepts_batch: bool = False


class Traffic(Struct, frozen=True):
    """Which backends serve an endpoint: (tag, share) pairs; shares of `weights` sum to 1."""

    weights: tuple[tuple[str, float], ...]
    shadows: tuple[tuple[str, float], ...] = ()


class Endpoint(Struct, frozen=True):
    """A named entry. `route` is None for one that only handles reach; `methods` as given, upper-cased."""

    name: str
    route: str | None
    methods: tuple[str, ...]
    traffic: Traffic


class BackendGoal(Struct, frozen=True):
    """One backend as it should be.

    `code` and `user_config` name blobs by content hash; `given` holds the config fields that the
    user set, as a mapping that `config.resolve` turned into `settings`. `version` counts
    the code, `config_version` the user_config; `call` is the id of the control call that made the
    newest change, so that a repeat of the same call is recognised. `resources` are the user's
    ray_actor_options.
    """

    tag: str
    version: int
    code: str
    settings: Settings
    facts: Facts
    given: dict[str, int | float | bool | None] = {}
    user_config: str | None = None
    config_version: int = 0
    env: tuple[tuple[str, str], ...] = ()
    resources: dict[str, Any] = {}
    call: str = ""


class EndpointGoal(Struct, frozen=True):
    """One endpoint as it should be, and the control call that last changed it."""

    endpoint: Endpoint
    call: str = ""


class Goals(Struct, frozen=True):
    """All that users asked for. Order is the order of creation."""

    endpoints: tuple[EndpointGoal, ...] = ()
    backends: tuple[BackendGoal, ...] = ()


class ReplicaAddress(Struct, frozen=True):
    """Where a router reaches a replica. `id` is never reused: "iris#0007".

    address   of a unix socket, for routers of the same node
    remote    "tcp://10.0.0.7:4711", for those of other nodes; "" where there are none
    """

    id: str
    address: str
    pid: int
    node: str = "local"
    remote: str = ""


class BackendView(Struct, frozen=True):
    """What a router knows of a backend."""

    tag: str
    version: int
    settings: Settings
    replicas: tuple[ReplicaAddress, ...] = ()
    #: Why there is no replica, for the error a waiting request ends with.
    trouble: str = ""


class Snapshot(Struct, frozen=True):
    """What every router obeys from the moment it has it. Versions only grow."""

    version: int = 0
    endpoints: tuple[Endpoint, ...] = ()
    backends: tuple[BackendView, ...] = ()
    #: False while the instance starts or drains: /-/healthz says 503.
    ready: bool = False
