"""One keep-alive HTTP connection of a load: bytes, and no more of HTTP than its answers need."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit


class Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it.

    `answered` is called with the connection and whether the status was 200; `lost` when it is closed.
    """

    def __init__(
        self, answered: Callable[[Connection, bool], None], lost: Callable[[Connection, bool], None]
    ) -> None:
        self._answered = answered
        self._lost = lost
        self._have = b""
        self._usual = 0  # bytes of the last answer: most are of one size
        self._busy = False
        self.freed = 0.0
        self.intended = self.sent = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by name

    def send(self, request: bytes, intended: float, now: float) -> None:
        self._busy = True
        self.intended, self.sent = intended, now
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._have:
            data = self._have + data
        if (len(data) == self._usual and data.startswith(b"HTTP/1.1 200 ")) or self._complete(data):
            self._have = b""
            self._busy = False
            self._answered(self, data.startswith(b"HTTP/1.1 200 "))
        else:
            self._have = data

    def _complete(self, data: bytes) -> bool:
        """Whether an answer is there as a whole; sets its usual length."""
        head, end, body = data.partition(b"\r\n\r\n")
        if not end:
            return False
        fields = head.lower()
        if b"transfer-encoding: chunked" in fields:
            return body.endswith(b"0\r\n\r\n")
        _, found, length = fields.partition(b"content-length:")
        if not found or len(body) < int(length.partition(b"\r\n")[0]):
            return False
        self._usual = len(data)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self, self._busy)

    def close(self) -> None:
        self._lost = lambda connection, busy: None
        self._transport.abort()


def request_of(url: str, method: str, content_type: str, body: bytes) -> tuple[str, int, bytes]:
    """(host, port, the request).

    >>> request_of("http://127.0.0.1:80/json", "GET", "", b"")
    ('127.0.0.1', 80, b'GET /json HTTP/1.1\\r\\nHost: 127.0.0.1:80\\r\\n\\r\\n')
    """
    parts = urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    fields = [f"{method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}"]
    if body:
        fields += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return parts.hostname, parts.port, "\r\n".join([*fields, "", ""]).encode() + body
