"""The listening socket of HTTP: bound by the process that starts the instance, inherited by the proxies that accept.

Binding comes first of all, so that a port in use is an exception before anything was started.
One socket is shared by all who accept on it; it outlives each of them, so a proxy that is
replaced refuses nobody. Never SO_REUSEPORT: two instances must not share a port in silence, and
a stopped process would keep its share of the connections. headgate's own sockets are wire/address.py.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
from collections.abc import Iterator

from headgate.errors import InstanceError
from headgate.wire.address import BACKLOG

_LISTENING = "0A"  # the state's code in /proc/net/tcp

_SO_ATTACH_FILTER = 26
_INSTRUCTION = struct.Struct("HBBI")  # struct sock_filter of <linux/filter.h>
_PROGRAM = struct.Struct("HP")  # struct sock_fprog
#: Drop packets that open a connection (SYN among the flags in byte 13 of the TCP header), pass all others: sockets
#: of connections that are half open inherit the filter.
_NO_SYN = (
    (0x30, 0, 0, 13),  # load a byte
    (0x45, 0, 1, 0x02),  # any of these bits? else skip one
    (0x06, 0, 0, 0),  # drop
    (0x06, 0, 0, 0xFFFF_FFFF),  # pass
)


def bind(host: str, port: int, backlog: int = BACKLOG) -> socket.socket:
    """A listening TCP socket on `host` (name, IPv4 or IPv6 address) and `port` (0: a free one).

    Raises InstanceError naming host:port, and who holds the port if that is the trouble; nothing
    is left open then.
    """
    where = _join(host, port)
    try:
        name = host.encode() if host.isascii() else host  # a str would have the IDNA codec imported: 3 ms, 0.5 MB
        family, kind, proto, _, address = socket.getaddrinfo(
            name, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
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


def admit_no_more(sock: socket.socket) -> None:
    """Let nobody connect to a listening socket any more; those who have can still be accepted. Raises OSError.

    Closing it resets whoever is in its queue, so they are accepted first, and meanwhile nobody may
    come. It holds for all processes that share the socket. New ones hear nothing, and when
    they try again (1 s) that nobody listens.
    """
    import ctypes  # 2 ms that the driver, which only binds, does not need

    code = b"".join(_INSTRUCTION.pack(*instruction) for instruction in _NO_SYN)
    program = ctypes.create_string_buffer(code, len(code))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, _PROGRAM.pack(len(_NO_SYN), ctypes.addressof(program)))


def has_waiting(sock: socket.socket) -> bool:
    """Whether somebody waits in a listening socket's queue to be accepted."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return bool(poll.poll(0))


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
    """Who listens on TCP `port` of this machine: "pid 4711 (python app.py)", or else whose process it is."""
    owners = dict(_listening_inodes(port))
    wanted = {f"socket:[{inode}]" for inode in owners}
    if not wanted:
        return ""
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if not wanted.isdisjoint(_targets(pid)):
            return f"pid {pid} ({_command(pid)})"
    return f"a process of user {_user(min(owners.values()))} that this user may not look into"


def _user(uid: int) -> str:
    import pwd

    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return str(uid)


def _listening_inodes(port: int) -> Iterator[tuple[str, int]]:
    """Of each socket that listens on that port: its inode, and the uid of who made it."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table, encoding="ascii") as lines:
                rows = [line.split() for line in lines][1:]
        except OSError:  # no IPv6, or no /proc
            continue
        for row in rows:
            if row[3] == _LISTENING and int(row[1].rpartition(":")[2], 16) == port:
                yield row[9], int(row[7])


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
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as title:
            name = title.read().strip()
    except OSError:
        return "?"
    if name.startswith("headgate-"):  # its command line is code
        return name
    text = " ".join(word.decode(errors="replace") for word in words)
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:57] + "..."
