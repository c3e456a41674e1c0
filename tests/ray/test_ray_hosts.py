"""Two hosts with a network between them: an instance spans both, and one goes on when the cable is cut."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import needs
import pytest
from hosts import ADDRESSES, Hosts, wait_for

needs.module("ray")

DRIVER = """
import json, sys, time
import headgate

client = headgate.start(http_options={"location": "EveryNode", "host": "node", "port": 8000})

def where(request):
    import ray
    return ray.util.get_node_ip_address()

def echo(request):
    return request.data

for host in ("1", "2"):
    client.create_backend(f"on{host}", where, ray_actor_options={"num_cpus": 0, "resources": {f"host{host}": 0.1}})
    client.create_endpoint(f"on{host}", backend=f"on{host}", route=f"/on{host}")
client.create_backend("both", where, ray_actor_options={"num_cpus": 3}, config={"num_replicas": 2})
client.create_endpoint("both", backend="both", route="/both")
client.create_backend("echo", echo, ray_actor_options={"num_cpus": 0, "resources": {"host2": 0.1}})
client.create_endpoint("echo", backend="echo")

def calls():
    handle = client.get_handle("echo")
    data = b"x" * (5 << 20)
    return [client.get_handle(f"on{host}").call() for host in "12"] + [handle.call(data) == data]

def after():
    # which node answers when host 2 is away, for fifteen seconds
    handle = client.get_handle("both")
    seen, slowest, end = {}, 0.0, time.monotonic() + 15
    while time.monotonic() < end:
        begun = time.monotonic()
        try:
            answer = handle.options(timeout_s=12).call()
        except headgate.RequestError as error:
            answer = type(error).__mro__[0].__name__
        seen[answer] = seen.get(answer, 0) + 1
        slowest = max(slowest, time.monotonic() - begun)
        time.sleep(0.01)
    return seen, slowest

def proxies():
    return sorted(one.address for one in client.status().proxies if one.state == "ready")

print(">ready", flush=True)
for line in sys.stdin:
    print(">" + json.dumps(globals()[line.strip()]()), flush=True)
client.shutdown()
print(">down", flush=True)
"""


class Driver:
    """A script in host 1 that does what it is told."""

    def __init__(self, hosts: Hosts, folder: Path) -> None:
        path = folder / "driver.py"
        path.write_text(DRIVER)
        self.errors = folder / "errors"
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                **hosts.command(1, sys.executable, str(path)),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )

    def line(self) -> str:
        """The next one that the script itself prints: Ray prints too."""
        assert self.process.stdout
        while line := self.process.stdout.readline():
            if line.startswith(">"):
                return line[1:].strip()
        raise AssertionError(self.errors.read_text()[-3000:])

    def ask(self, what: str) -> Any:
        assert self.process.stdin
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return json.loads(self.line())

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        assert self.line() == "down"
        assert self.process.wait(30) == 0, self.errors.read_text()[-3000:]

    def close(self) -> None:
        self.process.kill()
        with self.process:  # closes the pipes
            pass


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    needs.root()
    with Hosts(HEADGATE_ENGINE="ray") as hosts:
        yield hosts


def test_an_instance_spans_two_hosts_and_survives_the_loss_of_one(hosts: Hosts, tmp_path: Path) -> None:
    driver = Driver(hosts, tmp_path)
    try:
        assert driver.line() == "ready"
        for client in (1, 2):
            for server in (1, 2):
                for backend in (1, 2):
                    found = hosts.fetch(client, f"http://{ADDRESSES[server]}:8000/on{backend}")
                    assert found == (200, ADDRESSES[backend])
        assert driver.ask("calls") == [ADDRESSES[1], ADDRESSES[2], True]
        assert driver.ask("proxies") == [f"http://{ADDRESSES[host]}:8000" for host in (1, 2)]

        hosts.cut(2)
        seen, slowest = driver.ask("after")
        assert seen.get(ADDRESSES[1], 0) > 100, seen
        assert sum(count for answer, count in seen.items() if answer != ADDRESSES[1]) <= 20, seen
        assert slowest < 10.0, seen
        assert wait_for(hosts, 1, f"http://{ADDRESSES[1]}:8000/on1") == ADDRESSES[1]
        assert driver.ask("proxies") == [f"http://{ADDRESSES[1]}:8000"]
        driver.end()
    finally:
        driver.close()
