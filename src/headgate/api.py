"""The Client that start and connect return (starting.py, engines.py): what a program calls.

A Client's methods change or show the instance's goals: each is one call of the controller, and
when it returns, what it did is stored and in force in every proxy and handle. Requests do not
pass here: handle.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NoReturn

from headgate import config as configs
from headgate import params
from headgate.errors import ArgumentError, ConfigError, InstanceError
from headgate.launch import SHUTDOWN_S, Ending
from headgate.signals import Interrupts

if TYPE_CHECKING:
    from types import TracebackType

    from headgate.handle import AsyncServeHandle, ServeHandle
    from headgate.instance import Instance
    from headgate.status import Status

_GET = ["GET"]


class Client:
    """A running instance, to change and to ask. Made by `start` and `connect`.

    The end of a `with` block shuts down what `start` began in this process, detached or not; it
    ends nothing that this process connected to. Every call raises ControllerUnavailable when the
    controller gives no sign of life for 5 s: a change may or may not have happened then, and it
    is safe to repeat it.

    http_address   "http://127.0.0.1:8000", or None without an HTTP server
    """

    def __init__(self, instance: Instance, http_address: str | None, ending: Ending | None) -> None:
        self.http_address = http_address
        self._instance = instance
        self._ending = ending
        if ending is not None:
            ending.with_client(self)

    # --- backends ---

    def create_backend(
        self,
        tag: str,
        func_or_class: Callable[..., Any] | type | str,
        *init_args: Any,
        ray_actor_options: dict[str, Any] | None = None,
        config: dict[str, Any] | configs.BackendConfig | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Serve `func_or_class` under the name `tag`; returns when its replicas are ready.

        func_or_class       called with one request, or a class that is built once per replica with
                            *init_args; or an import path "module:name"
        ray_actor_options   resources and runtime_env of each replica, as Ray's actors take them; must consist of
                            what JSON can hold. The local engine looks at num_gpus only
        env                 environment variables of the replicas

        Raises ConfigError (ValueError), ArgumentError (TypeError), SerializationError (the code
        does not pickle) and BackendStartError with the user's traceback; then nothing is registered.
        """
        self._deploy("create_backend", tag, func_or_class, init_args, ray_actor_options, config, env)

    def update_backend(
        self,
        tag: str,
        func_or_class: Callable[..., Any] | type | str,
        *init_args: Any,
        ray_actor_options: dict[str, Any] | None = None,
        config: dict[str, Any] | configs.BackendConfig | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """New code under the same tag. New replicas are ready before old ones drain; no request is lost.

        config   fields to change; the others stay

        Raises as `create_backend`; then the old version serves on.
        """
        self._deploy("update_backend", tag, func_or_class, init_args, ray_actor_options, config, env)

    def _deploy(
        self, method: str, tag: Any, target: Any, init_args: tuple[Any, ...], resources: Any, config: Any, env: Any
    ) -> None:
        from headgate.replica import callable as code

        self._instance.check()
        params.text("tag", tag)
        given = self._given(tag, config, new=method == "create_backend")
        resources = None if resources is None else configs.check_ray_actor_options(resources)
        variables = None if env is None else configs.check_env(env)
        blob, facts = code.pack(target, init_args)
        self._instance.call(
            method,
            tag=tag,
            code=blob,
            facts=facts,
            env=variables,
            resources=resources,
            **params.config(given),
        )

    def _given(self, tag: str, config: Any, *, new: bool = False) -> dict[str, Any]:
        """The fields that `config` sets. A user_config that is None and was None is no change."""
        given = configs.as_backend_config(config).given
        if given.get("user_config", "") is None and (new or self.get_backend_config(tag).user_config is None):
            del given["user_config"]
        return given

    def update_backend_config(self, tag: str, config: dict[str, Any] | configs.BackendConfig) -> None:
        """Change the config fields that are given; the others stay.

        Returns when the replica count is reached and every replica has been reconfigured. Raises
        ConfigError (unknown tag, bad value) and BackendStartError (a replica did not start or
        reconfigure); then the old config is in force.
        """
        self._instance.check()
        params.text("tag", tag)
        if config is None:
            raise ArgumentError("config must be a dict or a BackendConfig, got None")
        given = self._given(tag, config)
        self._instance.call(
            "update_backend_config", tag=tag, has_user_config="user_config" in given, **params.config(given)
        )

    def get_backend_config(self, tag: str) -> configs.BackendConfig:
        """The config of a backend, every default resolved. Raises ConfigError if there is none of that tag."""
        known = self.list_backends()
        if tag not in known:
            there_are = f"the backends are: {', '.join(map(repr, known))}" if known else "there are no backends yet"
            raise ConfigError(f"there is no backend {tag!r}; {there_are}")
        return known[tag]

    def list_backends(self) -> dict[str, configs.BackendConfig]:
        """tag -> config, in the order of creation."""
        shown = self._instance.call("list_backends")
        return {tag: params.backend_config(each) for tag, each in shown.items()}

    def delete_backend(self, tag: str, force: bool = False) -> None:
        """Stop serving a backend; returns when its replicas are gone and the tag is free.

        force   do not drain: running requests fail with ReplicaDied

        Raises ConfigError while an endpoint's traffic or shadows name it. An unknown tag is no error.
        """
        self._instance.check()
        params.text("tag", tag)
        self._instance.call("delete_backend", tag=tag, force=bool(force))

    # --- endpoints ---

    def create_endpoint(
        self, name: str, *, backend: str, route: str | None = None, methods: list[str] = _GET
    ) -> None:
        """Open an entry to a backend; returns when every proxy routes it.

        route     "/api/{user_id:int}"; None: handles only
        methods   HTTP methods; GET serves HEAD too

        Raises ConfigError (unknown backend, bad or taken route, taken name) and ArgumentError.
        """
        self._instance.check()
        params.text("endpoint name", name)
        methods = params.methods(name, methods)
        self._instance.call("create_endpoint", name=name, backend=backend, route=route, methods=methods)

    def list_endpoints(self) -> dict[str, dict[str, Any]]:
        """name -> {"route", "methods", "traffic", "shadows"}, in the order of creation."""
        shown: dict[str, dict[str, Any]] = self._instance.call("list_endpoints")
        return shown

    def delete_endpoint(self, name: str) -> None:
        """Close an entry; its backends stay. An unknown name is no error."""
        self._instance.check()
        params.text("endpoint name", name)
        self._instance.call("delete_endpoint", name=name)

    def set_traffic(self, endpoint: str, weights: Mapping[str, float]) -> None:
        """Split the requests of an endpoint over backends, each by its share; shadows stay.

        weights   backend tag -> share in [0, 1]; the shares sum to 1 (within 1e-6)

        Returns once every proxy and handle follows the new split. Requests that wait already keep
        their backend. Raises ConfigError; then the old split stays.
        """
        self._instance.check()
        params.text("endpoint", endpoint)
        self._instance.call("set_traffic", endpoint=endpoint, weights=params.weights(weights))

    def shadow_traffic(self, endpoint: str, tag: str, proportion: float) -> None:
        """Send a share of an endpoint's requests to another backend too; its answers are ignored.

        proportion   in [0, 1]; 0 ends it

        Raises ArgumentError (not a number in [0, 1]) and ConfigError (unknown endpoint or backend).
        """
        self._instance.check()
        params.text("endpoint", endpoint)
        params.text("tag", tag)
        share = params.number(proportion)
        self._instance.call("shadow_traffic", endpoint=endpoint, tag=tag, proportion=share)

    def get_handle(
        self, endpoint: str, missing_ok: bool = False, sync: bool = True
    ) -> ServeHandle | AsyncServeHandle:
        """Something to call an endpoint with from Python.

        missing_ok   do not ask whether there is such an endpoint; a call waits up to 5 s for it
        sync         True: `handle.remote(...)`, from any thread; False: `await handle.remote(...)`

        Raises EndpointNotFound (a KeyError).
        """
        from headgate.handle import make_handle

        self._instance.check()
        return make_handle(self._instance, endpoint, missing_ok, sync)

    # --- the instance ---

    def status(self) -> Status:
        """The instance as the controller sees it now: endpoints, backends, replicas, proxies, what is waited for."""
        import msgspec

        from headgate.status import Status

        return msgspec.convert(self._instance.call("status"), Status)

    def shutdown(self) -> None:
        """Finish what is in flight (up to 20 s), then end all processes and free port, sockets and files.

        Idempotent. Any other call afterwards raises InstanceError.
        """
        if self._ending is not None:
            self._ending.now()
        elif self._instance.usable:
            self._end_connected()

    def _end_connected(self) -> None:
        """Shut down an instance that this process did not start; returns when it is gone."""
        from headgate.homes import is_alive

        self._instance.call("shutdown", timeout_s=SHUTDOWN_S)
        give_up = time.monotonic() + 5.0
        while is_alive(self._instance.key) and time.monotonic() < give_up:
            time.sleep(0.005)
        self._instance.leave()

    def wait(self) -> None:
        """Block until Ctrl-C or SIGTERM, then drain and shut down: what a script ends with.

        A second signal while it drains ends everything at once. Raises InstanceError if the
        instance ends by itself.
        """
        wake: SimpleQueue[None] = SimpleQueue()  # not an Event: its lock may be held here when a handler sets it
        end = partial(wake.put, None)
        self._instance.when_gone(end)
        with Interrupts(end):
            self._instance.check()
            wake.get()
        self._instance.check()
        with Interrupts(self._force):
            self.shutdown()

    def _force(self) -> NoReturn:
        if self._ending is not None:
            self._ending.force()
        os._exit(130)

    def _abandon(self) -> None:
        """The start was interrupted when it was done already: end it, detached or not."""
        if self._ending is not None:
            self._ending.now(force=True)

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ending is not None:
            self.shutdown()

    def __reduce__(self) -> NoReturn:
        raise InstanceError(
            "a Client cannot be pickled; inside a backend call headgate.connect() to get one there"
        )

    def __repr__(self) -> str:
        state = self.http_address or "no HTTP" if self._instance.usable else "shut down"
        return f"<headgate.Client {state}>"
