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
import os
import socket
from collections.abc import Sequence
from typing import Any

from headgate.errors import ProtocolError
from headgate.wire import greeting
from headgate.wire.address import connect_to, prepare
from headgate.wire.greeting import TIMEOUT_S, check_user, receive_fds

MAX_FDS = 2


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
            pid = await _dial(sock, address, token, name, fds)
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
    check_user(sock)


async def _dial(sock: socket.socket, address: str, token: bytes, name: str, fds: Sequence[int]) -> int:
    loop = asyncio.get_running_loop()
    is_local = sock.family == socket.AF_UNIX
    nonce = os.urandom(greeting.NONCE_BYTES)
    first = greeting.greeting(name, nonce)
    if fds and is_local:
        socket.send_fds(sock, [first], list(fds))
    else:
        sock.send(first)
    answer = await _receive(loop, sock, greeting.ANSWER_BYTES)
    proof, pid = greeting.prove(answer, nonce, token, address)
    await loop.sock_sendall(sock, proof)
    return pid if is_local else 0


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
        check_user(sock)
    else:
        prepare(sock)
    first = await _receive_fds(loop, sock, greeting.GREETING_BYTES, fds)
    name, answer, proof = greeting.answer_to(first, token)
    await loop.sock_sendall(sock, answer)
    greeting.check_proof(await _receive(loop, sock, greeting.PROOF_BYTES), proof)
    return name


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
