"""Who may connect: a mutual challenge on the raw socket, before an event loop frames anything on it.

The dialer sends a greeting with a nonce and its name, and passes its file descriptors along;
the acceptor answers with a nonce of its own and proof that it holds the instance's token; the
dialer proves the same. Each side's proof covers both nonces and names its role, so that neither
can be replayed or reflected. On a unix socket the peer must also be of the same user; over TCP no
file descriptors pass, and a pid means nothing.

Everything is awaited without blocking the loop and within `TIMEOUT_S`. Received file
descriptors are closed on every path that fails. The transport is made afterwards, link.py.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

from headgate.errors import ProtocolError
from headgate.wire.address import connect_to, prepare

VERSION = 1
TIMEOUT_S = 1.0
MAX_FDS = 2

_MAGIC = b"HGT1"
_NAME_BYTES = 64
_GREETING = struct.Struct("<4sHH32s64s")  # magic, version, reserved, nonce, name
_ANSWER = struct.Struct("<4sHH32sQ32s")  # magic, version, reserved, nonce, pid, proof
_CREDENTIALS = struct.Struct("3i")


def wire_name(name: str) -> str:
    """The name under which a dialer is known to those it dials: its own, or a digest of one too long to send."""
    return name if len(name.encode()) <= _NAME_BYTES else hashlib.sha256(name.encode()).hexdigest()


async def dial(address: str, token: bytes, name: str, fds: Sequence[int] = ()) -> tuple[socket.socket, int]:
    """A connected, authenticated, non-blocking socket, and the pid of the process behind it (0 over TCP).

    Raises OSError when nobody listens at `address`, ProtocolError when the other side is not ours.
    """
    family, place = connect_to(address)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        async with asyncio.timeout(TIMEOUT_S):
            await _connect(sock, place)
            pid = await _dial(sock, address, token, wire_name(name).encode(), fds)
    except TimeoutError:
        sock.close()
        raise ProtocolError(f"no answer to the handshake on {address} within {TIMEOUT_S:g} s") from None
    except BaseException:
        sock.close()
        raise
    return sock, pid


async def _connect(sock: socket.socket, place: Any) -> None:
    if sock.family != socket.AF_UNIX:
        await asyncio.get_running_loop().sock_connect(sock, place)
        prepare(sock)
        return
    while True:
        try:
            sock.connect(place)
            break
        except BlockingIOError:  # the listener's queue is full, connect() on a unix socket does not wait
            await asyncio.sleep(0.005)
    _check_user(sock)


async def _dial(sock: socket.socket, address: str, token: bytes, name: bytes, fds: Sequence[int]) -> int:
    loop = asyncio.get_running_loop()
    is_local = sock.family == socket.AF_UNIX
    nonce = os.urandom(32)
    greeting = _GREETING.pack(_MAGIC, VERSION, 0, nonce, name)
    if fds and is_local:
        socket.send_fds(sock, [greeting], list(fds))
    else:
        sock.send(greeting)
    answer = await _receive(loop, sock, _ANSWER.size)
    magic, version, _, their_nonce, pid, proof = _ANSWER.unpack(answer)
    _check_version(magic, version)
    if not hmac.compare_digest(proof, _proof(token, b"acceptor", nonce, their_nonce)):
        raise ProtocolError(f"whoever listens on {address} does not hold this instance's token")
    await loop.sock_sendall(sock, _proof(token, b"dialer", nonce, their_nonce))
    return int(pid) if is_local else 0


async def accept(sock: socket.socket, token: bytes) -> tuple[str, list[int]]:
    """Greet a connection that was just accepted: (the dialer's name, the file descriptors it passed).

    Raises ProtocolError or OSError; the caller closes the socket.
    """
    fds: list[int] = []
    try:
        sock.setblocking(False)
        async with asyncio.timeout(TIMEOUT_S):
            name = await _accept(sock, token, fds)
    except TimeoutError:
        _close(fds)
        raise ProtocolError(f"the dialer did not finish the handshake within {TIMEOUT_S:g} s") from None
    except BaseException:
        _close(fds)
        raise
    return name, fds


async def _accept(sock: socket.socket, token: bytes, fds: list[int]) -> str:
    loop = asyncio.get_running_loop()
    if sock.family == socket.AF_UNIX:
        _check_user(sock)
    else:
        prepare(sock)
    greeting = await _receive_fds(loop, sock, _GREETING.size, fds)
    magic, version, _, nonce, name = _GREETING.unpack(greeting)
    _check_version(magic, version)
    mine = os.urandom(32)
    proof = _proof(token, b"acceptor", nonce, mine)
    await loop.sock_sendall(sock, _ANSWER.pack(_MAGIC, VERSION, 0, mine, os.getpid(), proof))
    answer = await _receive(loop, sock, 32)
    if not hmac.compare_digest(answer, _proof(token, b"dialer", nonce, mine)):
        raise ProtocolError("the dialer does not hold this instance's token")
    return str(name.rstrip(b"\0").decode("utf-8", "replace"))


def _proof(token: bytes, role: bytes, dialer_nonce: bytes, acceptor_nonce: bytes) -> bytes:
    return hmac.digest(token, role + dialer_nonce + acceptor_nonce, "sha256")


def _check_version(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise ProtocolError("the peer does not speak headgate's protocol")
    if version != VERSION:
        raise ProtocolError(f"the peer speaks wire version {version}, this process version {VERSION}")


def pid_of(sock: socket.socket) -> int:
    """The process that dialled an accepted connection; 0 over TCP, and if it cannot be seen from here."""
    return _credentials(sock)[0] if sock.family == socket.AF_UNIX else 0


def _credentials(sock: socket.socket) -> tuple[int, int]:
    """SO_PEERCRED: pid and user of the process that called listen() or connect()."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def _check_user(sock: socket.socket) -> None:
    uid = _credentials(sock)[1]  # the user is what counts: who called listen() may be another process
    if uid != os.geteuid():
        raise ProtocolError(f"the peer runs as user {uid}, this process as {os.geteuid()}")


async def _receive(loop: asyncio.AbstractEventLoop, sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:  # exactly: what follows belongs to the link
        piece = await loop.sock_recv(sock, size - len(data))
        if not piece:
            raise ProtocolError("the peer closed the connection in the middle of the handshake")
        data += piece
    return data


async def _receive_fds(
    loop: asyncio.AbstractEventLoop, sock: socket.socket, size: int, fds: list[int]
) -> bytes:
    data = b""
    while len(data) < size:
        await _readable(loop, sock)
        try:
            piece, received, flags = receive_fds(sock, size - len(data), MAX_FDS)
        except BlockingIOError:
            continue
        fds.extend(received)
        if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
            raise ProtocolError("the dialer passed more file descriptors than a handshake may")
        if not piece:
            raise ProtocolError("the peer closed the connection in the middle of the handshake")
        data += piece
    return data


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


async def _readable(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
    ready: asyncio.Future[None] = loop.create_future()

    def mark() -> None:
        if not ready.done():
            ready.set_result(None)

    loop.add_reader(sock.fileno(), mark)
    try:
        await ready
    finally:
        loop.remove_reader(sock.fileno())


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
