"""One instance on three Ray nodes: proxies and replicas on each, calls across, and drivers of all kinds."""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import needs
import pytest
from ray_cluster import RayCluster, node_id
from running import Script, eventually, is_gone, key_of, one_instance

import headgate

ray = needs.module("ray")

MIB = 1 << 20


class Stage(NamedTuple):
    """An instance with a proxy on each node. Node "b" has the resource "b", and so on."""

    client: headgate.Client
    cluster: RayCluster
    nodes: dict[str, str]

    def address(self, name: str) -> str:
        """Where the proxy of that node is."""
        return addresses(self.client)[self.nodes[name]]


def addresses(client: headgate.Client) -> dict[str, str]:
    """node -> address of its proxy, of those that are ready."""
    return {one.node: str(one.address) for one in client.status().proxies if one.state == "ready"}


@pytest.fixture(scope="module")
def cluster(clusters: Any) -> Iterator[RayCluster]:
    with clusters.own(num_cpus=4, resources={"a": 10}) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def whole(cluster: RayCluster) -> Iterator[Stage]:
    nodes = {"a": cluster.head, "b": cluster.add(resources={"b": 10}), "c": cluster.add(resources={"c": 10})}
    with one_instance(http_options={"location": "EveryNode", "host": "node", "port": free_port()}) as client:
        yield Stage(client, cluster, {name: node_id(node) for name, node in nodes.items()})


def free_port() -> int:
    """A TCP port that nobody has on any address of this machine."""
    import socket

    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def stage(whole: Stage) -> Iterator[Stage]:
    """The module's instance; what the test creates in it is deleted afterwards."""
    yield whole
    for name in whole.client.list_endpoints():
        whole.client.delete_endpoint(name)
    for tag in whole.client.list_backends():
        whole.client.delete_backend(tag, force=True)


def on(*names: str, cpus: float = 0) -> dict[str, Any]:
    """The ray_actor_options that pin to the nodes with these resources."""
    return {"num_cpus": cpus, "resources": dict.fromkeys(names, 1)}


def where(request: Any) -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def serve(client: headgate.Client, code: Any, *arguments: Any, name: str = "it", **options: Any) -> Any:
    """A sync handle of a new endpoint, which is also at /<name>."""
    client.create_backend(name, code, *arguments, **options)
    client.create_endpoint(name, backend=name, route=f"/{name}", methods=["GET", "POST"])
    return client.get_handle(name)


def ready(client: headgate.Client, tag: str = "it") -> list[Any]:
    return [one for one in client.status().replicas if one.backend == tag and one.state == "ready"]


# --- proxies ---


def test_an_initialised_ray_is_the_engine(cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HEADGATE_ENGINE")
    with headgate.start(http_options={"location": None}) as client:
        assert key_of(client).startswith("ray:")
        assert serve(client, where).call() in {node["NodeID"] for node in ray.nodes()}


def test_every_node_answers_on_the_same_port(stage: Stage) -> None:
    serve(stage.client, lambda request: request.url.path)
    found = addresses(stage.client)
    assert set(found) == set(stage.nodes.values())
    assert stage.client.http_address == stage.address("a")
    assert len({httpx.URL(address).host for address in found.values()}) == 3
    assert len({httpx.URL(address).port for address in found.values()}) == 1
    for address in found.values():
        assert httpx.get(f"{address}/it").text == "/it"
        assert httpx.get(f"{address}/-/healthz").status_code == 200


def test_head_only_is_the_node_where_start_was_called(cluster: RayCluster, whole: Stage) -> None:
    with headgate.start(http_options={"port": 0}) as client:
        (proxy,) = client.status().proxies
        assert proxy.node == whole.nodes["a"]
        assert httpx.get(f"{client.http_address}/-/healthz").text == "ok"


def test_a_node_that_joins_gets_a_proxy_and_one_that_leaves_loses_it(stage: Stage) -> None:
    serve(stage.client, lambda request: "here")
    fourth = stage.cluster.add(resources={"d": 10})
    try:
        eventually(lambda: node_id(fourth) in addresses(stage.client), 30)
        address = addresses(stage.client)[node_id(fourth)]
        assert httpx.get(f"{address}/it").text == "here"
    finally:
        stage.cluster.remove(fourth)
    eventually(lambda: set(addresses(stage.client)) == set(stage.nodes.values()), 30)
    assert {one.node for one in stage.client.status().proxies} == set(stage.nodes.values())
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{address}/it", timeout=3)
    for name in stage.nodes:
        assert httpx.get(f"{stage.address(name)}/it").text == "here"
    stage.client.set_traffic("it", {"it": 1.0})  # nobody is waited for


# --- replicas ---


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_replica_runs_on_a_node_that_has_what_it_needs(stage: Stage, name: str) -> None:
    assert serve(stage.client, where, ray_actor_options=on(name)).call() == stage.nodes[name]
    (replica,) = ready(stage.client)
    assert replica.node == stage.nodes[name]


def test_replicas_spread_over_nodes(stage: Stage) -> None:
    handle = serve(stage.client, where, ray_actor_options={"num_cpus": 3}, config={"num_replicas": 3})
    assert {replica.node for replica in ready(stage.client)} == set(stage.nodes.values())
    from_all = [stage.address(name) for name in stage.nodes]
    answers = {httpx.get(f"{address}/it").text for address in from_all} | {handle.call()}
    assert answers == set(stage.nodes.values())


def test_one_cpu_is_the_default_and_zero_is_possible(stage: Stage) -> None:
    def cpus(request: Any) -> float:
        import ray

        return float(ray.get_runtime_context().get_assigned_resources().get("CPU", 0.0))

    assert serve(stage.client, cpus).call() == 1.0
    assert serve(stage.client, cpus, name="free", ray_actor_options={"num_cpus": 0}).call() == 0.0


def test_sequential_requests_stay_on_their_node(stage: Stage) -> None:
    handle = serve(stage.client, where, ray_actor_options={"num_cpus": 3}, config={"num_replicas": 3})
    for name, node in stage.nodes.items():
        with httpx.Client(base_url=stage.address(name)) as http:
            assert {http.get("/it").text for _ in range(20)} == {node}
    assert {handle.call() for _ in range(20)} == {stage.nodes["a"]}


# --- across nodes ---


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_request_crosses_nodes_whole(stage: Stage, name: str) -> None:
    def echo(request: Any) -> Any:
        return {"sha256": hashlib.sha256(request.view).hexdigest(), "node": where(request)}

    serve(stage.client, echo, ray_actor_options=on("b"))
    with httpx.Client(base_url=stage.address(name), timeout=20) as http:
        for size in (0, 10, 65_537, MIB, 20 * MIB):
            body = os.urandom(min(size, MIB)) * (size // MIB or 1)
            answer = http.post("/it", content=body).json()
            assert answer == {"sha256": hashlib.sha256(body).hexdigest(), "node": stage.nodes["b"]}


def test_a_value_crosses_nodes_whole(stage: Stage) -> None:
    handle = serve(stage.client, lambda request: (request.data, request.query_params), ray_actor_options=on("c"))
    for value in (None, {"a": {1, 2}}, os.urandom(MIB), os.urandom(MIB) * 20):
        assert handle.call(value, n=1) == (value, {"n": 1})
        assert headgate.get(handle.remote(value, n=1)) == (value, {"n": 1})


def test_a_stream_crosses_nodes_piece_by_piece(stage: Stage) -> None:
    async def pieces(request: Any) -> Any:
        for number in range(5):
            yield f"{number} "
            await asyncio.sleep(0.1)

    def large(request: Any) -> Any:
        return (b"x" * 65536 for _ in range(160))

    serve(stage.client, pieces, ray_actor_options=on("b"))
    serve(stage.client, large, name="large", ray_actor_options=on("b"))
    with httpx.Client(base_url=stage.address("c"), timeout=20) as http:
        with http.stream("GET", "/it") as answer:
            assert len(list(answer.iter_raw())) >= 3
        assert http.get("/it").text == "0 1 2 3 4 "
        assert len(http.get("/large").content) == 10 * MIB


def test_a_batch_is_made_of_requests_of_all_nodes(stage: Stage) -> None:
    @headgate.accept_batch
    def size(requests: list[Any]) -> list[int]:
        return [len(requests)] * len(requests)

    config = {"max_batch_size": 4, "batch_wait_timeout": 20.0}
    handle = serve(stage.client, size, ray_actor_options=on("b"), config=config)

    async def ask() -> list[int]:
        async with httpx.AsyncClient(timeout=30) as http:
            asked = [http.get(f"{stage.address(name)}/it") for name in stage.nodes]
            answers = asyncio.gather(*asked)
            other = await asyncio.to_thread(handle.call)
            return [other, *(answer.json() for answer in await answers)]

    assert asyncio.run(ask()) == [4, 4, 4, 4]


def test_errors_cross_nodes(stage: Stage) -> None:
    class Spoiled(Exception):
        pass

    def spoil(request: Any) -> None:
        raise Spoiled("milk")

    handle = serve(stage.client, spoil, ray_actor_options=on("b"))
    with pytest.raises(Exception, match="milk") as caught:
        handle.call()
    assert type(caught.value).__mro__[1].__name__ == "Spoiled" or "Spoiled" in str(type(caught.value).__mro__)
    assert httpx.get(f"{stage.address('c')}/it").status_code == 500


def test_a_client_that_leaves_cancels_the_handler_on_another_node(stage: Stage, tmp_path: Any) -> None:
    async def hang(request: Any) -> None:
        (tmp_path / "started").touch()
        try:
            await asyncio.sleep(3600)
        finally:
            (tmp_path / "cancelled").touch()

    serve(stage.client, hang, ray_actor_options=on("b"))

    async def leave() -> None:
        async with httpx.AsyncClient() as http:
            asked = asyncio.create_task(http.get(f"{stage.address('c')}/it"))
            await asyncio.to_thread(eventually, (tmp_path / "started").exists)
            asked.cancel()

    asyncio.run(leave())
    eventually((tmp_path / "cancelled").exists, 2)


def test_a_change_is_in_force_on_every_node_when_it_returns(stage: Stage) -> None:
    serve(stage.client, lambda request: "one", ray_actor_options=on("b"))
    stage.client.create_backend("two", lambda request: "two", ray_actor_options=on("c"))
    for number in range(10):
        tag = ("two", "it")[number % 2]
        stage.client.set_traffic("it", {tag: 1.0})
        answers = {httpx.get(f"{stage.address(name)}/it").text for name in stage.nodes}
        assert answers == {("two", "one")[number % 2]}


# --- handles and refs in Ray's own tasks and actors ---


@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_a_handle_works_in_a_task_of_any_node(stage: Stage, name: str) -> None:
    handle = serve(stage.client, lambda request: request.data + 1, ray_actor_options=on("b"))
    later = stage.client.get_handle("it", sync=False)

    @ray.remote(num_cpus=0, resources={name: 1})
    def task(handle: Any, later: Any) -> Any:
        async def use() -> Any:
            return await asyncio.gather(*(later.call(number) for number in range(5)), await later.remote(5))

        refs = [handle.remote(number) for number in range(3)]
        return [handle.call(10), headgate.get(refs), asyncio.run(use())]

    assert ray.get(task.remote(handle, later)) == [11, [1, 2, 3], [1, 2, 3, 4, 5, 6]]


def test_a_handle_works_in_actors_of_another_node(stage: Stage) -> None:
    handle = serve(stage.client, lambda request: request.data + 1, ray_actor_options=on("b"))

    @ray.remote(num_cpus=0, resources={"c": 1})
    class Plain:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        def use(self) -> Any:
            return self.handle.call(1), ray.get(self.handle.remote(2))

    @ray.remote(num_cpus=0, resources={"c": 1})
    class Later:
        def __init__(self, handle: Any) -> None:
            self.handle = handle

        async def use(self) -> Any:
            return await self.handle.call(1), await (await self.handle.remote(2))

    plain = Plain.remote(handle)
    later = Later.remote(stage.client.get_handle("it", sync=False))
    for actor in (plain, later):
        assert ray.get([actor.use.remote() for _ in range(3)]) == [(2, 3)] * 3
        ray.kill(actor)


def test_refs_are_rays(stage: Stage) -> None:
    handle = serve(stage.client, lambda request: request.data * 2, ray_actor_options=on("b"))
    later = stage.client.get_handle("it", sync=False)
    ref = handle.remote(1)
    assert isinstance(ref, ray.ObjectRef)
    assert (ray.get(ref), headgate.get(ref), headgate.get([ref, ref])) == (2, 2, [2, 2])
    assert ray.wait([ref, handle.remote(2)], num_returns=2)[1] == []
    assert headgate.wait([ref], timeout=5) == ([ref], [])

    @ray.remote(num_cpus=0)
    def plus(number: int) -> int:
        return number + 1

    assert ray.get(plus.remote(handle.remote(5))) == 11
    assert headgate.get(handle.remote(plus.remote(1))) == 4  # a task's ref as data: the handler gets its value
    assert handle.call(plus.remote(2)) == 6
    assert headgate.get(handle.remote(handle.remote(handle.remote(1)))) == 8
    assert headgate.get(handle.remote(ray.put(b"x" * MIB))) == b"x" * 2 * MIB

    async def use() -> Any:
        ref = await later.remote(plus.remote(2))
        return await ref, await later.call(plus.remote(3)), await (await later.remote(await later.remote(1)))

    assert asyncio.run(use()) == (6, 8, 4)


def test_a_ref_raises_what_the_handler_raised(stage: Stage) -> None:
    def spoil(request: Any) -> None:
        raise LookupError("no milk")

    handle = serve(stage.client, spoil, ray_actor_options=on("b"))
    for get in (ray.get, headgate.get):
        with pytest.raises(LookupError, match="no milk"):
            get(handle.remote())


def test_remote_waits_while_every_replica_is_full(stage: Stage, tmp_path: Any) -> None:
    def gate(request: Any) -> None:
        import time

        while not (tmp_path / "open").exists():
            time.sleep(0.01)

    config = {"max_concurrent_queries": 1}
    handle = serve(stage.client, gate, ray_actor_options=on("b"), config=config)
    first = handle.remote()
    sent: list[Any] = []
    thread = threading.Thread(target=lambda: sent.append(handle.remote()))
    thread.start()
    thread.join(0.5)
    assert not sent
    (tmp_path / "open").touch()
    thread.join(10)
    assert headgate.get([first, *sent], timeout=10) == [None, None]


# --- resources ---


@pytest.mark.parametrize(
    ("options", "texts"),
    [
        ({"resources": {"unicorn": 1}}, ("unicorn",)),
        ({"num_gpus": 1}, ("GPU",)),
        ({"num_cpus": 5}, ("CPU", "5")),  # twelve in the cluster, but four on each node
        ({"num_cpus": 0, "resources": {"a": 1, "b": 1}}, ("a", "b")),  # no node has both
    ],
)
def test_what_the_cluster_can_never_give_is_named(stage: Stage, options: dict[str, Any], texts: tuple[str]) -> None:
    with pytest.raises(headgate.HeadgateError) as error:
        stage.client.create_backend("it", where, ray_actor_options=options)
    assert isinstance(error.value, headgate.BackendStartError | headgate.ConfigError)
    for text in ("'it'", *texts):
        assert text in str(error.value)
    assert stage.client.list_backends() == {}
    eventually(lambda: stage.client.status().replicas == ())


def test_what_is_busy_is_waited_for_and_status_and_log_say_so(stage: Stage) -> None:
    @ray.remote(num_cpus=0, resources={"c": 10})
    class Holder:
        def here(self) -> None: ...

    holder = Holder.remote()
    ray.get(holder.here.remote())
    errors: list[Exception] = []

    def create() -> None:
        try:
            stage.client.create_backend("it", where, ray_actor_options=on("c"))
        except headgate.HeadgateError as error:
            errors.append(error)

    thread = threading.Thread(target=create)
    thread.start()
    try:
        (waiting,) = eventually(lambda: [one for one in stage.client.status().waiting if "resource 'c'" in one], 15)
        assert "'it'" in waiting
        assert thread.is_alive()
        logs = Path(ray.nodes()[0]["ObjectStoreSocketName"]).parents[1] / "logs"
        said = b"waits for 1 of the resource 'c'"
        eventually(lambda: any(said in path.read_bytes() for path in logs.glob("worker-*.err")), 20)
    finally:
        ray.kill(holder)
        thread.join(30)
    assert errors == []
    stage.client.create_endpoint("it", backend="it")
    assert stage.client.get_handle("it").call() == stage.nodes["c"]
    eventually(lambda: stage.client.status().waiting == ())


# --- other drivers ---

STARTS = """
import headgate, os
client = headgate.start(detached=True, namespace="mine", http_options={"location": None})
client.create_backend("it", lambda request: os.getpid())
client.create_endpoint("it", backend="it")
print(client._instance.home.key, client.get_handle("it").call())
"""
CONNECTS = """
import headgate, os
client = headgate.connect("mine")
print(client.get_handle("it").call(), client.status().replicas[0].pid)
client.create_backend("more", lambda request: "more")
client.create_endpoint("more", backend="more")
"""


def test_a_detached_instance_belongs_to_no_driver(cluster: RayCluster, script: Callable[..., Script]) -> None:
    key, pid = script(STARTS).output().split()
    try:
        client = headgate.connect("mine")
        assert key_of(client) == key
        assert client.get_handle("it").call() == int(pid)
        with pytest.raises(headgate.InstanceError, match=r"headgate\.connect\('mine'\)"):
            headgate.start(detached=True, namespace="mine", http_options={"location": None})
        assert script(CONNECTS).output().split() == [pid, pid]
        assert client.get_handle("more").call() == "more"
        assert list(client.list_backends()) == ["it", "more"]
    finally:
        headgate.connect("mine").shutdown()
    assert is_gone(key)
    with pytest.raises(headgate.InstanceError, match="already been shut down"):
        client.status()
    with pytest.raises(headgate.InstanceError, match="'mine'"):
        headgate.connect("mine")


def test_of_two_detached_starts_at_once_one_is_told_to_connect(cluster: RayCluster) -> None:
    together = threading.Barrier(2)

    def begin() -> headgate.Client:
        together.wait(10)
        return headgate.start(detached=True, namespace="race", http_options={"location": None})

    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(begin) for _ in range(2)]
        problems = [error for each in asked if (error := each.exception(60)) is not None]
    (client,) = [each.result() for each in asked if each.exception() is None]
    try:
        (problem,) = problems
        assert isinstance(problem, headgate.InstanceError)
        assert "use headgate.connect('race')" in str(problem)
        assert headgate.connect("race").list_backends() == {}
    finally:
        client.shutdown()
    assert is_gone(key_of(client))


def test_a_backend_connects_to_its_own_instance(stage: Stage) -> None:
    class Outer:
        def __init__(self) -> None:
            client = headgate.connect()
            client.create_backend("inner", where, ray_actor_options=on("c"))
            client.create_endpoint("inner", backend="inner")
            self.inner = client.get_handle("inner", sync=False)

        async def __call__(self, request: Any) -> Any:
            return await self.inner.call(), where(request)

    assert serve(stage.client, Outer, ray_actor_options=on("b")).call() == (stage.nodes["c"], stage.nodes["b"])
