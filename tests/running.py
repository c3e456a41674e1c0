"""Real processes for tests: an instance of a module's own, scripts, and what to look and wait with.

All of it works on both engines; `on_ray()` says on which the tests run (tests/conftest.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import leftovers
import ray_leftovers

import headgate

SECONDS_TO_END = 5.0


def on_ray() -> bool:
    return os.environ.get("HEADGATE_TEST_ENGINE") == "ray"


def slack() -> float:
    """How many times longer than in the embedded engine the end of something may take."""
    return 10.0 if on_ray() else 1.0


def key_of(client: headgate.Client) -> str:
    """What tells the instance from others: its run directory, or "ray:<its Ray namespace>"."""
    key: str = client._instance.home.key
    return key


def died() -> tuple[type[Exception], ...]:
    """What `headgate.get(ref)` raises when the replica died: Ray's refs raise Ray's own error."""
    if not on_ray():
        return (headgate.ReplicaDied,)
    from ray.exceptions import RayActorError

    return headgate.ReplicaDied, RayActorError


def cancelled() -> tuple[type[Exception], ...]:
    """What it raises when the request was cancelled."""
    if not on_ray():
        return (headgate.RequestCancelled,)
    from ray.exceptions import TaskCancelledError

    return headgate.RequestCancelled, TaskCancelledError


def cancel(ref: Any) -> None:
    if on_ray():
        import ray

        ray.cancel(ref)
    else:
        assert ref.cancel()


def eventually(holds: Callable[[], Any], timeout_s: float = 10.0) -> Any:
    """What `holds()` returns once that is true; fails when it takes too long."""
    give_up = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < give_up, f"waited {timeout_s} s in vain"
        time.sleep(0.005)
    return found


def is_alive(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def age_s(pid: int) -> float:
    """For how long the process has lived."""
    started = float(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def grown_controller(key: str) -> int:
    """The controller's pid, once its end is that of no crash loop: whatever died before, it is replaced at once."""
    pid = pid_of(key, "headgate-ctl")
    time.sleep(max(0.0, 1.05 - age_s(pid)))
    return pid


def instance_pids(key: str) -> list[int]:
    """The processes of an instance; on Ray those of its actors.

    In the embedded engine: who holds the lock of the run directory, and all below.
    """
    if key.startswith("ray:"):
        return sorted(pid for pid in ray_leftovers.actor_pids(key[4:]).values() if is_alive(pid))
    lock = os.path.join(key, "lock")
    everything = leftovers.processes()
    holders = [each for each in everything if lock in leftovers.descriptors(each.pid).values()]
    found = {each.pid for each in holders}
    for holder in holders:
        found |= {each.pid for each in leftovers.descendants(everything, holder.pid, set())}
    return sorted(pid for pid in found - {os.getpid()} if is_alive(pid))


def is_gone(key: str) -> bool:
    """Whether nothing of the instance is there any more."""
    if key.startswith("ray:"):
        return not ray_leftovers.is_there(key[4:])
    return not instance_pids(key) and not os.path.exists(key)


def pid_of(key: str, title: str) -> int:
    """The pid of the instance's process whose name is `title`."""
    if key.startswith("ray:") and title == "headgate-ctl":
        return ray_leftovers.actor_pids(key[4:])["controller"]
    for pid in instance_pids(key):
        with contextlib.suppress(OSError):
            if Path("/proc", str(pid), "comm").read_text().strip() == title:
                return pid
    raise LookupError(title)


@contextlib.contextmanager
def one_instance(**options: Any) -> Iterator[headgate.Client]:
    """An instance for several tests, in a run directory of its own; at its end nothing of it is left."""
    before = os.environ["XDG_RUNTIME_DIR"]
    folder = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    marker = f"module.{os.getpid()}.{folder.name}"
    watch = leftovers.Watch(marker, folder, ray_leftovers.watch())
    os.environ.update({"XDG_RUNTIME_DIR": str(folder), leftovers.VARIABLE: marker})
    try:
        client = headgate.start(**options)
        client.get_handle("none", missing_ok=True)  # its loop is not what a test that has a handle leaves behind
    finally:
        os.environ["XDG_RUNTIME_DIR"] = before
        del os.environ[leftovers.VARIABLE]
    try:
        yield client
    finally:
        client.shutdown()
        found = watch.leftovers()
        watch.clean()
        shutil.rmtree(folder, ignore_errors=True)
    assert not found, "the module left behind:\n  " + "\n  ".join(found)


@contextlib.contextmanager
def output_in(path: Path) -> Iterator[None]:
    """What is started inside the block writes its stdout and stderr there."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = {number: os.dup(number) for number in (1, 2)}
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in before:
        os.dup2(log, number)
    os.close(log)
    try:
        yield
    finally:
        for number, fd in before.items():
            os.dup2(fd, number)
            os.close(fd)


class Script:
    """A Python program that a test started; `lines` of its output come one by one."""

    def __init__(self, arguments: list[str], stdin: str | None, folder: Path, **environment: str) -> None:
        self._errors = folder / f"stderr-{time.monotonic_ns()}"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        if stdin is not None:
            assert self.process.stdin
            self.process.stdin.write(stdin)
            self.process.stdin.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def errors(self) -> str:
        return self._errors.read_text()

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, f"it ended:\n{self.errors[-3000:]}"
        return line.rstrip("\n")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self, timeout_s: float = SECONDS_TO_END) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s * slack())

    def output(self, timeout_s: float = 30.0) -> str:
        """All that it still prints; it must end well."""
        assert self.process.stdout
        text = self.process.stdout.read()
        assert self.process.wait(timeout_s) == 0, self.errors[-3000:]
        return text
