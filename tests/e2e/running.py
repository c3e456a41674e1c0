"""Real processes for tests: an instance of a module's own, scripts, and what to look and wait with."""

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

import headgate

SECONDS_TO_END = 5.0


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


def instance_pids(directory: str) -> list[int]:
    """The processes of the instance that lives in that run directory: who holds its lock, and all below."""
    lock = os.path.join(directory, "lock")
    everything = leftovers.processes()
    holders = [each for each in everything if lock in leftovers.descriptors(each.pid).values()]
    found = {each.pid for each in holders}
    for holder in holders:
        found |= {each.pid for each in leftovers.descendants(everything, holder.pid, set())}
    return sorted(pid for pid in found - {os.getpid()} if is_alive(pid))


def pid_of(directory: str, title: str) -> int:
    """The pid of the instance's process whose name is `title`."""
    for pid in instance_pids(directory):
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
    watch = leftovers.Watch(marker, folder)
    os.environ.update({"XDG_RUNTIME_DIR": str(folder), leftovers.VARIABLE: marker})
    try:
        client = headgate.start(**options)
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
        return self.process.wait(timeout_s)

    def output(self, timeout_s: float = 30.0) -> str:
        """All that it still prints; it must end well."""
        assert self.process.stdout
        text = self.process.stdout.read()
        assert self.process.wait(timeout_s) == 0, self.errors[-3000:]
        return text
