"""What start and connect do on each engine.

`begin` goes on where starting.py began: the instance is launched on this machine (launch.py) or on a Ray
cluster (launch_ray.py), and this process becomes a member of it. From then on nothing differs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headgate import config as configs
from headgate import params
from headgate.api import Client
from headgate.errors import ArgumentError, ConfigError, HeadgateError, InstanceError
from headgate.launch import Ending, launch

if TYPE_CHECKING:
    from headgate.engine.ignition import Spark
    from headgate.launch import Launch
    from headgate.signals import Held
    from headgate.wire.home import Home

#: The environment variable that says where instances live when the program does not.
VARIABLE = "HEADGATE_ENGINE"
LOCAL, RAY = "local", "ray"


def choose(engine: Any) -> str:
    """The engine that is meant: as said, else as the environment says, else Ray if this process takes part in it.

    Raises ConfigError.
    """
    if engine is None:
        engine = os.environ.get(VARIABLE) or (RAY if _takes_part_in_ray() else LOCAL)
    if engine not in (LOCAL, RAY):
        raise ConfigError(f'engine must be "local" or "ray", got {engine!r}')
    return str(engine)


def _takes_part_in_ray() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and bool(ray.is_initialized())


def begin(
    spark: Spark | None,
    http: Mapping[str, Any],
    options: Any,
    *,
    detached: Any,
    namespace: Any,
    insecure: Any,
    held: Held,
) -> Client:
    """What `starting.start` goes on with: on this machine if a supervisor was executed, else on Ray."""
    if not isinstance(detached, bool):
        raise ArgumentError(f"detached must be True or False, got {detached!r}")
    params.text("namespace", namespace)
    chosen = _options(http, options)
    params.check_certificate(chosen)
    if spark is None:
        from headgate import launch_ray

        with held.let():
            on_ray = launch_ray.launch(chosen, namespace, detached, bool(insecure))
        return _join(on_ray, on_ray.home, detached, held)
    launched = launch(spark, chosen, namespace, detached)
    from headgate.wire.home import DirectoryHome

    return _join(launched, DirectoryHome(launched.path, launched.token), detached, held)


def _join(launched: Launch, home: Home, detached: bool, held: Held) -> Client:
    ending = Ending(launched, detached)
    try:
        # Heavy: imported while the supervisor starts. The first two are what `create_backend` will want, 6 ms.
        import cloudpickle  # noqa: F401

        import headgate.replica.callable  # noqa: F401
        from headgate.instance import Instance

        name = f"driver-{os.getpid()}-{os.urandom(4).hex()}"
        instance = Instance(home, name, by_line=getattr(home, "path", None))
        address = ending.join(instance, held)
    except BaseException as error:
        ending.now(force=True)
        if isinstance(error, HeadgateError):
            raise InstanceError(f"the instance did not start: {error}") from None
        raise
    return Client(instance, address, ending)


def _options(old: Mapping[str, Any], options: Any) -> configs.HTTPOptions:
    if not old:
        return configs.as_http_options(options)
    names = ", ".join(f"http_{name}" for name in old)
    if options is not None:
        raise ConfigError(f"{names} and http_options say the same twice; put everything into http_options")
    warnings.warn(f"{names}: use http_options={{...}} instead", DeprecationWarning, stacklevel=4)
    return configs.as_http_options(old)


def connect(namespace: str = "default") -> Client:
    """A client of a running instance; its going away ends nothing.

    In a script: the detached instance of that namespace, on the Ray cluster that this process takes part in
    (or that HEADGATE_ENGINE=ray and RAY_ADDRESS name), else on this machine. Inside a backend: the instance
    that the backend belongs to. Raises InstanceError when there is none, and ControllerUnavailable
    when it does not answer.
    """
    from headgate import instance as instances

    params.text("namespace", namespace)
    instance = instances.own()
    if instance is None:
        home = _detached_on_ray(namespace) if choose(None) == RAY else _detached_here(namespace)
        instance = instances.join(home)
    instance.follow()
    address: str | None = instance.call("start_info")["http"]
    return Client(instance, address, None)


def _detached_here(namespace: str) -> Home:
    from headgate.engine import directory
    from headgate.wire.home import DirectoryHome

    path = directory.find(directory.base(), namespace)
    if path is None:
        raise _none_runs(namespace, "on this machine")
    return DirectoryHome(path, directory.read_token(path))


def _detached_on_ray(namespace: str) -> Home:
    from headgate import launch_ray
    from headgate.engine import cluster, ray_access, ray_home

    ray_access.take_part(may_start=False)
    scope = launch_ray.scope_of(namespace)
    if not cluster.is_alive(scope):
        raise _none_runs(namespace, "on this Ray cluster")
    return ray_home.home(f"ray:{scope}")


def _none_runs(namespace: str, where: str) -> InstanceError:
    return InstanceError(
        f"no detached instance of namespace {namespace!r} runs {where}; "
        f"start one with headgate.start(detached=True, namespace={namespace!r})"
    )
