"""A supervisor that is executed: as a child, or as an orphan that does not end with its maker."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import leftovers
import pytest
from tiny import Driver, Node, eventually, processes_of

from headgate.engine import ignition
from headgate.errors import InstanceError


def gone(pid: int) -> bool:
    return all(process.pid != pid or process.state == "Z" for process in leftovers.processes())


def parent(pid: int) -> int:
    return next(process.parent for process in leftovers.processes() if process.pid == pid)


@pytest.fixture
def watched() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("orphan", [False, True])
def test_a_spark_that_is_quenched_is_gone(orphan: bool) -> None:
    before = leftovers.descriptors()
    spark = ignition.strike(orphan=orphan)
    assert (parent(spark.pid) == os.getpid()) != orphan
    spark.quench()
    assert gone(spark.pid)
    spark.quench()
    assert len(leftovers.descriptors()) == len(before)


@pytest.mark.parametrize("orphan", [False, True])
def test_a_spark_that_is_forgotten_ends_by_itself(orphan: bool) -> None:
    spark = ignition.strike(orphan=orphan)
    spark._sock.close()  # type: ignore[union-attr]
    assert eventually(lambda: gone(spark.pid))
    spark.quench()


def test_an_orphan_has_a_session_of_its_own_and_no_file_of_its_maker_s() -> None:
    leak = os.open(os.devnull, os.O_RDONLY)
    os.set_inheritable(leak, True)
    spark = ignition.strike(orphan=True)
    try:
        assert os.getsid(spark.pid) == os.getpgid(spark.pid) == spark.pid
        open_files = leftovers.descriptors(spark.pid)
        assert len([fd for fd in open_files if fd > 2 and open_files[fd].startswith("socket:")]) == 1
        assert leak not in open_files
        assert spark.pid in processes_of(spark.instance)
    finally:
        spark.quench()
        os.close(leak)


def test_an_orphan_whose_interpreter_cannot_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    before = leftovers.descriptors()
    with pytest.raises(InstanceError, match="ended at once"):
        ignition.strike(orphan=True)
    assert len(leftovers.descriptors()) == len(before)


def test_an_orphan_outlives_its_maker_and_ends_with_the_process_it_watches(
    watched: subprocess.Popen[bytes],
) -> None:
    maker = Driver(str(watched.pid), run="start_node")
    instance = os.path.basename(maker.directory)
    assert parent(maker.supervisor) != maker.process.pid
    assert eventually(lambda: len(processes_of(instance)) == 2)  # an agent too
    maker.kill()
    assert not eventually(lambda: gone(maker.supervisor), within_s=0.3)
    assert len(processes_of(instance)) == 2
    assert os.path.exists(maker.directory)

    os.kill(watched.pid, signal.SIGKILL)
    assert eventually(lambda: gone(maker.supervisor), within_s=1.0)
    assert processes_of(instance) == set()
    assert not os.path.exists(maker.directory)


def test_a_node_whose_process_is_gone_already_ends_at_once(watched: subprocess.Popen[bytes]) -> None:
    watched.kill()
    watched.wait()
    node = Node(watched.pid, orphan=True)
    try:
        assert eventually(lambda: gone(node.pid))
        assert not Path(node.directory).exists()
    finally:
        node.close()
