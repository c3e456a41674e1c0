"""A tiny instance for the engine's tests: a real supervisor, tiny children, the test as its controller.

The tiny controller does nothing but hand its socket to the supervisor over to the test, which then
asks in its place. Everything else is as in a real instance: run directory, lock, listeners, spawn.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from headgate.engine import asks, boot, directory, ignition, listener, roles, supervisor
from headgate.engine.roles import Role
from headgate.wire import home
from headgate.wire.address import listen

HERE = Path(__file__).parent


# --- roles: run in the children --------------------------------------------------------------


def supervise(boot_fd: int) -> None:
    supervisor.main(boot.read(boot_fd), ROLES)


def supervise_replicas(boot_fd: int) -> None:
    """The tiny controller, and the replicas and proxies of the package; none that nobody asked for."""
    proxy = roles.ROLES["proxy"]._replace(unasked=False)
    supervisor.main(boot.read(boot_fd), {**roles.ROLES, "controller": ROLES["controller"], "proxy": proxy})


def supervise_unasked(boot_fd: int) -> None:
    """As `supervise`, with a role that nobody has to ask for."""
    supervisor.main(boot.read(boot_fd), {**ROLES, "early": Role("tiny:sleeper", "tiny-early", unasked=True)})


def supervise_impatiently(boot_fd: int) -> None:
    """As `supervise`; a controller may be stopped for half a second only."""
    supervisor._STOPPED_S = 0.5
    supervise(boot_fd)


def supervise_node(boot_fd: int) -> None:
    """A node of a cluster: the package's agent and the tiny roles."""
    supervisor.main(boot.read(boot_fd), {**ROLES, "controller": roles.AGENT_ROLES["controller"]})


def controller(child: boot.ChildBoot) -> int:
    """Hand the ask socket to the test; end with the status that it sends."""
    assert child.ask is not None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as test:
        test.connect(os.path.join(child.boot.directory, "test.sock"))
        about = msgspec.msgpack.encode((child.incarnation, os.getpid()))
        socket.send_fds(test, [about], [child.ask.fileno()])
        child.ask.close()
        word = test.recv(1)
        if not word:  # the test ended
            signal.pause()
        return word[0]


def controller_that_cannot_start(child: boot.ChildBoot) -> int:
    with open(os.path.join(child.boot.directory, "starts"), "a") as file:
        file.write(f"{time.monotonic()}\n")
    return 1


def proxy(child: boot.ChildBoot) -> None:
    assert child.http_listener is not None
    while True:
        connection, _ = child.http_listener.accept()
        with connection:
            connection.sendall(child.id.encode())


def sleeper(child: boot.ChildBoot) -> None:
    while True:
        signal.pause()


def exits(child: boot.ChildBoot) -> int:
    return 3


def raises(child: boot.ChildBoot) -> None:
    raise RuntimeError("the constructor of a tiny role")


def holds_the_gil(child: boot.ChildBoot) -> None:
    ctypes.PyDLL(None).sleep(1000)  # unlike CDLL it keeps the interpreter's lock


def has_children(child: boot.ChildBoot) -> None:
    """One grandchild in its own group and one that has left it."""
    reader, writer = os.pipe()
    for leaves in (False, True):
        if os.fork() == 0:
            if leaves:
                os.setsid()
            os.write(writer, b".")
            sleeper(child)
    for _ in range(2):
        os.read(reader, 1)
    Path(child.boot.directory, "grandchildren").touch()
    sleeper(child)


def tells(child: boot.ChildBoot) -> None:
    """Write down what a child finds around it."""
    facts = {
        "id": child.id,
        "name": child.name,
        "parent": os.getppid(),
        "group": os.getpgid(0),
        "session": os.getsid(0),
        "comm": Path("/proc/self/comm").read_text().strip(),
        "main": sorted(name for name in vars(sys.modules["__main__"]) if not name.startswith("__")),
        "main_file": hasattr(sys.modules["__main__"], "__file__"),
        "fds": sorted(target for target in _descriptors() if "/fd" not in target),
        "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "own_handlers": [n for n in (signal.SIGTERM, signal.SIGCHLD) if signal.getsignal(n)],
        "instance": os.environ[boot.INSTANCE_VARIABLE],
    }
    path = Path(child.boot.directory, "facts")
    path.with_suffix(".new").write_bytes(msgspec.msgpack.encode(facts))
    path.with_suffix(".new").rename(path)
    sleeper(child)


def _descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return found


ROLES = {
    "controller": Role("tiny:controller", "tiny-ctl"),
    "proxy": Role("tiny:proxy", "tiny-proxy"),
    "replica": Role("tiny:sleeper", "tiny-rep"),
    "exits": Role("tiny:exits", "tiny-exits"),
    "raises": Role("tiny:raises", "tiny-raises"),
    "holds_the_gil": Role("tiny:holds_the_gil", "tiny-gil"),
    "has_children": Role("tiny:has_children", "tiny-has"),
    "tells": Role("tiny:tells", "tiny-tells"),
}


# --- what replicas of the package run ----------------------------------------------------------


def good(request: Any) -> str:
    return "good"


class Bad:
    def __init__(self) -> None:
        raise RuntimeError("bad code")

    def __call__(self, request: Any) -> str:
        return "never"


# --- the driver's and controller's side: run in the test ---------------------------------------


class Instance:
    """A running supervisor; `ask` talks to it in the controller's place."""

    def __init__(self, *, detached: bool = False, main: str = "tiny:supervise") -> None:
        root = directory.base()
        name = directory.name_of("tiny") if detached else os.urandom(4).hex()
        self.directory, lock = directory.create(root, name)
        self.token = directory.write_token(self.directory)
        self.control = listen(os.path.join(self.directory, directory.CONTROL))
        self._test = listen(os.path.join(self.directory, "test.sock"))
        self._test.settimeout(10)
        http = listener.bind("127.0.0.1", 0)
        self.port = http.getsockname()[1]
        record = boot.Boot(
            name, "tiny", self.directory, self.token, detached, os.getpid(), lock,
            self.control.fileno(), http.fileno(),
        )  # fmt: skip
        self.pid = boot.spawn(record, main)
        self._fd = os.pidfd_open(self.pid)
        os.close(lock)
        http.close()
        self._connection: socket.socket | None = None
        self.ask: socket.socket
        self._counter = itertools.count(1)
        self._exited: list[asks.Exited] = []

    def meet_controller(self) -> tuple[int, int]:
        """Take the place of the next incarnation of the controller: (incarnation, pid)."""
        if self._connection is not None:
            self._connection.close()
            self.ask.close()
        self._connection, _ = self._test.accept()
        about, fds, _, _ = socket.recv_fds(self._connection, 100, 1)
        self.ask = socket.socket(fileno=fds[0])
        self.ask.settimeout(10)
        incarnation, pid = msgspec.msgpack.decode(about)
        return incarnation, pid

    def fork(self, role: str = "replica", name: str = "tiny", note: bytes = b"") -> asks.Forked:
        self.ask.send(asks.encode(asks.Fork(next(self._counter), role, name, note)))
        answer = self.hear(asks.Forked)
        assert isinstance(answer, asks.Forked)
        return answer

    def children(self) -> dict[str, asks.Child]:
        self.ask.send(asks.encode(asks.List()))
        found: dict[str, asks.Child] = {}
        while isinstance(answer := self.hear(asks.Child, asks.Listed), asks.Child):
            found[answer.id] = answer
        assert isinstance(answer, asks.Listed)
        assert answer.count == len(found)
        return found

    def kill(self, id: str) -> None:
        self.ask.send(asks.encode(asks.Kill(id)))

    def exited(self) -> asks.Exited:
        if self._exited:
            return self._exited.pop(0)
        answer = self.hear(asks.Exited)
        assert isinstance(answer, asks.Exited)
        return answer

    def hear(self, *kinds: type) -> asks.Answer:
        """The next answer of one of these kinds; exits that come in between are kept for `exited`."""
        while True:
            answer = asks.decode_answer(self.ask.recv(asks.MAX_ASK_BYTES))
            if isinstance(answer, kinds):
                return answer
            assert isinstance(answer, asks.Exited), answer
            self._exited.append(answer)

    def end_controller(self, status: int) -> None:
        assert self._connection is not None
        self._connection.sendall(bytes([status]))

    def processes(self) -> set[int]:
        """The living processes of this instance but for this one."""
        return processes_of(os.path.basename(self.directory))

    def ended(self, within_s: float) -> int | None:
        """The supervisor's wait status, or None if it still runs after that time."""
        if not select.select([self._fd], [], [], within_s)[0]:
            return None
        return os.waitpid(self.pid, 0)[1]

    def close(self) -> None:
        """End whatever is left."""
        for end in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ChildProcessError, ProcessLookupError):
                os.kill(self.pid, end)
                self.ended(within_s=5.0)
        eventually(lambda: not self.processes())
        directory.sweep(directory.base())
        os.close(self._fd)
        for sock in (self.control, self._test, self._connection, getattr(self, "ask", None)):
            if sock is not None:
                sock.close()


class Node:
    """A running supervisor of a cluster's node; the test writes down where the controller is, and is it.

    watch   pid of the process with which all ends
    """

    ID = "4f1d0e2b9a7c"

    def __init__(self, watch: int, *, orphan: bool = False) -> None:
        self.instance = os.urandom(4).hex()
        self.directory, lock = directory.create(directory.base(), self.instance)
        self.token = directory.write_token(self.directory)
        http = listener.bind("127.0.0.1", 0)
        self.port = http.getsockname()[1]
        home.write_controller(self.directory, "@nobody-listens-here", node=self.ID)
        record = boot.Boot(
            instance=self.instance, namespace="tiny", directory=self.directory, token=self.token, detached=False,
            driver_pid=1, lock_fd=lock, control_fd=-1, http_fd=http.fileno(), node=self.ID, watch_pid=watch,
        )  # fmt: skip
        spark = ignition.strike("tiny:supervise_node", self.instance, orphan=orphan)
        boot.tell(spark, record)
        self.pid = spark.pid
        os.close(lock)
        http.close()

    def processes(self) -> set[int]:
        """The living ones."""
        return processes_of(self.instance)

    def close(self) -> None:
        """End whatever is left."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        eventually(lambda: not self.processes())
        directory.sweep(directory.base())


def processes_of(instance: str) -> set[int]:
    """The living processes of an instance but for this one: those with its id in their environment."""
    wanted = f"{boot.INSTANCE_VARIABLE}={instance}".encode()
    found = set()
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError):
            if entry.isdigit() and wanted in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                found.add(int(entry))
    return found


def controller_of(instance: Instance) -> int:
    """The process of its tiny controller."""
    for pid in instance.processes():
        with contextlib.suppress(OSError):  # it has ended since
            if Path(f"/proc/{pid}/comm").read_text().strip() == "tiny-ctl":
                return pid
    raise AssertionError("no controller runs")


def eventually(true: Callable[[], Any], within_s: float = 5.0) -> bool:
    """Whether it becomes true in that time; looks every millisecond."""
    give_up = time.monotonic() + within_s
    while not true():
        if time.monotonic() > give_up:
            return False
        time.sleep(0.001)
    return True


def drive() -> None:
    """A driver of its own: starts an instance with a few children, says so, and waits to be killed."""
    instance = Instance(detached="detached" in sys.argv)
    instance.meet_controller()
    for role in ("proxy", "replica", "holds_the_gil"):
        instance.fork(role)
    print(msgspec.json.encode((instance.pid, instance.directory, instance.port)).decode(), flush=True)
    signal.pause()


def start_node() -> None:
    """A process of a cluster that starts a node's supervisor, says so, and waits to be killed."""
    os.set_inheritable(os.open(os.devnull, os.O_RDONLY), True)  # what foreign code may have left open
    node = Node(int(sys.argv[1]), orphan=True)
    print(msgspec.json.encode((node.pid, node.directory, node.port)).decode(), flush=True)
    signal.pause()


class Driver:
    """Another process that runs `drive`, or what else is named."""

    def __init__(self, *arguments: str, run: str = "drive") -> None:
        code = f"import sys; sys.path[:0] = [{str(HERE)!r}]; import tiny; tiny.{run}()"
        self.process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.supervisor, self.directory, self.port = msgspec.json.decode(line)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
