"""Addresses of headgate's own sockets, as text that any process may be told.

    /run/headgate/1f3a90c2/control.sock   a unix socket, for processes of the same node
    @headgate-1f3a90c2                    an abstract one: no file, so none is left behind
    tcp://10.0.0.7:4711                   for processes of other nodes; tcp://[::1]:4711

Whoever connects must still prove itself: handshake.py.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from headgate.errors import InstanceError, ProtocolError

#: Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG = 4096
#: The longest path that a unix socket's address can hold, without its final zero.
MAX_UNIX_PATH_BYTES = 107

_TCP = "tcp://"
#: A machine that is gone says nothing: its connections end after so long.
_SILENCE_MS = 5000
_PROBES = 4


def is_remote(address: str) -> bool:
    """Whether processes of other nodes reach it too.

    >>> is_remote("tcp://10.0.0.7:4711"), is_remote("@headgate")
    (True, False)
    """
    return address.startswith(_TCP)


def is_loopback(address: str) -> bool:
    """Whether only processes of the same machine reach that "host:port" or URL.

    >>> is_loopback("[::1]:6379"), is_loopback("http://127.0.0.1:8000"), is_loopback("http://10.0.0.7:8000")
    (True, True, False)
    """
    import ipaddress  # 5 ms that only several nodes cost
    from urllib.parse import urlsplit

    host = urlsplit(address if "//" in address else f"//{address}").hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def connect_to(address: str) -> tuple[int, Any]:
    """The family and the place for `socket.connect`; ProtocolError if it is no address.

    >>> connect_to("tcp://[::1]:4711")[1], connect_to("@headgate")[1]
    (('::1', 4711), '\\x00headgate')
    """
    if address.startswith("/"):
        return socket.AF_UNIX, address
    if address.startswith("@"):
        return socket.AF_UNIX, "\0" + address[1:]
    host, _, port = address.removeprefix(_TCP).rpartition(":")
    if not is_remote(address) or not host or not (port.isascii() and port.isdigit()) or int(port) > 0xFFFF:
        raise ProtocolError(f"{address!r} is not the address of a socket")
    host = host.removeprefix("[").removesuffix("]")
    return socket.AF_INET6 if ":" in host else socket.AF_INET, (host, int(port))


def listen(address: str, backlog: int = BACKLOG) -> socket.socket:
    """A listening socket; port 0 picks a free one. A path must be free, and only this user may connect to it (0600).

    Raises InstanceError; nothing is left open then.
    """
    family, place = connect_to(address)
    if family == socket.AF_UNIX and (length := len(os.fsencode(address))) > MAX_UNIX_PATH_BYTES:
        mend = "; set XDG_RUNTIME_DIR or TMPDIR to a shorter directory" if address.startswith("/") else ""
        raise InstanceError(
            f"cannot listen on {address}: a unix socket's address has at most {MAX_UNIX_PATH_BYTES} bytes, "
            f"this one {length}{mend}"
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if is_remote(address):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(place)
        if address.startswith("/"):
            os.chmod(address, 0o600)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise InstanceError(f"cannot listen on {address}: {error.strerror or error}") from None
    return sock


def address_of(sock: socket.socket) -> str:
    """The address of a socket that is bound, with its real port."""
    place = sock.getsockname()
    if sock.family == socket.AF_UNIX:
        return os.fsdecode(place) if isinstance(place, str) else "@" + os.fsdecode(place[1:])
    host, port = place[:2]
    return f"{_TCP}[{host}]:{port}" if ":" in host else f"{_TCP}{host}:{port}"


def prepare(sock: socket.socket) -> None:
    """Set up a connected TCP socket: frames go out at once, and a machine that is gone is noticed."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)
