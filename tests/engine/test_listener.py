"""Binding, on real sockets of this machine."""

from __future__ import annotations

import os
import socket

import pytest

from headgate.engine import listener
from headgate.errors import InstanceError


def test_port_0_picks_a_free_port_and_listens() -> None:
    with listener.bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        assert listener.address_of(sock) == f"http://127.0.0.1:{port}"
        assert listener.address_of(sock, "https") == f"https://127.0.0.1:{port}"
        assert not sock.get_inheritable()
        with socket.create_connection(("127.0.0.1", port), timeout=5):
            pass


@pytest.mark.parametrize(("host", "shown"), [("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1")])
def test_the_address_is_one_that_a_client_can_dial(host: str, shown: str) -> None:
    with listener.bind(host, 0) as sock:
        assert listener.address_of(sock) in (
            f"http://{shown}:{sock.getsockname()[1]}",
            f"http://[::1]:{sock.getsockname()[1]}",
        )


@pytest.mark.skipif(not os.path.exists("/proc/net/if_inet6"), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "::"])
def test_an_ipv6_address_is_shown_in_brackets(host: str) -> None:
    try:
        sock = listener.bind(host, 0)
    except InstanceError:
        pytest.skip("IPv6 has no loopback address here")
    with sock:
        assert listener.address_of(sock) == f"http://[::1]:{sock.getsockname()[1]}"


def test_a_port_in_use_is_told_in_one_line_with_its_holder(free_port: int) -> None:
    with listener.bind("127.0.0.1", free_port), pytest.raises(InstanceError) as caught:
        listener.bind("127.0.0.1", free_port)

    text = str(caught.value)
    assert text.startswith(f"cannot listen on 127.0.0.1:{free_port}: the port is in use by pid ")
    assert f"pid {os.getpid()} (" in text
    assert "\n" not in text


def test_the_holder_of_a_port_that_nobody_holds_is_empty(free_port: int) -> None:
    assert listener.holder_of(free_port) == ""


def test_a_port_is_free_again_as_soon_as_its_holder_closed_it(free_port: int) -> None:
    with listener.bind("127.0.0.1", free_port) as first:
        with socket.create_connection(first.getsockname(), timeout=5) as client:
            first.accept()[0].close()
            client.recv(1)
    listener.bind("127.0.0.1", free_port).close()


@pytest.mark.parametrize("host", ["203.0.113.1", "no.such.host.invalid", "a..b", "x" * 70])
def test_a_host_that_cannot_be_bound_is_named(host: str) -> None:
    with pytest.raises(InstanceError, match=f"cannot listen on {host}:8000"):
        listener.bind(host, 8000)


def test_who_has_connected_is_accepted_when_nobody_else_is_admitted_any_more() -> None:
    with listener.bind("127.0.0.1", 0) as sock:
        assert not listener.has_waiting(sock)
        with socket.create_connection(sock.getsockname(), timeout=5) as early:
            listener.admit_no_more(sock)
            with pytest.raises(TimeoutError):
                socket.create_connection(sock.getsockname(), timeout=0.1)
            assert listener.has_waiting(sock)
            accepted, _ = sock.accept()
            with accepted:
                early.sendall(b"hello")
                assert accepted.recv(10) == b"hello"
            assert not listener.has_waiting(sock)


def test_a_node_s_own_address_can_be_bound() -> None:
    with listener.bind(listener.node_address(), 0) as sock:
        assert sock.getsockname()[0] == listener.node_address()
