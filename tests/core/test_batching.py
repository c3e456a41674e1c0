import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from headgate.core.batching import Batcher


def filled(items, *, size=3, wait_s=60.0, key="", now=0.0):
    batcher = Batcher(max_batch_size=size, batch_wait_timeout_s=wait_s)
    for item in items:
        batcher.add(item, now=now, key=key)
    return batcher


def test_nothing_waits_in_a_new_batcher():
    batcher = filled("")

    assert len(batcher) == 0
    assert batcher.take(now=1e9) == []
    assert batcher.next_deadline() is None


def test_a_full_batch_does_not_wait():
    batcher = filled("abcd")

    assert batcher.next_deadline() <= 0.0
    assert batcher.take(now=0.0) == ["a", "b", "c"]
    assert batcher.take(now=0.0) == []  # "d" waits for company
    assert len(batcher) == 1


def test_the_oldest_request_never_waits_longer_than_the_timeout():
    batcher = filled("a", wait_s=0.010, now=5.0)
    batcher.add("b", now=5.009)

    assert batcher.take(now=5.0099) == []
    assert batcher.take(now=batcher.next_deadline()) == ["a", "b"]


def test_with_no_timeout_a_batch_is_whatever_is_there():
    batcher = filled("ab", wait_s=0.0)

    assert batcher.take(now=0.0) == ["a", "b"]


def test_the_wait_counts_from_the_arrival_also_after_an_earlier_batch_left():
    batcher = filled("abcd", size=3, wait_s=1.0, now=7.0)
    batcher.take(now=7.9)

    assert batcher.next_deadline() == 8.0
    assert batcher.take(now=8.0) == ["d"]


def test_a_batch_calls_one_method_only():
    batcher = filled("ab", wait_s=0.0, key="predict")
    batcher.add("x", now=0.0, key="explain")
    batcher.add("c", now=0.0, key="predict")

    assert batcher.take(now=0.0) == ["a", "b", "c"]
    assert batcher.take(now=0.0) == ["x"]


def test_a_full_batch_goes_before_an_older_request_that_may_still_wait():
    batcher = filled("x", key="explain", now=0.0)
    for item in "abc":
        batcher.add(item, now=1.0, key="predict")

    assert batcher.take(now=1.0) == ["a", "b", "c"]
    assert batcher.next_deadline() == 60.0


@pytest.mark.parametrize("first", ["predict", "explain"])
def test_of_two_methods_that_are_due_the_one_with_the_oldest_request_goes_first(first):
    second = {"predict": "explain", "explain": "predict"}[first]
    batcher = filled("ab", size=2, key="predict", wait_s=0.0)  # both keys are known, in this order
    batcher.add("x", now=0.0, key="explain")
    batcher.add("c", now=0.0, key="predict")
    batcher.take(now=0.0), batcher.remove("x"), batcher.remove("c")
    batcher.add("first", now=2.0, key=first)
    batcher.add("second", now=2.0, key=second)

    assert [batcher.take(now=2.0), batcher.take(now=2.0)] == [["first"], ["second"]]


def test_a_full_batch_may_be_taken_before_its_time_if_nobody_else_could_come_first():
    batcher = filled("abcd", size=3)
    assert batcher.take_full() == ["a", "b", "c"]
    assert batcher.take_full() == []  # "d" may get company yet
    assert len(batcher) == 1

    two = filled("abc", size=3, key="predict")
    two.add("x", now=0.0, key="explain")
    assert two.take_full() == []
    assert filled("").take_full() == []


def test_a_request_can_be_taken_out():
    batcher = filled("abcd")

    assert batcher.remove("b")
    assert not batcher.remove("b")
    assert len(batcher) == 3
    assert batcher.take(now=0.0) == ["a", "c", "d"]
    assert not batcher.remove("a")


def test_when_the_oldest_is_taken_out_the_next_one_sets_the_deadline():
    batcher = filled("a", wait_s=1.0, now=0.0)
    batcher.add("b", now=0.5)
    batcher.remove("a")

    assert batcher.next_deadline() == 1.5


def test_new_limits_hold_for_those_who_wait_already():
    batcher = filled("abcd", size=10)
    batcher.configure(max_batch_size=3, batch_wait_timeout_s=5.0)

    assert batcher.take(now=0.0) == ["a", "b", "c"]
    assert batcher.next_deadline() == 5.0


class AgainstAList(RuleBasedStateMachine):
    """The same, told by one list of (arrival, key, item)."""

    def __init__(self):
        super().__init__()
        self.now, self.made, self.model = 0.0, 0, []
        self.size, self.wait_s = 3, 1.0
        self.batcher = Batcher(self.size, self.wait_s)

    @rule(key=st.sampled_from("abc"))
    def add(self, key):
        self.made += 1
        self.batcher.add(self.made, self.now, key)
        self.model.append((self.now, key, self.made))

    @rule(seconds=st.floats(0, 2))
    def wait(self, seconds):
        self.now += seconds

    @rule(size=st.integers(1, 4), wait_s=st.sampled_from([0.0, 0.3, 1.0]))
    def configure(self, size, wait_s):
        self.size, self.wait_s = size, wait_s
        self.batcher.configure(size, wait_s)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def remove(self, data):
        gone = data.draw(st.sampled_from(self.model))
        self.model.remove(gone)
        assert self.batcher.remove(gone[2])

    @rule()
    def take(self):
        due = []
        for arrived, key, _ in self.model:
            same = [item for _, other, item in self.model if other == key]
            if len(same) >= self.size or arrived + self.wait_s <= self.now:
                due = same[: self.size]
                break
        assert self.batcher.take(self.now) == due
        self.model = [entry for entry in self.model if entry[2] not in due]

    @precondition(lambda self: self.model)
    @rule()
    def sleep_until_the_deadline(self):
        self.now = max(self.now, self.batcher.next_deadline())
        batch = self.batcher.take(self.now)
        assert 1 <= len(batch) <= self.size
        self.model = [entry for entry in self.model if entry[2] not in batch]

    @invariant()
    def both_hold_as_many(self):
        assert len(self.batcher) == len(self.model)


TestAgainstAList = AgainstAList.TestCase


@given(arrivals=st.lists(st.floats(0, 1e6), min_size=1, max_size=20), wait_s=st.floats(0, 1e3))
def test_sleeping_until_the_deadline_is_never_a_moment_too_short(arrivals, wait_s):
    batcher = Batcher(1000, wait_s)
    for item, now in enumerate(sorted(arrivals)):
        batcher.add(item, now)

    assert batcher.take(batcher.next_deadline())[0] == 0
