"""Fixtures of all tests: a place to run in, a free port, and the guard against leftovers."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import leftovers
import pytest

#: Folders whose tests start processes.
GUARDED = {"controller", "e2e", "engine", "wire"}

_numbers = count(1)


@pytest.fixture(scope="session", autouse=True)
def run_dir() -> Iterator[Path]:
    """The $XDG_RUNTIME_DIR of this run. Its path is short: a unix socket's may have 107 bytes."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    path = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    os.environ["XDG_RUNTIME_DIR"] = str(path)
    yield path
    if before is None:
        del os.environ["XDG_RUNTIME_DIR"]
    else:
        os.environ["XDG_RUNTIME_DIR"] = before
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture(autouse=True)
def nothing_left_behind(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[None]:
    """Fail a test that starts processes and leaves something behind, and clean up for the next one.

    Those are the tests in the folders `GUARDED`; tests/test_leftovers.py tests the guard itself.

    Set up before and torn down after all other fixtures of the test, so that those may
    still end what they began. Fixtures of a wider scope come first and are not its business.
    """
    if not GUARDED & set(request.path.parent.parts):
        yield
        return
    marker = f"{os.getpid()}.{next(_numbers)}"
    watch = leftovers.Watch(marker, run_dir)
    os.environ[leftovers.VARIABLE] = marker
    try:
        yield
    finally:
        os.environ.pop(leftovers.VARIABLE, None)
        found = watch.leftovers()
        if found:
            watch.clean()
    if found:
        pytest.fail("the test left behind:\n  " + "\n  ".join(found), pytrace=False)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A folder of the test's own whose path is short enough for unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="hg-", dir="/tmp"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def free_port() -> int:
    """A TCP port of 127.0.0.1 on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
