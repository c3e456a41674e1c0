"""Backends: what may be served, how it is started, changed and taken away, and what each error says."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from running import died, eventually, is_alive, on_ray, slack

import headgate
from headgate import (
    ArgumentError,
    BackendConfig,
    BackendStartError,
    ConfigError,
    ReplicaDied,
    SerializationError,
)

LOCK = threading.Lock()


def ask(client: headgate.Client, tag: str, data: Any = None, **options: Any) -> Any:
    """What a backend answers."""
    return handle_of(client, tag).options(**options).call(data)


def handle_of(client: headgate.Client, tag: str) -> Any:
    name = f"to {tag}"
    if name not in client.list_endpoints():
        client.create_endpoint(name, backend=tag)
    return client.get_handle(name)


def served(client: headgate.Client, code: Any, *init_args: Any, data: Any = None, **options: Any) -> Any:
    """What a new backend of that code answers."""
    client.create_backend("it", code, *init_args, **options)
    return ask(client, "it", data)


def pids(client: headgate.Client, tag: str = "it") -> list[int]:
    return [one.pid for one in client.status().replicas if one.backend == tag and one.state == "ready"]


def pid(request: Any) -> int:
    return os.getpid()


def no_request(one: Any, two: Any) -> None:
    """Nothing that a backend can be."""


class Doubler:
    """A class that can be imported."""

    def __init__(self, factor: int = 2, plus: int = 0) -> None:
        self.factor = factor
        self.plus = plus

    def __call__(self, request: Any) -> int:
        return int(request.data * self.factor + self.plus)

    def name(self, request: Any) -> str:
        return type(self).__name__


class Settable:
    """Shows its user_config; "refuse" cannot be taken."""

    def __init__(self) -> None:
        self.config: Any = "nothing"
        self.thread = threading.get_ident()

    def reconfigure(self, config: Any) -> None:
        assert threading.get_ident() == self.thread
        if config == "refuse":
            raise LookupError("this is not for me")
        if isinstance(config, dict) and os.path.exists(config["refuse if there is"]):
            raise LookupError("the file is there")
        self.config = config

    def __call__(self, request: Any) -> Any:
        return self.config


class AsyncSettable(Settable):
    async def reconfigure(self, config: Any) -> None:  # type: ignore[override]
        await asyncio.sleep(0)
        super().reconfigure(config)

    async def __call__(self, request: Any) -> Any:
        return self.config


# --- what may be served ---


def test_a_function(client: headgate.Client) -> None:
    def greet(request: Any) -> str:
        return f"hello {request.data}"

    assert served(client, greet, data="you") == "hello you"
    assert client.create_backend("other", greet) is None


def test_a_lambda(client: headgate.Client) -> None:
    assert served(client, lambda request: request.data + 1, data=1) == 2


def test_a_function_without_arguments(client: headgate.Client) -> None:
    assert served(client, lambda: "nothing needed") == "nothing needed"


def test_a_function_with_defaults(client: headgate.Client) -> None:
    assert served(client, lambda request, plus=3: request.data + plus, data=1) == 4


def test_a_partial(client: headgate.Client) -> None:
    assert served(client, partial(lambda a, request: (a, request.data), 7), data=1) == (7, 1)


def test_an_async_function(client: headgate.Client) -> None:
    async def slow(request: Any) -> int:
        await asyncio.sleep(0.001)
        return int(request.data) * 3

    assert served(client, slow, data=2) == 6


def test_a_class_with_init_args(client: headgate.Client) -> None:
    assert served(client, Doubler, 3, 1, data=5) == 16
    assert ask(client, "it", method_name="name") == "Doubler"


def test_an_async_class(client: headgate.Client) -> None:
    class Counter:
        def __init__(self, start: int) -> None:
            self.count = start
            assert asyncio.get_running_loop()

        async def __call__(self, request: Any) -> int:
            self.count += 1
            return self.count

    assert served(client, Counter, 10) == 11
    assert ask(client, "it") == 12


def test_init_args_may_hold_instances_of_local_classes(client: headgate.Client) -> None:
    class Weights:
        values = (1, 2)

    class Model:
        def __init__(self, weights: Any) -> None:
            self.weights = weights

        def __call__(self, request: Any) -> Any:
            return self.weights.values

    assert served(client, Model, Weights()) == (1, 2)


@pytest.mark.parametrize("path", ["test_backends:Doubler", "test_backends.Doubler"])
def test_an_import_path(client: headgate.Client, path: str) -> None:
    assert served(client, path, 5, data=2) == 10
    assert client.get_backend_config("it").max_concurrent_queries == 8


def test_an_import_path_that_leads_to_something_async_has_its_limits(client: headgate.Client) -> None:
    client.create_backend("it", "test_backends:AsyncSettable")
    assert client.get_backend_config("it").max_concurrent_queries == 100


def test_local_code_sees_a_module_that_only_the_driver_has_on_its_path(
    client: headgate.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def answer(request):\n    return __file__\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import only_here  # type: ignore[import-not-found]

    assert served(client, only_here.answer) == str(tmp_path / "only_here.py")


def test_replicas_have_the_working_directory_and_the_environment(
    client: headgate.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def where(request: Any) -> Any:
        return os.getcwd(), os.environ.get("COLOUR"), os.environ.get("PATH")

    assert served(client, where, env={"COLOUR": "blue"}) == (str(tmp_path), "blue", os.environ["PATH"])
    client.update_backend("it", where)
    assert ask(client, "it")[1] == "blue"  # what is not given stays
    client.update_backend("it", where, env={})
    assert ask(client, "it")[1] is None


@pytest.mark.local("on Ray its log monitor carries what workers print")
def test_printing_goes_to_the_drivers_streams(client: headgate.Client, capfd: Any) -> None:
    with headgate.start(http_options={"location": None}) as own:
        own.create_backend("it", lambda: print("printed by a replica"))
        ask(own, "it")
    assert "printed by a replica" in capfd.readouterr().out


def test_a_replica_knows_who_it_is(client: headgate.Client) -> None:
    def who() -> Any:
        context = headgate.get_replica_context()
        assert context.backend_tag == headgate.get_current_backend_tag()
        return context.backend_tag, context.replica_tag == headgate.get_current_replica_tag()

    assert served(client, who) == ("it", True)
    with pytest.raises(headgate.InstanceError):
        headgate.get_replica_context()


def test_odd_tags_are_fine(client: headgate.Client) -> None:
    for tag in ("ü/☃", "x" * 200, "../up", "a#1"):
        client.create_backend(tag, pid)
        assert ask(client, tag) == pids(client, tag)[0]
        client.delete_endpoint(f"to {tag}")
        client.delete_backend(tag)


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "text"),
    [
        ((None, pid), {}, TypeError, "tag"),
        ((3, pid), {}, TypeError, "tag"),
        (("", pid), {}, ValueError, "tag"),
        (("it", None), {}, TypeError, "NoneType"),
        (("it", 3), {}, TypeError, "int"),
        (("it", "no path"), {}, TypeError, "module:name"),
        (("it", lambda a, b: 1), {}, TypeError, "one positional argument"),
        (("it", type("NoCall", (), {"__call__": lambda self, a, b: 1})), {}, TypeError, "one positional"),
        (("it", pid, 1), {}, ValueError, "init args"),
        (("it", pid), {"config": 3}, TypeError, "config"),
        (("it", pid), {"config": [("num_replicas", 1)]}, TypeError, "config"),
        (("it", pid), {"config": {"num_replica": 1}}, ValueError, "num_replicas"),
        (("it", pid), {"config": {"num_replicas": 0}}, ValueError, "num_replicas"),
        (("it", pid), {"config": {"num_replicas": "many"}}, ValueError, "num_replicas"),
        (("it", pid), {"config": {"num_replicas": True}}, ValueError, "num_replicas"),
        (("it", pid), {"config": {"max_batch_size": 2}}, ValueError, "accept_batch"),
        (("it", pid), {"config": {"batch_wait_timeout": -1}}, ValueError, "batch_wait_timeout"),
        (("it", pid), {"config": {"max_concurrent_queries": 0}}, ValueError, "max_concurrent_queries"),
        (("it", pid), {"config": {"request_timeout_s": 0}}, ValueError, "request_timeout_s"),
        (("it", pid), {"config": {"max_queued_requests": -1}}, ValueError, "max_queued_requests"),
        (("it", pid), {"config": {"idempotent": 3}}, ValueError, "idempotent"),
        (("it", pid), {"config": {"graceful_shutdown_timeout_s": 0}}, ValueError, "graceful_shutdown_timeout_s"),
        (("it", pid), {"config": {"user_config": threading.Lock()}}, TypeError, "user_config"),
        (("it", pid), {"ray_actor_options": 3}, TypeError, "ray_actor_options"),
        (("it", pid), {"ray_actor_options": {"name": "x"}}, ValueError, "name"),
        (("it", pid), {"ray_actor_options": {"lifetime": "x"}}, ValueError, "lifetime"),
        (("it", pid), {"ray_actor_options": {"max_restarts": 1}}, ValueError, "max_restarts"),
        (("it", pid), {"ray_actor_options": {"placement_group": 1}}, ValueError, "placement_group"),
        (("it", pid), {"ray_actor_options": {"num_cpus": "1"}}, TypeError, "num_cpus"),
        (("it", pid), {"ray_actor_options": {"num_cpus": -1}}, ValueError, "num_cpus"),
        (("it", pid), {"ray_actor_options": {"num_gpus": None}}, TypeError, "num_gpus"),
        (("it", pid), {"ray_actor_options": {"memory": -1.0}}, ValueError, "memory"),
        (("it", pid), {"ray_actor_options": {"resources": [1]}}, TypeError, "resources"),
        (("it", pid), {"env": [1]}, TypeError, "env"),
        (("it", pid), {"env": {"A": 1}}, TypeError, "env"),
        (("it", pid), {"env": {"A=B": "x"}}, ValueError, "env"),
        (("it", partial(pid, threading.Lock())), {}, TypeError, ""),
        (("it", lambda request, lock=LOCK: lock), {}, TypeError, "cannot be sent"),
        (("it", Doubler, threading.Lock()), {}, TypeError, "Doubler"),
    ],
)
def test_a_bad_backend_is_refused_and_nothing_changes(
    client: headgate.Client,
    arguments: tuple[Any, ...],
    options: dict[str, Any],
    kind: type[Exception],
    text: str,
) -> None:
    with pytest.raises(kind) as error:
        client.create_backend(*arguments, **options)
    assert isinstance(error.value, headgate.HeadgateError)
    assert text in str(error.value)
    assert client.list_backends() == {}
    assert client.status().replicas == ()


def test_a_tag_is_taken_once(client: headgate.Client) -> None:
    client.create_backend("it", pid)
    with pytest.raises(ConfigError, match="'it' exists"):
        client.create_backend("it", Doubler)


def test_code_that_does_not_pickle_is_named(client: headgate.Client) -> None:
    lock = threading.Lock()

    def captures(request: Any) -> Any:
        return lock

    with pytest.raises(SerializationError, match=r"captures.*lock"):
        client.create_backend("it", captures)


@pytest.mark.local("on Ray it is the cluster that has GPUs or not; tests/ray has the test")
def test_gpus_that_are_not_there_are_named(client: headgate.Client) -> None:
    if any(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("this machine has GPUs")
    with pytest.raises(BackendStartError, match=r"'it'.*num_gpus=1 cannot be given") as error:
        client.create_backend("it", pid, ray_actor_options={"num_gpus": 1})
    assert "#" not in str(error.value)
    assert "mend its code" not in str(error.value)
    assert client.list_backends() == {}


# --- backends that do not start ---


class Explodes:
    def __init__(self) -> None:
        raise KeyError("no weights here")

    def __call__(self, request: Any) -> None:
        pass


class Exits(Explodes):
    def __init__(self) -> None:
        sys.exit("enough")


class Dies(Explodes):
    def __init__(self) -> None:
        os._exit(7)


class IsKilled(Explodes):
    def __init__(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class ExplodesLater(Explodes):
    def __init__(self) -> None:
        pass

    def reconfigure(self, config: Any) -> None:
        raise KeyError("no such setting")


class AsyncExplodes(Explodes):
    async def __call__(self, request: Any) -> None:  # type: ignore[override]
        pass


@pytest.mark.parametrize(
    ("code", "config", "texts"),
    [
        (Explodes, {}, ("KeyError: 'no weights here'", "test_backends.py", "in __init__")),
        (AsyncExplodes, {}, ("KeyError: 'no weights here'", "in __init__")),
        (Explodes, {"num_replicas": 3}, ("KeyError: 'no weights here'",)),
        (Exits, {}, ("SystemExit", "enough")),
        (Dies, {}, ("7",)),
        (IsKilled, {}, ("SIGKILL",)),
        (ExplodesLater, {"user_config": 1}, ("KeyError: 'no such setting'", "in reconfigure")),
        ("nowhere.to_be:found", {}, ("nowhere",)),
        ("test_backends:nothing", {}, ("nothing",)),
    ],
)
def test_a_backend_that_does_not_start_says_why_and_leaves_nothing(
    client: headgate.Client, code: Any, config: dict[str, Any], texts: tuple[str, ...]
) -> None:
    begun = time.monotonic()
    with pytest.raises(headgate.HeadgateError) as error:
        client.create_backend("it", code, config=config)
    assert time.monotonic() - begun < 5.0 * slack()
    assert isinstance(error.value, BackendStartError)
    if on_ray() and code in (Dies, IsKilled):
        texts = ("ended unexpectedly",)  # Ray does not say how
    for text in texts:
        assert text in str(error.value)
    assert client.list_backends() == {}
    eventually(lambda: client.status().replicas == ())
    client.create_backend("it", pid)  # the tag is free


@pytest.mark.parametrize(
    ("arguments", "config", "kind", "texts"),
    [
        (("os:sep",), {}, ArgumentError, ("os:sep", "got str")),
        (("test_backends:no_request",), {}, ArgumentError, ("no_request", "one positional argument")),
        (("test_backends:pid", 1), {}, ConfigError, ("pid", "init args")),
        (("test_backends:pid",), {"max_batch_size": 4}, ConfigError, ("max_batch_size is 4", "@accept_batch")),
    ],
)
def test_an_import_path_is_refused_as_the_object_would_be(
    client: headgate.Client,
    arguments: tuple[Any, ...],
    config: dict[str, Any],
    kind: type[headgate.HeadgateError],
    texts: tuple[str, ...],
) -> None:
    with pytest.raises(kind) as error:
        client.create_backend("it", *arguments, config=config)
    assert type(error.value) is kind
    for text in ("'it'", *texts):
        assert text in str(error.value)
    assert "mend its code" not in str(error.value)
    assert client.list_backends() == {}


def test_code_of_a_module_that_the_replica_cannot_find_is_named(
    client: headgate.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "soon_gone.py").write_text("def answer(request):\n    return 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import soon_gone  # type: ignore[import-not-found]

    sys.path.remove(str(tmp_path))
    with pytest.raises(BackendStartError, match="soon_gone"):
        client.create_backend("it", soon_gone.answer)


# --- configs ---


def test_configs_are_shown_with_every_default_resolved(client: headgate.Client) -> None:
    @headgate.accept_batch
    def batch(requests: list[Any]) -> list[Any]:
        return requests

    async def waits(request: Any) -> None:
        pass

    client.create_backend("plain", pid, config={"num_replicas": "2"})
    client.create_backend("batch", batch, config=BackendConfig(max_batch_size=6, batch_wait_timeout=0.5))
    client.create_backend("async", waits)
    taken = {"refuse if there is": ""}
    client.create_backend("given", Settable, config={"max_concurrent_queries": 3, "user_config": taken})
    known = client.list_backends()
    assert list(known) == ["plain", "batch", "async", "given"]
    assert all(isinstance(config, BackendConfig) for config in known.values())
    assert [config.max_concurrent_queries for config in known.values()] == [8, 12, 100, 3]
    assert known["plain"].num_replicas == 2
    assert known["batch"].batch_wait_timeout == 0.5
    assert known["given"].user_config == {"refuse if there is": ""}
    assert known["plain"].to_dict() == client.get_backend_config("plain").to_dict()
    client.update_backend_config("batch", {"max_batch_size": 3})
    assert client.get_backend_config("batch").max_concurrent_queries == 6
    client.update_backend_config("given", {"num_replicas": 1})
    assert client.get_backend_config("given").max_concurrent_queries == 3


def test_an_unknown_tag_has_no_config(client: headgate.Client) -> None:
    with pytest.raises(ConfigError, match="'nobody'"):
        client.get_backend_config("nobody")
    with pytest.raises(ConfigError, match="'nobody'"):
        client.update_backend_config("nobody", {"num_replicas": 2})
    with pytest.raises(ConfigError, match="'nobody'"):
        client.update_backend("nobody", pid)


@pytest.mark.parametrize(
    ("config", "kind", "text"),
    [
        (None, TypeError, "config"),
        (3, TypeError, "config"),
        ({"num_replicas": 0}, ValueError, "num_replicas"),
        ({"nonsense": 0}, ValueError, "nonsense"),
        ({"max_batch_size": 2}, ValueError, "accept_batch"),
        ({"num_replicas": 2, "max_batch_size": 2}, ValueError, "accept_batch"),
    ],
)
def test_a_bad_config_is_refused_and_the_old_one_stays(
    client: headgate.Client, config: Any, kind: type[Exception], text: str
) -> None:
    client.create_backend("it", pid, config={"max_concurrent_queries": 5})
    before = client.get_backend_config("it")
    with pytest.raises(kind, match=text):
        client.update_backend_config("it", config)
    assert client.get_backend_config("it") == before


def test_only_fields_that_are_set_change_and_no_replica_restarts(client: headgate.Client) -> None:
    client.create_backend("it", pid, config={"num_replicas": 2, "request_timeout_s": 9})
    before = sorted(pids(client))
    client.update_backend_config("it", BackendConfig(max_queued_requests=7))
    found = client.get_backend_config("it")
    assert (found.num_replicas, found.request_timeout_s, found.max_queued_requests) == (2, 9.0, 7)
    assert sorted(pids(client)) == before


def test_scaling_returns_when_the_count_is_reached(client: headgate.Client) -> None:
    client.create_backend("it", pid)
    handle = handle_of(client, "it")
    first = pids(client)
    client.update_backend_config("it", {"num_replicas": 3})
    running = pids(client)
    assert len(running) == 3
    assert set(first) < set(running)
    eventually(lambda: {handle.call() for _ in range(12)} == set(running))  # as soon as they are dialled
    client.update_backend_config("it", {"num_replicas": 1})
    assert pids(client) == first
    eventually(lambda: sum(map(is_alive, running)) == 1)
    assert handle.call() == first[0]


def test_scaling_down_lets_requests_finish(client: headgate.Client) -> None:
    async def slow(request: Any) -> int:
        await asyncio.sleep(0.3)
        return 1

    client.create_backend("it", slow, config={"num_replicas": 3})
    refs = [handle_of(client, "it").remote() for _ in range(9)]
    client.update_backend_config("it", {"num_replicas": 1})
    assert headgate.get(refs) == [1] * 9


# --- reconfigure ---


@pytest.mark.parametrize("kind", [Settable, AsyncSettable])
def test_a_user_config_is_taken_by_every_replica(client: headgate.Client, kind: Any) -> None:
    client.create_backend("it", kind, config={"num_replicas": 2, "user_config": {"a": 1, "refuse if there is": ""}})
    handle = handle_of(client, "it")
    assert [handle.call()["a"] for _ in range(4)] == [1] * 4
    before = sorted(pids(client))
    client.update_backend_config("it", {"user_config": "new"})
    assert [handle.call() for _ in range(4)] == ["new"] * 4
    assert client.get_backend_config("it").user_config == "new"
    assert sorted(pids(client)) == before
    client.update_backend_config("it", {"num_replicas": 3})
    assert [handle.call() for _ in range(6)] == ["new"] * 6


def test_a_user_config_that_nothing_takes_is_an_error(client: headgate.Client) -> None:
    with pytest.raises(BackendStartError, match="reconfigure"):
        client.create_backend("it", pid, config={"user_config": 1})
    client.create_backend("it", pid)
    with pytest.raises(BackendStartError, match="reconfigure"):
        client.update_backend_config("it", {"user_config": 1})
    assert client.get_backend_config("it").user_config is None


def test_without_a_user_config_reconfigure_is_not_called(client: headgate.Client) -> None:
    assert served(client, Settable) == "nothing"
    client.create_backend("other", Settable, config={"user_config": None})
    assert ask(client, "other") == "nothing"
    config = client.get_backend_config("other")
    config.num_replicas = 2
    client.update_backend_config("other", config)
    assert {ask(client, "other") for _ in range(4)} == {"nothing"}


def test_a_user_config_may_be_taken_back(client: headgate.Client) -> None:
    client.create_backend("it", Settable, config={"user_config": 1})
    client.update_backend_config("it", {"user_config": None, "num_replicas": 2})
    assert [ask(client, "it") for _ in range(4)] == [None] * 4
    assert client.get_backend_config("it").user_config is None


@pytest.mark.parametrize("kind", [Settable, AsyncSettable])
def test_a_user_config_that_is_refused_changes_nothing(client: headgate.Client, kind: Any) -> None:
    client.create_backend("it", kind, config={"num_replicas": 2, "user_config": "old"})
    handle = handle_of(client, "it")
    with pytest.raises(BackendStartError, match="this is not for me"):
        client.update_backend_config("it", {"user_config": "refuse", "max_queued_requests": 4})
    assert [handle.call() for _ in range(6)] == ["old"] * 6
    assert client.get_backend_config("it").user_config == "old"
    assert client.get_backend_config("it").max_queued_requests is None
    client.update_backend_config("it", {"user_config": "newer"})
    assert [handle.call() for _ in range(6)] == ["newer"] * 6


def test_if_one_replica_refuses_all_go_back(client: headgate.Client, tmp_path: Path) -> None:
    class Moody(Settable):
        def reconfigure(self, config: Any) -> None:
            if config == "new":
                for turn in range(3):
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(f"{tmp_path}/turn{turn}")
                        break
                if turn == 1:
                    raise LookupError("the second one refuses")
            super().reconfigure(config)

    client.create_backend("it", Moody, config={"num_replicas": 3, "user_config": "old"})
    with pytest.raises(BackendStartError, match="the second one refuses"):
        client.update_backend_config("it", {"user_config": "new"})
    handle = handle_of(client, "it")
    assert [handle.call() for _ in range(9)] == ["old"] * 9


def test_a_first_user_config_that_is_refused_leaves_the_class_as_it_was(client: headgate.Client) -> None:
    client.create_backend("it", Settable)
    with pytest.raises(BackendStartError, match="not for me"):
        client.update_backend_config("it", {"user_config": "refuse"})
    assert ask(client, "it") == "nothing"
    assert client.get_backend_config("it").user_config is None


# --- threads ---


class Threads:
    """Notes on which thread, and if async on which loop, each part of it ran."""

    def __init__(self) -> None:
        self.threads = {"constructor": threading.get_ident()}
        self.loops: list[Any] = []

    def note(self, what: str) -> None:
        self.threads[what] = threading.get_ident()

    async def note_async(self, what: str) -> None:
        await asyncio.sleep(0)
        self.note(what)
        self.loops.append(asyncio.get_running_loop())

    def reconfigure(self, config: Any) -> None:
        self.note(f"reconfigure {config}")

    def check_health(self) -> None:
        self.note("check_health")

    def found(self) -> tuple[list[str], int, int]:
        """What ran, on how many threads, on how many loops."""
        return sorted(self.threads), len(set(self.threads.values())), len(set(map(id, self.loops)))

    def __call__(self, request: Any) -> Any:
        self.note("call")
        return self.found()


class AsyncHooks(Threads):
    async def reconfigure(self, config: Any) -> None:  # type: ignore[override]
        await self.note_async(f"reconfigure {config}")

    async def check_health(self) -> None:  # type: ignore[override]
        await self.note_async("check_health")


class AsyncCall(Threads):
    async def __call__(self, request: Any) -> Any:
        await self.note_async("call")
        return self.found()


class AsyncAll(AsyncHooks):
    async def __call__(self, request: Any) -> Any:
        await self.note_async("call")
        return self.found()


@pytest.mark.parametrize(("kind", "loops"), [(Threads, 0), (AsyncHooks, 1), (AsyncCall, 1), (AsyncAll, 1)])
def test_a_class_runs_on_one_thread(client: headgate.Client, kind: Any, loops: int) -> None:
    config = {"user_config": 1, "health_check_period_s": 0.05}
    client.create_backend("it", kind, config=config)
    client.update_backend_config("it", {"user_config": 2})
    handle = handle_of(client, "it")
    found = eventually(lambda: "check_health" in (seen := handle.call())[0] and seen)
    parts = ["call", "check_health", "constructor", "reconfigure 1", "reconfigure 2"]
    assert found == (parts, 1, loops)


# --- update_backend ---


def test_new_code_under_the_same_tag(client: headgate.Client) -> None:
    client.create_backend("it", lambda: "old", config={"num_replicas": 2, "max_queued_requests": 5})
    old = pids(client)
    assert ask(client, "it") == "old"
    assert client.update_backend("it", lambda: "new") is None
    handle = handle_of(client, "it")
    assert [handle.call() for _ in range(10)] == ["new"] * 10
    assert client.get_backend_config("it").max_queued_requests == 5
    assert len(pids(client)) == 2
    eventually(lambda: not any(map(is_alive, old)))


def test_a_failing_version_leaves_the_old_one(client: headgate.Client) -> None:
    client.create_backend("it", lambda: "old")
    before = pids(client)
    with pytest.raises(BackendStartError, match="no weights here"):
        client.update_backend("it", Explodes, config={"num_replicas": 3})
    assert ask(client, "it") == "old"
    assert client.get_backend_config("it").num_replicas == 1
    assert pids(client) == before
    client.update_backend("it", Doubler, 4)
    assert ask(client, "it", 2) == 8


def test_an_update_loses_no_request(client: headgate.Client) -> None:
    def make(version: int) -> Callable[[Any], Any]:
        async def answer(request: Any) -> tuple[int, int]:
            await asyncio.sleep(0.005)
            return version, request.data

        return answer

    client.create_backend("it", make(0), config={"num_replicas": 2})
    handle = handle_of(client, "it")
    over = threading.Event()

    def send(start: int) -> list[tuple[int, bool]]:
        found = []
        number = start
        while not over.is_set():
            version, echo = handle.call(number)
            found.append((version, echo == number))
            number += 1
        return found

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(send, 1_000_000 * n) for n in range(4)]
        try:
            for version in range(1, 5):
                client.update_backend("it", make(version))
                time.sleep(0.05)
        finally:
            over.set()
        answers = [each.result() for each in running]
    for found in answers:
        versions = [version for version, _ in found]
        assert versions == sorted(versions)
        assert all(fits for _, fits in found)
    assert {version for found in answers for version, _ in found} >= {3, 4}


# --- delete_backend ---


def test_a_deleted_backend_is_gone_and_its_tag_free(client: headgate.Client) -> None:
    client.create_backend("it", pid, config={"num_replicas": 2})
    running = pids(client)
    assert client.delete_backend("it") is None
    assert client.list_backends() == {}
    assert client.status().replicas == ()
    eventually(lambda: not any(map(is_alive, running)), 1.0 * slack())
    client.create_backend("it", pid)


def test_deleting_an_unknown_backend_is_no_error(client: headgate.Client) -> None:
    client.delete_backend("nobody")


def sleeper(request: Any) -> str:
    time.sleep(request.data)
    return "slept"


def test_deleting_waits_for_running_requests(client: headgate.Client) -> None:
    client.create_backend("it", sleeper)
    ref = handle_of(client, "it").remote(0.3)
    client.delete_endpoint("to it")
    client.delete_backend("it")
    assert headgate.get(ref) == "slept"


def test_deleting_by_force_does_not(client: headgate.Client) -> None:
    client.create_backend("it", sleeper)
    ref = handle_of(client, "it").remote(20)
    client.delete_endpoint("to it")
    time.sleep(0.1)  # it has started
    begun = time.monotonic()
    client.delete_backend("it", force=True)
    with pytest.raises(died()):
        headgate.get(ref)
    assert time.monotonic() - begun < 2.0 * slack()


def test_draining_ends_after_its_time(client: headgate.Client) -> None:
    client.create_backend("it", sleeper, config={"graceful_shutdown_timeout_s": 0.3})
    ref = handle_of(client, "it").remote(20)
    client.delete_endpoint("to it")
    time.sleep(0.1)
    begun = time.monotonic()
    client.delete_backend("it")
    assert 0.2 < time.monotonic() - begun < 3.0
    with pytest.raises(died()):
        headgate.get(ref)


# --- replicas that end ---


def test_a_killed_replica_is_replaced(client: headgate.Client) -> None:
    client.create_backend("it", pid, config={"num_replicas": 2})
    handle = handle_of(client, "it")
    first = pids(client)
    os.kill(first[0], signal.SIGKILL)
    assert [handle.call() in first for _ in range(20)] == [True] * 20
    eventually(lambda: len(pids(client)) == 2 and first[0] not in pids(client))
    assert first[1] in pids(client)
    assert {one.restarts for one in client.status().replicas} == {1}
    eventually(lambda: {handle.call() for _ in range(8)} == set(pids(client)))  # as soon as it is dialled


def test_a_running_request_of_a_killed_replica_fails_once(client: headgate.Client) -> None:
    client.create_backend("it", sleeper)
    ref = handle_of(client, "it").remote(20)
    time.sleep(0.1)
    os.kill(pids(client)[0], signal.SIGKILL)
    with pytest.raises(died()) as error:
        headgate.get(ref, timeout=5)
    if isinstance(error.value, ReplicaDied):
        assert error.value.started
    assert ask(client, "it", 0) == "slept"


def test_a_replica_that_kills_itself_again_and_again_is_restarted(client: headgate.Client) -> None:
    def fragile(request: Any) -> str:
        if request.data:
            os._exit(3)
        return "fine"

    client.create_backend("it", fragile)
    for _ in range(2):
        with pytest.raises(ReplicaDied):
            ask(client, "it", True)
        assert ask(client, "it", False) == "fine"


class Ill:
    """Says that it is ill while a file is there."""

    def __init__(self, path: str) -> None:
        self.path = path

    def check_health(self) -> None:
        if os.path.exists(self.path):
            raise RuntimeError("I have a cold")

    def __call__(self, request: Any) -> int:
        return os.getpid()


def test_an_unhealthy_replica_is_replaced(client: headgate.Client, tmp_path: Path) -> None:
    path = tmp_path / "cold"
    client.create_backend("it", Ill, str(path), config={"health_check_period_s": 0.05})
    first = ask(client, "it")
    time.sleep(0.3)
    assert pids(client) == [first]
    path.touch()
    eventually(lambda: not is_alive(first))
    path.unlink()
    eventually(lambda: len(pids(client)) == 1)
    assert ask(client, "it") != first
    assert "I have a cold" in client.status().replicas[0].last_error


class Hangs:
    """Its check_health does not return while a file is there."""

    def __init__(self, path: str) -> None:
        self.path = path

    def check_health(self) -> None:
        while os.path.exists(self.path):
            time.sleep(0.02)

    def __call__(self, request: Any) -> int:
        time.sleep(request.data or 0)
        return os.getpid()


class HangsAwaiting(Hangs):
    async def check_health(self) -> None:  # type: ignore[override]
        while os.path.exists(self.path):
            await asyncio.sleep(0.02)

    async def __call__(self, request: Any) -> int:  # type: ignore[override]
        return super().__call__(request)


class HangsItsLoop(Hangs):
    async def __call__(self, request: Any) -> int:  # type: ignore[override]
        return super().__call__(request)


@pytest.mark.parametrize("kind", [Hangs, HangsAwaiting, HangsItsLoop])
def test_a_replica_whose_check_health_does_not_return_is_replaced(
    client: headgate.Client, tmp_path: Path, kind: Any
) -> None:
    path = tmp_path / "hang"
    config = {"health_check_period_s": 0.05, "health_check_timeout_s": 1, "graceful_shutdown_timeout_s": 0.5}
    client.create_backend("it", kind, str(path), config=config)
    first = ask(client, "it")
    path.touch()
    eventually(lambda: pids(client) not in ([], [first]))
    path.unlink()
    assert ask(client, "it") != first
    assert "check_health did not return in 1 s" in client.status().replicas[0].last_error
    eventually(lambda: len(client.status().replicas) == 1)


@pytest.mark.parametrize("kind", [Hangs, HangsAwaiting, HangsItsLoop])
def test_a_busy_thread_is_not_unhealthy(client: headgate.Client, tmp_path: Path, kind: Any) -> None:
    config = {"health_check_period_s": 0.02, "health_check_timeout_s": 0.3}
    client.create_backend("it", kind, str(tmp_path / "hang"), config=config)
    first = ask(client, "it")
    assert ask(client, "it", 1.8) == first
    time.sleep(0.2)
    assert pids(client) == [first]
    assert client.status().replicas[0].restarts == 0


# --- at once ---


def test_several_backends_start_at_once(client: headgate.Client) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: client.create_backend(f"b{n}", pid), range(4)))
    assert set(client.list_backends()) == {"b0", "b1", "b2", "b3"}


def test_of_two_that_want_one_tag_one_gets_it(client: headgate.Client) -> None:
    def create(number: int) -> str:
        try:
            client.create_backend("it", pid)
        except ConfigError:
            return "taken"
        return "made"

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(create, range(4))) == ["made", "taken", "taken", "taken"]
