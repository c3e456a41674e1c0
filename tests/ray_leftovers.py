"""What instances leave behind in a Ray cluster: actors, keys, workers, and what their agents started.

`RayWatch(folder)` notes what is there in the cluster to which this process is connected and whose
files are below `folder`; `look()` says what is there since, `clean()` removes it. Part of
leftovers.Watch.

Ray starts and keeps idle workers as it likes: those are no leftovers. Nor is what belongs to an
instance that was there before: while one lives, processes cannot be told apart, and only what
other instances left in Ray's tables counts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any

import leftovers
import ray_cluster

#: Every Ray namespace of an instance begins so.
PREFIX = "headgate"
#: Where an instance keeps its state: keys "<its Ray namespace>/…" in this namespace of Ray's key-value store.
KEYS = b"headgate"
#: Beginnings of the names of Ray's own workers.
RAYS_OWN = ("ray::IDLE", "ray::Spill", "ray::Restore", "ray::Dashboard", "ray::RuntimeEnv")
#: And of the processes that an agent's supervisor starts.
OURS = "headgate-"


def actors() -> list[tuple[str, str]]:
    """(Ray namespace, name) of each living actor of an instance."""
    import ray

    known = ray.util.list_named_actors(all_namespaces=True)
    return sorted((each["namespace"], each["name"]) for each in known if each["namespace"].startswith(PREFIX))


def keys() -> list[bytes]:
    import ray

    client: Any = ray._private.worker.global_worker.gcs_client
    return sorted(client.internal_kv_keys(b"", namespace=KEYS))


def is_there(namespace: str) -> bool:
    """Whether anything of the instance with that Ray namespace is in Ray's tables."""
    return any(place == namespace for place, _ in actors()) or any(of(key, {namespace}) for key in keys())


def of(key: bytes, namespaces: set[str]) -> bool:
    """Whether the key belongs to one of these Ray namespaces."""
    return any(key.startswith(f"{namespace}/".encode()) for namespace in namespaces)


def actor_pids(namespace: str) -> dict[str, int]:
    """name -> pid of the worker, of each living actor of that Ray namespace."""
    import ray

    table = ray._private.state.actors()
    found = {}
    for place, name in actors():
        if place == namespace:
            with contextlib.suppress(ValueError):  # gone meanwhile
                entry = table.get(ray.get_actor(name, namespace=place)._actor_id.hex(), {})
                if entry.get("State") == "ALIVE":
                    found[name] = entry["Pid"]
    return found


def workers(folder: Path) -> set[leftovers.Process]:
    """The processes of that cluster that Ray did not start for itself."""
    return {
        each
        for each in leftovers.processes()
        if each.state not in "ZX"
        and each.name.startswith(("ray::", OURS))
        and not each.name.startswith(RAYS_OWN)
        and ray_cluster.belongs(each.pid, folder)
    }


def watch() -> RayWatch | None:
    """A watch of the cluster to which this process is connected, if it is."""
    ray: Any = sys.modules.get("ray")
    return RayWatch(ray_cluster.prepare()) if ray is not None and ray.is_initialized() else None


class RayWatch:
    """What instances have left in the cluster since this object was made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._namespaces = {place for place, _ in actors()}
        self._keys = set(keys())
        self._workers = workers(folder)

    def look(self) -> list[str]:
        found = [f"actor {name} of {place}" for place, name in actors() if place not in self._namespaces]
        found += [f"key {key!r} in Ray's store" for key in self._new_keys()]
        return found + [str(each) for each in sorted(self._new_workers())]

    def _new_keys(self) -> list[bytes]:
        return [key for key in keys() if key not in self._keys and not of(key, self._namespaces)]

    def _new_workers(self) -> set[leftovers.Process]:
        if self._namespaces:
            return set()
        return {each for each in workers(self._folder) if not leftovers.known(each, self._workers)}

    def clean(self) -> None:
        import ray

        for place, name in actors():
            if place not in self._namespaces:
                with contextlib.suppress(ValueError):  # gone meanwhile
                    ray.kill(ray.get_actor(name, namespace=place))
        client: Any = ray._private.worker.global_worker.gcs_client
        for key in self._new_keys():
            client.internal_kv_del(key, False, namespace=KEYS)
        for each in self._new_workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(each.pid, signal.SIGKILL)
