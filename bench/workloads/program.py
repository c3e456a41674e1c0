"""Programs of the benchmark in processes of their own: those that run and print, and those that are talked with."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

import processes
import servers
from peers.jobs import Request

#: With its stdin closed, and with SIGTERM.
SECONDS_TO_STOP, SECONDS_TO_END = 60.0, 10.0


class MeasureFailed(Exception):
    """Something was there, but could not be measured."""


def run_client(program: str, url: str, asked: Request, seconds: float, *options: str) -> dict[str, Any]:
    """What a client of the benchmark, a program of this directory's parent, found out in at most that time."""
    with tempfile.NamedTemporaryFile() as body:
        body.write(asked.body)
        body.flush()
        request = [f"--method={asked.method}", f"--body={body.name}", f"--content-type={asked.content_type}"]
        return run_program([program, url, *request, *options], seconds)


def run_program(command: list[str], seconds: float, variables: Mapping[str, str] = {}) -> dict[str, Any]:
    """The JSON that a Python program prints last; raises MeasureFailed if it fails or takes too long."""
    name = " ".join(command[:2])
    with tempfile.TemporaryFile() as said, child(command, variables, said) as process:
        try:
            printed, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            raise MeasureFailed(f"{name} took more than {seconds:g} s") from None
        if process.returncode:
            said.seek(0)
            last = (said.read().decode(errors="replace").strip() or "it said nothing").splitlines()[-1]
            raise MeasureFailed(f"{name} ended with {process.returncode}: {last}")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


@contextmanager
def child(
    command: list[str], variables: Mapping[str, str], errors: IO[bytes] | int
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program; one that still runs at the block's end is ended, with all its children."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        cwd=servers.HERE,
        env={**os.environ, **variables},
        start_new_session=True,  # Ctrl-C is for who measures
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            end(process)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL for what is left of its tree; a pid may be somebody else's by then."""
    born = {pid: servers.start_time(pid) for pid in processes.tree(process.pid)}
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(SECONDS_TO_END)
    for pid, when in born.items():
        if when and servers.start_time(pid) == when:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


class Program:
    """One that is talked with, a line of JSON in, a line of JSON out. It has said its first line."""

    def __init__(self, process: subprocess.Popen[bytes], name: str) -> None:
        self._process = process
        self._name = name

    @property
    def pids(self) -> list[int]:
        """All its processes."""
        return processes.tree(self._process.pid)

    def ask(self, seconds: float, **command: object) -> dict[str, Any]:
        """The answer, which comes in that time, or MeasureFailed."""
        self.tell(**command)
        return self.hear(seconds)

    def tell(self, **command: object) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            raise MeasureFailed(f"{self._name} has ended") from None

    def hear(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise MeasureFailed(f"{self._name} said nothing for {seconds:g} s")
        line = self._process.stdout.readline()
        if not line:
            raise MeasureFailed(f"{self._name} has ended")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def program(name: str, *arguments: object, seconds: float = 60.0) -> Iterator[Program]:
    """`python -m programs.<name>` that is ready; with the block its stdin ends, and then it does."""
    with child(["-m", f"programs.{name}", *map(str, arguments)], {}, subprocess.DEVNULL) as process:
        running = Program(process, name)
        try:
            running.hear(seconds)
            yield running
        finally:
            assert process.stdin is not None
            with suppress(OSError):
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_STOP)
