"""What is lent: what is large enough, and to clients only so much at a time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headgate.core.lending import (
    MOST_BYTES,
    SMALLEST_ANSWER_BYTES,
    SMALLEST_BYTES,
    lends_answer,
    lends_value,
)
from headgate.core.spares import MOST

KIB = 1 << 10


def test_a_value_is_lent_if_it_is_large_however_much_is_lent_already() -> None:
    assert [lends_value(size, 0, 0) for size in (0, SMALLEST_BYTES - 1, SMALLEST_BYTES)] == [False, False, True]
    assert lends_value(SMALLEST_BYTES, lent=1 << 40, count=1000)


def test_an_answer_is_lent_if_it_is_large() -> None:
    assert [lends_answer(size, 0, 0) for size in (0, 64 * KIB - 1, 64 * KIB)] == [False, False, True]


def test_what_is_lent_to_clients_has_an_end_in_bytes_and_in_pieces() -> None:
    assert lends_answer(MOST_BYTES, lent=0, count=0)
    assert not lends_answer(MOST_BYTES + 1, lent=0, count=0)
    assert not lends_answer(100 * KIB, lent=MOST_BYTES - 99 * KIB, count=1)
    assert lends_answer(100 * KIB, lent=MOST_BYTES - 100 * KIB, count=MOST - 1)
    assert not lends_answer(100 * KIB, lent=0, count=MOST)


@given(st.lists(st.integers(0, MOST_BYTES)))
def test_however_answers_come_no_more_is_lent_than_may_be(sizes: list[int]) -> None:
    lent = [0]
    for size in sizes:
        if lends_answer(size, sum(lent), len(lent) - 1):
            assert size >= SMALLEST_ANSWER_BYTES
            lent.append(size)
    assert sum(lent) <= MOST_BYTES
    assert len(lent) - 1 <= MOST
