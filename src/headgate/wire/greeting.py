"""What the two ends of a handshake say, and what proves that they may: bytes in, bytes out.

The dialer's greeting carries a nonce and its name; the acceptor's answer a nonce of its own and its
proof; the dialer sends its proof last. handshake.py does it on an event loop, line.py without one.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
from _operator import _compare_digest
from typing import TYPE_CHECKING

from headgate.errors import ProtocolError

# The interpreter's own SHA-256. hashlib and hmac would load OpenSSL for it: 3 ms and 1.3 MB in a driver, which has
# no other use for it.
try:
    if TYPE_CHECKING:
        from hashlib import sha256
    elif sys.version_info >= (3, 12):
        from _sha2 import sha256
    else:
        from _sha256 import sha256
except ImportError:  # built without it
    from hashlib import sha256

VERSION = 1
#: A handshake that takes longer fails.
TIMEOUT_S = 1.0

_MAGIC = b"HGT1"
_NAME_BYTES = 64
_GREETING = struct.Struct("<4sHH32s64s")  # magic, version, reserved, nonce, name
_ANSWER = struct.Struct("<4sHH32sQ32s")  # magic, version, reserved, nonce, pid, proof
_CREDENTIALS = struct.Struct("3i")

_BLOCK_BYTES = 64
_INNER, _OUTER = (bytes(byte ^ pad for byte in range(256)) for pad in (0x36, 0x5C))

NONCE_BYTES = PROOF_BYTES = 32
GREETING_BYTES, ANSWER_BYTES = _GREETING.size, _ANSWER.size


def wire_name(name: str) -> str:
    """The name under which a dialer is known to those it dials: its own, or a digest of one too long to send."""
    return name if len(name.encode()) <= _NAME_BYTES else sha256(name.encode()).hexdigest()


# --- the dialer ---


def greeting(name: str, nonce: bytes) -> bytes:
    """The first thing that is said."""
    return _GREETING.pack(_MAGIC, VERSION, 0, nonce, wire_name(name).encode())


def prove(answer: bytes, nonce: bytes, token: bytes, address: str) -> tuple[bytes, int]:
    """The dialer's proof, and the pid that the acceptor says it has. ProtocolError if it is not ours."""
    magic, version, _, theirs, pid, proof = _ANSWER.unpack(answer)
    _check_version(magic, version)
    if not _compare_digest(proof, _proof(token, b"acceptor", nonce, theirs)):
        raise ProtocolError(f"whoever listens on {address} does not hold this instance's token")
    return _proof(token, b"dialer", nonce, theirs), int(pid)


# --- the acceptor ---


def answer_to(greeting: bytes, token: bytes) -> tuple[str, bytes, bytes]:
    """The dialer's name, what to say to it, and the proof that it has to send. ProtocolError if it is not ours."""
    magic, version, _, theirs, name = _GREETING.unpack(greeting)
    _check_version(magic, version)
    nonce = os.urandom(NONCE_BYTES)
    answer = _ANSWER.pack(_MAGIC, VERSION, 0, nonce, os.getpid(), _proof(token, b"acceptor", theirs, nonce))
    return name.rstrip(b"\0").decode("utf-8", "replace"), answer, _proof(token, b"dialer", theirs, nonce)


def check_proof(given: bytes, expected: bytes) -> None:
    """Raises ProtocolError unless the dialer holds the token."""
    if not _compare_digest(given, expected):
        raise ProtocolError("the dialer does not hold this instance's token")


def _proof(token: bytes, role: bytes, dialer_nonce: bytes, acceptor_nonce: bytes) -> bytes:
    return hmac_sha256(token, role + dialer_nonce + acceptor_nonce)


def hmac_sha256(key: bytes, message: bytes) -> bytes:
    """HMAC (RFC 2104) with SHA-256.

    >>> hmac_sha256(b"Jefe", b"what do ya want for nothing?").hex()[:32]  # RFC 4231, test case 2
    '5bdcc146bf60754e6a042426089575c7'
    """
    block = (key if len(key) <= _BLOCK_BYTES else sha256(key).digest()).ljust(_BLOCK_BYTES, b"\0")
    inner = sha256(block.translate(_INNER) + message).digest()
    return sha256(block.translate(_OUTER) + inner).digest()


def _check_version(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise ProtocolError("the peer does not speak headgate's protocol")
    if version != VERSION:
        raise ProtocolError(f"the peer speaks wire version {version}, this process version {VERSION}")


# --- the socket below ---


def pid_of(sock: socket.socket) -> int:
    """The process that dialled an accepted connection; 0 over TCP, and if it cannot be seen from here."""
    return _credentials(sock)[0] if sock.family == socket.AF_UNIX else 0


def check_user(sock: socket.socket) -> None:
    """Raises ProtocolError if the other end of a unix socket belongs to another user."""
    uid = _credentials(sock)[1]  # the user is what counts: who called listen() may be another process
    if uid != os.geteuid():
        raise ProtocolError(f"the peer runs as user {uid}, this process as {os.geteuid()}")


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """SO_PEERCRED: pid and user of the process that called listen() or connect()."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def receive_fds(sock: socket.socket, size: int, max_fds: int, flags: int = 0) -> tuple[bytes, list[int], int]:
    """Up to `size` bytes, the file descriptors that came along (never inheritable), and the message's flags.

    What socket.recv_fds is for, which drops the flags it is given (CPython 3.11).
    """
    room = socket.CMSG_LEN(max_fds * struct.calcsize("i"))
    data, messages, found, _ = sock.recvmsg(size, room, flags | socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in messages:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(content) - len(content) % struct.calcsize("i")
            fds += struct.unpack(f"{whole // struct.calcsize('i')}i", content[:whole])
    return data, fds, found
