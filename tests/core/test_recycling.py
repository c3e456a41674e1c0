"""When a replica has had enough."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.recycling import SPREAD, is_too_low, last_request, worn
from headgate.core.state import Settings

REQUESTS = Settings(max_requests=1000)
MEMORY = Settings(max_rss_bytes=500)


@pytest.mark.parametrize(
    ("limit", "spread", "last"),
    [(None, 0.5, 0), (1, 0.99, 1), (10, 0.0, 10), (10, 0.999, 10), (1000, 0.5, 1050), (1000, 0.999, 1099)],
)
def test_each_replica_has_its_own_last_request(limit: int | None, spread: float, last: int) -> None:
    assert last_request(limit, spread) == last


@given(st.integers(1, 10**9), st.floats(0.0, 1.0, exclude_max=True))
def test_it_is_never_before_the_limit_and_never_late(limit: int, spread: float) -> None:
    assert limit <= last_request(limit, spread) <= limit * (1 + SPREAD)


@pytest.mark.parametrize(
    ("settings", "served", "rss", "first", "reason"),
    [
        (Settings(), 10**9, 10**12, 0, ""),
        (REQUESTS, 999, 10**12, 0, ""),
        (REQUESTS, 1000, 0, 0, "it has served 1000 requests (max_requests = 1000)"),
        (MEMORY, 10**9, 500, 400, ""),
        (MEMORY, 0, 501, 400, "it takes 501 bytes of memory (max_rss_bytes = 500)"),
        (MEMORY, 0, 900, 501, ""),  # a new one would be no better
    ],
)
def test_why_a_replica_is_replaced(settings: Settings, served: int, rss: int, first: int, reason: str) -> None:
    assert worn(settings, served, rss, first, 0.0) == reason


def test_a_spread_counts_for_requests() -> None:
    assert worn(REQUESTS, 1049, 0, 0, 0.5) == ""
    assert worn(REQUESTS, 1050, 0, 0, 0.5) != ""


def test_a_limit_below_what_a_new_replica_takes_is_too_low() -> None:
    assert [is_too_low(MEMORY, first) for first in (499, 500, 501)] == [False, False, True]
    assert not is_too_low(Settings(), 10**12)
