"""HTTPS: which certificate clients see, and how a new one comes into force without losing a connection.

Certificates are replaced on disk while a proxy runs: a file is written anew, or a symbolic link is
swapped, the key some time before or after its certificate. So the files are looked at every
`LOOK_S` seconds, and taken once they have not changed from one look to the next. From then on
handshakes use the new certificate; connections that exist go on. Files that cannot be used are
logged as an error, once for each state of them, and the old certificate stays.

Rule: what is served never depends on the files being good when a proxy is replaced. The last good
pair lies in memory that all proxies of a node share (`Kept`), and a new one falls back to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import logging
import os
import ssl
import struct
from collections.abc import Iterator
from operator import itemgetter
from typing import Any, NamedTuple

from msgspec import MsgspecError
from msgspec.msgpack import decode, encode

log = logging.getLogger("headgate.proxy")

#: A handshake that takes longer is broken off.
HANDSHAKE_S = 10.0
#: Time from one look at the files to the next.
LOOK_S = 0.5
#: uvloop breaks off an answer that is still being taken so long after its end was written.
_NEVER_S = 1e9
#: The most that is kept of a certificate and its key.
SLOT_BYTES = 1 << 24
_DIGEST_BYTES = 32
_HEAD = struct.Struct("<QQ")  # number, size
#: Ephemeral keys and authenticated encryption only; those of TLS 1.3 all are.
_CIPHERS = "ECDHE+AESGCM:ECDHE+CHACHA20"


class Pair(NamedTuple):
    """A certificate with its chain, and its private key, as PEM; no key: it is in the same text."""

    certificate: bytes
    key: bytes = b""


class Files(NamedTuple):
    """Where the pair is kept on disk; no key file: it is in the same file."""

    certificate: str
    key: str | None

    def read(self) -> Pair:
        """Raises OSError with the name of the file."""
        texts = []
        for path in filter(None, self):
            with open(path, "rb") as file:
                texts.append(file.read())
        return Pair(*texts)

    def state(self) -> tuple[object, ...]:
        """What changes when somebody writes, replaces or removes one of them."""
        return tuple(_state(path) for path in filter(None, self))


def _state(path: str) -> tuple[object, ...]:
    try:
        found = os.stat(path)
    except OSError as error:
        return (error.errno,)
    # The time of the last change of the inode tells a file that keeps its age, size and place (cp -p).
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def context_of(pair: Pair) -> ssl.SSLContext:
    """What a server needs to be that one. Raises ssl.SSLError or ValueError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.set_alpn_protocols(["http/1.1"])
    with _as_file(pair.certificate) as certificate, _as_file(pair.key or pair.certificate) as key:
        # An encrypted key is an error: there is nobody to ask for its password.
        context.load_cert_chain(certificate, key, password=lambda: "")
    return context


@contextlib.contextmanager
def _as_file(text: bytes) -> Iterator[str]:
    """A path where OpenSSL can read `text`, which stands on no disk."""
    with open(os.memfd_create("headgate-pem"), "wb") as file:
        file.write(text)
        file.flush()
        yield f"/proc/self/fd/{file.fileno()}"


class Kept:
    """The last good pair of a node's proxies, in memory that they share (a memfd); fd -1: it is not kept.

    Two slots, of which the older one is written: whoever is killed while it writes leaves the other as it was.
    A slot holds the sha256 of all that follows it there, its number (the higher, the newer), a size, and the pair.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def write(self, pair: Pair) -> None:
        """Keep `pair` from now on. Raises ValueError if it is too large, and OSError."""
        if self._fd < 0:
            return
        number = self._newest()[0] + 1
        content = encode(pair)
        slot = _HEAD.pack(number, len(content)) + content
        if _DIGEST_BYTES + len(slot) > SLOT_BYTES:
            raise ValueError(f"it has {len(content)} bytes, and {SLOT_BYTES} may be kept")
        slot = hashlib.sha256(slot).digest() + slot
        written = os.pwrite(self._fd, slot, number % 2 * SLOT_BYTES)
        if written < len(slot):
            raise OSError(errno.ENOSPC, "there is no memory to keep it in")

    def read(self) -> Pair | None:
        """The newest that was written whole; None if there is none."""
        return None if self._fd < 0 else self._newest()[1]

    def _newest(self) -> tuple[int, Pair | None]:
        found: list[tuple[int, Pair | None]] = [(0, None), *filter(None, map(self._slot, range(2)))]
        return max(found, key=itemgetter(0))

    def _slot(self, which: int) -> tuple[int, Pair] | None:
        """Its number and pair; None if it was never written, or not to its end."""
        at = which * SLOT_BYTES
        digest = os.pread(self._fd, _DIGEST_BYTES, at)
        head = os.pread(self._fd, _HEAD.size, at + len(digest))
        if len(head) < _HEAD.size:
            return None
        number, size = _HEAD.unpack(head)
        content = os.pread(self._fd, min(size, SLOT_BYTES), at + len(digest) + len(head))
        if hashlib.sha256(head + content).digest() != digest:
            return None
        try:
            return number, decode(content, type=Pair)
        except MsgspecError:
            return None


class Certificate:
    """What a server's handshakes use: `context` is for the server, and always leads to the newest pair.

    Raises OSError (ssl.SSLError is one) or ValueError if the files cannot be used and no pair was kept.
    """

    def __init__(self, files: Files, kept: Kept) -> None:
        self._files = files
        self._kept = kept
        self._seen = files.state()
        self._taken: tuple[object, ...] | None = self._seen
        self._complaint: object = None
        before = kept.read()
        try:
            self._pair, self._newest = self._load()
        except (OSError, ValueError) as error:
            if before is None:
                raise
            self._taken = None
            self._complain(error)
            self._pair, self._newest = before, context_of(before)
        self.context = context_of(self._pair)
        self.context.sni_callback = self._choose

    def for_server(self) -> dict[str, Any]:
        """What `create_server` needs besides, on uvloop."""
        return {
            "ssl": self.context,
            "ssl_handshake_timeout": HANDSHAKE_S,
            "ssl_shutdown_timeout": _NEVER_S,  # the server's sweep ends those who do not say goodbye
        }

    def _load(self) -> tuple[Pair, ssl.SSLContext]:
        pair = self._files.read()
        context = context_of(pair)
        self._kept.write(pair)
        return pair, context

    def _choose(self, connection: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._newest

    def look(self) -> None:
        """Take what is in the files now, if it is new and nobody is at work on them."""
        before, self._seen = self._seen, self._files.state()
        if self._seen != before or self._seen == self._taken:
            return
        try:
            pair, context = self._load()
        except (OSError, ValueError) as error:
            self._complain(error)
            return
        self._taken, self._complaint = self._seen, None
        if pair != self._pair:
            self._pair, self._newest = pair, context
            log.info("the certificate in %s is in force from now on", self._files.certificate)

    def _complain(self, error: Exception) -> None:
        complaint = (self._seen, str(error))
        if complaint != self._complaint:
            self._complaint = complaint
            log.error(
                "the certificate in %s with the private key in %s cannot be used: %s; the one before stays in "
                "force until these files are good",
                self._files.certificate,
                self._files.key or self._files.certificate,
                error,
            )

    async def watch(self) -> None:
        """Look every now and then; in a thread, for a disk may be slow."""
        while True:
            await asyncio.sleep(LOOK_S)
            try:
                await asyncio.to_thread(self.look)
            except Exception:
                log.exception("looking for a new certificate failed")
