"""The node of a cluster as its agent's threads see it, with a run directory of the test's own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from headgate.engine import directory
from headgate.engine.node import Node
from headgate.engine.ray_records import Meeting, Origin
from headgate.wire.home import FileHome

TOKEN = b"t" * 32


def meeting(number: int) -> Meeting:
    return Meeting(f"@controller-{number}", f"tcp://10.0.0.7:{number}", "there", number)


@pytest.fixture
def node(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Node:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    origin = Origin("scope", "1f3a90c2", "default", TOKEN, False, "there", "10.0.0.7", {"host": "127.0.0.1"})
    return Node(origin, "here", "10.0.0.8")


@pytest.fixture
def running(node: Node) -> Iterator[str]:
    """Somebody holds the lock of the run directory, as the supervisor would: its path."""
    path, lock = directory.create(*os.path.split(node._path))
    yield path
    os.close(lock)
    directory.remove(path)


def known(path: str) -> str | None:
    """What the node's processes find."""
    return asyncio.run(FileHome(path, TOKEN, "here").find(None))


def test_threads_that_say_where_the_controller_listens_do_not_meet(node: Node, running: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        for _ in pool.map(node.follow, [meeting(number % 8 + 1) for number in range(24)]):
            pass
    assert str(known(running)).startswith("tcp://10.0.0.7:")
    assert sorted(os.listdir(running)) == ["controller", "lock"]


def test_what_was_stored_is_older_than_what_was_said(node: Node, running: str) -> None:
    node.catch_up(meeting(1))
    assert known(running) == "tcp://10.0.0.7:1"
    node.follow(meeting(2))
    node.catch_up(meeting(1))
    assert known(running) == "tcp://10.0.0.7:2"


def test_nothing_is_said_where_no_supervisor_runs(node: Node) -> None:
    node.follow(meeting(1))
    assert not node.runs
    assert not os.path.exists(node._path)
