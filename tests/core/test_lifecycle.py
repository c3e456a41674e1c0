"""core/lifecycle.py: the table holds together, and late reports change nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core.lifecycle import (
    DRAIN,
    DRAINED,
    DRAINING,
    ENDED,
    EVENTS,
    FAILED,
    GONE,
    IDLE,
    PHASES,
    READY,
    STARTED,
    STARTING,
    STOP,
    STOPPING,
    after,
    is_failure,
)
from headgate.errors import ProtocolError

POSSIBLE = [
    (phase, event)
    for phase in PHASES
    for event in EVENTS
    if (phase, event) not in {(STARTING, DRAIN), (STARTING, IDLE), (READY, IDLE)}
]


def test_a_life_without_accidents():
    phase = STARTING
    lived = [phase := after(phase, event) for event in (STARTED, DRAIN, IDLE, STOP, ENDED)]

    assert lived == [READY, DRAINING, DRAINED, STOPPING, GONE]


@pytest.mark.parametrize(("phase", "event"), POSSIBLE)
def test_a_replica_never_goes_back(phase, event):
    assert PHASES.index(after(phase, event)) >= PHASES.index(phase)


@pytest.mark.parametrize("phase", PHASES)
def test_every_phase_ends_with_its_process(phase):
    assert after(phase, ENDED) == GONE


@pytest.mark.parametrize("phase", PHASES[:-1])
def test_whatever_raises_or_is_told_to_end_stops(phase):
    assert after(phase, FAILED) == after(phase, STOP) == STOPPING


@pytest.mark.parametrize(("phase", "event"), POSSIBLE)
def test_an_event_that_comes_twice_changes_nothing_more(phase, event):
    once = after(phase, event)

    assert (once, event) in POSSIBLE
    assert after(once, event) in (once, GONE)


@pytest.mark.parametrize("event", EVENTS)
def test_the_gone_stay_gone(event):
    assert after(GONE, event) == GONE


@pytest.mark.parametrize(
    ("phase", "event"), [(STARTING, DRAIN), (STARTING, IDLE), (READY, IDLE), ("odd", STOP)]
)
def test_what_cannot_happen_is_an_error_that_names_both(phase, event):
    with pytest.raises(ProtocolError, match=f"{phase}.*{event}"):
        after(phase, event)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("event", EVENTS)
def test_only_who_was_meant_to_go_on_fails(phase, event):
    assert is_failure(phase, event) == (phase in (STARTING, READY) and event in (FAILED, ENDED))


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_whatever_happens_a_life_goes_one_way_and_ends_with_its_process(events):
    phase, lived = STARTING, [STARTING]
    for event in events:
        try:
            following = after(phase, event)
        except ProtocolError:  # refused, and nothing has changed
            assert (phase, event) not in POSSIBLE
            continue
        assert following in PHASES
        assert PHASES.index(following) >= PHASES.index(phase)
        assert phase != GONE or following == GONE
        assert phase != STOPPING or following in (STOPPING, GONE)
        assert (following == GONE) == (phase == GONE or event == ENDED)
        phase = following
        lived.append(phase)

    assert DRAINED not in lived or DRAINING in lived
    assert DRAINING not in lived or READY in lived
    assert (phase == GONE) == (ENDED in events)
    assert after(phase, ENDED) == GONE
