"""Connections to an instance for bytes that no client would send, or in pieces that none would."""

from __future__ import annotations

import contextlib
import socket

from under_load import address_of

import headgate


def connect(client: headgate.Client) -> socket.socket:
    """To its HTTP port; what is sent goes out at once."""
    host, _, port = address_of(client).removeprefix("http://").rpartition(":")
    sock = socket.create_connection((host, int(port)), timeout=20)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


def read_to_end(sock: socket.socket) -> bytes:
    """What still comes until the other side ends the connection, be it by a reset."""
    received = bytearray()
    with contextlib.suppress(ConnectionError):
        while piece := sock.recv(65536):
            received += piece
    return bytes(received)
