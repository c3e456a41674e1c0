"""Traffic policies: shares, shard keys, shadows."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from hashlib import sha256
from random import Random
from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headgate.core.state import Traffic
from headgate.core.traffic import (
    check_proportion,
    check_weights,
    choose,
    shadows,
    sole,
    uses,
    with_shadow,
    with_weights,
)
from headgate.errors import ArgumentError, ConfigError

KNOWN = {"a", "b", "c"}
CHANCES = st.floats(0.0, 1.0, exclude_max=True)


@st.composite
def policies(draw: st.DrawFn) -> Traffic:
    """Any split over one to five backends, some of them with weight 0."""
    parts = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=5).filter(any))
    return Traffic(weights=tuple((f"b{n}", part / sum(parts)) for n, part in enumerate(parts)))


# --- checks -------------------------------------------------------------------------------


def test_weights_come_back_as_pairs_in_the_order_given() -> None:
    assert check_weights("e", {"b": 0.25, "a": 0.75}, KNOWN) == (("b", 0.25), ("a", 0.75))
    assert check_weights("e", {"a": 1, "b": 0}, KNOWN) == (("a", 1.0), ("b", 0.0))


def test_numbers_of_other_libraries_are_numbers() -> None:
    given = {"a": numpy.float32(0.5), "b": Fraction(1, 2), "c": numpy.int64(0)}
    checked = check_weights("e", given, KNOWN)
    assert checked == (("a", 0.5), ("b", 0.5), ("c", 0.0))
    assert {type(share) for _, share in checked} == {float}


@pytest.mark.parametrize("off", [0.0, 1e-6, -1e-6, 5e-7, 1e-12])
def test_a_sum_may_be_off_by_a_millionth(off: float) -> None:
    check_weights("e", {"a": 0.5, "b": 0.5 + off}, KNOWN)


def test_ten_tenths_are_one() -> None:
    tags = [f"t{n}" for n in range(10)]
    check_weights("e", dict.fromkeys(tags, 0.1), tags)


@pytest.mark.parametrize(
    ("weights", "why"),
    [
        ({}, "traffic of endpoint 'e' is empty"),
        ({"a": 0.5, "x": 0.5}, "backend 'x' is not registered"),
        ({"a": 1.0, "x": 0.0}, "backend 'x' is not registered"),
        ({5: 1.0}, "backend 5 is not registered"),
        ({"a": 1.5, "b": -0.5}, "weight of backend 'b' must be a number >= 0, got -0.5"),
        ({"a": "1"}, "weight of backend 'a' must be a number >= 0, got '1'"),
        ({"a": None}, "must be a number >= 0"),
        ({"a": True}, "must be a number >= 0"),
        ({"a": 1j}, "must be a number >= 0"),
        ({"a": float("nan")}, "must be a number >= 0"),
        ({"a": float("inf")}, "must be a number >= 0"),
        ({"a": 10**400}, "must be a number >= 0"),
        ({"a": 0.5}, "weights must sum to 1, got 0.5"),
        ({"a": 0.5, "b": 0.500002}, "weights must sum to 1, got 1.000002"),
        ({"a": 0.5, "b": 0.499998}, "weights must sum to 1, got 0.999998"),
        ({"a": 0}, "weights must sum to 1, got 0"),
    ],
)
def test_a_bad_split_is_a_value_error_that_says_why(weights: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        check_weights("e", weights, KNOWN)


@pytest.mark.parametrize("weights", [None, "a", ["a"], [("a", 1.0)], 1.0])
def test_a_split_that_is_no_dict_is_a_type_error(weights: object) -> None:
    with pytest.raises(ArgumentError, match="must be a dict of backend tag -> weight, got"):
        check_weights("e", weights, KNOWN)


@pytest.mark.parametrize("proportion", [0, 1, 0.0, 0.5, 1.0, numpy.float32(0.25), Fraction(1, 3)])
def test_a_proportion_between_none_and_all_is_accepted(proportion: Any) -> None:
    assert check_proportion(proportion) == float(proportion)


@pytest.mark.parametrize("proportion", [-0.1, 1.1, "0.5", None, True, False, [], float("nan"), 10**400])
def test_any_other_proportion_is_a_type_error(proportion: object) -> None:
    with pytest.raises(ArgumentError, match=r"proportion must be a number in \[0, 1\], got"):
        check_proportion(proportion)


# --- the choice ---------------------------------------------------------------------------


def test_a_single_backend_gets_all() -> None:
    only = Traffic(weights=(("a", 1.0),))
    assert choose(only, 0.0) == choose(only, 0.999, "key") == "a"


def test_the_shares_meet_where_one_ends_and_the_next_begins() -> None:
    half = Traffic(weights=(("a", 0.5), ("b", 0.5)))
    assert [choose(half, chance) for chance in (0.0, 0.4999999, 0.5, 0.9999999)] == ["a", "a", "b", "b"]


@settings(max_examples=300)
@given(policies(), CHANCES, st.none() | st.text())
def test_a_backend_without_weight_is_never_chosen(policy: Traffic, chance: float, key: str | None) -> None:
    assert dict(policy.weights)[choose(policy, chance, key)] > 0.0


@pytest.mark.parametrize("zero_at", [0, 1, 2])
def test_nor_where_the_sum_is_a_little_below_one(zero_at: int) -> None:
    weights = [("b", 0.4999999), ("c", 0.4999999)]
    weights.insert(zero_at, ("a", 0.0))
    assert choose(Traffic(weights=tuple(weights)), 0.9999999999) == "c"


def test_each_backend_gets_its_share() -> None:
    policy, random = Traffic(weights=(("a", 0.1), ("b", 0.6), ("c", 0.3))), Random(1)
    counts = Counter(choose(policy, random.random()) for _ in range(20_000))
    for tag, share in policy.weights:  # five standard deviations
        assert abs(counts[tag] / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


def test_shard_keys_spread_over_the_backends_by_their_shares() -> None:
    policy = Traffic(weights=(("a", 0.1), ("b", 0.6), ("c", 0.3)))
    counts = Counter(choose(policy, 0.0, f"user-{n}") for n in range(20_000))
    for tag, share in policy.weights:
        assert abs(counts[tag] / 20_000 - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


@given(policies(), CHANCES, CHANCES, st.text(st.characters()), st.randoms(use_true_random=False))
def test_a_shard_key_decides_alone(
    policy: Traffic, one: float, other: float, key: str, random: Random
) -> None:
    shuffled = random.sample(policy.weights, len(policy.weights))
    again = with_weights(policy, tuple(shuffled))
    assert choose(policy, one, key) == choose(again, other, key)


def test_a_shard_key_means_the_same_in_every_version_and_process() -> None:
    """Literal, so that a change of the rule, which would move every user's key, is seen."""
    policy = Traffic(weights=(("a", 0.25), ("b", 0.25), ("c", 0.25), ("d", 0.25)))
    keys = ["", "alice", "bob", "carol", "é", "\udcff"]
    quarters = ["abcd"[sha256(key.encode("utf-8", "surrogatepass")).digest()[0] // 64] for key in keys]
    assert [choose(policy, 0.0, key) for key in keys] == quarters
    assert quarters[1:3] == ["a", "c"]


def test_an_empty_shard_key_is_a_key() -> None:
    policy = Traffic(weights=(("a", 0.5), ("b", 0.5)))
    assert choose(policy, 0.0, "") == choose(policy, 0.9, "")


def test_one_backend_without_shadows_gets_every_request() -> None:
    alone = Traffic(weights=(("a", 1.0),))

    assert sole(alone) == "a"
    assert sole(with_weights(alone, (("a", 1.0), ("b", 0.0)))) == ""
    assert sole(with_shadow(alone, "b", 0.1)) == ""


# --- shadows --------------------------------------------------------------------------------


def test_each_shadow_has_a_chance_of_its_own() -> None:
    policy = Traffic(weights=(("a", 1.0),), shadows=(("b", 0.5), ("c", 0.5), ("d", 1.0)))
    chances = iter([0.7, 0.2, 0.999999])
    assert shadows(policy, lambda: next(chances)) == ["c", "d"]
    assert list(chances) == []


def test_without_shadows_no_chance_is_asked_for() -> None:
    def never() -> float:
        raise AssertionError

    assert shadows(Traffic(weights=(("a", 1.0),)), never) == []


# --- changes ----------------------------------------------------------------------------------


def test_a_new_split_keeps_the_shadows() -> None:
    policy = Traffic(weights=(("a", 1.0),), shadows=(("b", 0.5),))
    assert with_weights(policy, (("c", 1.0),)) == Traffic(weights=(("c", 1.0),), shadows=(("b", 0.5),))


def test_a_shadow_is_added_changed_in_its_place_and_removed() -> None:
    policy = with_shadow(with_shadow(Traffic(weights=(("a", 1.0),)), "b", 0.5), "c", 1.0)
    assert policy.shadows == (("b", 0.5), ("c", 1.0))
    assert with_shadow(policy, "b", 0.1).shadows == (("b", 0.1), ("c", 1.0))
    assert with_shadow(policy, "b", 0.0).shadows == (("c", 1.0),)
    assert with_shadow(policy, "unknown", 0.0) == policy
    assert policy.weights == (("a", 1.0),)


def test_a_policy_uses_also_what_has_weight_0_and_what_is_a_shadow() -> None:
    policy = Traffic(weights=(("a", 1.0), ("b", 0.0)), shadows=(("a", 0.5), ("c", 0.5)))
    assert uses(policy) == {"a", "b", "c"}
