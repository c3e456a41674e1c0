"""Fixtures of all tests: the engine, a place to run in, a free port, and the guard against leftovers.

`--engine ray` runs tests/e2e and tests/faults once more, with all instances on a real Ray cluster of one
node, and then tests/ray, which start their own clusters. What is about the local engine only says so with
`@pytest.mark.local("why")` and is left out then. Other tests know no engine.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import leftovers
import pickles
import promises
import pytest
import ray_cluster
import ray_leftovers
from running import Script, on_ray, one_instance

import headgate

#: Folders whose tests start processes.
GUARDED = {"controller", "e2e", "engine", "faults", "ray", "security", "wire"}

#: Folders whose tests run on both engines.
BOTH = {"e2e", "faults"}

#: The longest that a test of tests/ray may take: starting a cluster of three nodes takes ten seconds.
RAY_S = 120

_numbers = count(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--engine",
        choices=("local", "ray"),
        default=os.environ.get("HEADGATE_TEST_ENGINE", "local"),
        help="where the tests' instances live; the default is local, or what HEADGATE_TEST_ENGINE says",
    )
    promises.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    promises.configure(config)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell's background job; every program would inherit it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "local(why): holds for the local engine only; left out with --engine ray")
    os.environ["HEADGATE_TEST_ENGINE"] = engine = config.getoption("--engine")
    if not hasattr(config, "workerinput"):  # else it is a process of pytest-xdist, which inherits it
        pickles.install()
    if engine == "ray":
        os.environ["HEADGATE_ENGINE"] = "ray"
        ray_cluster.prepare()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if pickles.problems():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if found := pickles.problems():
        terminalreporter.section("unpickled in a process that never may (tests/pickles.py)", red=True)
        terminalreporter.write_line("\n".join(found))
    promises.summary(terminalreporter)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    promises.note(item, outcome.get_result())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    promises.collect(report)


def pytest_collection_finish(session: pytest.Session) -> None:
    promises.choose(session.items, session.config)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """A process of pytest-xdist has ended; one that died says nothing, but the others know the same."""
    promises.expect(getattr(node, "workeroutput", {}).get("promises", {}))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    promises.begin(item)


@pytest.fixture
def promise(request: pytest.FixtureRequest) -> Iterator[promises.Promise]:
    """What a test of one promise measures (promises.py)."""
    yield from promises.measured(request)


def pytest_unconfigure() -> None:
    ray_cluster.close()
    pickles.close()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The files of tests/ray import Ray, which the other tests are not to see."""
    is_ray = collection_path.parent.name == "ray" and collection_path.suffix == ".py"
    return True if is_ray and config.getoption("--engine") != "ray" else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not about the chosen engine, and let the tests of one cluster follow each other."""
    if config.getoption("--engine") == "ray":
        chosen = [item for item in items if folder_of(item) in {*BOTH, "ray"} and not item.get_closest_marker("local")]
        chosen.sort(key=folder_of)
        for item in chosen:
            if folder_of(item) == "ray":
                item.add_marker(pytest.mark.timeout(RAY_S))
    else:
        chosen = [item for item in items if folder_of(item) != "ray"]
    kept = set(chosen)
    if left_out := [item for item in items if item not in kept]:
        config.hook.pytest_deselected(items=left_out)
    items[:] = chosen


def folder_of(item: pytest.Item) -> str:
    return item.path.parent.name


class Clusters:
    """The Ray cluster of this process: one at a time."""

    def __init__(self) -> None:
        self._one_node: ray_cluster.RayCluster | None = None

    def one_node(self) -> ray_cluster.RayCluster:
        """The cluster of tests/e2e and tests/faults; it goes on from module to module."""
        if self._one_node is None:
            self._one_node = ray_cluster.RayCluster(num_cpus=64).start()
        return self._one_node

    def own(self, **options: Any) -> ray_cluster.RayCluster:
        """A cluster to use in a `with` statement, instead of the one that is there."""
        self.stop()
        return ray_cluster.RayCluster(**options)

    def stop(self) -> None:
        if self._one_node is not None:
            self._one_node.stop()
            self._one_node = None


@pytest.fixture(scope="session")
def clusters(run_dir: Path) -> Iterator[Clusters]:
    found = Clusters()
    yield found
    found.stop()


@pytest.fixture(scope="session", autouse=True)
def run_dir() -> Iterator[Path]:
    """The $XDG_RUNTIME_DIR of this run. Its path is short: a unix socket's may have 107 bytes."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    os.environ["XDG_RUNTIME_DIR"] = str(path)
    yield path
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[None]:
    """Fail a test that starts processes and leaves something behind, and clean up for the next one.

    Those are the tests in the folders `GUARDED`; tests/test_leftovers.py tests the guard itself.

    Set up before and torn down after all other fixtures of the test, so that those may
    still end what they began. Fixtures of a wider scope come first and are not its business.
    """
    if not GUARDED & set(request.path.parent.parts):
        yield
        return
    marker = f"{os.getpid()}.{next(_numbers)}"
    watch = leftovers.Watch(marker, run_dir, ray_leftovers.watch())
    os.environ[leftovers.VARIABLE] = marker
    try:
        yield
    finally:
        os.environ.pop(leftovers.VARIABLE, None)
        found = watch.leftovers()
        if found:
            watch.clean()
    if found:
        pytest.fail("the test left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """script("print(1)") runs that text as a file; script(arguments=[...], stdin="...") anything else."""
    started: list[Script] = []

    def start(text: str = "", *, arguments: list[str] | None = None, stdin: str | None = None) -> Script:
        if arguments is None:
            path = tmp_path / f"script{len(started)}.py"
            path.write_text(text)
            arguments = [str(path)]
        started.append(Script(arguments, stdin, tmp_path))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        assert each.process.stdout
        each.process.stdout.close()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder of the test's own whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="module", autouse=True)
def engine(request: pytest.FixtureRequest) -> None:
    """With --engine ray: a cluster, to which this process is connected, so that `start` picks it."""
    if on_ray() and folder_of(request.node) in BOTH:
        request.getfixturevalue("clusters").one_node()


@pytest.fixture(scope="module")
def shared(request: pytest.FixtureRequest) -> Iterator[headgate.Client]:
    """An instance for all tests of the module: started with the module's START, without HTTP if it has none."""
    with one_instance(**getattr(request.module, "START", {"http_options": {"location": None}})) as client:
        yield client


@pytest.fixture
def client(shared: headgate.Client) -> Iterator[headgate.Client]:
    """The module's instance; what the test creates in it is deleted afterwards."""
    yield shared
    for name in shared.list_endpoints():
        shared.delete_endpoint(name)
    for tag in shared.list_backends():
        shared.delete_backend(tag, force=True)
    actors = getattr(shared._instance.home, "actors", None)
    if actors is not None:
        actors.close()  # its couriers would be left behind by this test
