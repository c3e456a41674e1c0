"""Reply heads: what is in them, what is not, and that a real parser reads them back."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import format_datetime, formatdate
from http import HTTPStatus

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core import replies
from headgate.core.replies import (
    AS_GIVEN,
    CHUNKED,
    OWN_HEADERS,
    has_body,
    http_date,
    reply_head,
    reply_head_with,
    reply_start,
)
from headgate.errors import ConfigError

DATE = b"Sun, 06 Nov 1994 08:49:37 GMT"
OURS = {b"date": DATE, b"x-request-id": b"id"}


def read(reply: bytes, method: str = "GET") -> tuple[int, bytes, dict[bytes, bytes], bytes]:
    """(status, phrase, fields, body) as an independent client reads them."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
    client.send(h11.EndOfMessage())
    client.receive_data(reply)
    head, body = client.next_event(), b""
    assert isinstance(head, h11.Response)
    while isinstance(event := client.next_event(), h11.Data):
        body += bytes(event.data)
    assert len(head.headers) == len(dict(head.headers))
    return head.status_code, bytes(head.reason), dict(head.headers), body


def test_a_plain_reply():
    assert reply_head(200, 2, 17, b"id", DATE, False, False) == (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 17\r\n"
        b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\nx-request-id: id\r\n\r\n"
    )


@pytest.mark.parametrize("code", range(OWN_HEADERS))
def test_each_content_type_has_its_code(code):
    for _ in range(2):  # made, then from the cache
        _, _, fields, _ = read(reply_head(200, code, 0, b"id", DATE, False, False))
        assert fields == {b"content-type": replies.CONTENT_TYPES[code], b"content-length": b"0", **OURS}


def test_a_code_beyond_the_content_types_brings_none():
    _, _, fields, _ = read(reply_head(200, OWN_HEADERS, 0, b"id", DATE, False, False))

    assert fields == {b"content-length": b"0", **OURS}


@pytest.mark.parametrize(
    ("close", "http10", "connection"),
    [(False, False, None), (True, False, b"close"), (False, True, b"keep-alive"), (True, True, b"close")],
)
def test_connection_is_said_when_it_is_not_understood(close, http10, connection):
    for head in (
        reply_head(200, 0, 0, b"id", DATE, close, http10),
        reply_head_with(200, b"", 0, b"id", DATE, close, http10),
    ):
        assert read(head)[2].get(b"connection") == connection


def test_an_ordinary_reply_is_its_start_the_id_and_an_empty_line():
    assert reply_head(200, 2, 17, b"id", DATE, False, False) == reply_start(200, 2, 17, DATE) + b"id\r\n\r\n"


@pytest.mark.parametrize(("status", "length"), [(204, None), (304, None), (205, b"0")])
def test_a_status_without_a_body_has_no_framing(status, length):
    own = b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\nETag: e\r\n"
    heads = [reply_head(status, 0, 5, b"id", DATE, False, False)]
    heads += [reply_head_with(status, own, size, b"id", DATE, False, False) for size in (5, CHUNKED)]

    for head in heads:
        _, _, fields, body = read(head)
        assert fields.get(b"content-length") == length
        assert b"transfer-encoding" not in fields
        assert b"content-type" not in fields
        assert body == b""


def test_has_body():
    assert has_body(200, "GET")
    assert has_body(404, "OPTIONS")
    assert not has_body(200, "HEAD")
    assert not any(has_body(status, "GET") for status in (204, 205, 304))


def test_a_reply_keeps_its_own_fields_but_not_those_that_frame_it():
    own = (
        b"Content-Type: text/html\r\nContent-Length: 99\r\nconnection: upgrade\r\nTRANSFER-ENCODING: gzip\r\n"
        b"Keep-Alive: 5\r\nDate: never\r\nX-Request-Id: forged\r\nX-Date: kept\r\n"
    )
    _, _, fields, body = read(reply_head_with(201, own, 2, b"id", DATE, False, False) + b"ok")

    assert fields == {b"content-type": b"text/html", b"x-date": b"kept", b"content-length": b"2", **OURS}
    assert body == b"ok"


def test_a_field_may_be_there_twice():
    head = reply_head_with(200, b"Set-Cookie: a\r\nSet-Cookie: b\r\n", 0, b"id", DATE, False, False)

    assert head.count(b"Set-Cookie: ") == 2


def test_a_chunked_reply():
    head = reply_head_with(200, b"", CHUNKED, b"id", DATE, False, False)
    stream = b"3\r\nhel\r\n" + b"28\r\n%b\r\n" % (b"lo" * 20) + replies.LAST_CHUNK
    _, _, fields, body = read(head + stream)

    assert fields == {b"transfer-encoding": b"chunked", **OURS}
    assert body == b"hel" + b"lo" * 20


def test_http10_gets_no_chunks_but_the_end_of_the_connection():
    _, _, fields, _ = read(reply_head_with(200, b"", CHUNKED, b"id", DATE, False, True))

    assert fields == {b"connection": b"close", **OURS}


@pytest.mark.parametrize(
    ("status", "own", "length"),
    [
        (200, b"A: b\r\ncontent-length: 42 \r\n", b"42"),
        (304, b"Content-Length:42\r\n", b"42"),
        (200, b"content-length: x\r\n", None),
        (200, b"", None),
        (204, b"content-length: 42\r\n", None),
    ],
)
def test_head_and_304_may_tell_the_length_that_get_would_have(status, own, length):
    head = reply_head_with(status, own, AS_GIVEN, b"id", DATE, False, False)
    _, _, fields, body = read(head, method="HEAD")

    assert fields.get(b"content-length") == length
    assert body == b""


@pytest.mark.parametrize(
    "block",
    [
        b"A: b\r\n\r\n", b"A: b\nC: d\r\n", b"A: b\rC: d\r\n", b"A: b",
        b"A : b\r\n", b"A: \0\r\n", b": b\r\n", b"A: b\r\n C: d\r\n",
    ],
)
def test_a_header_block_cannot_split_the_response(block):
    with pytest.raises(ConfigError, match="a response header has a name or value"):
        reply_head_with(200, block, 0, b"id", DATE, False, False)


@pytest.mark.parametrize("status", [-1, 0, 99, 101, 199, 1000])
def test_a_status_that_is_no_final_one_is_refused(status):
    with pytest.raises(ConfigError, match=f"from 200 to 999, got {status}"):
        reply_head(status, 0, 0, b"id", DATE, False, False)
    with pytest.raises(ConfigError):
        reply_head_with(status, b"", 0, b"id", DATE, False, False)


@pytest.mark.parametrize("status", [status for status in HTTPStatus if status >= 200])
def test_known_statuses_have_a_phrase(status):
    code, phrase, _, _ = read(reply_head(status.value, 0, 0, b"id", DATE, True, False), method="HEAD")

    assert code == status
    assert phrase


def test_an_unknown_status_has_an_empty_phrase_after_its_space():
    assert reply_head(799, 0, 0, b"id", DATE, False, False).startswith(b"HTTP/1.1 799 \r\n")


@pytest.mark.parametrize("year", [1970, 1999, 2000, 2004, 2026, 2100, 9999])
@pytest.mark.parametrize(("month", "day"), [(1, 1), (2, 28), (3, 1), (12, 31)])
def test_dates_at_the_edges_of_months_and_years(year, month, day):
    moment = datetime(year, month, day, 23, 59, 58, tzinfo=UTC)

    assert http_date(int(moment.timestamp())).decode() == format_datetime(moment, usegmt=True)


@given(st.integers(0, 253402300799))
def test_dates_are_those_of_the_calendar(seconds):
    assert http_date(seconds).decode() == formatdate(seconds, usegmt=True)
