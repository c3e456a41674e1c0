"""When a refused request may come again: the rate of a line, from literals."""

import math

from hypothesis import given
from hypothesis import strategies as st

from headgate.core.drain_rate import CLOSE_S, FORGET_S, LONGEST_S, WINDOW_S, DrainRate


def test_the_rate_is_that_of_the_time_with_a_line():
    drain = DrainRate()
    drain.begin(now=1000.0, answers=5000)

    assert drain.retry_after_s(now=1002.0, answers=5020, ahead=30) == 3
    assert drain.retry_after_s(now=1004.0, answers=5040, ahead=31) == 4  # 3.1: whoever comes at 3 is too early


def test_idle_time_does_not_count():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)
    drain.end(now=1.0, answers=10)

    drain.begin(now=40.0, answers=12)
    assert drain.retry_after_s(now=41.0, answers=22, ahead=20) == 2


def test_answers_without_a_line_do_not_count():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)
    drain.end(now=1.0, answers=10)
    drain.begin(now=3.0, answers=10_000)

    assert drain.retry_after_s(now=4.0, answers=10_010, ahead=40) == 4


def test_at_the_very_start_nothing_is_known():
    drain = DrainRate()
    drain.begin(now=1000.0, answers=0)

    assert drain.retry_after_s(now=1000.0, answers=0, ahead=1000) == 1


def test_without_a_first_answer_it_is_as_long_again():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)

    assert drain.retry_after_s(now=3.0, answers=0, ahead=2) == 3
    assert drain.retry_after_s(now=20.0, answers=0, ahead=2) == 20
    assert drain.retry_after_s(now=40.0, answers=1, ahead=1) == 40


def test_batches_are_answered_at_once_and_the_rate_is_that_of_all():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)
    waits = [drain.retry_after_s(now=0.5 + n, answers=32 * n, ahead=96) for n in range(20)]

    assert waits[0] == 1  # nothing known
    assert waits[1] == 5  # 32 in 1.5 s
    assert set(waits[4:]) <= {3, 4}


def test_a_slow_backend_is_measured_for_longer():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)
    waits = [drain.retry_after_s(now=2.0 * n + 1.9, answers=n, ahead=6) for n in range(1, 40)]

    assert waits[-1] in (12, 13)
    assert set(waits[8:]) <= {12, 13, 14}


def test_a_backend_that_became_slower_is_noticed():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)
    assert drain.retry_after_s(now=WINDOW_S, answers=500, ahead=100) == 1

    for n in range(1, 11):
        drain.retry_after_s(now=WINDOW_S + n, answers=500 + 10 * n, ahead=100)
    assert drain.retry_after_s(now=WINDOW_S + 11, answers=610, ahead=100) == 10


def test_a_long_line_without_refusals_does_not_outweigh_what_is_new():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)
    drain.end(now=1000.0, answers=100_000)

    drain.begin(now=1000.0, answers=100_000)
    assert drain.retry_after_s(now=1004.9, answers=100_000, ahead=500) == 10  # 500 answers in 9.9 s


def test_a_line_of_long_ago_is_forgotten():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)
    drain.end(now=10.0, answers=10_000)

    drain.begin(now=10.0 + FORGET_S + 1, answers=10_000)
    assert drain.retry_after_s(now=10.0 + FORGET_S + 3, answers=10_002, ahead=10) == 10


def test_a_line_that_never_ends_is_not_forgotten():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)

    assert drain.retry_after_s(now=100.0, answers=1000, ahead=50) == 5


def test_where_nobody_may_wait_the_time_between_refusals_counts():
    drain = DrainRate()
    assert drain.retry_after_s(now=0.0, answers=100, ahead=4) == 1

    assert drain.retry_after_s(now=CLOSE_S, answers=101, ahead=4) == 4
    assert drain.retry_after_s(now=CLOSE_S + 50, answers=101, ahead=4) == 4  # nobody came: it may have been idle


def test_what_is_said_has_bounds():
    drain = DrainRate()
    drain.begin(now=0.0, answers=0)

    assert drain.retry_after_s(now=1.0, answers=10_000, ahead=1) == 1
    assert drain.retry_after_s(now=2.0, answers=10_000, ahead=0) == 1
    assert drain.retry_after_s(now=3.0, answers=10_000, ahead=10**9) == LONGEST_S


def test_a_line_may_end_that_never_began():
    drain = DrainRate()
    drain.end(now=5.0, answers=7)

    assert drain.retry_after_s(now=9.0, answers=7, ahead=3) == 1


@given(
    st.lists(st.tuples(st.floats(0.05, 5.0), st.floats(0.0, 10.0)), min_size=4, max_size=30),
    st.integers(20, 2000),
    st.integers(1, 100),
)
def test_a_steady_rate_is_found_whatever_the_pauses(lines, rate, ahead):
    drain = DrainRate()
    now, answers = 0.0, 0
    for seconds, pause in lines:
        drain.begin(now, answers)
        now, answers = now + seconds, answers + round(seconds * rate)
        found = drain.retry_after_s(now, answers, ahead)
        drain.end(now, answers)
        now, answers = now + pause, answers + 3
    assert abs(found - max(1, min(LONGEST_S, math.ceil(ahead / rate)))) <= 1
