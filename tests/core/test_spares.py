"""Which free memory is kept: never more than may be, never for long, and what fits best is used first."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.spares import MOST, ROOMY, Spares, capacity

MIB = 1 << 20


@given(st.integers(0, 2**40))
def test_a_piece_has_room_for_its_value_and_little_more(size: int) -> None:
    room = capacity(size)
    assert room >= size
    assert room % MIB == 0
    assert room - size <= max(MIB, size // 4 + 1)


def test_pieces_are_of_whole_mib_a_quarter_larger_at_most() -> None:
    assert [capacity(1), capacity(MIB), capacity(100_000_200)] == [MIB, MIB, 96 * MIB]


def test_the_smallest_that_fits_is_taken_and_none_that_is_far_too_large() -> None:
    spares = Spares(10_000 * MIB, 5.0)
    for number, size in enumerate((100, 400, 200)):
        assert spares.put(number, size * MIB, now=0.0) == []
    assert spares.take(400 * MIB + 1) is None
    assert spares.take(150 * MIB) == 2
    assert spares.take(400 * MIB // ROOMY) == 0
    assert spares.take(400 * MIB // ROOMY) == 1
    assert not len(spares)
    spares.put(3, 400 * MIB, now=0.0)
    assert spares.take(400 * MIB // ROOMY - 1) is None


def test_a_piece_of_the_smallest_is_never_far_too_large() -> None:
    spares = Spares(10 * MIB, 5.0)
    spares.put(1, MIB, now=0.0)
    assert spares.take(1) == 1


def test_a_certain_piece_can_be_taken_once() -> None:
    spares = Spares(10 * MIB, 5.0)
    for number in range(3):
        spares.put(number, MIB, now=float(number))
    assert [spares.pick(1), spares.pick(1), spares.pick(7)] == [True, False, False]
    assert spares.held == 2 * MIB
    assert [spares.take(MIB), spares.take(MIB), spares.take(MIB)] == [2, 0, None]


def test_of_the_same_size_the_one_used_last_is_taken() -> None:
    spares = Spares(10_000, 5.0)
    for number in range(3):
        spares.put(number, 100, now=float(number))
    assert [spares.take(100) for _ in range(4)] == [2, 1, 0, None]


def test_beyond_the_limits_the_oldest_is_given_back() -> None:
    spares = Spares(250, 5.0)
    assert [spares.put(number, 100, now=0.0) for number in range(4)] == [[], [], [0], [1]]
    assert spares.held == 200
    assert spares.put(9, 300, now=0.0) == [2, 3, 9]
    assert spares.held == 0
    dropped = [spares.put(number, 1, now=0.0) for number in range(MOST + 1)]
    assert dropped[-1] == [0]


def test_what_nobody_needed_for_a_while_is_given_back() -> None:
    spares = Spares(10_000, 5.0)
    spares.put(1, 100, now=0.0)
    spares.put(2, 100, now=3.0)
    assert spares.late(now=4.9) == []
    assert spares.late(now=5.0) == [1]
    assert spares.late(now=8.0) == [2]
    assert spares.held == 0


def test_all_may_be_given_back_at_once() -> None:
    spares = Spares(10_000, 5.0)
    spares.put(1, 100, now=0.0)
    spares.put(2, 100, now=0.0)
    assert spares.clear() == [1, 2]
    assert spares.held == 0
    assert spares.take(100) is None


@pytest.mark.parametrize("seed", range(20))
def test_each_piece_is_kept_taken_or_given_back_once_and_the_limit_holds(seed: int) -> None:
    dice = random.Random(seed)
    spares = Spares(1000, 5.0)
    kept: dict[int, int] = {}
    for number in range(200):
        now = number * 0.5
        if dice.random() < 0.6:
            kept[number] = dice.randrange(1, 400)
            gone = spares.put(number, kept[number], now)
        else:
            taken = spares.take(dice.randrange(1, 400))
            gone = [] if taken is None else [taken]
        for each in (*gone, *spares.late(now)):
            del kept[each]
        assert spares.held == sum(kept.values()) <= 1000
