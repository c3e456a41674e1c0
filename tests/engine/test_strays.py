"""Processes that left their session: found by what they were executed with; only those of the instance end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from running import eventually

from headgate.engine import directory, ignition, strays
from headgate.engine.ignition import INSTANCE_VARIABLE, REPLICA_VARIABLE

CODE = "print('there', flush=True); import time; time.sleep(60)"


@pytest.fixture
def daemon() -> Iterator[subprocess.Popen[str]]:
    """A process of the instance "0badcafe" in a session of its own."""
    env = {**os.environ, INSTANCE_VARIABLE: "0badcafe", REPLICA_VARIABLE: "iris#0007"}
    command = [sys.executable, "-S", "-c", CODE]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "there\n"
        yield process
        process.kill()


@pytest.mark.parametrize(
    ("environment", "value"),
    [
        (b"", None),
        (b"A=1\0B=2\0", None),
        (b"A=1\0NAME=x\0", "x"),
        (b"NAME=\0", ""),
        (b"NAME=a\0NAME=b\0", "a"),
        (b"NAMES=a\0XNAME=b\0", None),
        (b"NAME=a=b\0", "a=b"),
        (b"NAME=\xff\0", "\udcff"),
    ],
)
def test_a_variable_is_found_as_a_whole(environment: bytes, value: str | None) -> None:
    assert strays.value_in(environment, "NAME") == value


def test_a_process_shows_what_it_was_executed_with(daemon: subprocess.Popen[str]) -> None:
    assert strays.variable_of(daemon.pid, INSTANCE_VARIABLE) == "0badcafe"
    assert strays.variable_of(daemon.pid, REPLICA_VARIABLE) == "iris#0007"
    assert strays.variable_of(2**22 + 1, INSTANCE_VARIABLE) is None


def test_all_of_an_instance_end_and_nobody_else(daemon: subprocess.Popen[str]) -> None:
    strays.kill_all_of("0badcaf")
    assert daemon.poll() is None
    strays.kill_all_of("0badcafe")
    assert daemon.wait(5) == -9


def test_who_sweeps_a_dead_instance_s_directory_ends_what_is_left_of_it(
    daemon: subprocess.Popen[str], run_dir: str
) -> None:
    root = directory.base()
    path, lock = directory.create(root, "0badcafe")
    directory.write_instance(path, "0badcafe")
    assert directory.sweep(root) == []  # it lives
    assert daemon.poll() is None
    os.close(lock)
    assert directory.sweep(root) == [path]
    assert daemon.wait(5) == -9


def test_children_that_were_adopted_are_told_from_others(daemon: subprocess.Popen[str]) -> None:
    assert daemon.pid in strays.adopted(set())
    assert daemon.pid not in strays.adopted({daemon.pid})


def test_an_instance_that_a_replica_starts_is_no_part_of_the_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(REPLICA_VARIABLE, "iris#0007")
    spark = ignition.strike()
    try:
        eventually(lambda: strays.variable_of(spark.pid, INSTANCE_VARIABLE) == spark.instance)  # it was executed
        assert strays.variable_of(spark.pid, REPLICA_VARIABLE) is None
    finally:
        spark.quench()
