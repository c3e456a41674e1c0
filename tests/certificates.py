"""Certificates for tests: self-signed, of 127.0.0.1, each a key of its own.

    first = certificates.make(folder, "first")      # first.pem and first.key
    certificates.served(address, first)             # whether a new connection sees it
"""

from __future__ import annotations

import select
import socket
import ssl
import subprocess
from pathlib import Path
from typing import NamedTuple

import needs

MOST = 64 * 1024
_KINDS = {"ec": ["ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"], "rsa": ["rsa:2048"]}


class Made(NamedTuple):
    certificate: Path
    key: Path

    @property
    def der(self) -> bytes:
        return ssl.PEM_cert_to_DER_cert(self.certificate.read_text())


def make(folder: Path, name: str, kind: str = "ec") -> Made:
    made = Made(folder / f"{name}.pem", folder / f"{name}.key")
    command = [needs.program("openssl"), "req", "-x509", "-newkey", *_KINDS[kind], "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(made.key), "-out", str(made.certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return made


def unchecked() -> ssl.SSLContext:
    """A client that takes any certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def place_of(address: str) -> tuple[str, int]:
    host, _, port = address.partition("//")[2].rpartition(":")
    return host, int(port)


def connect(address: str, context: ssl.SSLContext | None = None, timeout_s: float = 20.0) -> ssl.SSLSocket:
    sock = socket.create_connection(place_of(address), timeout_s)
    try:
        return (context or unchecked()).wrap_socket(sock, server_hostname="127.0.0.1")
    except BaseException:
        sock.close()
        raise


def served(address: str) -> bytes:
    """The certificate (DER) that a new connection sees."""
    with connect(address) as sock:
        found = sock.getpeercert(binary_form=True)
    assert found
    return found


class Talk:
    """A file to read from, and meanwhile something is said; in one thread, for two on an SSLSocket would race."""

    def __init__(self, sock: ssl.SSLSocket, said: bytes = b"", timeout_s: float = 20.0) -> None:
        self._sock = sock
        self._left = memoryview(said)
        self._received = bytearray()
        self._timeout_s = timeout_s
        sock.setblocking(False)

    def read(self, size: int) -> bytes:
        while len(self._received) < size:
            self._go_on()
        found = bytes(self._received[:size])
        del self._received[:size]
        return found

    def readline(self) -> bytes:
        while (end := self._received.find(b"\n")) < 0:
            self._go_on()
        return self.read(end + 1)

    def _go_on(self) -> None:
        try:
            if self._left:
                self._left = self._left[self._sock.send(self._left[:MOST]) :]
        except ssl.SSLWantWriteError:
            pass
        try:
            piece = self._sock.recv(MOST)
        except ssl.SSLWantReadError:
            ready = select.select([self._sock], [self._sock] if self._left else [], [], self._timeout_s)
            if not any(ready):
                raise TimeoutError(f"nothing more after {bytes(self._received[-200:])!r}") from None
            return
        if not piece:
            raise EOFError(f"the end, after {bytes(self._received[-200:])!r}")
        self._received += piece
