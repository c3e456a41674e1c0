"""Places where a test may end the controller, stop it or make it fail, to show that nothing is lost there.

A tool for tests, off unless the environment of `start` says otherwise; then each point costs one check.

    HEADGATE_FAILPOINTS=publish.before=kill          SIGKILL to itself whenever it comes to that point
    HEADGATE_FAILPOINTS=replica.asked=kill:2,...     the second time that a process comes there
    HEADGATE_FAILPOINTS=@/some/file                  what the file says while it is there; it is removed
                                                     by whoever acts, so that a successor goes on

Actions: `kill`; `raise`, an OSError as of a broken disk; `pause`, SIGSTOP to itself: SIGCONT lets it go on.

`POINTS` lists all there are. Each is reached by a scenario of tests/controller/test_failpoints.py.
"""

from __future__ import annotations

import errno
import os
import signal
from collections import Counter
from collections.abc import Callable

from msgspec import Struct

VARIABLE = "HEADGATE_FAILPOINTS"

#: Each point, and what is so when a controller comes to it.
POINTS = {
    "call.received": "a call that changes something was read, and nothing is done",
    "file.written": "a temporary file is written and not synced",
    "blob.synced": "code or a user_config is in a temporary file",
    "blob.written": "it has its name",
    "deploy.begun": "a candidate is tried out, and nothing was started for it",
    "replica.before_start": "nobody was asked for the replica",
    "replica.asked": "its process exists, and nobody noted its id",
    "replica.started": "its id is noted",
    "replica.ready": "it says that it is ready, and nothing was made of it",
    "deploy.reached": "all replicas of a candidate are ready, and it is no goal yet",
    "goals.before_write": "new goals are decided on, and nothing is written",
    "goals.synced": "they are in a temporary file",
    "goals.linked": "the generation before has a second name",
    "goals.kept": "it has the name of the older one",
    "goals.renamed": "the new ones have their name, and the directory is not synced",
    "goals.stored": "they are stored, and not in force",
    "goals.taken": "they are in force in the controller, and nobody else knows",
    "blobs.collected": "code that nobody uses is removed",
    "publish.before": "there is a new snapshot, and it was sent to nobody",
    "publish.one": "one more process was sent it",
    "publish.all": "each was sent it",
    "ack.heard": "one more process says that it is in force there",
    "change.in_force": "it is in force everywhere",
    "configure.before": "a replica is to get new limits or a new user_config",
    "configure.told": "it was told",
    "drain.before": "a replica is to drain, and does not know",
    "drain.told": "it was told",
    "drain.ended": "it says that it has nothing left to finish",
    "stop.before": "a replica is to end",
    "stop.told": "its end was asked for",
    "replica.gone": "a process has ended, and nobody noted it",
    "deploy.ended": "a candidate is a goal or given up",
    "answer.before": "a call is done, and its caller does not know",
    "answer.sent": "its caller was told",
    "takeover.loaded": "a new controller has loaded the goals, and looked at nothing",
    "takeover.over": "it knows all that runs, and has published nothing",
}

_ACTIONS = ("kill", "raise", "pause")


class Trap(Struct, frozen=True):
    """What to do at a point, at the `nth` time; 0: each time."""

    action: str
    nth: int = 0


class Armed:
    """The points at which something is to happen."""

    def __init__(self, text: str) -> None:
        self._file = text[1:] if text.startswith("@") else ""
        self._text = ""
        self._traps: dict[str, Trap] = {}
        self._counts: Counter[str] = Counter()
        if not self._file:
            self._set(text)

    def _set(self, text: str) -> None:
        self._text, self._traps = text, parse(text)
        self._counts.clear()

    def __call__(self, point: str) -> None:
        """Act, if it is time."""
        if self._file and not self._look():
            return
        trap = self._traps.get(point)
        if trap is None:
            return
        self._counts[point] += 1
        if trap.nth in (0, self._counts[point]):
            if self._file:
                os.unlink(self._file)
            _act(trap.action, point)

    def _look(self) -> bool:
        try:
            with open(self._file, encoding="utf-8") as file:
                text = file.read().strip()
        except FileNotFoundError:
            return False
        if text != self._text:
            self._set(text)
        return True


def parse(text: str) -> dict[str, Trap]:
    """The traps of "point=action[:nth],..."; raises ValueError for a point or action that there is not.

    >>> parse("publish.before=kill:2")
    {'publish.before': Trap(action='kill', nth=2)}
    """
    traps = {}
    for one in filter(None, text.split(",")):
        point, _, what = one.partition("=")
        action, _, nth = what.partition(":")
        if point not in POINTS:
            raise ValueError(f"{VARIABLE}: there is no point {point!r}; there are: {', '.join(POINTS)}")
        if action not in _ACTIONS or not (nth or "0").isdecimal():
            raise ValueError(f"{VARIABLE}: {one!r} is not point=action[:nth] with one of {', '.join(_ACTIONS)}")
        traps[point] = Trap(action, int(nth or 0))
    return traps


def _act(action: str, point: str) -> None:
    if action == "raise":
        raise OSError(errno.EIO, f"failpoint {point}")
    os.kill(os.getpid(), signal.SIGKILL if action == "kill" else signal.SIGSTOP)


#: What is called with each point that is reached; None in production.
on_reach: Callable[[str], None] | None = None


def reach(point: str) -> None:
    """The controller has come to `point`."""
    if on_reach is not None:
        on_reach(point)


def arm(text: str) -> bool:
    """Obey the text of the environment variable, "" for none: whether there is anything to obey."""
    global on_reach
    on_reach = Armed(text) if text else None
    return on_reach is not None
