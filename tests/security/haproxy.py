"""HAProxy in front of an instance: a process of its own, and what it says that it forwarded.

Each request that HAProxy makes out of a client's bytes gets an id, which goes to the app in the field `Case-Id` and
into HAProxy's log, with whether it was sent on and what was answered. So its view and the app's can be compared.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import needs
from running import eventually

_CONFIG = """
global
    log stdout format raw daemon
    maxconn 1000
    tune.bufsize 65536
defaults
    mode http
    log global
    option http-keep-alive
    timeout connect 2s
    timeout client 500ms
    timeout server 3s
    timeout http-request 500ms
    timeout http-keep-alive 500ms
    unique-id-format %cp-%rt
    log-format "CASE %ID %cp %s %ST %ts"
frontend strict
    bind 127.0.0.1:{strict}
    http-request set-header Case-Id %[unique-id]
    default_backend app
frontend lenient
    bind 127.0.0.1:{lenient}
    option accept-invalid-http-request
    http-request set-header Case-Id %[unique-id]
    default_backend app
backend app
    http-reuse always
    server app {server} maxconn 8
"""
_LINE = re.compile(r"CASE (\S+) ([0-9]+) (\S+) (-?[0-9]+) (\S+)$", re.MULTILINE)


class Forwarded(NamedTuple):
    """A request as HAProxy made it out."""

    id: str
    port: int  # the client's
    server: bool  # it was sent on
    status: int  # what its client got


class Haproxy:
    def __init__(self, log: Path, strict: int, lenient: int) -> None:
        self._log = log
        #: Where HAProxy refuses what it finds invalid, and where it lets some of that pass.
        self.fronts = {"strict": ("127.0.0.1", strict), "lenient": ("127.0.0.1", lenient)}

    def forwarded(self) -> dict[int, list[Forwarded]]:
        """What it has logged, by the client's port, in order."""
        found: dict[int, list[Forwarded]] = defaultdict(list)
        for id, port, server, status, _ in _LINE.findall(self._log.read_text(errors="replace")):
            found[int(port)].append(Forwarded(id, int(port), server == "app", int(status)))
        return found

    def forget(self) -> None:
        """Begin a new log."""
        with self._log.open("r+b") as file:
            file.truncate()


@contextlib.contextmanager
def in_front_of(server: tuple[str, int], folder: Path) -> Iterator[Haproxy]:
    """A HAProxy that sends what it accepts to `server`, on few connections that it keeps."""
    program = needs.program("haproxy")
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    config, log = folder / "haproxy.cfg", folder / "haproxy.log"
    config.write_text(_CONFIG.format(strict=ports[0], lenient=ports[1], server=":".join(map(str, server))))
    with log.open("ab") as output:
        process = subprocess.Popen([program, "-db", "-f", str(config)], stdout=output, stderr=output)
    try:
        haproxy = Haproxy(log, *ports)
        eventually(lambda: process.poll() is None and all(map(_listens, haproxy.fronts.values())))
        yield haproxy
    finally:
        process.kill()
        process.wait()


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0
