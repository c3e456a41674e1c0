"""The replicas that run, as far as their engine and they themselves have said.

Nothing here is stored: after a restart of the controller the same knowledge comes from the engine's
list and from each replica's own report. A replica that was asked for and has no id yet is
here too, so that it is not asked for twice. What cannot be told from a report (what it was told
last, how often it failed) is kept beside it.

What follows from all this is decided in core/reconcile.py.
"""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from headgate import logs
from headgate.core import lifecycle, reconcile
from headgate.core.reconcile import UNKNOWN_CONFIG, Failures, Seen, Version
from headgate.core.state import BackendGoal, Facts, Settings
from headgate.errors import BackendStartError, HeadgateError, ProtocolError, from_wire
from headgate.wire import messages

log = logs.get("controller")

#: A replica that says so often in a row that it is unhealthy is replaced.
UNHEALTHY = 3
#: The version of replicas that are to be replaced: nobody wants it, so they drain.
UNWANTED = -1
#: So many replicas that the engine has not named yet are remembered by what they said of themselves.
EARLY = 1000
#: How much of an error's last line is shown where it is one among others.
LINE_CHARS = 200
LOCAL = "local"
_START_ERROR = BackendStartError.__name__

#: What must have happened to a replica that reports this phase.
_LIVES = {
    lifecycle.STARTING: (),
    lifecycle.READY: (lifecycle.STARTED,),
    lifecycle.DRAINING: (lifecycle.STARTED, lifecycle.DRAIN),
    lifecycle.DRAINED: (lifecycle.STARTED, lifecycle.DRAIN, lifecycle.IDLE),
    "failed": (lifecycle.FAILED,),
}


class Setback(Struct, frozen=True):
    """A replica failed.

    id               "" if there was not even a process
    kind             the class of `error` in headgate.errors
    first_steps      while it started or reconfigured: what is being deployed may be to blame
    config_version   of the user_config that it could not take, -1 if that is not what failed
    """

    id: str
    version: Version
    error: str
    first_steps: bool
    config_version: int = -1
    kind: str = _START_ERROR

    def who(self) -> str:
        """The replica, for the log."""
        return f"replica {self.id}" if self.id else f"a start of a replica of backend {self.version[0]!r}"

    def problem(self) -> HeadgateError:
        """For whoever asked for the change that it ended."""
        tag, _ = self.version
        if self.config_version >= 0:
            return BackendStartError(
                f"backend {tag!r}: replica {self.id} could not take the new user_config; the old one stays. "
                f"It said:\n{self.error}"
            )
        if not self.id:
            return BackendStartError(
                f"backend {tag!r}: a replica could not be started, so nothing was changed: {self.error}"
            )
        if self.kind != _START_ERROR:
            return from_wire(self.kind, f"backend {tag!r}: {self.error}")
        return BackendStartError(
            f"backend {tag!r}: replica {self.id} did not start, so nothing was changed; mend its code, its "
            f"arguments or its resources and call again. It said:\n{self.error}"
        )


class _Notes:
    """What a replica does not say of itself."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.told: Settings | None = None
        self.facts = Facts()
        self.unhealthy = 0


class Fleet:
    """Every replica whose process exists or was asked for."""

    def __init__(self) -> None:
        self.seen: dict[str, Seen] = {}
        self.failures: dict[Version, Failures] = {}
        self._restarts: dict[Version, int] = {}
        self._last_errors: dict[Version, str] = {}
        self._recycled: dict[Version, tuple[int, str]] = {}  # how many were worn out, and why the last was
        self._configs: dict[str, int] = {}
        self._notes: dict[str, _Notes] = {}
        self._asked = 0
        self._unborn: set[str] = set()  # asked for, without an id
        self._unwanted: dict[str, tuple[Seen, _Notes]] = {}  # the same, but told to end
        self._met: dict[str, tuple[int, str]] = {}  # connected, and not known yet: pid and node

    # --- births ---

    def ask(self, goal: BackendGoal, now: float) -> str:
        """A replica of `goal` is asked for: the name under which it is counted until it has an id."""
        self._asked += 1
        name = f"{goal.tag}#new-{self._asked}"
        self._add(name, goal.tag, goal.version, now, goal.config_version)
        self._unborn.add(name)
        self.told(name, goal.settings)
        return name

    def born(self, name: str, id: str, pid: int, node: str = "local") -> bool:
        """The replica that was asked for has an id; False if it is to end at once."""
        is_wanted = name in self._unborn
        if is_wanted:
            self._unborn.discard(name)
            one, notes = self.seen.pop(name), self._notes.pop(name)
        elif name in self._unwanted:
            one, notes = self._unwanted.pop(name)
        else:
            return False
        self.seen[id] = replace(one, id=id, pid=pid, node=node)
        self._notes[id] = notes
        self._recall(id)
        return is_wanted

    def adopt(self, id: str, tag: str, version: int, pid: int, node: str, now: float) -> None:
        """A replica was found running that an earlier controller started."""
        if id not in self.seen:
            self._add(id, tag, version, now, 0)
            self.seen[id] = replace(self.seen[id], pid=pid, node=node)
            self._recall(id)

    def met(self, id: str, pid: int, node: str) -> None:
        """A replica has connected: where it is, it knows itself. It may be one that is not known yet."""
        one = self.seen.get(id)
        if one is not None:
            is_forked = one.node == node == LOCAL and one.pid  # then the supervisor, its parent, knows
            self.seen[id] = replace(one, pid=one.pid if is_forked else pid or one.pid, node=_node(one, node))
            return
        self._met[id] = pid, node
        if len(self._met) > EARLY:
            del self._met[next(iter(self._met))]

    def _recall(self, id: str) -> None:
        if id in self._met:
            self.met(id, *self._met.pop(id))

    def _add(self, id: str, tag: str, version: int, now: float, config_version: int) -> None:
        self.seen[id] = Seen(id, tag, version, lifecycle.STARTING, now, config_version=config_version)
        self._notes[id] = _Notes(version)

    # --- what is heard ---

    def reported(self, id: str, report: messages.Report, now: float) -> Setback | None:
        """A replica said how it is. Raises ProtocolError if that cannot be."""
        one = self.seen.get(id)
        if one is None:
            return None
        before = one
        if report.phase not in _LIVES:
            raise ProtocolError(f"replica {id} reports the phase {report.phase!r}, which there is not")
        for event in _LIVES[report.phase]:
            one = reconcile.heard(one, event, now)
        self._notes[id].facts = report.facts
        one = replace(
            one,
            address=report.address or one.address,
            remote=report.remote or one.remote,
            node=_node(one, report.node),
            worn=report.worn,
        )
        if report.worn and not before.worn:
            self._wear_out(one, report.worn)
        self.seen[id] = _configured(one, report, first=before.phase == lifecycle.STARTING)
        if report.phase == "failed":
            error = report.error or "it gave no reason"
            setback = self._fail(before, lifecycle.FAILED, error, now)
            return replace(setback, kind=report.error_kind or _START_ERROR) if setback else None
        if before.reconfiguring and self.seen[id].config_version == UNKNOWN_CONFIG:
            return self._setback(before, report.error, True, before.config_version)
        return None

    def _wear_out(self, one: Seen, reason: str) -> None:
        version = one.backend, one.version
        count, _ = self._recycled.get(version, (0, ""))
        self._recycled[version] = count + 1, f"replica {one.id}: {reason}"
        log.info("replica %s is to be replaced: %s", one.id, reason)

    def ended(self, id: str, cause: str, now: float) -> Setback | None:
        """The process of a replica is gone, or could not be made."""
        self._met.pop(id, None)
        self._unwanted.pop(id, None)
        one = self.seen.get(id)
        if one is None:
            return None
        setback = self._fail(one, lifecycle.ENDED, cause, now)
        del self.seen[id], self._notes[id]
        if setback is not None and id in self._unborn:
            setback = replace(setback, id="")
        self._unborn.discard(id)
        return setback

    def broken(self, id: str, error: str, now: float) -> Setback | None:
        """A replica cannot be used any more and is about to be killed."""
        one = self.seen[id]
        self.seen[id] = reconcile.heard(one, lifecycle.FAILED, now)
        return self._fail(one, lifecycle.FAILED, error, now)

    def checked(self, id: str, error: str, now: float, *, hangs: bool = False) -> bool:
        """A replica's health check passed (""), failed, or hangs: whether the replica is now to be replaced.

        That is so for one that hangs, or fails too often in a row.
        """
        notes = self._notes.get(id)
        if notes is None:
            return False
        notes.unhealthy = notes.unhealthy + 1 if error else 0
        one = self.seen[id]
        is_ill = hangs or notes.unhealthy >= UNHEALTHY
        if is_ill and one.phase == lifecycle.READY and one.version != UNWANTED:
            self._fail(one, lifecycle.FAILED, f"its health check failed: {_last_line(error)}", now)
            self.seen[id] = replace(one, version=UNWANTED)
            return True
        return False

    def _fail(self, before: Seen, event: str, error: str, now: float) -> Setback | None:
        if not lifecycle.is_failure(before.phase, event) or before.version == UNWANTED:
            return None
        version = before.backend, before.version
        line = _last_line(error)
        self.failures[version] = reconcile.failed(self.failures.get(version), before, now, line)
        self._restarts[version] = self._restarts.get(version, 0) + 1
        started = before.phase != lifecycle.STARTING and not before.reconfiguring
        return self._setback(before, error, not started)

    def _setback(self, one: Seen, error: str, first_steps: bool, config_version: int = -1) -> Setback:
        self._last_errors[one.backend, one.version] = _last_line(error)
        return Setback(one.id, (one.backend, one.version), error, first_steps, config_version)

    # --- what is told ---

    def drained(self, id: str, now: float) -> None:
        """A replica was told to drain."""
        self.seen[id] = reconcile.heard(self.seen[id], lifecycle.DRAIN, now)

    def stopped(self, id: str, now: float) -> None:
        """A replica was told to end. One without an id is not seen until it has one: `born` will say so."""
        self.seen[id] = reconcile.heard(self.seen[id], lifecycle.STOP, now)
        if id in self._unborn:
            self._unborn.discard(id)
            self._unwanted[id] = self.seen.pop(id), self._notes.pop(id)

    def configuring(self, id: str, config_version: int) -> None:
        """A replica was told to take another user_config."""
        tag = self.seen[id].backend
        self._configs[tag] = max(self._configs.get(tag, 0), config_version)
        self.seen[id] = replace(self.seen[id], reconfiguring=True, config_version=config_version)

    def told(self, id: str, settings: Settings) -> bool:
        """Whether `settings` are news to a replica; from now on they are not."""
        notes = self._notes[id]
        if notes.told == settings:
            return False
        notes.told = settings
        self.seen[id] = replace(
            self.seen[id], graceful_shutdown_timeout_s=settings.graceful_shutdown_timeout_s
        )
        return True

    def forget_failures(self, versions: set[Version]) -> None:
        """Keep the failures of these versions only."""
        histories: tuple[dict[Version, Any], ...] = (
            self.failures, self._restarts, self._last_errors, self._recycled,
        )  # fmt: skip
        for history in histories:
            for version in history.keys() - versions:
                del history[version]

    # --- questions ---

    def of(self, tag: str) -> list[Seen]:
        """The replicas of a backend, whatever their version and phase."""
        return [one for one in self.seen.values() if one.backend == tag]

    def living(self) -> list[Seen]:
        """The replicas that have an id, whose process exists."""
        return [one for one in self.seen.values() if one.id not in self._unborn]

    def history(self, id: str) -> tuple[int, str]:
        """How often replicas of the same version failed, and the last line of the newest failure."""
        version = self.seen[id].backend, self._notes[id].version
        return self._restarts.get(version, 0), self._last_errors.get(version, "")

    def recycled(self, goal: BackendGoal) -> tuple[int, str]:
        """How many replicas of `goal` have been worn out, and why the newest of them was."""
        return self._recycled.get((goal.tag, goal.version), (0, ""))

    def version(self, id: str) -> int:
        """The version of the code that a replica runs, wanted or not."""
        return self._notes[id].version

    def versions(self, tag: str) -> list[int]:
        """The versions of its code that run, or may be about to."""
        running = [notes.version for id, notes in self._notes.items() if self.seen[id].backend == tag]
        return running + [notes.version for one, notes in self._unwanted.values() if one.backend == tag]

    def newest_config(self, tag: str) -> int:
        """The highest user_config version that any replica was given."""
        return max([self._configs.get(tag, 0), *(one.config_version for one in self.of(tag))])

    def facts(self, goal: BackendGoal) -> Facts | None:
        """What the ready replicas of `goal` say about its code."""
        for one in self.of(goal.tag):
            if one.version == goal.version and one.phase == lifecycle.READY:
                return self._notes[one.id].facts
        return None


def _node(one: Seen, said: str) -> str:
    """Where a replica is; "local" is also what one says that was not told the name of its node."""
    return one.node if said == LOCAL else said


def _configured(one: Seen, report: messages.Report, *, first: bool) -> Seen:
    """`one` with what `report` says about its user_config."""
    if report.phase != lifecycle.READY:
        return one
    if first:  # an adopted one may have failed to take the newest
        config_version = UNKNOWN_CONFIG if report.error else report.config_version
        return replace(one, config_version=config_version, reconfiguring=False)
    if one.reconfiguring and report.error:
        return replace(one, config_version=UNKNOWN_CONFIG, reconfiguring=False)
    if report.config_version != one.config_version:
        return one  # said before it was told
    return replace(one, reconfiguring=False)


def _last_line(text: str) -> str:
    line = (text.strip().splitlines() or [text])[-1].strip()
    return line if len(line) <= LINE_CHARS else f"{line[: LINE_CHARS - 1]}…"
