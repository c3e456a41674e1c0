"""What replicas leave in sessions of its own ends with them, also what was never executed: real processes, tiny roles.

The roles below run in the children of a supervisor that imports this file.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tiny
from running import is_alive
from tiny import Instance, eventually

from headgate.engine import asks, boot, child, ignition, supervisor
from headgate.engine.roles import Role

#: How long what is left may live on.
BOUND_S = 1.0


# --- run in the children ----------------------------------------------------------------------


def supervise(boot_fd: int) -> None:
    replica = Role("test_supervisor_strays:forks", "tiny-forks")
    other = Role("test_supervisor_strays:forks", "tiny-other")
    supervisor.main(boot.read(boot_fd), {**tiny.ROLES, "replica": replica, "other": other})


def forks(child: boot.ChildBoot) -> None:
    """Start each kind of daemon, and wait."""
    for kind in KINDS if child.role == "replica" else ["forked"]:
        begin(KINDS[kind], Path(child.boot.directory, f"{child.id} {kind}"))
    tiny.sleeper(child)


def begin(leave: Callable[[], None], path: Path) -> None:
    """A fork that leaves its parent in that way, and notes its pid."""
    if os.fork() == 0:
        leave()
        note(path, os.getpid())
        while True:
            time.sleep(60)


def note(path: Path, pid: int) -> None:
    path.with_suffix(".new").write_text(str(pid))
    path.with_suffix(".new").rename(path)


def twice() -> None:
    """As a daemon does: nothing of its parent's is left but the supervisor."""
    os.setsid()
    if os.fork():
        os._exit(0)
    os.closerange(0, 1024)
    os.chdir("/")


def in_two_generations() -> None:
    """A daemon that has a daemon: the second is adopted when the first has ended."""
    os.setsid()
    if os.fork():
        time.sleep(60)
    os.setsid()


def with_another_title() -> None:
    os.setsid()
    Path("/proc/self/comm").write_text("sh")


KINDS = {
    "forked": os.setsid,
    "forked twice": twice,
    "in two generations": in_two_generations,
    "with another title": with_another_title,
}


# --- the tests ----------------------------------------------------------------------------------


@pytest.fixture
def instance() -> Iterator[Instance]:
    one = Instance(main="test_supervisor_strays:supervise")
    try:
        one.meet_controller()
        yield one
    finally:
        one.close()


def daemons_of(instance: Instance, forked: asks.Forked, kinds: list[str]) -> dict[str, int]:
    paths = {kind: Path(instance.directory, f"{forked.id} {kind}") for kind in kinds}
    assert eventually(lambda: all(path.exists() for path in paths.values()))
    return {kind: int(path.read_text()) for kind, path in paths.items()}


@pytest.mark.parametrize("end", ["killed", "asked", "ended"])
def test_what_a_replica_forked_ends_with_it_and_what_others_forked_does_not(instance: Instance, end: str) -> None:
    """Three replicas that end one after the other, and a process of another kind, whose forks are nobody's."""
    replicas = [instance.fork("replica", "iris") for _ in range(3)]
    left = {one.id: daemons_of(instance, one, list(KINDS)) for one in replicas}
    nobody_s = daemons_of(instance, instance.fork("other"), ["forked"])
    assert all(is_alive(pid) for pids in (*left.values(), nobody_s) for pid in pids.values())

    for one in replicas:
        if end == "asked":
            instance.kill(one.id)
        else:
            os.kill(one.pid, signal.SIGKILL if end == "killed" else signal.SIGTERM)
        gone = left.pop(one.id)
        assert eventually(lambda: not any(map(is_alive, gone.values())), BOUND_S), gone  # noqa: B023
        assert all(is_alive(pid) for pids in (*left.values(), nobody_s) for pid in pids.values())


def test_what_a_dead_replica_s_daemon_forks_while_it_ends_ends_too(instance: Instance) -> None:
    forked = instance.fork()
    pids = daemons_of(instance, forked, list(KINDS))
    before = instance.processes()
    assert set(pids.values()) < before
    os.kill(forked.pid, signal.SIGKILL)

    # the supervisor and its controller: nothing that was started carries on under another parent
    assert eventually(lambda: len(instance.processes()) == 2, BOUND_S)


def test_a_mark_is_handed_down_whatever_a_daemon_does() -> None:
    said = subprocess.run(
        [sys.executable, "-c", HANDS_DOWN, *sys.path], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.split()
    assert said == [str(4711 << 32 | 7)] * 2


HANDS_DOWN = """
import os, sys
sys.path[:] = sys.argv[1:]
from headgate.engine import child
child._bear(child.mark(4711, "iris#0007"))
pid = os.fork()
if not pid:
    os.setsid()
    os.execve("/bin/sleep", ["sleep", "60"], {})
while os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe"):
    pass
print(child.mark_on(os.getpid()), child.mark_on(pid))
os.kill(pid, 9)
"""


def test_who_bears_no_mark_has_none() -> None:
    assert child.mark_on(os.getpid()) is None
    assert child.mark_on(2**22 + 1) is None


def test_a_limit_that_was_lowered_for_good_leaves_a_replica_unmarked() -> None:
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(child._UNUSED_LIMIT, (5, 5))
        child._bear(child.mark(4711, "iris#0007"))
        os._exit(child.mark_on(os.getpid()) or 0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 5


def test_an_instance_that_a_replica_started_outlives_it() -> None:
    """It bears the mark of the replica that executed it, and is adopted by the replica's supervisor."""
    one = Instance(main="test_supervisor_strays:supervise_starters")
    try:
        one.meet_controller()
        forked = one.fork()
        path = Path(one.directory, "inner")
        assert eventually(path.exists)
        inner = int(path.read_text())
        os.kill(forked.pid, signal.SIGKILL)
        assert one.exited().id == forked.id
        last = one.fork("exits")  # the supervisor has looked again
        assert one.exited().id == last.id
        assert is_alive(inner)
        assert child.mark_on(inner) == child.mark(one.pid, forked.id)
        os.kill(inner, signal.SIGKILL)
    finally:
        one.close()


def supervise_starters(boot_fd: int) -> None:
    supervisor.main(boot.read(boot_fd), {**tiny.ROLES, "replica": Role("test_supervisor_strays:starts", "tiny-starts")})


def starts(child: boot.ChildBoot) -> None:
    """Execute a process of another instance, in place of its supervisor."""
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    env = {**ignition._without_replica(), ignition.INSTANCE_VARIABLE: "0badcafe"}
    inner = subprocess.Popen(command, env=env, start_new_session=True)
    note(Path(child.boot.directory, "inner"), inner.pid)
    tiny.sleeper(child)
