"""A call of the controller: what is sent, what an answer means, and how long to wait for a sign of life.

Whoever waits on an event loop does so in pending.py, whoever has none in line.py.
"""

from __future__ import annotations

from typing import Any

import msgspec

from headgate import errors
from headgate.core.framing import MAX_FRAME_BYTES
from headgate.errors import ArgumentError, ControllerUnavailable
from headgate.wire import messages

#: What the arguments of one call may take.
MOST_BYTES = MAX_FRAME_BYTES - 4096
SILENCE_S = 5.0
#: Silence is counted in ticks, so that a process that was held up itself blames nobody.
TICK_S = 0.25

SILENT = (
    f"the controller gave no sign of life for {SILENCE_S:g} s: it is stopped, or this machine is overloaded; "
    "requests go on without it"
)
OVER = (
    "the instance is over: it has already been shut down, or its processes were killed; "
    "call headgate.start() for a new one"
)


def request(number: int, caller: str, method: str, params: dict[str, Any]) -> messages.Request:
    """The call of that number by `caller`, a name for ever its own; ArgumentError if a parameter cannot travel."""
    try:
        packed = msgspec.msgpack.encode(params)
    except (TypeError, OverflowError, UnicodeEncodeError) as error:
        raise ArgumentError(f"{method}: an argument cannot be sent to the controller: {error}") from None
    if len(packed) > MOST_BYTES:
        raise ArgumentError(
            f"{method}: its arguments take {len(packed)} bytes, and {MOST_BYTES} can be sent to the controller; "
            "load what is large where it is used, in the constructor for instance"
        )
    return messages.Request(number, f"{caller}-{number}", method, msgspec.Raw(packed))


def error_of(response: messages.Response) -> Exception | None:
    """What the controller raised, if it did."""
    return None if response.error is None else errors.from_wire(*response.error)


def no_sign_of_life(method: str) -> ControllerUnavailable:
    """The error of a call that was given up."""
    return ControllerUnavailable(
        f"{method}: {SILENT}; what was asked for may or may not have happened, and it is safe to repeat the call"
    )
