"""Who is believed, and what a client may not send."""

from __future__ import annotations

import logging

import pytest

from headgate.proxy import fields

HEAD = b"GET / HTTP/1.1\r\nHost: x\r\n%b\r\n"


def read(lines: bytes, trusted: bool = True, allowed: str = "127.0.0.1") -> fields.Fields:
    return fields.read(HEAD % lines, False, trusted, fields.trust(allowed))


@pytest.mark.parametrize(
    ("chain", "allowed", "client"),
    [
        (b"1.2.3.4", "127.0.0.1", "1.2.3.4"),
        (b"6.6.6.6, 1.2.3.4", "127.0.0.1", "1.2.3.4"),
        (b"6.6.6.6, 1.2.3.4, 10.0.0.1", "127.0.0.1, 10.0.0.0/8", "1.2.3.4"),
        (b"1.2.3.4, 10.0.0.1", "*", "1.2.3.4"),
        (b"1.2.3.4:5678", "127.0.0.1", "1.2.3.4"),
        (b"[2001:db8::1]:80", "127.0.0.1", "2001:db8::1"),
        (b"2001:db8::1", "127.0.0.1", "2001:db8::1"),
        (b" , ", "127.0.0.1", None),
    ],
)
def test_the_client_is_the_last_that_is_not_one_of_our_proxies(
    chain: bytes, allowed: str, client: str | None
) -> None:
    assert read(b"X-Forwarded-For: %b\r\n" % chain, allowed=allowed).client == client


@pytest.mark.parametrize(("proto", "scheme"), [(b"https", "https"), (b"HTTP", "http"), (b"gopher", None)])
def test_the_scheme_is_one_of_two(proto: bytes, scheme: str | None) -> None:
    assert read(b"X-Forwarded-Proto: %b\r\n" % proto).scheme == scheme


def test_a_stranger_cannot_speak_for_others() -> None:
    found = read(b"X-Forwarded-For: 1.2.3.4\r\nForwarded: for=1.2.3.4\r\nX-Own: y\r\n", trusted=False)
    assert (found.client, found.scheme) == (None, None)
    assert found.head == HEAD % b"X-Own: y\r\n"


def test_internal_fields_are_taken_out_but_for_two() -> None:
    found = read(b"X-Headgate-Link: 1\r\nX-Headgate-Model: m\r\nX-Headgate-Timing: t\r\n")
    assert found.head == HEAD % b"X-Headgate-Model: m\r\nX-Headgate-Timing: t\r\n"


def test_an_untouched_head_is_the_same_object() -> None:
    head = HEAD % b"X-Request-ID: a\r\n"
    assert fields.read(head, False, True, fields.trust("")).head is head


@pytest.mark.parametrize(("given", "found"), [(b"abc", b"abc"), (b"", None), (b"x" * 129, None), (b"\xff", None)])
def test_a_request_id_is_taken_over_if_it_is_valid(given: bytes, found: bytes | None) -> None:
    assert read(b"X-Request-Id: %b\r\n" % given).request_id == found


def test_an_address_that_is_none_trusts_nobody(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        is_trusted = fields.trust("10.0.0.0/99, 10.0.0.0/8, ::1")
    assert "10.0.0.0/99" in caplog.text
    assert [is_trusted(each) for each in ("10.9.9.9", "::1", "11.0.0.1", "no address")] == [True, True, False, False]
