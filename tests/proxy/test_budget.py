"""The budget of request bodies: bounded, and never a standstill."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headgate.proxy.budget import Budget


class FakeReader:
    paused = False

    def pause(self) -> None:
        assert not self.paused
        self.paused = True

    def resume(self) -> None:
        assert self.paused
        self.paused = False


def test_a_reader_waits_while_answered_requests_will_make_room() -> None:
    budget, one, two = Budget(100), FakeReader(), FakeReader()
    budget.add(one, 90)
    budget.complete(one)
    budget.add(two, 20)
    assert two.paused
    budget.release(one)
    assert not two.paused
    assert budget.held == 20


def test_half_received_bodies_do_not_wait_for_each_other_for_ever() -> None:
    budget, readers = Budget(100), [FakeReader() for _ in range(4)]
    for reader in readers:
        budget.add(reader, 40)
    assert [reader.paused for reader in readers] == [False, False, False, True]
    budget.add(readers[0], 1)
    budget.add(readers[1], 1)
    assert [reader.paused for reader in readers] == [True, True, False, True]
    budget.complete(readers[2])
    assert [reader.paused for reader in readers] == [True, True, False, True]
    budget.release(readers[2])
    assert [reader.paused for reader in readers].count(True) == 2


def test_a_reader_that_goes_makes_room() -> None:
    budget, readers = Budget(10), [FakeReader() for _ in range(3)]
    for reader in readers:
        budget.add(reader, 8)
    budget.release(readers[1])
    assert not readers[2].paused
    budget.release(readers[2])
    budget.release(readers[0])
    assert budget.held == 0


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from("rrrcx")), max_size=60))
def test_it_is_exceeded_by_one_body_at_most_and_somebody_always_goes_on(steps: list[tuple[int, str]]) -> None:
    budget, readers = Budget(100), [FakeReader() for _ in range(6)]
    received, complete = dict.fromkeys(readers, 0), set()
    for number, step in steps:
        reader = readers[number]
        if step == "r" and reader not in complete and not reader.paused and received[reader] < 50:
            received[reader] += 10
            budget.add(reader, 10)
        elif step == "c" and received[reader] and reader not in complete:
            complete.add(reader)
            budget.complete(reader)
        elif step == "x":
            received[reader] = 0
            complete.discard(reader)
            budget.release(reader)
        assert budget.held == sum(received.values()) <= 100 + 50 + 10 * len(readers)
        if not complete and any(received.values()):
            assert not all(reader.paused for reader in readers)
        if not any(received.values()):
            assert not any(reader.paused for reader in readers)


def test_it_is_full_while_more_is_held_than_should_be() -> None:
    budget, one, two = Budget(100), FakeReader(), FakeReader()
    budget.add(one, 100)
    assert not budget.full
    budget.add(two, 1)
    assert budget.full
    budget.release(one)
    assert not budget.full
