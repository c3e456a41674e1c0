from math import inf
from typing import NamedTuple

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headgate.core.waiting import Waiting


class Request(NamedTuple):
    order: int
    deadline: float = inf


def queued(*orders):
    waiting = Waiting()
    for order in orders:
        assert waiting.push(Request(order))
    return waiting


def drained(waiting):
    return [waiting.pop().order for _ in range(len(waiting))]


def test_the_oldest_request_leaves_first():
    assert drained(queued(1, 2, 3)) == [1, 2, 3]


def test_the_oldest_can_be_looked_at_and_stays():
    waiting = queued(2, 3)
    assert waiting.oldest == Request(2)
    waiting.push_front(Request(1))
    assert waiting.oldest == Request(1)
    assert drained(waiting) == [1, 2, 3]


def test_a_request_beyond_the_limit_is_not_queued():
    waiting = queued(1, 2)

    assert not waiting.push(Request(3), limit=2)
    assert waiting.push(Request(4), limit=3)
    assert drained(waiting) == [1, 2, 4]


def test_the_newest_request_can_be_taken_too():
    waiting = queued(3, 4)
    waiting.push_front(Request(1))
    waiting.push_front(Request(2))

    assert [waiting.pop_newest().order for _ in range(4)] == [4, 3, 2, 1]
    with pytest.raises(KeyError):
        waiting.pop_newest()


def test_with_a_limit_of_nought_nothing_waits():
    assert not Waiting().push(Request(1), limit=0)


def test_refused_requests_go_before_newer_ones_in_whatever_order_the_refusals_come():
    waiting = queued(5, 6)
    for order in (3, 1, 2):
        waiting.push_front(Request(order))

    assert drained(waiting) == [1, 2, 3, 5, 6]


def test_a_refused_request_is_queued_again_also_when_the_queue_is_full():
    waiting = queued(2)
    waiting.push_front(Request(1))

    assert not waiting.push(Request(3), limit=2)
    assert len(waiting) == 2


def test_a_request_can_be_taken_out_wherever_it_waits():
    waiting = queued(2, 3)
    waiting.push_front(Request(1))

    assert waiting.remove(Request(1))
    assert waiting.remove(Request(2))
    assert not waiting.remove(Request(2))
    assert drained(waiting) == [3]


def test_from_an_empty_queue_nothing_can_be_popped():
    with pytest.raises(KeyError):
        Waiting().pop()


class AgainstAList(RuleBasedStateMachine):
    """The same, told by one sorted list; what was popped may come back."""

    def __init__(self):
        super().__init__()
        self.made = 0
        self.model, self.under_way = [], []
        self.waiting = Waiting()

    @rule(limit=st.sampled_from([None, 0, 3]))
    def push(self, limit):
        self.made += 1
        request = Request(self.made)
        assert self.waiting.push(request, limit) == (limit is None or len(self.model) < limit)
        if limit is None or len(self.model) < limit:
            self.model.append(request)

    @precondition(lambda self: self.model)
    @rule()
    def pop(self):
        assert self.waiting.oldest == self.model[0]
        request = self.waiting.pop()
        assert request == self.model.pop(0)
        self.under_way.append(request)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def push_front(self, data):
        request = data.draw(st.sampled_from(self.under_way))
        self.under_way.remove(request)
        self.waiting.push_front(request)
        self.model = sorted([*self.model, request])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        request = data.draw(st.sampled_from(self.model))
        self.model.remove(request)
        assert self.waiting.remove(request)

    @invariant()
    def both_hold_as_many(self):
        assert len(self.waiting) == len(self.model)


TestAgainstAList = AgainstAList.TestCase
