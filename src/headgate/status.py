"""What `client.status()` returns: frozen values, as the controller sees the instance now."""

from __future__ import annotations

from msgspec import Struct


class EndpointStatus(Struct, frozen=True):
    """One endpoint and its traffic policy."""

    name: str
    route: str | None
    methods: tuple[str, ...]
    traffic: dict[str, float]
    shadows: dict[str, float]


class BackendStatus(Struct, frozen=True):
    """One backend: how many replicas it should have, and how many serve.

    `recycled` counts the replicas of this version that were worn out (max_requests, max_rss_bytes of its
    config); `last_recycled` says which was the last and why.
    """

    tag: str
    version: int
    num_replicas: int
    ready: int
    trouble: str = ""
    recycled: int = 0
    last_recycled: str = ""


class ReplicaStatus(Struct, frozen=True):
    """One replica. `restarts` counts failures of its backend's version so far.

    `last_error` is the last line of the newest of them, or of a reconfigure that raised. `waits_for`
    says what keeps one that starts from having a process: resources that others have now.
    """

    id: str
    backend: str
    version: int
    state: str
    pid: int
    node: str
    restarts: int = 0
    last_error: str = ""
    waits_for: str = ""


class ProxyStatus(Struct, frozen=True):
    """One HTTP proxy; `address` is its node's."""

    id: str
    pid: int
    state: str
    address: str | None = None
    node: str = "local"


class Status(Struct, frozen=True):
    """The whole instance. `waiting` says in sentences what is not yet as it should be, and why."""

    endpoints: tuple[EndpointStatus, ...] = ()
    backends: tuple[BackendStatus, ...] = ()
    replicas: tuple[ReplicaStatus, ...] = ()
    proxies: tuple[ProxyStatus, ...] = ()
    waiting: tuple[str, ...] = ()
