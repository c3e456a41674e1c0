"""The retry budget: how many go again at one time, who is next, and that nobody is refused."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.retries import Retries, allowed


@dataclass(eq=False)
class Request:
    order: int
    retrying: bool = False


@pytest.mark.parametrize(
    ("active", "most"), [(0, 3), (1, 3), (15, 3), (19, 3), (20, 4), (100, 20), (104, 20), (105, 21)]
)
def test_a_fifth_of_what_is_active_may_be_retries_and_always_three(active: int, most: int) -> None:
    assert allowed(active) == most


def test_the_oldest_goes_first_however_they_came() -> None:
    retries: Retries[Request] = Retries()
    for order in (5, 2, 9, 1):
        retries.add(Request(order))
    assert [retries.take().order for _ in range(3)] == [1, 2, 5]
    assert [one.order for one in retries.waiting] == [9]


def test_beyond_the_budget_they_wait_until_one_has_its_answer() -> None:
    retries: Retries[Request] = Retries()
    for order in range(5):
        retries.add(Request(order))
    assert retries.room(active=5) == 3
    under_way = [retries.take() for _ in range(3)]
    for one in under_way:
        one.retrying = True
    assert retries.room(active=5) == 0
    under_way[1].retrying = False
    assert retries.room(active=5) == 1


def test_a_budget_that_shrinks_lets_nobody_go() -> None:
    retries: Retries[Request] = Retries()
    for order in range(30):
        retries.add(Request(order))
    for _ in range(retries.room(active=100)):
        retries.take().retrying = True
    assert retries.room(active=10) == 0


def test_there_is_no_room_for_nobody() -> None:
    assert Retries[Request]().room(active=100) == 0


def test_nobody_is_kept_beyond_the_answer_though_nobody_waits() -> None:
    retries: Retries[Request] = Retries()
    one, other = Request(1), Request(2)
    known = weakref.ref(one)
    under_way = retries.under_way
    for request in (one, other):
        retries.add(request)
    for _ in range(retries.room(active=2)):
        retries.take().retrying = True
    del request
    assert under_way == [one, other]
    one.retrying = False
    del one
    assert retries.room(active=1) == 0
    assert known() is None
    assert under_way is retries.under_way
    assert under_way == [other]


def test_one_that_loses_its_replica_again_counts_once() -> None:
    retries: Retries[Request] = Retries()
    one = Request(1)
    for _ in range(2):
        one.retrying = False
        retries.add(one)
        assert retries.room(active=1) == 1
        assert retries.take() is one
        one.retrying = True
    for order in range(2, 6):
        retries.add(Request(order))
    assert retries.room(active=5) == 2


def test_who_does_not_wait_any_more_is_taken_out() -> None:
    retries: Retries[Request] = Retries()
    one, other = Request(1), Request(2)
    retries.add(one)
    assert retries.remove(one)
    assert not retries.remove(one)
    retries.add(other)
    line = retries.waiting
    assert retries.clear() == [other]
    assert retries.waiting == []
    assert retries.waiting is line


@given(st.lists(st.sampled_from(["lose", "answer", "arrive", "go"]), max_size=200))
def test_never_more_than_allowed_go_and_all_go_in_the_end(steps: list[str]) -> None:
    retries: Retries[Request] = Retries()
    first: list[Request] = []  # in flight, for the first time
    again: list[Request] = []

    def go() -> None:
        active = len(first) + len(again) + len(retries.waiting)
        for _ in range(retries.room(active)):
            one = retries.take()
            one.retrying = True
            again.append(one)
        assert len(again) <= max(allowed(active), before)

    for number, step in enumerate(steps):
        before = len(again)
        if step == "arrive":
            first.append(Request(number))
        elif step == "lose" and (first or again):
            lost = (again or first).pop()
            lost.retrying = False
            retries.add(lost)
        elif step == "answer" and (first or again):
            (again or first).pop(0).retrying = False
        else:
            go()
    while retries.waiting:
        before = len(again)
        go()
        again.pop(0).retrying = False
