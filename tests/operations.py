"""Each operation that changes an instance, and the failpoints that the controller passes on its way through it.

For tests/controller/test_failpoints.py, in memory, and tests/faults/test_fault_failpoints.py, with processes.
"""

from __future__ import annotations

from headgate.controller.failpoints import POINTS


def _starting(*prefixes: str) -> frozenset[str]:
    return frozenset(point for point in POINTS if point.startswith(prefixes))


#: Of any change.
ANY = _starting("call.", "file.", "goals.", "publish.", "ack.", "change.", "answer.") | {"blobs.collected"}
#: Of one that is tried out first.
TRIED = ANY | _starting("deploy.")
_BLOB = _starting("blob.")
_BIRTH = _starting("replica.") - {"replica.gone"}
_DEATH = _starting("drain.", "stop.") | {"replica.gone"}
_CONFIGURE = _starting("configure.")

#: Of the restart of a controller that has nothing to do.
RESTART = _starting("takeover.", "publish.", "ack.")

PASSES = {
    "create_backend": TRIED | _BLOB | _BIRTH,
    "update_backend": TRIED | _BLOB | _BIRTH | _DEATH,
    "scale_up": TRIED | _BIRTH | _CONFIGURE,
    "scale_down": TRIED | _CONFIGURE | _DEATH,
    "limits": TRIED | _CONFIGURE,
    "user_config": (TRIED | _BLOB | _CONFIGURE) - _starting("publish.", "ack."),
    "delete_backend": ANY | _DEATH,
    "create_endpoint": ANY,
    "delete_endpoint": ANY,
    "set_traffic": ANY,
    "shadow_traffic": ANY,
}
