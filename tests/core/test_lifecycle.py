"""core/lifecycle.py: the table holds together, and late reports change nothing."""

from __future__ import annotations

import pytest

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
