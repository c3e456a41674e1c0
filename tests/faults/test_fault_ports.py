"""A port that is taken: one line says by whom, at once, and nothing is left."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import leftovers
import pytest
from promises import Promise
from running import Script, key_of, pid_of

import headgate

pytestmark = pytest.mark.local("on Ray it is a node's agent that binds")

START = """
import headgate, sys
try:
    headgate.start(http_options={{"host": {host!r}, "port": {port}}})
except headgate.InstanceError as error:
    sys.exit(str(error))
"""

LISTEN = """
import socket, sys
server = socket.create_server((sys.argv[1], 0), family=socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
print(server.getsockname()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def a_program(host: str) -> Iterator[tuple[int, str]]:
    """Another program that listens: its port, and what is to be said of it."""
    command = [sys.executable, "-c", LISTEN, host]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        yield int(other.stdout.readline()), rf"pid {other.pid} \(\S*python"
        other.communicate("\n")


@contextmanager
def another_instance(host: str) -> Iterator[tuple[int, str]]:
    with headgate.start(http_options={"host": host, "port": 0}) as client:
        assert client.http_address
        pid = pid_of(key_of(client), "headgate-super")
        yield int(client.http_address.rpartition(":")[2]), rf"pid {pid} \(headgate-super\)"


HOLDERS = [(a_program, "127.0.0.1"), (another_instance, "127.0.0.1"), (a_program, "::1"), (another_instance, "::1")]


@pytest.mark.promise("port taken: one line names the holder, exit within 1 s, nothing left")
def test_a_taken_port_is_said_at_once_with_its_holder(
    promise: Promise, script: Callable[..., Script], run_dir: Path
) -> None:
    size = promise.size(20, 4)
    slowest = 0.0
    with ExitStack() as stack:
        held = [(host, *stack.enter_context(holder(host))) for holder, host in HOLDERS]
        watch = leftovers.Watch(os.environ[leftovers.VARIABLE], run_dir)
        for number in range(size):
            host, port, holder = held[number % len(held)]
            begun = time.monotonic()
            run = script(START.format(host=host, port=port))
            assert run.process.wait(20) == 1
            slowest = max(slowest, time.monotonic() - begun)
            (line,) = run.errors.splitlines()
            where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
            assert line.startswith(f"cannot listen on {where}: the port is in use by pid "), line
            assert re.search(holder, line), line
            assert watch.leftovers(mine=False) == []
    promise.within(slowest, 1.0, "from the program's start to its end")
    promise.none_of(size, "starts left anything or did not name the holder")


UNREADABLE = """
import os
import encodings.ascii, encodings.idna, pwd  # what that user may not be able to read
from headgate.engine import listener
from headgate.errors import InstanceError
if os.geteuid() == 0:
    os.setuid(65534)
try:
    listener.bind("127.0.0.1", {port})
except InstanceError as error:
    print(error)
"""


def test_a_holder_that_is_another_user_s_is_named_by_its_user(script: Callable[..., Script]) -> None:
    # PR_SET_DUMPABLE: /proc shows nothing of it.
    secretive = "import ctypes; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0)\n" + LISTEN
    command = [sys.executable, "-c", secretive, "127.0.0.1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout
        port = int(other.stdout.readline())
        said = script(UNREADABLE.format(port=port)).output()
        other.communicate("\n")
    user = rf"a process of user \S+ \(uid {os.geteuid()}\) that this user may not look into"
    assert re.search(rf"127\.0\.0\.1:{port}: the port is in use by {user}; ", said), said


@pytest.mark.promise("a port is free again as soon as its instance was shut down or killed")
def test_a_port_is_free_again(promise: Promise, free_port: int) -> None:
    size = promise.size(10, 2)
    for number in range(size):
        client = headgate.start(http_options={"port": free_port})
        with socket.create_connection(("127.0.0.1", free_port)) as kept:
            kept.sendall(b"GET /-/healthz HTTP/1.1\r\nHost: test\r\n\r\n")
            assert b" 200 " in kept.recv(1000)
            if number % 2:
                os.kill(pid_of(key_of(client), "headgate-super"), 9)
            client.shutdown()
    promise.none_of(size, "starts on a port that had just been in use failed")
