"""The controller is killed at each step of each change, under load.

Which steps there are, and that each is passed, is tests/controller/test_failpoints.py. Here the process is
killed there (SIGKILL), and the supervisor, the replicas and the callers have to live with it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from http_load import Load, get, in_thread
from operations import PASSES, RESTART
from promises import Promise
from running import grown_controller, instance_pids, key_of, one_instance, pid_of
from under_load import address_of, described, under_load

import headgate
from headgate.controller import failpoints, store
from headgate.core.state import Goals
from headgate.status import Status

pytestmark = [
    pytest.mark.local("the controller's environment is that of `start`"),
    pytest.mark.timeout(600),
]

#: What happens -> at which steps of it the controller is killed. In a restart it is the one that takes over.
STEPS = {**PASSES, "a restart": RESTART}

#: All that a change may take while the controller is killed in it; then the test fails rather than hang.
LONG_S = 20.0


@pytest.fixture(scope="module")
def armed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What is written there happens at the failpoint that it names, once."""
    path = tmp_path_factory.mktemp("failpoints") / "armed"
    os.environ[failpoints.VARIABLE] = f"@{path}"
    yield path
    del os.environ[failpoints.VARIABLE]


@pytest.fixture(scope="module")
def shared(armed: Path) -> Iterator[headgate.Client]:
    with one_instance(http_options={"port": 0}) as client:
        yield client


def noted(log: Path, said: str) -> type:
    """A backend's code that notes in which replica it is constructed."""

    class Noted:
        def __init__(self) -> None:
            id = headgate.get_replica_context().replica_tag
            fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(fd, f"{id}\n".encode())
            os.close(fd)

        async def __call__(self, request: Any) -> str:
            await asyncio.sleep(0.02)
            return said

        def reconfigure(self, config: Any) -> None: ...

    return Noted


class Operation:
    """The operations of tests/operations.py on a client, and how to take them back."""

    def __init__(self, client: headgate.Client, log: Path) -> None:
        self._client = client
        self._log = log
        self._numbers = iter(range(10**6))

    def prepare(self) -> None:
        client = self._client
        many = {"max_concurrent_queries": 100}
        client.create_backend("it", noted(self._log, "it"), config={"num_replicas": 2, **many})
        client.create_backend("other", noted(self._log, "other"), config=many)
        client.create_endpoint("it", backend="it", route="/it")

    def before(self, name: str) -> None:
        """What has to be so before it."""
        if name == "delete_backend":
            self._create("spare")
        elif name == "delete_endpoint":
            self._client.create_endpoint("spare", backend="it", route="/spare")

    def run(self, name: str) -> Callable[[], Any]:
        client, number = self._client, next(self._numbers)
        match name:
            case "create_backend":
                return lambda: self._create("new")
            case "update_backend":
                return lambda: client.update_backend("it", noted(self._log, f"it {number}"))
            case "scale_up":
                return lambda: client.update_backend_config("it", {"num_replicas": 3})
            case "scale_down":
                return lambda: client.update_backend_config("it", {"num_replicas": 1})
            case "limits":
                return lambda: client.update_backend_config("it", {"max_concurrent_queries": 50})
            case "user_config":
                return lambda: client.update_backend_config("it", {"user_config": number})
            case "delete_backend":
                return lambda: client.delete_backend("spare")
            case "create_endpoint":
                return lambda: client.create_endpoint("new", backend="other", route="/new")
            case "delete_endpoint":
                return lambda: client.delete_endpoint("spare")
            case "set_traffic":
                return lambda: client.set_traffic("it", {"it": 0.5, "other": 0.5})
            case "shadow_traffic":
                return lambda: client.shadow_traffic("it", "other", 0.5)
            case "a restart":
                return self._restart
        raise AssertionError(name)

    def undo(self, name: str) -> None:
        client = self._client
        match name:
            case "create_backend":
                client.delete_backend("new")
            case "scale_up" | "scale_down":
                client.update_backend_config("it", {"num_replicas": 2})
            case "limits":
                client.update_backend_config("it", {"max_concurrent_queries": 100})
            case "create_endpoint":
                client.delete_endpoint("new")
            case "set_traffic":
                client.set_traffic("it", {"it": 1.0})
            case "shadow_traffic":
                client.shadow_traffic("it", "other", 0)

    def has_happened(self, name: str, status: Status) -> bool:
        """Whether the goals say so."""
        counts = {one.tag: one.num_replicas for one in status.backends}
        endpoints = {one.name: one for one in status.endpoints}
        return {
            "create_backend": "new" in counts,
            "scale_up": counts["it"] == 3,
            "scale_down": counts["it"] == 1,
            "delete_backend": "spare" not in counts,
            "create_endpoint": "new" in endpoints,
            "delete_endpoint": "spare" not in endpoints,
            "set_traffic": endpoints["it"].traffic.get("other") == 0.5,
            "shadow_traffic": endpoints["it"].shadows.get("other") == 0.5,
        }.get(name, True)

    def _create(self, tag: str) -> None:
        self._client.create_backend(tag, noted(self._log, tag), config={"num_replicas": 2})

    def _restart(self) -> None:
        os.kill(pid_of(key_of(self._client), "headgate-ctl"), signal.SIGKILL)
        self._client.list_endpoints()  # answered by whoever is there in the end


def disagreement(client: headgate.Client) -> str:
    """In what goals, status, processes, the driver's snapshot and the proxy differ; "" if all say the same."""
    status, key = client.status(), key_of(client)
    goals = store.unpack(Path(key, store.NEWEST).read_bytes())
    ready = {
        goal.tag: sorted(one.id for one in status.replicas if (one.backend, one.state) == (goal.tag, "ready"))
        for goal in goals.backends
    }
    snapshot = client._instance.snapshot
    children = {one.pid for one in status.replicas} | {one.pid for one in status.proxies}
    pids = set(instance_pids(key))
    for what, found, wanted in (
        ("waiting", status.waiting, ()),
        ("ready", {tag: len(ids) for tag, ids in ready.items()}, _counts(goals)),
        ("replicas", sorted(one.id for one in status.replicas), sorted(id for ids in ready.values() for id in ids)),
        ("their processes", pids & children, children),
        ("other processes", _titles(pids - children), ["headgate-ctl", "headgate-super"]),
        ("snapshot", {view.tag: sorted(one.id for one in view.replicas) for view in snapshot.backends}, ready),
        ("endpoints", snapshot.endpoints, tuple(goal.endpoint for goal in goals.endpoints)),
        ("the proxy's routes", asyncio.run(get(address_of(client), "/-/routes")).json(), _routes(goals)),
    ):
        if found != wanted:
            return f"{what}: {found}, not {wanted}"
    return ""


def _counts(goals: Goals) -> dict[str, int]:
    return {goal.tag: goal.settings.num_replicas for goal in goals.backends}


def _titles(pids: set[int]) -> list[str]:
    """Sorted; "" of one that has just ended."""
    found = []
    for pid in pids:
        try:
            found.append(Path("/proc", str(pid), "comm").read_text().strip())
        except OSError:
            found.append("")
    return sorted(found)


def _routes(goals: Goals) -> dict[str, list[Any]]:
    """As /-/routes shows them."""
    endpoints = [goal.endpoint for goal in goals.endpoints]
    return {one.route or one.name: [one.name, list(one.methods)] for one in endpoints}


def agree(client: headgate.Client) -> float:
    """When goals and world agreed, on time.monotonic()."""
    give_up = time.monotonic() + LONG_S
    while trouble := disagreement(client):
        assert time.monotonic() < give_up, trouble
        time.sleep(0.01)
    return time.monotonic()


class Killing:
    """What was seen of the kills in one operation."""

    def __init__(self, client: headgate.Client, armed: Path, log: Path, name: str) -> None:
        self.client = client
        self.armed = armed
        self.name = name
        self.operation = Operation(client, log)
        self.back_s = self.agree_s = 0.0

    async def at(self, point: str) -> None:
        """Kill the controller there, once, and see that all is made good."""
        client, operation = self.client, self.operation
        await in_thread(operation.before, self.name)
        await in_thread(agree, client)
        key = key_of(client)
        before = {one.id: one.pid for one in client.status().replicas}
        killed = await in_thread(grown_controller, key)
        self.armed.write_text(f"{point}=kill")
        call = operation.run(self.name)
        calling = asyncio.create_task(in_thread(call))
        try:
            await asyncio.wait_for(self._gone(), LONG_S)
        except TimeoutError:
            self.armed.unlink()
            raise AssertionError(f"{self.name} did not come to {point}") from None
        begun = time.monotonic()
        await in_thread(client.list_endpoints)
        self.back_s = max(self.back_s, time.monotonic() - begun)
        assert pid_of(key, "headgate-ctl") != killed
        await asyncio.wait_for(calling, LONG_S)  # the client repeats it by itself
        self.agree_s = max(self.agree_s, await in_thread(agree, client) - begun)
        status = client.status()
        assert operation.has_happened(self.name, status), (self.name, point)
        self._check_stayed(before, {one.id: one.pid for one in status.replicas}, point)
        await in_thread(operation.undo, self.name)

    async def _gone(self) -> None:
        while self.armed.exists():
            await asyncio.sleep(0.001)

    def _check_stayed(self, before: dict[str, int], after: dict[str, int], point: str) -> None:
        """The replicas that this operation does not concern are the same processes."""
        concerned = {"update_backend": "it#", "scale_down": "it#", "delete_backend": "spare#"}.get(self.name, "-")
        stay = {id: pid for id, pid in before.items() if not id.startswith(concerned)}
        assert stay.items() <= after.items(), (self.name, point)
        if self.name == "scale_down":
            assert min(id for id in before if id.startswith("it#")) in after, point


def test_there_is_no_step_at_which_it_is_not_killed() -> None:
    assert set().union(*STEPS.values()) == set(failpoints.POINTS)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.promise(f"controller kill -9 at each step of {name}")) for name in STEPS],
)
def test_a_controller_killed_in_the_middle(
    name: str, client: headgate.Client, armed: Path, tmp_path: Path, promise: Promise
) -> None:
    log = tmp_path / "constructed"
    points = sorted(STEPS[name])
    chosen = promise.random.sample(points, promise.size(len(points), 1))
    killing = Killing(client, armed, log, name)
    killing.operation.prepare()

    async def kill_all(running: Load) -> None:
        for point in chosen:
            try:
                await killing.at(point)
            except Exception as error:
                error.add_note(f"killed at {point}")
                raise

    running = under_load(client, kill_all)
    assert described(running.failed) == []
    promise.none_of(running.sent, "requests failed")
    constructed = Counter(log.read_text().split())
    assert set(constructed.values()) == {1}, constructed
    promise.none_of(len(constructed), "replicas constructed twice")
    promise.within(killing.back_s, 0.5, "back")
    promise.within(killing.agree_s, 1.0, "goals and world agree")
    promise.none_of(len(chosen), "calls raised")
