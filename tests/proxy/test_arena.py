"""The arena's allocator: no two segments overlap, and what is freed can be had again."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.wire.arena import SMALLEST_BYTES, Arena, Segments

MIB = 1 << 20


def test_a_segment_is_as_large_as_asked_and_starts_where_nobody_else_is() -> None:
    segments = Segments(MIB)
    assert [segments.take(size) for size in (1, 65536, 65537, 300_000)] == [0, 65536, 131072, 524288]
    assert segments.taken == 65536 * 2 + 131072 + 524288


def test_more_than_there_is_cannot_be_had() -> None:
    segments = Segments(MIB)
    assert segments.take(MIB + 1) is None
    assert segments.take(MIB) == 0
    assert segments.take(1) is None


def test_a_segment_is_freed_once() -> None:
    segments = Segments(MIB)
    segments.free(segments.take(5) or 0)
    with pytest.raises(KeyError):
        segments.free(0)


@pytest.mark.parametrize("size", [0, 1000, SMALLEST_BYTES // 2, SMALLEST_BYTES * 3])
def test_an_arena_is_a_power_of_two(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        Segments(size)


@given(st.integers(0, 2**32))
def test_segments_never_overlap_and_all_come_back(seed: int) -> None:
    dice = random.Random(seed)
    segments = Segments(4 * MIB)
    taken: dict[int, int] = {}
    for _ in range(100):
        if taken and dice.random() < 0.5:
            offset = dice.choice(list(taken))
            segments.free(offset)
            del taken[offset]
            continue
        size = dice.randrange(1, 2 * MIB)
        offset = segments.take(size)
        if offset is not None:
            assert offset + size <= segments.size
            assert all(offset + size <= other or other + end <= offset for other, end in taken.items())
            taken[offset] = size
    for offset in taken:
        segments.free(offset)
    assert segments.taken == 0
    assert segments.take(4 * MIB) == 0


def test_what_was_not_needed_lately_is_given_back_once() -> None:
    segments = Segments(4 * MIB)
    large, small = segments.take(2 * MIB), segments.take(1)
    assert (large, small) == (0, 2 * MIB)
    segments.free(2 * MIB)
    assert segments.trim() is None
    segments.free(0)
    assert segments.trim() == (2 * MIB, 2 * MIB + SMALLEST_BYTES)
    assert segments.trim() == (0, 2 * MIB)
    assert segments.trim() is None


def test_the_memory_is_shared_bounded_and_can_be_given_back() -> None:
    arena = Arena(3 * MIB)
    assert len(arena.view) == 2 * MIB
    offset = arena.take(MIB)
    assert offset is not None
    arena.view[offset : offset + 4] = b"abcd"
    arena.free(offset)
    for _ in range(3):
        arena.trim()
    assert bytes(arena.view[offset : offset + 4]) == b"\0\0\0\0"
    os.close(arena.fd)
