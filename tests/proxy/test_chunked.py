"""Chunked bodies, cut anywhere, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.http11 import Limits, Reject
from headgate.proxy.chunked import Chunked

LIMITS = Limits(max_body_bytes=1000, max_head_bytes=200)

VALID = {
    b"0\r\n\r\n": b"",
    b"3\r\nabc\r\n0\r\n\r\n": b"abc",
    b"00a\r\n0123456789\r\n000\r\n\r\n": b"0123456789",
    b"A\r\n0123456789\r\n0\r\n\r\n": b"0123456789",
    b'1;x\r\na\r\n1 ; y = "\\"; \\\\" ;z=1\r\nb\r\n0;last\r\nA: b\r\nC:\r\n\r\n': b"ab",
    b"2\r\n\r\n\r\n0\r\n\r\n": b"\r\n",
}


@pytest.mark.parametrize("stream", VALID)
def test_a_body_may_be_cut_anywhere_and_ends_where_it_ends(stream: bytes) -> None:
    rest = b"GET /"
    for cut in range(len(stream)):
        chunked = Chunked(LIMITS)
        assert chunked.take(stream[:cut]) == cut
        assert not chunked.done
        assert chunked.take(stream[cut:] + rest) == len(stream) - cut
        assert chunked.done
        assert bytes(chunked.body) == VALID[stream]
        assert chunked.take(rest) == 0


def refusal(chunked: Chunked, *pieces: bytes) -> int | None:
    """The status with which one of the pieces is refused."""
    try:
        for piece in pieces:
            chunked.take(piece)
    except Reject as reject:
        return reject.status
    return None


INVALID = {
    b"\r\n": 400,
    b"x\r\n": 400,
    b" 3\r\n": 400,
    b"3 \r\n": 400,
    b"+3\r\n": 400,
    b"0x3\r\n": 400,
    b"3_0\r\n": 400,
    b"3\n": 400,
    b"3\r\nabcd\r\n": 400,
    b"3\r\nabc\n": 400,
    b"3\r\nabc0\r\n": 400,
    b"3;\r\n": 400,
    b'3;a="\r\n': 400,
    b"3;a\x00\r\n": 400,
    b"3;a=b\rc\r\n": 400,
    b"3;" + b"a" * 2000: 400,
    b"ffffffffffffffff\r\n": 400,
    b"3e9\r\n": 413,
    b"3e8\r\n" + b"x" * 1000 + b"\r\n1\r\n": 413,
    b"0\r\nbad\r\n": 400,
    b"0\r\na : b\r\n": 400,
    b"0\r\na: b\r\nContent-Length: 5\r\n": 400,
    b"0\r\ntransfer-encoding: chunked\r\n": 400,
    b"0\r\nHOST: a\r\n": 400,
    b"0\r\n" + b"a: b\r\n" * 50: 431,
}


@pytest.mark.parametrize("stream", INVALID)
def test_what_is_malformed_is_refused_however_it_is_cut(stream: bytes) -> None:
    for cut in range(len(stream)):
        chunked = Chunked(LIMITS)
        assert refusal(chunked, stream[:cut], stream[cut:]) == INVALID[stream]


def test_framing_without_end_is_refused() -> None:
    chunked = Chunked(Limits())
    assert refusal(chunked, *[b"1;" + b"a" * 1000 + b"\r\nx\r\n"] * 1000) == 413


@given(st.lists(st.binary(min_size=1, max_size=50)), st.lists(st.integers(1, 20), min_size=1))
def test_any_chunks_in_any_pieces_give_the_body(parts: list[bytes], sizes: list[int]) -> None:
    stream = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    chunked, at, turn = Chunked(Limits()), 0, 0
    while at < len(stream):
        piece = stream[at : at + sizes[turn % len(sizes)]]
        assert chunked.take(piece) == len(piece)
        at, turn = at + len(piece), turn + 1
    assert chunked.done
    assert bytes(chunked.body) == b"".join(parts)
