"""What a test leaves behind: processes, ports, sockets, files, descriptors.

`Watch(marker)` notes what is there, `leftovers()` says what is there since, `clean()` removes it.
Processes count that descend from this one, or whose environment holds
`HEADGATE_TEST_ID=marker`: so one that was reparented, or that outlives its parent, is found too.
What was there before the watch began belongs to somebody else, its children included.

The fixture that runs this around each test that starts processes is in conftest.py.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import socket
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ray_leftovers import RayWatch

VARIABLE = "HEADGATE_TEST_ID"
SHM = Path("/dev/shm")
LISTEN = "0A"  # the state in /proc/net/tcp


class Process(NamedTuple):
    """One entry of /proc. The start time tells a reused pid apart."""

    pid: int
    start: int
    parent: int
    state: str
    name: str

    def __str__(self) -> str:
        return f"process {self.pid} ({self.name}, state {self.state})"


def processes() -> list[Process]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):  # gone meanwhile
                head, _, rest = Path("/proc", entry, "stat").read_text(errors="replace").rpartition(")")
                fields = rest.split()
                name = head.partition("(")[2]
                found.append(Process(int(entry), int(fields[19]), int(fields[1]), fields[0], name))
    return found


def marked(pid: int, marker: str) -> bool:
    """Whether the process was started with HEADGATE_TEST_ID=marker."""
    try:
        environ = Path("/proc", str(pid), "environ").read_bytes()
    except OSError:
        return False
    return f"{VARIABLE}={marker}".encode() in environ.split(b"\0")


def descendants(everything: list[Process], root: int, without: set[Process]) -> set[Process]:
    """The processes below `root`, but for those in `without` and below them."""
    found: set[Process] = set()
    parents = {root}
    while parents:
        level = {each for each in everything if each.parent in parents} - found
        level = {each for each in level if not known(each, without)}
        found |= level
        parents = {each.pid for each in level}
    return found


def known(process: Process, among: set[Process]) -> bool:
    return any(process[:2] == each[:2] for each in among)


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """Open file descriptors and what they point at."""
    folder = f"/proc/{pid}/fd"
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(folder):
            with contextlib.suppress(OSError):  # the one that reads the folder
                found[int(name)] = os.readlink(f"{folder}/{name}")
    return found


def listening_ports(pid: int | str = "self") -> set[int]:
    """TCP ports on which the process holds a listening socket."""
    inodes = {target[8:-1] for target in descriptors(pid).values() if target.startswith("socket:[")}
    ports = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path("/proc/net", table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == LISTEN and fields[9] in inodes:
                    ports.add(int(fields[1].rpartition(":")[2], 16))
    return ports


def run_files(folder: Path) -> set[Path]:
    """All below the runtime directory; an empty "headgate" there is nobody's instance."""
    found = set(folder.rglob("*"))
    return set() if found == {folder / "headgate"} else found


def links() -> Counter[str]:
    """How many connections this process has to each abstract socket of an instance."""
    found: Counter[str] = Counter()
    for fd, target in descriptors().items():
        if target.startswith("socket:"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(fd)) as sock:  # not connected
                peer = sock.getpeername()
                if isinstance(peer, bytes) and peer.startswith(b"\0headgate-"):
                    found[peer[1:].decode()] += 1
    return found


def bound_sockets(folder: Path) -> set[str]:
    """Paths below the runtime directory at which some process holds a socket, whether the file is there or not."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/net/unix").read_text(errors="replace").splitlines()[1:]
        names = {line.split(maxsplit=7)[7] for line in lines if len(line.split(maxsplit=7)) == 8}
        return {name for name in names if name.startswith(f"{folder}/") and not os.path.exists(name)}
    return set()


def shared_memory() -> set[Path]:
    """What is in /dev/shm, but for libfaketime's: a test of the clock may run beside this one."""
    found = set(SHM.iterdir()) if SHM.is_dir() else set()
    return {path for path in found if "faketime_" not in path.name}


def maps(pid: int, path: Path) -> bool:
    """Whether the process has that file in its memory."""
    with contextlib.suppress(OSError):  # gone, or another user's
        return f" {path}\n" in Path("/proc", str(pid), "maps").read_text(errors="replace")
    return False


class Watch:
    """What has appeared since this object was made.

    marker    the value of HEADGATE_TEST_ID that this test's processes inherit
    run_dir   the $XDG_RUNTIME_DIR of the test
    ray       what to look at in a Ray cluster besides. Its driver, this process, opens descriptors at will:
              of those, only connections to headgate's own sockets count
    """

    def __init__(self, marker: str, run_dir: Path, ray: RayWatch | None = None) -> None:
        gc.collect()
        self._marker = marker
        self._run_dir = run_dir
        self._ray = ray
        self._children = descendants(processes(), os.getpid(), set())
        self._ports = listening_ports()
        self._files = run_files(run_dir)
        self._bound = bound_sockets(run_dir)
        self._shm = shared_memory()
        self._descriptors = descriptors()
        self._links = links()

    def leftovers(self, grace_s: float | None = None, *, mine: bool = True) -> list[str]:
        """A line for each thing left behind; what goes away within `grace_s` (2, or 6 on Ray) is not.

        mine   this process's descriptors too
        """
        gc.collect()
        if grace_s is None:
            grace_s = 2.0 if self._ray is None else 6.0
        deadline = time.monotonic() + grace_s
        while (found := self._look(mine)) and time.monotonic() < deadline:
            time.sleep(0.01 if self._ray is None else 0.1)
        return found

    def _look(self, mine: bool) -> list[str]:
        left = sorted(self._processes())
        found = [str(each) for each in left]
        found += [f"port {port} of {each}" for each in left for port in sorted(listening_ports(each.pid))]
        found += [f"port {port} of the test process" for port in sorted(listening_ports() - self._ports)]
        found += [f"{kind(path)} {path}" for path in sorted(run_files(self._run_dir) - self._files)]
        found += [f"bound socket {path}" for path in sorted(bound_sockets(self._run_dir) - self._bound)]
        found += [f"shared memory {path}" for path in sorted(self._shared_memory())]
        if self._ray is not None:
            return found + self._ray.look() + [f"a connection to {peer}" for peer in links() - self._links]
        now = descriptors()
        if mine and len(now) > len(self._descriptors):
            new = {fd: target for fd, target in now.items() if self._descriptors.get(fd) != target}
            found += [f"open file descriptor {fd} -> {target}" for fd, target in sorted(new.items())]
        return found

    def _shared_memory(self) -> set[Path]:
        """New files of shared memory, but for those that a process of somebody else uses."""
        new = shared_memory() - self._shm
        if not new:
            return new
        mine = {os.getpid(), *(each.pid for each in self._processes())}
        others = [each.pid for each in processes() if each.pid not in mine]
        return {path for path in new if not any(maps(pid, path) for pid in others)}

    def _processes(self) -> set[Process]:
        everything = processes()
        if self._ray is not None:
            everything = [each for each in everything if each.name != "gcs_server"]  # a test may have restarted it
        found = descendants(everything, os.getpid(), self._children)
        return found | {
            each
            for each in everything
            if each.pid != os.getpid() and not known(each, self._children) and marked(each.pid, self._marker)
        }

    def clean(self, patience_s: float = 5.0) -> None:
        """Kill and remove what `leftovers` names. Descriptors stay open: closing them could hit others."""
        deadline = time.monotonic() + patience_s
        if self._ray is not None:
            self._ray.clean()
        while (left := self._processes()) and time.monotonic() < deadline:
            for each in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(each.pid, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(each.pid, os.WNOHANG)
            time.sleep(0.005)
        for path in sorted((run_files(self._run_dir) - self._files) | self._shared_memory()):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def kind(path: Path) -> str:
    if path.is_socket():
        return "unix socket"
    return "run directory" if path.is_dir() else "file"
