"""Start a server of one of the two sides in processes of its own, and end it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SECONDS_TO_START = 30.0
SECONDS_TO_STOP = 20.0


class Server(NamedTuple):
    """A running side: its URL for one job, and the pid at the root of its processes."""

    name: str
    url: str
    pid: int


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


#: Sides that are headgate, and the engine of each.
ENGINES = {"headgate": "local", "headgate-ray": "ray"}


def command(side: str, job: str, port: int) -> list[str]:
    if side in ENGINES:
        return [sys.executable, "headgate_server.py", job, str(port)]
    if side == "batcher":
        return [sys.executable, "inprocess_batcher.py", str(port)]
    options = ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    return [sys.executable, "-m", "uvicorn", "starlette_app:app", "--port", str(port), *options]


@contextmanager
def running(side: str, job: str, body_bytes: int = 0) -> Iterator[Server]:
    """A server that has answered one request of `job`."""
    port = free_port()
    environment = {**os.environ, "HEADGATE_ENGINE": ENGINES.get(side, ""), "RAY_AUTH_MODE": "disabled"}
    with subprocess.Popen(command(side, job, port), cwd=HERE, env=environment) as process:
        try:
            wait_until_it_answers(process, port, f"/{job}", body_bytes)
            yield Server(side, f"http://127.0.0.1:{port}/{job}", process.pid)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                process.kill()


def wait_until_it_answers(process: subprocess.Popen[bytes], port: int, path: str, body_bytes: int) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while (status := ask(port, path, bytes(body_bytes))) != 200:
        if process.poll() is not None:
            sys.exit(f"the server ended with {process.returncode} before it answered: {process.args}")
        if time.monotonic() > deadline:
            sys.exit(f"the server did not answer {path} with 200 in {SECONDS_TO_START:g} s: {process.args}")
        time.sleep(0.02 if status is None else 0.1)


def ask(port: int, path: str, body: bytes) -> int | None:
    """The status of one request, None if nobody answers."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("POST" if body else "GET", path, body or None)
        return connection.getresponse().status
    except OSError:
        return None
    finally:
        connection.close()
