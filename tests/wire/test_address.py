"""wire/address.py on real sockets."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest

from headgate.errors import InstanceError, ProtocolError
from headgate.wire.address import MAX_UNIX_PATH_BYTES, address_of, connect_to, is_remote, listen, prepare


@pytest.mark.parametrize(
    ("address", "family", "place"),
    [
        ("/run/r0007.sock", socket.AF_UNIX, "/run/r0007.sock"),
        ("@headgate-1f3a", socket.AF_UNIX, "\0headgate-1f3a"),
        ("tcp://10.0.0.7:4711", socket.AF_INET, ("10.0.0.7", 4711)),
        ("tcp://head-node:80", socket.AF_INET, ("head-node", 80)),
        ("tcp://[fd00::7]:65535", socket.AF_INET6, ("fd00::7", 65535)),
    ],
)
def test_an_address_says_how_to_connect(address: str, family: int, place: object) -> None:
    assert connect_to(address) == (family, place)
    assert is_remote(address) == address.startswith("tcp")


@pytest.mark.parametrize(
    "address", ["", "relative.sock", "tcp://", "tcp://:80", "tcp://h", "tcp://h:", "tcp://h:65536", "tcp://h:²", "h:80"]
)
def test_anything_else_is_no_address(address: str) -> None:
    with pytest.raises(ProtocolError, match="is not the address of a socket"):
        connect_to(address)


@pytest.mark.parametrize("address", ["@headgate-test-address", "tcp://127.0.0.1:0", "tcp://[::1]:0", "PATH"])
def test_who_listens_can_be_connected_to_by_the_address_of_the_socket(address: str, short_dir: Path) -> None:
    asked = str(short_dir / "s") if address == "PATH" else address
    if "::1" in address and not socket.has_ipv6:
        pytest.skip("no IPv6")
    with listen(asked) as listener:
        found = address_of(listener)
        assert found == asked or (found.startswith(asked[:-1]) and not found.endswith(":0"))
        family, place = connect_to(found)
        with socket.socket(family) as sock:
            sock.connect(place)
            listener.accept()[0].close()


def test_a_path_is_for_this_user_only_and_an_abstract_name_leaves_no_file(short_dir: Path) -> None:
    with listen(str(short_dir / "s")), listen("@headgate-test-address"):
        assert [entry.name for entry in short_dir.iterdir()] == ["s"]
        assert stat.S_IMODE((short_dir / "s").stat().st_mode) == 0o600


@pytest.mark.parametrize("address", ["@headgate-test-address", "tcp://127.0.0.1:0", "PATH"])
def test_an_address_that_is_taken_is_named(address: str, short_dir: Path) -> None:
    with listen(str(short_dir / "s") if address == "PATH" else address) as first:
        taken = address_of(first)
        with pytest.raises(InstanceError, match=r"cannot listen on .*in use") as raised:
            listen(taken)
        assert taken in str(raised.value)


def test_a_place_that_cannot_be_bound_is_named(short_dir: Path) -> None:
    with pytest.raises(InstanceError, match=r"cannot listen on .*No such file"):
        listen(str(short_dir / "missing" / "s"))


def test_a_unix_address_may_have_107_bytes(short_dir: Path) -> None:
    room = MAX_UNIX_PATH_BYTES - len(f"{short_dir}/")
    for longest in (str(short_dir / ("x" * room)), "@" + "x" * (MAX_UNIX_PATH_BYTES - 1)):
        listen(longest).close()
        with pytest.raises(InstanceError, match=r"cannot listen on .* at most 107 bytes, this one 108") as raised:
            listen(longest + "x")
        assert ("set XDG_RUNTIME_DIR" in str(raised.value)) == longest.startswith("/")


def test_a_port_can_be_bound_again_at_once() -> None:
    with listen("tcp://127.0.0.1:0") as first:
        address = address_of(first)
        with socket.create_connection(connect_to(address)[1]):
            first.accept()[0].close()
    listen(address).close()


def test_a_prepared_connection_sends_at_once_and_notices_silence() -> None:
    with listen("tcp://127.0.0.1:0") as listener, socket.socket() as sock:
        sock.connect(connect_to(address_of(listener))[1])
        prepare(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        wanted = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 1, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 5000}
        assert {name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name)) for name in wanted} == wanted
