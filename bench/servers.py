"""Start a peer for a job in processes of its own, and end all of them.

    with servers.running("starlette", "json", replicas=2) as server:
        server.url              "http://127.0.0.1:41001/json"; it was asked and answered right
        server.request          what to send: method, path, body, content_type
        server.pid              the root of its processes
        server.first_answer_s   from the spawn to the first right answer

    server = servers.spawn("headgate", "json")      the same in steps, for who measures them
    server.wait_until_it_answers()
    seconds = server.stop()                         SIGINT -> no process of it is left

`NoServer` says why there is none: not installable, ended too early, no right answer. What a peer prints goes to a
file and is shown by that error only.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import peers
import processes
from peers import environments, jobs

HERE = Path(__file__).parent
SECONDS_TO_START = 180.0
SECONDS_TO_STOP = 30.0
SECONDS_TO_ANSWER = 10.0

#: A variable in the environment of all processes of a server, also of those that left its session and its tree.
MARK = "HEADGATE_BENCH_SERVER"

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class NoServer(Exception):
    """A peer that could not be started for a job, and why."""


class Server:
    """One peer that serves one job."""

    def __init__(self, peer: peers.Peer, job: str, port: int, command: list[str]) -> None:
        self.name = peer.name
        self.job = job
        self.port = port
        self.request = peer.request(job)
        self.url = f"http://127.0.0.1:{port}{self.request.path}"
        self.first_answer_s = 0.0
        #: Processes that outlived SIGINT and had to be killed; filled by `stop`.
        self.left: list[int] = []
        self._frozen: set[tuple[int, str]] = set()
        self._peer = peer
        mark = str(uuid4())
        self._mark = f"{MARK}={mark}".encode()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115  closed by `stop`
        self._began = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            cwd=HERE,
            env={**os.environ, **peer.variables, MARK: mark},
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        self.pid = self._process.pid

    def wait_until_it_answers(self) -> None:
        """Returns at the first right answer; raises NoServer when there will be none."""
        while why := self._why_not():
            if self._process.poll() is not None:
                code = self._process.returncode
                raise NoServer(f"{self.name} ended with {code} before it answered\n{self.printed()}")
            if time.perf_counter() - self._began > SECONDS_TO_START:
                raise NoServer(f"{self.name}: {why}, after {SECONDS_TO_START:g} s\n{self.printed()}")
            time.sleep(min(0.1, 0.001 + 0.005 * (time.perf_counter() - self._began)))  # exact for who is quick
        self.first_answer_s = time.perf_counter() - self._began

    def _why_not(self) -> str:
        """Why it does not serve yet; "" if it does."""
        try:
            status, body = ask(self.port, self.request)
        except (OSError, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        if status != 200:
            return f"status {status}: {body[:200]!r}"
        return self.wrong(body)

    def wrong(self, body: bytes, features: bytes = jobs.JOBS["model"].request.body) -> str:
        """Why `body` is no right answer to the job; "" if it is one."""
        return self._peer.wrong(self.job, body, features)

    def printed(self, lines: int = 15) -> str:
        """The last lines that it printed."""
        self._output.seek(0)
        return "\n".join(self._output.read().decode(errors="replace").splitlines()[-lines:])

    def processes(self) -> set[tuple[int, str]]:
        """(pid, start time) of all that lives of it: below its root, in its session, or with its mark."""
        found = processes.tree(self.pid) + [pid for pid in all_pids() if session(pid) == self.pid or self._marked(pid)]
        return {(pid, born) for pid in found if (born := start_time(pid))}

    def _marked(self, pid: int) -> bool:
        try:
            return self._mark in Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            return False

    def freeze(self) -> None:
        """Its processes get no time until `thaw`, so that they cannot slow down others that are measured."""
        while new := self.processes() - self._frozen:  # what was born meanwhile
            send(signal.SIGSTOP, new)
            self._frozen |= new

    def thaw(self) -> None:
        send(signal.SIGCONT, self._frozen)
        self._frozen = set()

    def interrupt(self) -> None:
        """What `stop` begins with, without waiting: others may be ended meanwhile."""
        self.thaw()
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)

    def stop(self, patience_s: float = SECONDS_TO_STOP) -> float:
        """Seconds from SIGINT until nothing of it lives.

        What lives on after `patience_s` is killed, and listed in `left`. Of a second call nothing comes.
        """
        if self._output.closed:
            return 0.0
        known = self.processes()
        began, took = time.perf_counter(), 0.0
        self.interrupt()
        while known:
            known = {(pid, born) for pid, born in known if start_time(pid) == born}
            took = time.perf_counter() - began
            if took > patience_s:
                self.left = sorted(pid for pid, _ in known)
                self._kill(known)
                break
            known = known or self.processes()  # what was born meanwhile
            time.sleep(0.0005)
            self._process.poll()
        self._process.wait()
        self._output.close()
        return took

    def _kill(self, known: set[tuple[int, str]]) -> None:
        for _ in range(3):  # what a dying one still started
            send(signal.SIGKILL, known | self.processes())
            time.sleep(0.1)


def spawn(peer: str, job: str, *, replicas: int = 1, routes: int = 1, port: int = 0) -> Server:
    """A server that may not answer yet. Raises NoServer if the peer cannot do the job or cannot be installed.

    replicas   processes that run the handler
    routes     how many there are beside each other, for `typed`
    port       0: any that is free
    """
    chosen = peers.PEERS[peer]
    if job not in chosen.jobs:
        raise NoServer(f"{peer} cannot do {job}: {chosen.cannot.get(job, 'unknown job')}")
    try:
        python = environments.python(chosen.environment)
    except environments.NotInstalled as error:
        raise NoServer(f"{peer} could not be installed: {error}") from error
    port = port or free_port()
    command = [python, "-m", f"peers.{chosen.module}", job, str(port), str(replicas), str(routes), *chosen.arguments]
    return Server(chosen, job, port, command)


@contextmanager
def running(peer: str, job: str, *, replicas: int = 1, routes: int = 1, port: int = 0) -> Iterator[Server]:
    """A server that answers right; all its processes end with the block, soon after SIGINT or by SIGKILL."""
    server = spawn(peer, job, replicas=replicas, routes=routes, port=port)
    try:
        server.wait_until_it_answers()
        yield server
    finally:
        server.stop(peers.PEERS[peer].seconds_to_stop)


def send(number: signal.Signals, processes_of_it: Iterable[tuple[int, str]]) -> None:
    """A signal to processes, as far as they still live."""
    for pid, born in processes_of_it:
        if start_time(pid) == born:
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def end_with_parent() -> None:
    """In a new process: SIGINT is not ignored, as in the background of a shell, and comes when the parent dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(port: int, request: jobs.Request) -> tuple[int, bytes]:
    """Status and body of one request on a connection of its own."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS_TO_ANSWER)
    try:
        headers = {"Content-Type": request.content_type} if request.content_type else {}
        connection.request(request.method, request.path, request.body or None, headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def all_pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return 0


def start_time(pid: int) -> str:
    """What tells a pid's process from the next that gets the number; "" if it does not live."""
    try:
        _, fields = processes.stat(pid)
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
