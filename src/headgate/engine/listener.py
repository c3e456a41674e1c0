"""Listening sockets: bound by the process that starts the instance, inherited by those that accept.

Binding comes first of all, so that a port in use is an exception before anything was started.
One socket is shared by all who accept on it; it outlives each of them, so a proxy that is
replaced refuses nobody. Never SO_REUSEPORT: two instances must not share a port in silence, and
a stopped process would keep its share of the connections.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator

from headgate.errors import InstanceError

#: Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG = 4096
#: The longest path that a unix socket's address can hold, without its final zero.
MAX_UNIX_PATH_BYTES = 107

_LISTENING = "0A"  # the state's code in /proc/net/tcp


def bind(host: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A listening TCP socket on `host` (name, IPv4 or IPv6 address) and `port` (0: a free one).

    Raises InstanceError naming host:port, and who holds the port if that is the trouble; nothing
    is left open then.
    """
    where = _join(host, port)
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (socket.gaierror, UnicodeError) as error:
        raise InstanceError(f"cannot listen on {where}: {host!r} is no address of a host ({error})") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise InstanceError(f"cannot listen on {where}: {_why(error, port)}") from None
    return sock


def bind_unix(path: str, backlog: int = BACKLOG) -> socket.socket:
    """A listening unix socket at `path`, which must be free; only this user may connect (0600)."""
    length = len(os.fsencode(path))
    if length > MAX_UNIX_PATH_BYTES:
        raise InstanceError(
            f"cannot listen on {path}: the path has {length} bytes, a unix socket's at most "
            f"{MAX_UNIX_PATH_BYTES}; set XDG_RUNTIME_DIR or TMPDIR to a shorter directory"
        )
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        os.chmod(path, 0o600)
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise InstanceError(f"cannot listen on {path}: {error.strerror}") from None
    return sock


def node_address() -> str:
    """This machine's own address, by which others reach it; 127.0.0.1 if it has no network."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # RFC 5737, for documentation; connecting a UDP socket sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def address_of(sock: socket.socket, scheme: str = "http") -> str:
    """The URL under which a client of this machine reaches `sock`, without a trailing slash.

    A socket on all addresses (0.0.0.0, ::) is reached by the loopback one.
    """
    host, port = sock.getsockname()[:2]
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"{scheme}://{_join(reachable, port)}"


def _join(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _why(error: OSError, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = holder_of(port)
        by = f" by {holder}" if holder else ""
        return f"the port is in use{by}; stop that process, or choose another port (0 picks a free one)"
    if error.errno == errno.EACCES:
        return "this user may not bind ports below 1024; choose a higher one"
    if error.errno == errno.EADDRNOTAVAIL:
        return "no network interface of this machine has that address"
    return str(error.strerror)


def holder_of(port: int) -> str:
    """Who listens on TCP `port` of this machine: "pid 4711 (python app.py)", or "" if /proc does not tell."""
    wanted = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if wanted and not wanted.isdisjoint(_targets(pid)):
            return f"pid {pid} ({_command(pid)})"
    return ""


def _listening_inodes(port: int) -> Iterator[str]:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as lines:
                rows = [line.split() for line in lines][1:]
        except OSError:  # no IPv6, or no /proc
            continue
        for row in rows:
            if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port:
                yield row[9]


def _targets(pid: int) -> Iterator[str]:
    """What the open file descriptors of `pid` point to; nothing if they are not ours to see."""
    folder = f"/proc/{pid}/fd"
    try:
        for fd in os.listdir(folder):
            yield os.readlink(f"{folder}/{fd}")
    except OSError:  # another user's process, or one that ended meanwhile
        return


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            words = file.read().rstrip(b"\0").split(b"\0")
    except OSError:
        return "?"
    text = " ".join(word.decode(errors="replace") for word in words)
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
