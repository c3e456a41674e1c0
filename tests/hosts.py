"""Two "hosts" on this machine: network namespaces on one bridge, with a Ray node in each.

    with Hosts() as hosts:
        script = hosts.popen(1, "driver.py")      # a driver, in host 1
        hosts.fetch(2, "http://127.0.0.1:8000/")  # what a client in host 2 gets
        hosts.cut(2)                              # the cable of host 2 is pulled out

Each host has an address, a loopback and abstract unix sockets of its own; processes, files and the
clock are shared. Needs root and iproute2: ask `needs.root()` first. Leaves nothing behind, also
when this process is killed: ray_cluster.guard.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ray_cluster

ADDRESSES = {1: "10.77.0.1", 2: "10.77.0.2"}
PORT = 6379
START = [sys.executable, "-m", "ray.scripts.scripts", "start"]
FETCH = """
import sys, urllib.error, urllib.request
try:
    answer = urllib.request.urlopen(sys.argv[1], timeout=float(sys.argv[2]))
except urllib.error.HTTPError as error:
    answer = error
except OSError as error:
    print(0)
    print(type(error).__name__, error)
    sys.exit()
print(answer.status)
print(answer.read().decode())
"""


def ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Hosts:
    """Hosts 1 and 2; the head of the Ray cluster runs in 1. Resources: "host1" and "host2", one each."""

    def __init__(self, **variables: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hgr-", dir="/tmp"))
        self._environment = {**os.environ, **ray_cluster.environment(self.folder), **variables}
        self._environment["RAY_ADDRESS"] = f"{ADDRESSES[1]}:{PORT}"
        self._tag = str(os.getpid())
        undo = [f"ip netns del {self._name(host)}" for host in ADDRESSES]
        self._guard = ray_cluster.guard(self.folder, *undo, f"ip link del {self._bridge}")

    @property
    def _bridge(self) -> str:
        return f"hgb{self._tag}"

    def _name(self, host: int) -> str:
        return f"hg{self._tag}-{host}"

    def _cable(self, host: int) -> str:
        return f"hgc{self._tag}-{host}"

    def start(self) -> None:
        ip("link", "add", self._bridge, "type", "bridge")
        ip("link", "set", self._bridge, "up")
        for host, address in ADDRESSES.items():
            name, cable = self._name(host), self._cable(host)
            ip("netns", "add", name)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", cable, "master", self._bridge, "up")
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", name, "link", "set", device, "up")
            (self.folder / str(host)).mkdir()
        health = json.dumps(ray_cluster.HEALTH)
        head = ("--head", f"--port={PORT}", "--include-dashboard=false", "--no-monitor")
        self._start_ray(1, *head, f"--system-config={health}")
        self._start_ray(2, f"--address={ADDRESSES[1]}:{PORT}")

    def _start_ray(self, host: int, *flags: str) -> None:
        resources = json.dumps({f"host{host}": 1})
        flags = (
            *flags, f"--node-ip-address={ADDRESSES[host]}", f"--resources={resources}", "--num-cpus=4",
            "--num-gpus=0", f"--object-store-memory={ray_cluster.STORE_BYTES}", "--disable-usage-stats",
        )  # fmt: skip
        done = self.run(host, *START, *flags)
        assert done.returncode == 0, done.stdout + done.stderr

    def command(self, host: int, *command: str) -> dict[str, Any]:
        """What subprocess needs to run a command in that host."""
        arguments = ["ip", "netns", "exec", self._name(host), *command]
        return {"args": arguments, "env": {**self._environment, "RAY_TMPDIR": str(self.folder / str(host))}}

    def run(self, host: int, *command: str, timeout_s: float = 60.0) -> subprocess.CompletedProcess[str]:
        return subprocess.run(**self.command(host, *command), capture_output=True, text=True, timeout=timeout_s)

    def fetch(self, host: int, url: str, timeout_s: float = 5.0) -> tuple[int, str]:
        """(status, body) as a client in that host gets it; status 0 and why, if there is no answer."""
        done = self.run(host, sys.executable, "-S", "-c", FETCH, url, str(timeout_s))
        assert done.returncode == 0, done.stderr
        status, _, body = done.stdout.partition("\n")
        return int(status), body.strip()

    def cut(self, host: int) -> None:
        """Pull the cable out: nothing goes in or out, and nobody is told."""
        ip("link", "set", self._cable(host), "down")

    def mend(self, host: int) -> None:
        ip("link", "set", self._cable(host), "up")

    def stop(self) -> None:
        ray_cluster.dismiss(self._guard)
        left = [each for each in os.listdir("/run/netns") if each.startswith(f"hg{self._tag}-")]
        assert not left, left

    def __enter__(self) -> Hosts:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def wait_for(hosts: Hosts, host: int, url: str, timeout_s: float = 20.0) -> str:
    """The body, once the URL is answered with 200."""
    give_up = time.monotonic() + timeout_s
    while (found := hosts.fetch(host, url))[0] != 200:
        assert time.monotonic() < give_up, f"{url} from host {host}: {found}"
        time.sleep(0.1)
    return found[1]
