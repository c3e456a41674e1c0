"""What comes of a stream of bytes: the proxy's whole reading half in memory, whole or cut, without sockets.

    outcome = run(stream)                       # in one piece
    outcome = run(stream[:9], stream[9:])       # in two
    outcome.seen                                # the requests that the app saw: (method, target, body)
    outcome.statuses, outcome.closed            # what the client saw

Everything that is not refused reaches the app, whatever its path; each request is answered at once. For the tests
of tests/security, scripts/fuzz and scripts/http-corpora.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).with_name("proxy")))

from fakes import DATE, FakeTransport, Wire

from headgate.core import http11
from headgate.core.state import BackendView, Endpoint, Settings, Snapshot, Traffic

#: The methods that the app takes; others are answered with 405 by the proxy.
METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "M-SEARCH")
_SNAPSHOT = Snapshot(
    version=1,
    endpoints=(Endpoint("any", "/{path:path}", METHODS, Traffic((("any", 1.0),))),),
    backends=(BackendView("any", 1, Settings()),),
    ready=True,
)
_STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) [^\r]*\r\n")


class Seen(NamedTuple):
    """A request as the app sees it."""

    method: str
    target: str
    body: bytes


class Outcome(NamedTuple):
    """What came of a stream."""

    seen: list[Seen]
    statuses: list[int]  # of the answers, 100 left out
    closed: bool  # the proxy would read no further request
    waits: bool  # a request has begun and is not complete
    broken: bool  # the connection failed inside the proxy: always a bug

    @property
    def refused(self) -> bool:
        """Whether something was answered that was no request."""
        return self.closed and bool(self.statuses) and self.statuses[-1] in (400, 413, 414, 431)


class Rig(Wire):
    """A proxy that is used for many streams, each on a connection of its own; the app answers at once."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.server.follow(_SNAPSHOT)

    def run(self, *pieces: bytes) -> Outcome:
        """What comes of the pieces, read one by one."""
        router = self.router
        router.callers.clear()
        router.seen.clear()
        self.server.sweep(0.0, DATE)
        connection, transport = self.connect()
        answered = 0
        for piece in pieces:
            if transport.closing:
                break
            self.receive(piece, connection)
            while len(router.callers) > answered:
                answered += 1
                self.reply(b"ok")
        state = connection.state
        outcome = Outcome(
            [_seen(head, body) for head, body in router.seen],
            [status for status in map(int, _STATUS.findall(transport.output)) if status != 100],
            _is_closed(transport),
            not _is_closed(transport) and (state in (http11.HEAD, http11.BODY) or bool(connection._rest)),
            transport.aborted,
        )
        connection.connection_lost(None)
        return outcome


def _is_closed(transport: FakeTransport) -> bool:
    return transport.closing or transport.eof_written


def _seen(head: bytes, body: bytes) -> Seen:
    method, target, _ = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    return Seen(method, target, body)


_rig: list[Rig] = []


def run(*pieces: bytes) -> Outcome:
    """What comes of the pieces at a proxy with default options."""
    if not _rig:
        _rig.append(Rig())
    return _rig[0].run(*pieces)


def cuts(stream: bytes, places: int = 1_000_000) -> Iterator[tuple[bytes, ...]]:
    """The stream cut in two at each byte (at `places` of them, if it is longer), and then in single bytes."""
    for at in range(1, len(stream), max(1, len(stream) // places)):
        yield stream[:at], stream[at:]
    if len(stream) <= places:
        yield tuple(stream[at : at + 1] for at in range(len(stream)))
