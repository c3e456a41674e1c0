"""What an instance on Ray loses, and what not, when its processes, its nodes and Ray's own head die."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import httpx
import needs
import pickles
import pytest
import ray_leftovers
from http_load import in_thread
from promises import Promise
from ray_cluster import RayCluster, node_id, prepare, raylet_pid
from running import Script, eventually, is_alive, is_gone, key_of
from under_load import starts, under_both_loads, worker

import headgate

ray = needs.module("ray")


@pytest.fixture(scope="module")
def cluster(clusters: Any) -> Iterator[RayCluster]:
    """Three nodes, whose head keeps its tables on disk."""
    storage = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(prepare() / "gcs")}
    with clusters.own(num_cpus=4, resources={"a": 10}, environment=storage) as cluster:
        cluster.add(resources={"b": 10})
        cluster.add(resources={"c": 10})
        yield cluster


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Where the replicas of all nodes write down the id of each request that they start."""
    path = tmp_path / "log"
    path.touch()
    return path


@pytest.fixture
def client(cluster: RayCluster, log: Path) -> Iterator[headgate.Client]:
    """An instance whose endpoint "it", at /it, takes 20 ms on two replicas."""
    with headgate.start(http_options={"port": 0}) as client:
        config = {"num_replicas": 2, "max_concurrent_queries": 100}
        client.create_backend("it", worker(log), config=config, ray_actor_options={"num_cpus": 0})
        client.create_endpoint("it", backend="it", route="/it")
        yield client


def scope(client: headgate.Client) -> str:
    """The Ray namespace of the instance."""
    return key_of(client).removeprefix("ray:")


def actor_pid(client: headgate.Client, beginning: str) -> int:
    """The pid of the one actor whose name begins so."""
    found = {name: pid for name, pid in ray_leftovers.actor_pids(scope(client)).items() if name.startswith(beginning)}
    (pid,) = found.values()
    return pid


def pids(client: headgate.Client, tag: str = "it") -> list[int]:
    return sorted(one.pid for one in client.status().replicas if one.backend == tag and one.state == "ready")


class Traffic:
    """Threads that ask while the block runs: two by handle, one over HTTP on one connection, one on new ones.

    `failed` has what went wrong, `count` how many were asked. Each has an id, and at the end of the block
    the log of the replicas says that none was started twice, and each that was answered once.
    """

    def __init__(self, client: headgate.Client, log: Path, patience_s: float = 30.0) -> None:
        self._log = log
        self._patience_s = patience_s
        self._ids = count()
        self._done: set[str] = set()
        self.failed: list[str] = []
        self.count = 0
        self.last = time.monotonic()
        self.longest_s = 0.0
        self._url = f"{client.http_address}/it"
        self._handle = client.get_handle("it").options(timeout_s=patience_s)
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(each,)) for each in (self._call, self._call)]
        self._threads += [threading.Thread(target=self._kept), threading.Thread(target=self._run, args=(self._get,))]

    def _call(self, id: str) -> str:
        answer: str = self._handle.call(id=id)
        return answer

    def _get(self, id: str, http: Any = httpx) -> str:
        answer = http.get(self._url, params={"id": id}, timeout=self._patience_s)
        return answer.text if answer.status_code == 200 else f"{answer.status_code} {answer.text}"

    def _kept(self) -> None:
        with httpx.Client() as http:
            self._run(lambda id: self._get(id, http))

    def _run(self, ask: Callable[[str], str]) -> None:
        while not self._over.is_set():
            begun = time.monotonic()
            id = f"t{next(self._ids)}"
            try:
                answer = ask(id)
            except (headgate.HeadgateError, httpx.HTTPError) as error:
                answer = f"{type(error).__name__}: {error}"
            self.count += 1
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            if answer == "done":
                self._done.add(id)
            else:
                self.failed.append(answer)
            time.sleep(0.002)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        eventually(lambda: self.count > 20)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        time.sleep(0.3)
        self._over.set()
        for thread in self._threads:
            thread.join(40)
        if kind is None:
            ran = starts(self._log)
            assert [id for id, times in ran.items() if times > 1 and id.startswith("t")] == []
            assert self._done <= ran.keys()


# --- replicas ---


def kill_actor(client: headgate.Client, pid: int) -> None:
    """As `ray.kill` does it: no warning, and Ray knows."""
    (name,) = [name for name, its in ray_leftovers.actor_pids(scope(client)).items() if its == pid]
    ray.kill(ray.get_actor(name, namespace=scope(client)))


def kill_worker(client: headgate.Client, pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("kill", [kill_actor, kill_worker])
def test_a_killed_replica_costs_what_it_had_started_and_is_replaced(
    client: headgate.Client, log: Path, kill: Any
) -> None:
    with Traffic(client, log) as traffic:
        for _ in range(3):
            before = pids(client)
            kill(client, before[0])
            eventually(lambda: len(found := pids(client)) == 2 and before[0] not in found, 20)  # noqa: B023
    assert traffic.count > 100
    assert len(traffic.failed) <= 3 * 4, traffic.failed  # four threads
    assert all("started" in each or "died" in each.lower() for each in traffic.failed), traffic.failed


@pytest.mark.promise("a replica on another node, kill -9: what was sent may be lost, nothing runs twice")
def test_what_was_sent_to_another_node_never_runs_twice(
    client: headgate.Client, log: Path, tmp_path: Path, promise: Promise
) -> None:
    """Over TCP nobody can see what had started there: what was sent counts as started."""
    config = {"num_replicas": 2, "max_concurrent_queries": 100}
    options = {"num_cpus": 0, "resources": {"b": 1}}
    client.create_backend("far", worker(tmp_path / "far"), config=config, ray_actor_options=options)
    client.set_traffic("it", {"far": 1.0})
    (proxy,) = client.status().proxies
    assert {one.node for one in client.status().replicas if one.backend == "far"}.isdisjoint({proxy.node})

    def replaced(victim: int) -> bool:
        return len(found := pids(client, "far")) == 2 and victim not in found

    async def kill() -> None:
        for _ in range(promise.size(20, 5)):
            victim = promise.random.choice(await in_thread(pids, client, "far"))
            os.kill(victim, signal.SIGKILL)
            await in_thread(eventually, lambda: replaced(victim), 20)  # noqa: B023

    loads = under_both_loads(client, kill, fresh_per_s=50)
    answers = loads[0].answers | loads[1].answers
    ran = starts(tmp_path / "far")
    assert [id for id, times in ran.items() if times > 1] == []
    lost = {id: answer for id, answer in answers.items() if answer.status != 200}
    assert {answer.status for answer in lost.values()} <= {502}, lost
    assert answers.keys() - lost.keys() <= ran.keys()
    assert starts(log) == {}
    assert lost, "nothing was under way when they were killed"
    promise.none_of(len(answers), "requests run twice")
    promise.says(f"502 for {len(lost)}, of which {len(lost.keys() & ran.keys())} had started")


def test_a_replica_that_exits_by_itself_fails_its_own_request_only(client: headgate.Client) -> None:
    def fragile(request: Any) -> int:
        if request.data:
            os._exit(3)
        return os.getpid()

    client.create_backend("fragile", fragile, ray_actor_options={"num_cpus": 0})
    client.create_endpoint("fragile", backend="fragile")
    handle = client.get_handle("fragile")
    before = handle.call()
    with pytest.raises(headgate.ReplicaDied) as error:
        handle.call("die")
    assert error.value.started
    assert handle.options(timeout_s=20).call() != before


# --- the proxy and its agent ---


def test_a_killed_proxy_refuses_nobody(client: headgate.Client, log: Path) -> None:
    with Traffic(client, log) as traffic:
        for _ in range(5):
            (old,) = client.status().proxies
            os.kill(old.pid, signal.SIGKILL)
            eventually(lambda: [one for one in client.status().proxies if one.state == "ready" and one.pid != old.pid])  # noqa: B023
            assert httpx.get(f"{client.http_address}/it").text == "done"
    assert not any("ConnectError" in each for each in traffic.failed), traffic.failed
    assert all(each.startswith(("RemoteProtocolError", "ReadError", "WriteError")) for each in traffic.failed)
    assert len(traffic.failed) <= 5 * 2, traffic.failed


@pytest.mark.parametrize("kill", [kill_actor, kill_worker])
def test_requests_go_on_when_an_agent_is_killed(client: headgate.Client, log: Path, kill: Any) -> None:
    (proxy,) = client.status().proxies
    with Traffic(client, log) as traffic:
        for _ in range(2):
            old = actor_pid(client, "agent")
            if kill is kill_actor:
                (name,) = [name for name in ray_leftovers.actor_pids(scope(client)) if name.startswith("agent")]
                ray.kill(ray.get_actor(name, namespace=scope(client)), no_restart=False)
            else:
                os.kill(old, signal.SIGKILL)
            eventually(lambda: not is_alive(old))  # noqa: B023
            client.set_traffic("it", {"it": 1.0})
            eventually(lambda: another(client, old), 20)  # noqa: B023
    assert traffic.failed == []
    assert [one.pid for one in client.status().proxies] == [proxy.pid]
    os.kill(proxy.pid, signal.SIGKILL)  # the new agent can still start another
    eventually(lambda: [one for one in client.status().proxies if one.state == "ready" and one.pid != proxy.pid], 20)
    assert httpx.get(f"{client.http_address}/it").text == "done"


def another(client: headgate.Client, old: int) -> bool:
    try:
        return actor_pid(client, "agent") != old
    except ValueError:  # it is not back yet
        return False


# --- the controller ---


def test_a_killed_supervisor_of_a_node_is_started_again_on_the_same_port(client: headgate.Client) -> None:
    before = client.status().proxies[0].pid
    supervisor = int(Path("/proc", str(before), "stat").read_text().rpartition(")")[2].split()[1])
    handle = client.get_handle("it")
    os.kill(supervisor, signal.SIGKILL)
    eventually(lambda: not is_alive(before))
    assert handle.call() == "done"  # handles never went that way

    def answers() -> bool:
        try:
            return bool(httpx.get(f"{client.http_address}/it").status_code == 200)
        except httpx.TransportError:
            return False

    eventually(answers, 30)
    assert client.status().proxies[0].pid != before


@pytest.mark.promise("Ray: the controller killed: no request fails, the same replicas, changes work again")
def test_a_killed_controller_fails_no_request_and_keeps_all_replicas(
    client: headgate.Client, log: Path, promise: Promise
) -> None:
    before = pids(client)
    (proxy,) = client.status().proxies
    with Traffic(client, log) as traffic:
        for _ in range(promise.size(5, 2)):
            os.kill(actor_pid(client, "controller"), signal.SIGKILL)
            begun = time.monotonic()
            client.set_traffic("it", {"it": 1.0})
            promise.within(time.monotonic() - begun, 3.0, "a change")
            eventually(lambda: pids(client) == before)
    assert traffic.failed == []
    assert [one.pid for one in client.status().proxies] == [proxy.pid]
    client.update_backend_config("it", {"num_replicas": 1})
    assert set(pids(client)) < set(before)


def test_what_was_deployed_survives_the_controller(client: headgate.Client) -> None:
    client.create_backend("other", lambda request: "other", ray_actor_options={"num_cpus": 0})
    client.set_traffic("it", {"it": 0.0, "other": 1.0})
    endpoints, backends = client.list_endpoints(), client.list_backends()
    os.kill(actor_pid(client, "controller"), signal.SIGKILL)
    assert client.list_endpoints() == endpoints
    assert client.list_backends() == backends
    client.update_backend("other", lambda request: "new")
    assert client.get_handle("it").call() == "new"


# --- nodes ---


def on_new_node(client: headgate.Client, cluster: RayCluster, log: Path) -> tuple[Any, list[int]]:
    """A node with two replicas of "it" that could be elsewhere, and those two's pids."""
    node = cluster.add(num_cpus=16)
    options = {"num_cpus": 5}  # the others have four each
    config = {"num_replicas": 2, "max_concurrent_queries": 100}
    client.create_backend("there", worker(log), ray_actor_options=options, config=config)
    found = [one for one in client.status().replicas if one.backend == "there"]
    assert {one.node for one in found} == {node_id(node)}
    return node, [one.pid for one in found]


@pytest.mark.parametrize("gracefully", [True, False])
def test_a_node_that_is_lost_costs_what_it_had_started(
    client: headgate.Client, cluster: RayCluster, log: Path, gracefully: bool
) -> None:
    """Ungracefully: kill -9 of its raylet, which leaves the workers to themselves.

    What chose the lost version before its traffic was taken away waits for it, as long as it is ready to.
    """
    node, there = on_new_node(client, cluster, log)
    client.set_traffic("it", {"it": 0.5, "there": 0.5})
    try:
        with Traffic(client, log, patience_s=4.0) as traffic:
            if gracefully:
                cluster.remove(node)
            else:
                os.kill(raylet_pid(node), signal.SIGKILL)
            eventually(lambda: not any(map(is_alive, there)), 15)
            client.set_traffic("it", {"it": 1.0})
            eventually(lambda: not any(one.node == node_id(node) for one in client.status().replicas), 20)
            count = traffic.count
            eventually(lambda: traffic.count > count + 50)
    finally:
        if not gracefully:
            cluster.remove(node, gracefully=False)
    lost = [each for each in traffic.failed if not each.startswith(("RequestTimeout", "ReadTimeout"))]
    assert len(lost) <= 12, lost
    assert any("'there'" in sentence for sentence in client.status().waiting)  # which fits nowhere any more
    replacement = cluster.add(num_cpus=16)
    try:
        eventually(lambda: len(pids(client, "there")) == 2, 30)
        client.delete_backend("there")
    finally:
        cluster.remove(replacement)


# --- the driver ---

STARTS = """
import headgate, os, time
client = headgate.start(http_options={"location": "EveryNode", "host": "node", "port": 0})
client.create_backend("it", lambda request: os.getpid(), config={"num_replicas": 3}, ray_actor_options={"num_cpus": 0})
client.create_endpoint("it", backend="it")
client.get_handle("it").call()
status = client.status()
print(client._instance.home.key, *(one.pid for one in (*status.replicas, *status.proxies)), flush=True)
time.sleep(60)
"""


def test_nothing_outlives_a_killed_driver(cluster: RayCluster, script: Callable[..., Script]) -> None:
    run = script(STARTS)
    key, *others = run.line().split()
    running = [*map(int, others), *ray_leftovers.actor_pids(key[4:]).values()]
    assert len(running) >= 3 + 3 + 4
    assert all(map(is_alive, running))
    run.send(signal.SIGKILL)
    eventually(lambda: not any(map(is_alive, running)), 15)
    eventually(lambda: is_gone(key), 15)


# --- Ray's head ---


def test_requests_go_on_while_ray_s_head_is_away_and_changes_work_again_after(
    client: headgate.Client, cluster: RayCluster, log: Path
) -> None:
    before = pids(client)
    with Traffic(client, log) as traffic:
        cluster.head.kill_gcs_server()
        try:
            time.sleep(2)
            count = traffic.count
            begun = time.monotonic()
            with ThreadPoolExecutor(1) as pool:
                change = pool.submit(client.create_backend, "late", lambda request: "late")
                error = change.exception(timeout=20)
            assert isinstance(error, headgate.HeadgateError), error
            assert time.monotonic() - begun < 8.0
            assert "cluster" in str(error) or "store" in str(error), error
            assert traffic.count > count + 50
        finally:
            cluster.head.start_gcs_server()
        eventually(lambda: works(client), 40)
    assert traffic.failed == []
    assert pids(client) == before
    if "late" not in client.list_backends():
        client.create_backend("late", lambda request: "late", ray_actor_options={"num_cpus": 0})
    client.create_endpoint("late", backend="late")
    assert client.get_handle("late").call() == "late"


def works(client: headgate.Client) -> bool:
    try:
        client.set_traffic("it", {"it": 1.0})
    except headgate.HeadgateError:
        return False
    return True


def test_the_guard_of_these_tests_sees_what_is_left(cluster: RayCluster) -> None:
    """The guard of these tests finds what an instance would leave in Ray's tables."""
    watch = ray_leftovers.watch()
    assert watch
    assert watch.look() == []

    class Left:
        def here(self) -> int:
            return os.getpid()

    actor = ray.remote(num_cpus=0)(Left).options(name="left", namespace="headgate-left", lifetime="detached").remote()
    pid = ray.get(actor.here.remote())
    gcs: Any = ray._private.worker.global_worker.gcs_client
    gcs.internal_kv_put(b"headgate-left/goals", b"{}", True, namespace=ray_leftovers.KEYS)
    found = "\n".join(watch.look())
    for text in ("actor left of headgate-left", "headgate-left/goals", f"process {pid} "):
        assert text in found
    watch.clean()
    eventually(lambda: watch.look() == [] and not is_alive(pid))


def test_the_guard_against_pickles_is_in_the_workers(cluster: RayCluster) -> None:
    """It is in every worker, the controller's too; what it counts there: tests/test_pickles.py."""

    def is_here(variable: str) -> bool:
        import sys

        return variable in os.environ and hasattr(sys.modules.get("sitecustomize"), "write_down")

    assert ray.get(ray.remote(num_cpus=0)(is_here).remote(pickles.VARIABLE))
