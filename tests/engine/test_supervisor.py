"""The supervisor with real processes and tiny roles (tiny.py): who restarts, and who dies with whom."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import leftovers
import msgspec
import pytest
from tiny import Driver, Instance, controller_of, eventually

from headgate.engine import asks, directory


@pytest.fixture
def instance() -> Iterator[Instance]:
    tiny = Instance()
    try:
        tiny.meet_controller()
        yield tiny
    finally:
        tiny.close()


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def gone(pid: int) -> bool:
    try:
        return state(pid) == "Z"
    except OSError:
        return True


def dial(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        return connection.recv(100).decode()


def test_a_child_is_forked_listed_and_its_end_is_told(instance: Instance) -> None:
    forked = instance.fork("replica", "iris", b"what it runs")

    assert forked.id == "iris#0001"
    child = instance.children()["iris#0001"]
    assert (child.role, child.name, child.pid, child.note) == ("replica", "iris", forked.pid, b"what it runs")
    assert abs(child.started - time.monotonic()) < 60

    instance.kill("iris#0001")
    assert instance.exited() == asks.Exited("iris#0001", forked.pid, signal.SIGKILL)
    assert instance.children() == {}


def test_killing_what_is_gone_or_never_was_does_nothing(instance: Instance) -> None:
    instance.kill("iris#0001")
    instance.kill("controller#")
    assert instance.children() == {}


def test_ids_are_never_used_again_not_even_after_the_controller_s_restart(instance: Instance) -> None:
    seen = [instance.fork("exits").id for _ in range(3)]
    os.kill(controller_of(instance), signal.SIGKILL)
    instance.meet_controller()
    seen += [instance.fork().id for _ in range(2)]

    assert seen == [f"tiny#{number:04d}" for number in range(1, 6)]


def test_a_killed_controller_is_replaced_and_finds_the_same_processes(instance: Instance) -> None:
    pids = {instance.fork(role).pid for role in ("proxy", "replica", "replica")}
    for incarnation in (2, 3):
        begun = time.monotonic()
        os.kill(controller_of(instance), signal.SIGKILL)
        assert instance.meet_controller()[0] == incarnation
        assert time.monotonic() - begun < 0.5
        assert {child.pid for child in instance.children().values()} == pids


def test_a_process_that_ended_without_a_controller_is_not_listed_to_the_next(instance: Instance) -> None:
    forked = instance.fork()
    os.kill(controller_of(instance), signal.SIGKILL)
    os.kill(forked.pid, signal.SIGKILL)
    assert eventually(lambda: gone(forked.pid))
    instance.meet_controller()

    assert eventually(lambda: instance.children() == {})


def test_an_exit_status_is_told_as_waitpid_says_it(instance: Instance) -> None:
    forked = instance.fork("exits")
    assert os.waitstatus_to_exitcode(instance.exited().status) == 3
    forked = instance.fork("raises")
    assert instance.exited() == asks.Exited(forked.id, forked.pid, 1 << 8)


def test_an_unknown_role_is_an_answer_not_an_end(instance: Instance) -> None:
    assert "no role 'barber'" in instance.fork("barber").error
    assert "no role 'controller'" in instance.fork("controller").error
    assert instance.fork().error == ""


def test_a_controller_that_exits_with_0_ends_the_instance(instance: Instance) -> None:
    for role in ("proxy", "replica", "holds_the_gil"):
        instance.fork(role)
    instance.end_controller(0)

    assert instance.ended(within_s=1.0) == 0
    assert instance.processes() == set()
    assert not os.path.exists(instance.directory)
    with pytest.raises(ConnectionRefusedError):
        dial(instance.port)


def test_what_nobody_asked_for_runs_once_however_often_the_controller_is_replaced() -> None:
    tiny = Instance(main="tiny:supervise_unasked")
    try:
        tiny.meet_controller()
        [first] = tiny.children().values()
        os.kill(controller_of(tiny), signal.SIGKILL)
        tiny.meet_controller()
        [second] = tiny.children().values()
        assert (first.role, first.id, first.pid) == ("early", "early#0001", second.pid)
    finally:
        tiny.close()


def test_a_controller_that_exits_otherwise_is_restarted(instance: Instance) -> None:
    instance.end_controller(7)
    assert instance.meet_controller()[0] == 2


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_supervisor(instance: Instance, end: signal.Signals) -> None:
    for role in ("proxy", "replica", "holds_the_gil"):
        instance.fork(role)
    assert len(instance.processes()) == 5
    os.kill(instance.pid, end)

    assert eventually(lambda: not instance.processes(), within_s=0.5)
    assert instance.ended(within_s=1.0) == (0 if end == signal.SIGTERM else signal.SIGKILL)
    assert os.path.exists(instance.directory) == (end == signal.SIGKILL)


def test_what_replicas_forked_ends_too(instance: Instance) -> None:
    instance.fork("has_children")
    assert eventually(lambda: os.path.exists(os.path.join(instance.directory, "grandchildren")))
    assert len(instance.processes()) == 5
    instance.end_controller(0)

    assert instance.ended(within_s=1.0) == 0
    assert instance.processes() == set()


def test_a_killed_replica_takes_its_group_along(instance: Instance) -> None:
    forked = instance.fork("has_children")
    assert eventually(lambda: os.path.exists(os.path.join(instance.directory, "grandchildren")))
    os.kill(forked.pid, signal.SIGKILL)
    instance.exited()

    # the one that left the group stays until the end
    assert eventually(lambda: len(instance.processes()) == 3)


def test_the_group_of_a_replica_dies_with_a_killed_supervisor(instance: Instance) -> None:
    instance.fork("has_children")
    assert eventually(lambda: os.path.exists(os.path.join(instance.directory, "grandchildren")))
    strays = instance.processes()
    os.kill(instance.pid, signal.SIGKILL)

    # all but the one with a session of its own, which the kernel ties to nobody
    assert eventually(lambda: len(instance.processes()) == 1, within_s=0.5)
    for pid in instance.processes() & strays:
        os.kill(pid, signal.SIGKILL)


def test_a_killed_driver_takes_everything_along() -> None:
    driver = Driver()
    pids = children_of(driver.supervisor)
    assert len(pids) == 4
    driver.kill()

    assert eventually(lambda: all(gone(pid) for pid in (driver.supervisor, *pids)), within_s=0.5)
    assert not os.path.exists(driver.directory)
    with pytest.raises(ConnectionRefusedError):
        dial(driver.port)


def test_a_detached_instance_outlives_its_driver() -> None:
    driver = Driver("detached")
    driver.kill()
    try:
        assert not eventually(lambda: gone(driver.supervisor), within_s=0.1)
        assert directory.find(directory.base(), "tiny") == driver.directory
        assert dial(driver.port) == "tiny#0001"
    finally:
        os.kill(driver.supervisor, signal.SIGTERM)
    assert eventually(lambda: not os.path.exists(driver.directory), within_s=1.0)
    assert eventually(lambda: gone(driver.supervisor), within_s=1.0)


def children_of(parent: int) -> list[int]:
    return [process.pid for process in leftovers.processes() if process.parent == parent]


def test_a_killed_proxy_s_listener_refuses_nobody(instance: Instance) -> None:
    first = instance.fork("proxy", "proxy")
    assert dial(instance.port) == first.id
    instance.kill(first.id)
    instance.exited()
    with socket.create_connection(("127.0.0.1", instance.port), timeout=5) as waiting:
        second = instance.fork("proxy", "proxy")
        assert waiting.recv(100).decode() == second.id


def test_once_all_have_closed_the_listener_connecting_is_refused(instance: Instance) -> None:
    forked = instance.fork("proxy", "proxy")
    instance.ask.send(asks.encode(asks.CloseListener()))
    instance.ask.send(asks.encode(asks.CloseListener()))
    assert dial(instance.port) == forked.id
    instance.kill(forked.id)
    instance.exited()

    with pytest.raises(ConnectionRefusedError):
        dial(instance.port)
    assert instance.fork().error == ""


def test_what_a_replica_finds_around_it(instance: Instance) -> None:
    forked = instance.fork("tells", "iris")
    path = Path(instance.directory, "facts")
    assert eventually(path.exists)
    facts = msgspec.msgpack.decode(path.read_bytes())

    assert (facts["id"], facts["name"], facts["parent"]) == (forked.id, "iris", instance.pid)
    assert facts["group"] == forked.pid
    assert facts["session"] == instance.pid
    assert facts["comm"] == "tiny-tells"
    assert facts["instance"] == os.path.basename(instance.directory)
    assert facts["blocked"] == 0
    assert facts["own_handlers"] == []
    assert "/dev/null" in facts["fds"]
    assert not [target for target in facts["fds"] if target.startswith(("socket:", "anon_inode", "/memfd"))]
    # its leash, stdout, stderr
    assert len([target for target in facts["fds"] if target.startswith("pipe:")]) <= 3
    assert os.path.join(instance.directory, directory.LOCK) not in facts["fds"]


def test_a_controller_that_stays_stopped_is_replaced_and_one_that_goes_on_is_not() -> None:
    """Two instances: when the one's controller is killed, the other's, stopped before it, has had as long."""
    with contextlib.ExitStack() as stack:
        goes_on, stays = (Instance(main="tiny:supervise_impatiently") for _ in range(2))
        for tiny in (goes_on, stays):
            stack.callback(tiny.close)
            tiny.meet_controller()
        kept = stays.fork().pid
        spared, stopped = controller_of(goes_on), controller_of(stays)

        os.kill(spared, signal.SIGSTOP)
        assert eventually(lambda: state(spared) == "T")
        goes_on.children()  # its supervisor has seen that by now
        os.kill(spared, signal.SIGCONT)
        assert eventually(lambda: state(spared) != "T")
        os.kill(stopped, signal.SIGSTOP)
        assert eventually(lambda: gone_entirely(stopped))
        assert stays.meet_controller()[1] != stopped
        assert [child.pid for child in stays.children().values()] == [kept]
        for _ in range(2):  # whole turns of the other supervisor: by now it would have killed
            assert goes_on.children() == {}
        assert not gone(spared)


def test_a_stopped_controller_holds_up_nobody(instance: Instance) -> None:
    """Its answers wait in the supervisor, which goes on reaping."""
    forked = [instance.fork() for _ in range(3)]
    for _ in range(2000):  # far more than the socket takes, and nobody reads
        with contextlib.suppress(BlockingIOError):
            instance.ask.send(asks.encode(asks.List()), socket.MSG_DONTWAIT)
    os.kill(forked[0].pid, signal.SIGKILL)

    assert eventually(lambda: gone_entirely(forked[0].pid))
    while not isinstance(answer := asks.decode_answer(instance.ask.recv(asks.MAX_ASK_BYTES)), asks.Exited):
        pass
    assert answer.id == forked[0].id


def gone_entirely(pid: int) -> bool:
    return not os.path.exists(f"/proc/{pid}")


def test_a_controller_that_cannot_start_is_not_restarted_in_a_hot_loop() -> None:
    firsts = []
    while not any(first < 0.05 for first in firsts):  # at once, where the machine is not busy just then
        assert len(firsts) < 5, firsts
        tiny = Instance(main="tiny_broken:supervise")
        try:
            starts = Path(tiny.directory, "starts")
            assert eventually(lambda: starts.exists() and len(starts.read_text().split()) >= 5)  # noqa: B023
            times = [float(line) for line in starts.read_text().split()]
            firsts.append(times[1] - times[0])
            assert times[4] - times[3] > 0.05  # and later not
            assert tiny.ended(within_s=0) is None
        finally:
            tiny.close()


def test_a_driver_that_is_gone_already_ends_the_supervisor_at_once() -> None:
    tiny = Instance(main="tiny_broken:supervise_for_another_driver")
    try:
        assert tiny.ended(within_s=5.0) == 0
        assert not os.path.exists(tiny.directory)
    finally:
        tiny.close()
