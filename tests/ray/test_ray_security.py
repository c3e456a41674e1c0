"""Who may command a cluster, and where headgate's own ports are open."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray_cluster

import headgate

QUIET = "log_to_driver=False, logging_level='ERROR', configure_logging=False"


@pytest.fixture(scope="module", autouse=True)
def cluster(clusters: Any) -> ray_cluster.RayCluster:
    """A cluster that asks for a token."""
    found: ray_cluster.RayCluster = clusters.one_node()
    return found


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Runs a program that starts a Ray of its own, without authentication: the lines that it prints."""
    folders: list[Path] = []

    def run_apart(text: str) -> list[str]:
        folder = Path(tempfile.mkdtemp(prefix="hgr-", dir="/tmp"))
        folders.append(folder)
        path = tmp_path / "driver.py"
        path.write_text(text)
        environment = {**ray_cluster.environment(folder), "RAY_AUTH_MODE": "disabled", "RAY_ADDRESS": ""}
        return run_script(path, environment)

    yield run_apart
    for folder in folders:
        ray_cluster.sweep(folder)
        shutil.rmtree(folder, ignore_errors=True)


def run_script(path: Path, environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(path)], env={**os.environ, **environment}, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_a_cluster_that_serves_everybody_is_refused_unless_told_otherwise(apart: Callable[[str], list[str]]) -> None:
    said = apart(
        f"""
import ray, headgate
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=4, include_dashboard=False))
ray.init(address=cluster.address, {QUIET})
try:
    headgate.start(engine="ray", http_options={{"location": None}})
except headgate.InstanceError as error:
    print("refused:", error)
print("left:", ray.util.list_named_actors(all_namespaces=True))
with headgate.start(engine="ray", http_options={{"location": None}}, insecure=True) as client:
    print("started:", client)
ray.shutdown()
cluster.shutdown()
"""
    )
    assert said[0].startswith("refused: the cluster at ")
    assert "insecure=True" in said[0]
    assert "RAY_AUTH_MODE=token" in said[0]
    assert said[1] == "left: []"
    assert said[2].startswith("started:")


def test_a_ray_of_this_process_without_authentication_is_warned_of_once(apart: Callable[[str], list[str]]) -> None:
    said = apart(
        f"""
import warnings, ray, headgate
ray.init(address="local", num_cpus=4, include_dashboard=False, {QUIET})
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for _ in range(2):
        headgate.start(http_options={{"location": None}}).shutdown()
print(len([one for one in told if "token authentication is off" in str(one.message)]))
ray.shutdown()
"""
    )
    assert said == ["1"]


@pytest.mark.parametrize("token", ["0" * 64, ""], ids=["wrong", "missing"])
def test_a_wrong_or_missing_token_is_an_error_that_says_so_at_once(
    cluster: ray_cluster.RayCluster, tmp_path: Path, token: str
) -> None:
    path = tmp_path / "driver.py"
    path.write_text(
        """
import headgate
try:
    headgate.start(engine="ray", http_options={"location": None})
except headgate.InstanceError as error:
    print(error)
"""
    )
    begun = time.monotonic()
    mode = "token" if token else "disabled"
    environment = {"RAY_ADDRESS": cluster.address, "RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": token, "HOME": "/nowhere"}
    [said] = run_script(path, environment)
    assert "asks for a token" in said
    assert "RAY_AUTH_TOKEN" in said
    assert time.monotonic() - begun < 15.0


def test_ports_of_the_wire_are_open_on_the_nodes_address_only() -> None:
    from headgate.engine import cluster, ray_records

    node = cluster.node_address()
    with headgate.start(http_options={"location": None}) as client:
        client.create_backend("it", lambda request: None)
        client.create_endpoint("it", backend="it")
        client.get_handle("it").call()
        meeting = ray_records.Records(client._instance.key.removeprefix("ray:")).meeting()
        assert meeting is not None
        urls = [meeting.tcp]
        urls += [replica.remote for view in client._instance.snapshot.backends for replica in view.replicas]
        assert len(urls) == 2
        for url in urls:
            host, _, port = url.removeprefix("tcp://").rpartition(":")
            assert host == node
            assert listening(int(port)) == [node]


def listening(port: int) -> list[str]:
    """The IPv4 addresses on which somebody listens on that port; ["::"] for IPv6's."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            address, _, number = fields[1].rpartition(":")
            if fields[3] == "0A" and int(number, 16) == port:
                octets = bytes.fromhex(address)[::-1]
                found.append(".".join(map(str, octets)) if table == "tcp" else "::")
    return found
