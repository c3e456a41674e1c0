"""proxy/second_opinion.py: llhttp has to agree with us, and no head leaves a trace for the next one."""

from __future__ import annotations

from typing import Any

import pytest

from headgate.core.http11 import Head, Limits, Reject, check_head
from headgate.proxy.second_opinion import SecondOpinion

WITHOUT_BODY = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n"
UPGRADES = b"Connection: Upgrade\r\nUPGRADE: h2c\r\n"
AGREED = {
    "GET": WITHOUT_BODY,
    "an empty body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n",
    "a body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    "chunks": b"PUT / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
    "the last request": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n",
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "a method that llhttp does not know": b"BREW / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\n",
    "a method that means something to llhttp": b"PRI / HTTP/1.1\r\nHost: a\r\n\r\n",
    "an upgrade": b"GET / HTTP/1.1\r\nHost: a\r\n" + UPGRADES + b"\r\n",
    "an upgrade with a body": b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n" + UPGRADES + b"\r\n",
    "an upgrade of another method": b"BREW / HTTP/1.1\r\nHost: a\r\n" + UPGRADES + b"\r\n",
    "an upgrade of the last request": b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close, Upgrade\r\nUpgrade: x\r\n\r\n",
}


def ours(raw: bytes) -> Head:
    return check_head(raw, Limits())


@pytest.mark.parametrize("raw", AGREED.values(), ids=list(AGREED))
def test_an_ordinary_head_is_agreed_upon(raw: bytes) -> None:
    SecondOpinion().check(raw, ours(raw))


def test_heads_in_any_order_leave_nothing_behind() -> None:
    opinion = SecondOpinion()
    for first in AGREED.values():
        for second in AGREED.values():
            opinion.check(first, ours(first))
            opinion.check(second, ours(second))


@pytest.mark.parametrize("upgrades", [b"", UPGRADES], ids=["", "upgrade"])
@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        (b"", {"content_length": 5}),
        (b"", {"chunked": True}),
        (b"Content-Length: 5\r\n", {"content_length": 0}),
        (b"Transfer-Encoding: chunked\r\n", {"chunked": False}),
    ],
)
def test_who_differs_about_the_body_is_refused(fields: bytes, wrong: dict[str, Any], upgrades: bytes) -> None:
    raw = b"POST / HTTP/1.1\r\nHost: a\r\n" + fields + upgrades + b"\r\n"
    opinion = SecondOpinion()

    with pytest.raises(Reject, match="parsers differ about where the request ends") as refused:
        opinion.check(raw, ours(raw)._replace(**wrong))

    assert refused.value.status == 400
    opinion.check(WITHOUT_BODY, ours(WITHOUT_BODY))


@pytest.mark.parametrize(
    "raw",
    [
        b"GET /a HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /a HTTP/1.1\r\nHost: a\rb\r\n\r\n",
        b"POST /a HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"\x16\x03\x01",
    ],
)
def test_what_llhttp_refuses_is_refused_and_the_next_head_is_read_afresh(raw: bytes) -> None:
    opinion = SecondOpinion()

    with pytest.raises(Reject, match="the head is ambiguous") as refused:
        opinion.check(raw, ours(WITHOUT_BODY))

    assert refused.value.status == 400
    opinion.check(WITHOUT_BODY, ours(WITHOUT_BODY))
