"""However an instance ends, nothing of it is left: no process, port, socket, file, descriptor, thread.

Drivers run as programs of their own, which are ended in each of the ways that there are. What they start is found
by HEADGATE_TEST_ID in the environment (leftovers.py), in whatever session or process group it is.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import leftovers
import pytest
from promises import Promise
from running import Script, eventually, instance_pids, is_alive, pid_of

import headgate
from headgate.engine import directory, strays

pytestmark = pytest.mark.local("about the processes and files of one machine")

NO_HTTP = {"location": None}

#: A driver with an instance that works, which says so and then does what the rest of the program says.
DRIVER = """
import ctypes, os, signal, subprocess, sys, threading, time
import headgate

def work(request):
    time.sleep(request.data or 0)
    return os.getpid()

def start(**more):
    client = headgate.start(http_options={"port": 0}, **more)
    client.create_backend("it", BACKEND)
    client.create_endpoint("it", backend="it", route="/it")
    HANDLES.append(client.get_handle("it"))
    HANDLES[-1].call()
    return client

BACKEND, HANDLES = work, []
"""

REFUSES_SIGTERM = """
class Deaf:
    def __init__(self):
        for number in set(signal.valid_signals()) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
            signal.signal(number, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: none any more
    def __call__(self, request):
        return os.getpid()
BACKEND = Deaf
"""

SPAWNS = """
SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
class Spawns:
    def __init__(self):
        self.children = [
            subprocess.Popen(SLEEP),
            subprocess.Popen(SLEEP, start_new_session=True),
            subprocess.Popen(["/bin/sh", "-c", "setsid sleep 600 & exit 0"]),
        ]
        self.children[-1].wait()  # its child is an orphan
        if os.fork() == 0:  # without an exec
            os.setsid()
            time.sleep(600)
            os._exit(0)
        self.thread = threading.Thread(target=time.sleep, args=(600,), daemon=True)
        self.thread.start()
    def __call__(self, request):
        return os.getpid()
BACKEND = Spawns
"""

IN_FLIGHT = """
for _ in range(3):
    threading.Thread(target=lambda: HANDLES[0].remote(0.3).result(), daemon=True).start()
time.sleep(0.05)
"""

FORKS = """
if (child := os.fork()) == 0:
    del HANDLES[:]
    sys.exit(0)
os.waitpid(child, 0)
"""

#: What is special about the driver: what comes before its start, and after it.
KINDS = {
    "plain": ("", ""),
    "deaf": (REFUSES_SIGTERM, ""),
    "spawning": (SPAWNS, ""),
    "busy": ("", IN_FLIGHT),
    "forking": ("", FORKS),
    "several": ("", "others = [start(), start()]"),
}

SAYS = "\nprint('ready', CLIENT._instance.home.key, flush=True)\n"

#: How it ends: what the program does, and what is done to it from outside.
ENDS: dict[str, tuple[str, Callable[[Script, str], object]]] = {
    "shutdown": ("CLIENT.shutdown()", lambda run, key: None),
    "exit": ("sys.exit(0)", lambda run, key: None),
    "error": ("raise KeyError('of the user')", lambda run, key: None),
    "SIGTERM": ("time.sleep(60)", lambda run, key: run.send(signal.SIGTERM)),
    "SIGINT": ("time.sleep(60)", lambda run, key: run.send(signal.SIGINT)),
    "SIGKILL": ("time.sleep(60)", lambda run, key: run.send(signal.SIGKILL)),
    "SIGTERM in wait": ("CLIENT.wait()", lambda run, key: run.send(signal.SIGTERM)),
    "supervisor SIGTERM": ("time.sleep(60)", lambda run, key: end_supervisor(run, key, signal.SIGTERM)),
    "supervisor SIGKILL": ("time.sleep(60)", lambda run, key: end_supervisor(run, key, signal.SIGKILL)),
}


def end_supervisor(run: Script, key: str, number: int) -> None:
    """While the driver lives; then that too is over."""
    os.kill(pid_of(key, "headgate-super"), number)
    eventually(lambda: not os.path.exists(key), 5.0)
    run.send(signal.SIGKILL)


def begin(script: Callable[..., Script], kind: str, end: str) -> tuple[Script, str]:
    """A driver whose instance works, and the instance's run directory."""
    before, after = KINDS[kind]
    run = script(DRIVER + before + "\nCLIENT = start()\n" + after + SAYS + ENDS[end][0])
    return run, run.line().split()[1]


KILLS = [end for end in ENDS if end.endswith("SIGKILL")]
OTHERS = [end for end in ENDS if end not in KILLS]


def plan(number: int) -> tuple[str, str]:
    """The kind of driver and its end: half of them kill -9; a few tries have all ends, and many all pairs."""
    kinds, ends, turn = list(KINDS), KILLS if number % 2 else OTHERS, number // 2
    shift = turn // math.lcm(len(kinds), len(ends))
    return kinds[(turn + shift) % len(kinds)], ends[turn % len(ends)]


def test_half_of_the_ends_are_kills_and_there_are_all_pairs_of_kind_and_end() -> None:
    plans = [plan(number) for number in range(100)]
    assert sum(end in ("SIGKILL", "supervisor SIGKILL") for _, end in plans) == 50
    assert set(plans) == {(kind, end) for kind in KINDS for end in ENDS}
    assert {end for _, end in plans[: 2 * len(OTHERS)]} == set(ENDS)


@pytest.mark.timeout(1200)
@pytest.mark.promise("100 start/stop, half by kill -9 of driver or supervisor, half in other ways: nothing left")
def test_nothing_is_left_of_an_instance(promise: Promise, script: Callable[..., Script], run_dir: Path) -> None:
    size = promise.size(100, 2 * len(OTHERS))
    watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
    gone_s: dict[str, float] = {}
    for number in range(size):
        kind, end = plan(number)
        run, key = begin(script, kind, end)
        ENDS[end][1](run, key)
        run.process.wait(30.0)
        begun = time.monotonic()
        left = watch.leftovers(grace_s=5.0, mine=False)
        case = f"{kind}, {end}"
        gone_s[case] = max(gone_s.get(case, 0.0), time.monotonic() - begun)
        assert left == [], f"{case}:\n{run.errors[-2000:]}"
    slowest = max(gone_s, key=lambda case: gone_s[case])
    promise.within(gone_s[slowest], 0.5, f"after the driver's end all was gone, slowest of all after {slowest!r}, in")
    promise.none_of(size, "instances left a process, port, socket, file, descriptor or shared memory")
    promise.says(f"{size // 2} of them by kill -9")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("victim", ["driver", "supervisor"])
@pytest.mark.promise("kill -9 of driver or supervisor: all gone in 0.5 s, sessions of its own too")
def test_a_kill_takes_everything_along(
    promise: Promise, script: Callable[..., Script], run_dir: Path, victim: str
) -> None:
    size = promise.size(10, 2)
    watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
    slowest, seen = 0.0, 0
    for number in range(size):
        run, key = begin(script, "spawning" if number % 2 else "deaf", "SIGKILL")
        pids = [each.pid for each in watch._processes() if each.pid != run.pid]
        seen += len(pids)
        pid = run.pid if victim == "driver" else pid_of(key, "headgate-super")
        begun = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not any(map(is_alive, pids)) and not os.path.exists(key), 5.0)  # noqa: B023
        slowest = max(slowest, time.monotonic() - begun)
        run.process.kill()
        run.process.wait()
        assert watch.leftovers(mine=False) == []
    promise.within(slowest, 0.5, f"after kill -9 of the {victim} all was gone in")
    promise.none_of(seen, "processes left")


#: A driver that goes on: it starts again and again, is interrupted, and says what is left in itself and around.
INTERRUPTED = """
import gc, os, sys, threading, time
from pathlib import Path
import leftovers
import headgate

with headgate.start(http_options={"port": 0}):
    pass
watch = leftovers.Watch(os.environ["HEADGATE_TEST_ID"], Path(os.environ["XDG_RUNTIME_DIR"]))
threads = threading.active_count()
print("go", flush=True)
for _ in sys.stdin:
    print("start", flush=True)
    try:
        with headgate.start(http_options={"port": 0}):
            time.sleep(10)
    except KeyboardInterrupt:
        pass
    left = watch.leftovers(grace_s=2.5)
    left += [str(each) for each in threading.enumerate()][threads:]
    print("left", left, flush=True)
"""


@pytest.mark.timeout(600)
@pytest.mark.promise("Ctrl-C at any moment of start: nothing left, not in the driver that goes on either")
def test_a_start_that_is_interrupted_leaves_nothing(
    promise: Promise, interruptible: Callable[..., Any], run_dir: Path
) -> None:
    size = promise.size(100, 8)
    run = interruptible(INTERRUPTED)
    for _ in range(size):
        assert run.ask() == "start"
        time.sleep(promise.random.uniform(0.0, 0.4))
        os.kill(run.pid, signal.SIGINT)
        assert run.line() == "left []"
    promise.none_of(size, "interrupted starts left a process, port, file, descriptor or thread")


@pytest.mark.timeout(600)
@pytest.mark.promise("kill -9 of the driver at any moment of start: nothing left")
def test_a_driver_that_is_killed_while_it_starts_leaves_nothing(
    promise: Promise, script: Callable[..., Script], run_dir: Path
) -> None:
    size = promise.size(100, 6)
    watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
    slowest = 0.0
    for _ in range(size):
        run = script("import headgate\nprint('start', flush=True)\nheadgate.start(http_options={'port': 0}).wait()")
        run.line()
        time.sleep(promise.random.uniform(0.0, 0.4))
        run.process.kill()
        run.process.wait()
        begun = time.monotonic()
        left = watch.leftovers(grace_s=5.0, mine=False)
        slowest = max(slowest, time.monotonic() - begun)
        assert left == [], run.errors[-2000:]
    promise.within(slowest, 0.5, "after the kill all was gone in")
    promise.none_of(size, "drivers killed in start left anything")


class Fails:
    def __init__(self) -> None:
        raise RuntimeError("not today")

    def __call__(self, request: Any) -> None: ...


def wrong_option() -> None:
    headgate.start(http_options={"port": 70_000})


def taken_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        headgate.start(http_options={"port": server.getsockname()[1]})


def no_such_host() -> None:
    headgate.start(http_options={"host": "192.0.2.1", "port": 0})


def first_backend_fails() -> None:
    with headgate.start(http_options={"port": 0}) as client:
        client.create_backend("it", Fails)


def error_in_the_block() -> None:
    with headgate.start(http_options={"port": 0}):
        raise ValueError


@pytest.mark.promise("exceptions in start: nothing left in the driver, which goes on")
def test_a_start_that_fails_leaves_nothing(promise: Promise, run_dir: Path) -> None:
    failures = [wrong_option, taken_port, no_such_host, first_backend_fails, error_in_the_block]
    with headgate.start(http_options=NO_HTTP):
        pass
    watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
    threads = threading.active_count()
    size = promise.size(50, len(failures))
    for number in range(size):
        with pytest.raises(ValueError if number % 5 in (0, 4) else headgate.HeadgateError):
            failures[number % 5]()
        assert watch.leftovers(grace_s=2.5) == [], failures[number % 5].__name__
        assert threading.active_count() == threads
    promise.none_of(size, "failed starts left a process, port, file, descriptor or thread")


@pytest.mark.timeout(600)
@pytest.mark.promise("a driver that goes on after 100 start/stop has the descriptors and threads of before")
def test_a_driver_that_goes_on_keeps_no_descriptor(promise: Promise, run_dir: Path) -> None:
    size = promise.size(100, 3)
    with headgate.start(http_options={"port": 0}):
        pass
    watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
    before = len(leftovers.descriptors()), threading.active_count()
    for number in range(size):
        client = headgate.start(http_options={"port": 0})
        if number % 3 == 2:
            os.kill(pid_of(client._instance.key, "headgate-super"), signal.SIGKILL)
        else:
            client.shutdown()
        del client
        assert watch.leftovers(grace_s=10.0) == []
        eventually(lambda: (len(leftovers.descriptors()), threading.active_count()) == before, 10.0)
    promise.none_of(size, "starts left a descriptor or thread in the driver")


# --- what is swept ---------------------------------------------------------------------------------


def kill_both(run: Script, key: str) -> None:
    """At once, so that neither can clean up after the other."""
    pids = instance_pids(key)
    os.kill(run.pid, signal.SIGSTOP)
    os.kill(pid_of(key, "headgate-super"), signal.SIGKILL)
    run.process.kill()
    run.process.wait()
    eventually(lambda: not any(map(is_alive, pids[:1])))


@pytest.mark.promise("driver and supervisor killed together: the next start removes what is left, daemons too")
def test_the_next_start_sweeps(promise: Promise, script: Callable[..., Script], run_dir: Path) -> None:
    size = promise.size(10, 1)
    watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
    for _ in range(size):
        run, key = begin(script, "spawning", "SIGKILL")
        kill_both(run, key)
        assert os.path.exists(key)
        assert any(is_alive(each.pid) for each in watch._processes())  # in sessions of their own
        with headgate.start(http_options=NO_HTTP):
            assert not os.path.exists(key)
        assert watch.leftovers(mine=False) == []
    promise.none_of(size, "killed instances left anything after the next start")


@pytest.mark.timeout(300)
@pytest.mark.promise("starts at the same time: each sweeps the dead, none a living one's directory")
def test_starts_at_the_same_time_sweep_no_living_instance(
    promise: Promise, script: Callable[..., Script], run_dir: Path
) -> None:
    root = run_dir / "headgate"
    size = promise.size(5, 1)
    for _ in range(size):
        for name in ("00000001", "00000002", "d-dead"):
            (root / name).mkdir(parents=True)
            (root / name / "lock").touch()
            (root / name / "stray").touch()
        runs = [script(DRIVER + "CLIENT = start()" + SAYS + "time.sleep(60)") for _ in range(4)]
        keys = [run.line().split()[1] for run in runs]
        assert sorted(os.listdir(root)) == sorted(os.path.basename(key) for key in keys)
        for key in keys:
            assert directory.is_alive(key)
        for run in runs:
            run.send(signal.SIGTERM)
            run.process.wait(30)
    promise.none_of(size * 4, "instances that started beside others were swept")


def test_a_place_too_long_for_sockets_is_passed_over(
    script: Callable[..., Script], monkeypatch: pytest.MonkeyPatch, short_dir: Path
) -> None:
    deep = short_dir / ("x" * 90)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    monkeypatch.setenv("TMPDIR", str(short_dir))
    run = script(DRIVER + "CLIENT = start()" + SAYS)
    assert Path(run.line().split()[1]).parent == short_dir / f"headgate-{os.geteuid()}"
    run.output()
    assert list(deep.iterdir()) == []
    assert list((short_dir / f"headgate-{os.geteuid()}").iterdir()) == []


# --- what leaves its session -----------------------------------------------------------------------


@pytest.mark.promise("a replica that ends takes along what it executed in sessions of its own")
def test_a_replica_takes_its_daemons_along(promise: Promise, run_dir: Path) -> None:
    import subprocess
    import sys

    class Spawns:
        def __init__(self) -> None:
            sleep = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
            self.child = subprocess.Popen(sleep, start_new_session=True)
            parent = f"import os, subprocess; print(subprocess.Popen({sleep!r}, start_new_session=True, stdout=-3).pid)"
            self.orphan = int(subprocess.check_output([sys.executable, "-S", "-c", parent], start_new_session=True))

        def __call__(self, request: Any) -> list[int]:
            return [self.child.pid, self.orphan]

    size = promise.size(10, 2)
    slowest = 0.0
    with headgate.start(http_options=NO_HTTP) as client:
        client.create_backend("other", Spawns)
        client.create_endpoint("other", backend="other")
        others = client.get_handle("other").call()
        for number in range(size):
            client.create_backend("it", Spawns)
            client.create_endpoint("it", backend="it")
            pids = client.get_handle("it").call()
            assert all(map(is_alive, pids))
            begun = time.monotonic()
            if number % 2:
                (replica,) = (one for one in client.status().replicas if one.backend == "it")
                os.kill(replica.pid, signal.SIGKILL)
            client.delete_endpoint("it")
            client.delete_backend("it")
            eventually(lambda: not any(map(is_alive, pids)), 5.0)  # noqa: B023
            slowest = max(slowest, time.monotonic() - begun)
            assert all(map(is_alive, others))  # those of a replica that lives
    promise.within(slowest, 1.0, "with their replica the daemons were gone in")
    promise.none_of(size * 2, "daemons outlived their replica")


def test_only_the_killed_instance_s_processes_are_ended(run_dir: Path) -> None:
    with headgate.start(http_options=NO_HTTP) as one, headgate.start(http_options=NO_HTTP) as two:
        pids = instance_pids(two._instance.key)
        os.kill(pid_of(one._instance.key, "headgate-super"), signal.SIGKILL)
        eventually(lambda: not os.path.exists(one._instance.key))
        assert two.list_backends() == {}
        assert all(map(is_alive, pids))
        strays.kill_all_of("0" * 8)


# --- a driver to talk to ---------------------------------------------------------------------------


class Talking:
    """A program that does something for each line that it is given."""

    def __init__(self, run: Script) -> None:
        self._run = run
        self.pid = run.pid
        self.line = run.line

    def ask(self) -> str:
        stdin = self._run.process.stdin
        assert stdin
        stdin.write("\n")
        stdin.flush()
        return self.line()


@pytest.fixture
def interruptible(tmp_path: Path) -> Any:
    """interruptible(text): that program, ready."""
    import subprocess
    import sys

    runs: list[Script] = []

    class Piped(Script):
        def __init__(self, text: str) -> None:
            self._errors = tmp_path / "stderr"
            path = f"{Path(leftovers.__file__).parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
            with self._errors.open("wb") as errors:
                self.process = subprocess.Popen(
                    [sys.executable, "-c", text], env={**os.environ, "PYTHONPATH": path}, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
                )  # fmt: skip

    def start(text: str) -> Talking:
        runs.append(Piped(text))
        assert runs[-1].line() == "go"
        return Talking(runs[-1])

    yield start
    for run in runs:
        run.process.communicate(timeout=20)
