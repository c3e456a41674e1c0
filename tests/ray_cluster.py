"""A real Ray cluster for tests: started, changed and ended by this process, and nothing of it left.

    prepare()                                  # before anything imports ray
    with RayCluster(num_cpus=4) as cluster:    # the head; this process is connected to it
        node = cluster.add(resources={"b": 1}) # a node of its own on 127.0.0.2
        cluster.remove(node)

Everything of it lives below one short folder in /tmp, which is its RAY_TMPDIR and its HOME: so it
meets no other Ray of this machine, and all that belongs to it is found by that folder: whoever has
a file of it open, or was started with it in the environment. `sweep` ends those; a guard process
does so when this one is killed.

Run as a program, this file is that guard: `python ray_cluster.py FOLDER COMMAND…` waits for the end of stdin.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

#: A node that says nothing for a second is dead. By default that takes 15 s.
HEALTH = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 2,
}
STORE_BYTES = 100 * 1024 * 1024
QUIET = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}


def environment(folder: str | Path) -> dict[str, str]:
    """What a process of a cluster in that folder is started with. The token goes to all of them."""
    return {
        "RAY_TMPDIR": str(folder),
        "HOME": str(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_SCHEDULER_EVENTS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


_folder: Path | None = None
_guard: subprocess.Popen[bytes] | None = None


def prepare() -> Path:
    """Set the environment of every cluster of this process, which must not have imported ray yet."""
    global _folder, _guard
    if _folder is None:
        assert "ray" not in sys.modules, "ray reads its environment when it is imported"
        _folder = Path(tempfile.mkdtemp(prefix="hgr-", dir="/tmp"))
        _guard = guard(_folder)
        os.environ.update(environment(_folder))
        os.environ.pop("RAY_ADDRESS", None)
    return _folder


def close() -> None:
    """The end of it: no process, no file. To be called when every cluster is stopped."""
    global _folder, _guard
    if _folder is not None:
        sweep(_folder)
        shutil.rmtree(_folder, ignore_errors=True)
        assert _guard
        dismiss(_guard)
        _folder = _guard = None


class RayCluster:
    """A head node on this machine's own address, and more nodes on 127.0.0.2, 127.0.0.3, …

    head          options of the head node, as of ray.cluster_utils.Cluster.add_node
    environment   variables for all its processes, such as RAY_gcs_storage
    """

    def __init__(self, *, environment: Mapping[str, str] | None = None, **head: Any) -> None:
        self._head = {"num_cpus": 4, **head}
        self._environment = dict(environment or {})
        self._cluster: Any = None
        self._before: dict[str, str | None] = {}
        self._addresses = 1

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    @property
    def head(self) -> Any:
        return self._cluster.head_node

    def start(self) -> RayCluster:
        """The head runs, and this process is its driver."""
        prepare()
        self._set({**self._environment})
        try:
            import ray
            from ray.cluster_utils import Cluster

            with default_sigterm():
                self._cluster = Cluster()
                self._cluster.add_node(
                    include_dashboard=False, no_monitor=True, include_log_monitor=False,
                    object_store_memory=STORE_BYTES,
                    _system_config={**HEALTH, **self._head.pop("_system_config", {})}, **self._head,
                )  # fmt: skip
                self._set({"RAY_ADDRESS": self.address})
                ray.init(address=self.address, **QUIET)
        except BaseException:
            self.stop()
            raise
        return self

    def add(self, **options: Any) -> Any:
        """One more node, on an address of its own; returns when it is alive."""
        self._addresses += 1
        options = {"num_cpus": 4, "object_store_memory": STORE_BYTES, **options}
        with default_sigterm():
            return self._cluster.add_node(node_ip_address=f"127.0.0.{self._addresses}", **options)

    def remove(self, node: Any, *, gracefully: bool = True) -> None:
        """A node leaves; not gracefully: its raylet is killed, and its workers are left to themselves."""
        self._cluster.remove_node(node, allow_graceful=gracefully)

    def stop(self) -> None:
        """Everything of it is gone when this returns. May be called again."""
        import ray

        assert _folder
        try:
            with contextlib.suppress(Exception):  # a cluster that a test has broken
                ray.shutdown()
            if self._cluster is not None:
                with contextlib.suppress(Exception):
                    self._cluster.shutdown()
        finally:
            self._cluster = None
            sweep(_folder)
            for path in _folder.iterdir():
                shutil.rmtree(path, ignore_errors=True)
            self._unset()

    def _set(self, variables: Mapping[str, str]) -> None:
        for name, value in variables.items():
            self._before.setdefault(name, os.environ.get(name))
            os.environ[name] = value

    def _unset(self) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before.clear()

    def __enter__(self) -> RayCluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


@contextlib.contextmanager
def default_sigterm() -> Iterator[None]:
    """Ray sets a handler for SIGTERM, when it is imported and for every node; a test's process keeps its own."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def node_id(node: Any) -> str:
    """The id that `status()` and Ray's tables have for a node that `add` returned."""
    return str(node._node_id)


def raylet_pid(node: Any) -> int:
    return int(node.all_processes["raylet"][0].process.pid)


# --- what belongs to a folder ---


def belongs(pid: int, folder: str | Path) -> bool:
    """Whether the process was started for that folder's cluster, or has a file of it open."""
    where = f"{folder}/".encode()
    try:
        environ = Path("/proc", str(pid), "environ").read_bytes()
        if any((each + b"/").startswith(b"RAY_TMPDIR=" + where) for each in environ.split(b"\0")):
            return True
        for entry in os.scandir(f"/proc/{pid}/fd"):  # Ray's titles overwrite the environment of some
            with contextlib.suppress(OSError):
                if os.fsencode(os.readlink(entry.path)).startswith(where):
                    return True
    except OSError:  # gone, or somebody else's
        pass
    return False


def processes_of(folder: str | Path) -> list[int]:
    """All that belong to that folder, but for this process and those above it."""
    mine = set()
    pid = os.getpid()
    while pid > 1:
        mine.add(pid)
        pid = int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])
    pids = [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
    return [pid for pid in pids if pid not in mine and is_running(pid) and belongs(pid, folder)]


def is_running(pid: int) -> bool:
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def sweep(folder: str | Path, patience_s: float = 3.0) -> list[int]:
    """End all that belong to that folder, kindly and then not; the pids that had to be killed."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        give_up = time.monotonic() + patience_s
        for pid in (found := processes_of(folder)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while processes_of(folder) and time.monotonic() < give_up:
            time.sleep(0.05)
    return found


def guard(folder: str | Path, *commands: str) -> subprocess.Popen[bytes]:
    """A process that sweeps when this one is gone, however it went, and then runs the shell commands."""
    program = [sys.executable, "-S", __file__, str(folder), *commands]
    return subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True)


def dismiss(guard: subprocess.Popen[bytes]) -> None:
    """Let it do its work now; returns when it has."""
    assert guard.stdin
    guard.stdin.close()
    guard.wait(30)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.read()
    sweep(sys.argv[1])
    shutil.rmtree(sys.argv[1], ignore_errors=True)
    for command in sys.argv[2:]:
        subprocess.run(command, shell=True, stderr=subprocess.DEVNULL)
