"""A replica's life as one table: (phase, event) -> phase.

    starting -> ready -> draining -> drained -> stopping -> gone

A replica may leave for `stopping` from anywhere, and for `gone` at any moment: processes die.
Reports travel between processes and may come late or twice; such a one leaves the phase as it
is. What the table does not list cannot happen, and is an error of whoever reported it.

Which replica should take the next step is decided in core/reconcile.py.
"""

from __future__ import annotations

from headgate.errors import ProtocolError

STARTING = "starting"  # the process was asked for; user code loads and constructs
READY = "ready"  # may be listed in a snapshot and get requests
DRAINING = "draining"  # takes nothing new and finishes what it has
DRAINED = "drained"  # has nothing left to do
STOPPING = "stopping"  # was told to end, or is ending by itself
GONE = "gone"  # the process has ended; its id never comes back

#: In the order of a life without accidents.
PHASES = (STARTING, READY, DRAINING, DRAINED, STOPPING, GONE)

STARTED = "started"  # reported: constructed and configured
DRAIN = "drain"  # told: take nothing new
IDLE = "idle"  # reported, once told to drain: nothing left to finish
FAILED = "failed"  # reported: user code raised while starting, is unhealthy, or cannot be configured
STOP = "stop"  # told: end
ENDED = "ended"  # observed: the process is gone

EVENTS = (STARTED, DRAIN, IDLE, FAILED, STOP, ENDED)

_TABLE = {
    (STARTING, STARTED): READY,
    (STARTING, FAILED): STOPPING,
    (STARTING, STOP): STOPPING,
    (STARTING, ENDED): GONE,
    (READY, STARTED): READY,  # said again to a controller that was restarted
    (READY, DRAIN): DRAINING,
    (READY, FAILED): STOPPING,
    (READY, STOP): STOPPING,
    (READY, ENDED): GONE,
    (DRAINING, STARTED): DRAINING,
    (DRAINING, DRAIN): DRAINING,
    (DRAINING, IDLE): DRAINED,
    (DRAINING, FAILED): STOPPING,
    (DRAINING, STOP): STOPPING,
    (DRAINING, ENDED): GONE,
    (DRAINED, STARTED): DRAINED,
    (DRAINED, DRAIN): DRAINED,
    (DRAINED, IDLE): DRAINED,
    (DRAINED, FAILED): STOPPING,
    (DRAINED, STOP): STOPPING,
    (DRAINED, ENDED): GONE,
    **{(STOPPING, event): STOPPING for event in EVENTS},
    (STOPPING, ENDED): GONE,
    **{(GONE, event): GONE for event in EVENTS},
}


def after(phase: str, event: str) -> str:
    """The phase that follows.

    >>> after("starting", "started")
    'ready'

    Raises ProtocolError for an event that cannot happen in `phase`.
    """
    try:
        return _TABLE[phase, event]
    except KeyError:
        raise ProtocolError(f"a replica that is {phase} cannot be told or report {event!r}") from None


def is_failure(phase: str, event: str) -> bool:
    """Whether `event` is an accident that must be counted: it was meant to go on and did not.

    A replica that was told to drain or stop may end as it likes.
    """
    return event in (FAILED, ENDED) and phase in (STARTING, READY)
