"""When the loop lends a link to the plain thread, and when it takes it back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from headgate.core.leading import AFTER_OTHER_S, AFTER_SLOW_S, LEND, REST, TAKE_BACK, Leading


def test_what_runs_at_two_looks_in_turn_takes_long() -> None:
    leading = Leading()
    assert [leading.look(call, 1) for call in ("a", "b", None, "b", "b")] == [LEND] * 4 + [TAKE_BACK]


def test_it_is_not_lent_again_at_once() -> None:
    leading = Leading()
    assert leading.may_lend(0.0)
    leading.taken_back(10.0, is_slow=True)
    assert not leading.may_lend(10.0 + 0.99 * AFTER_SLOW_S)
    assert leading.may_lend(10.0 + AFTER_SLOW_S)
    leading.taken_back(20.0, is_slow=False)
    assert not leading.may_lend(20.0 + 0.99 * AFTER_OTHER_S)
    assert leading.may_lend(20.0 + AFTER_OTHER_S)


def test_a_call_that_ran_before_it_was_taken_back_is_not_remembered() -> None:
    leading = Leading()
    leading.look("a", 1)
    leading.taken_back(0.0, is_slow=True)
    assert leading.look("a", 2) == LEND


def test_looks_end_when_no_calls_come_and_begin_anew() -> None:
    leading = Leading()
    looks = [leading.look(None, 7) for _ in range(200)]
    at = looks.index(REST)
    assert 50 <= at <= 150
    assert set(looks[:at]) == {LEND}
    leading.begin()
    assert leading.look(None, 7) == LEND


@given(st.lists(st.tuples(st.one_of(st.none(), st.integers(0, 2)), st.integers(0, 1)), max_size=300))
def test_nobody_rests_while_calls_run_or_come(looks: list[tuple[int | None, int]]) -> None:
    leading, count, quiet = Leading(), 0, 0
    for running, more in looks:
        quiet = 0 if more or running is not None else quiet + 1
        count += more
        found = leading.look(running, count)
        assert found != REST or quiet >= 90
