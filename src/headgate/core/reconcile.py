"""Which replicas to start, reconfigure, drain and stop, to bring what runs closer to what is wanted.

`plan` remembers nothing: what is wanted, what is seen and the time go in, actions come out; the
same input gives the same actions, and nothing to do gives none. So a restarted controller
loads the goals, looks around and plans; there is no recovery.

Rules: new replicas are ready before old ones drain. A replica drains only when no snapshot
lists it and no router may still follow one that does (`Seen.routed`). It is stopped when it
has drained, or took too long. A worn replica serves until a new one is ready; one of a version
leaves at a time. Whoever fails is started again after a back-off that is
computed from the time, never slept.

An update is blue-green: the new version is a candidate, started and kept beside the goals but
not served, until `reached`; then it becomes the goal, and one snapshot switches to all of
it. `goals.snapshot` publishes what `serving` lists; how an action is performed is controller/actions.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct
from msgspec.structs import replace

from headgate.core import lifecycle
from headgate.core.state import BackendGoal, Goals

#: `Seen.config_version` of a replica whose last reconfigure raised.
UNKNOWN_CONFIG = -1

FIRST_BACKOFF_S = 0.1
LAST_BACKOFF_S = 10.0
#: So long after the last failure, a new one is the first again.
FORGET_AFTER_S = 60.0


class Seen(Struct, frozen=True):
    """One replica whose process exists. `id` ends in a serial number: "iris#0007"."""

    id: str
    backend: str
    version: int
    phase: str
    #: When it entered its phase, on the clock of `now`.
    since: float
    #: Whether some router may still follow a snapshot that lists it.
    routed: bool = False
    address: str = ""
    pid: int = 0
    node: str = "local"
    #: Where routers of other nodes reach it.
    remote: str = ""
    #: The user_config in force in it, UNKNOWN_CONFIG after one that raised.
    config_version: int = 0
    #: Whether it was told to reconfigure and has not answered yet.
    reconfiguring: bool = False
    #: How long it may drain if its backend is no longer known.
    graceful_shutdown_timeout_s: float = 20.0
    #: Why it is to be replaced: it has served its time (core/recycling.py). "": it is not.
    worn: str = ""


class Failures(Struct, frozen=True):
    """The failures in a row of one version of a backend; `error` is one line."""

    count: int
    last_at: float
    error: str


class Start(Struct, frozen=True):
    """Start one replica of this version, with the newest user_config wanted for it."""

    backend: str
    version: int


class Reconfigure(Struct, frozen=True):
    """Give this running replica the user_config of that version."""

    id: str
    config_version: int


class Drain(Struct, frozen=True):
    """Let this replica finish what it has."""

    id: str


class Stop(Struct, frozen=True):
    """End this replica; `reason` is for the log."""

    id: str
    reason: str


Action = Start | Reconfigure | Drain | Stop
Version = tuple[str, int]  # a backend's tag and the version of its code


def backoff_s(count: int) -> float:
    """How long to wait after the `count`-th failure in a row: 0.1 s doubling to 10 s; 0 without one."""
    if count <= 0:
        return 0.0
    return min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(count - 1, 10))


def failed(before: Failures | None, seen: Seen, now: float, error: str) -> Failures:
    """The failures of a version after its replica `seen`, starting or ready until now, failed.

    Replicas that were there together count once. One that was ready for longer than the back-off
    it would cost was no failed start: counting begins anew, and it comes back quickly.
    """
    if before is None or now - before.last_at > FORGET_AFTER_S:
        return Failures(1, now, error)
    if seen.since <= before.last_at:
        return Failures(before.count, now, error)
    if seen.phase == lifecycle.READY and now - seen.since > backoff_s(before.count + 1):
        return Failures(1, now, error)
    return Failures(before.count + 1, now, error)


def heard(seen: Seen, event: str, now: float) -> Seen:
    """`seen` after an event of core/lifecycle.py; raises ProtocolError if it cannot have happened."""
    phase = lifecycle.after(seen.phase, event)
    return seen if phase == seen.phase else replace(seen, phase=phase, since=now)


def by_version(seen: Iterable[Seen]) -> dict[Version, list[Seen]]:
    """The replicas of each version: who asks about many goals looks at each replica once, not once for each goal."""
    groups: dict[Version, list[Seen]] = {}
    for one in seen:
        groups.setdefault((one.backend, one.version), []).append(one)
    return groups


def serving(goal: BackendGoal, seen: Iterable[Seen]) -> tuple[Seen, ...]:
    """The replicas that may get requests: ready, of the goal's version, the oldest `num_replicas` of them.

    Worn ones only where there are too few others.
    """
    return tuple(_ready(goal, seen)[: goal.settings.num_replicas])


def reached(goal: BackendGoal, seen: Iterable[Seen]) -> bool:
    """Whether as many replicas as wanted are ready, each with the wanted user_config."""
    ready = serving(goal, seen)
    return len(ready) == goal.settings.num_replicas and all(_is_configured(goal, one) for one in ready)


def all_wanted(goals: Goals, candidates: Iterable[BackendGoal] = ()) -> dict[Version, BackendGoal]:
    """What replicas are to run, by version: the goals, and beside them the candidates.

    A candidate of a goal's version takes its place, but never asks for fewer replicas.
    """
    wanted = {(goal.tag, goal.version): goal for goal in goals.backends}
    for candidate in candidates:
        goal = wanted.get((candidate.tag, candidate.version), candidate)
        most = max(goal.settings.num_replicas, candidate.settings.num_replicas)
        settings = replace(candidate.settings, num_replicas=most)
        wanted[candidate.tag, candidate.version] = replace(candidate, settings=settings)
    return wanted


def plan(
    goals: Goals,
    seen: Sequence[Seen],
    failures: Mapping[Version, Failures],
    now: float,
    *,
    candidates: Sequence[BackendGoal] = (),
) -> list[Action]:
    """The actions that bring `seen` closer to `goals`, all of them at once, safest first.

    `candidates` are backends being deployed or changed and not yet in `goals`. One of the version
    that a goal has is a change of config: replicas are started and reconfigured for it, and
    none is taken away before it is a goal.
    """
    wanted, there = all_wanted(goals, candidates), by_version(seen)
    actions: list[Action] = []
    keep: set[str] = set()
    for version, goal in wanted.items():
        mine = there.get(version, ())
        kept, alive = _used(goal, mine)
        keep.update([one.id for one in alive])
        if now >= _next_try(failures.get(version)):
            missing = goal.settings.num_replicas - len(kept)
            actions.extend(Start(goal.tag, goal.version) for _ in range(missing))
        actions.extend(
            Reconfigure(one.id, goal.config_version)
            for one in alive
            if one.phase == lifecycle.READY and not one.reconfiguring and not _is_configured(goal, one)
        )
    patience = _patience(wanted.values())
    leaving = sorted((one for one in seen if one.id not in keep and not one.routed), key=_age)
    actions.extend(Drain(one.id) for one in leaving if one.phase == lifecycle.READY)
    for one in leaving:
        if reason := _why_stop(one, patience, now):
            actions.append(Stop(one.id, reason))
    return actions


def next_look(
    goals: Goals,
    seen: Iterable[Seen],
    failures: Mapping[Version, Failures],
    now: float,
    *,
    candidates: Sequence[BackendGoal] = (),
) -> float | None:
    """When time alone will change the plan next: a back-off or a drain runs out. None: never."""
    wanted = all_wanted(goals, candidates)
    patience = _patience(wanted.values())
    moments = [_next_try(failures.get(version)) for version in wanted]
    moments += [_drains_until(one, patience) for one in seen if one.phase == lifecycle.DRAINING]
    return min((moment for moment in moments if moment > now), default=None)


def unmet(
    goals: Goals,
    seen: Sequence[Seen],
    failures: Mapping[Version, Failures],
    now: float,
    *,
    candidates: Sequence[BackendGoal] = (),
    waits_for: Mapping[str, str] = {},
) -> tuple[str, ...]:
    """What is waited for and why, a sentence each; nothing when all is as wanted.

    waits_for   what replicas without a process wait for, by id: "for 2 CPUs", or why they have to
    """
    wanted, there = all_wanted(goals, candidates), by_version(seen)
    waits: list[str] = []
    keep: set[str] = set()
    for version, goal in wanted.items():
        mine = there.get(version, ())
        _, alive = _used(goal, mine)
        keep.update(one.id for one in alive)
        waits.extend(f"replica {one.id} serves until a new one is ready: {one.worn}" for one in alive if one.worn)
        if not reached(goal, mine):
            waits.append(_shortfall(goal, alive, failures.get(version), now, waits_for))
    patience = _patience(wanted.values())
    waits.extend(_farewell(one, patience, now) for one in sorted(seen, key=_age) if one.id not in keep)
    return tuple(waits)


# ---------------------------------------------------------------- what is wanted


def _patience(wanted: Iterable[BackendGoal]) -> dict[str, float]:
    """How long the replicas of each backend may drain; the newest version says so."""
    return {goal.tag: goal.settings.graceful_shutdown_timeout_s for goal in wanted}


def _next_try(failures: Failures | None) -> float:
    return failures.last_at + backoff_s(failures.count) if failures else float("-inf")


# ---------------------------------------------------------------- what is there


def _in(phase: str, goal: BackendGoal, seen: Iterable[Seen]) -> list[Seen]:
    """Oldest first."""
    tag, version = goal.tag, goal.version
    found = [one for one in seen if one.phase == phase and one.version == version and one.backend == tag]
    if len(found) > 1:
        found.sort(key=_age)
    return found


def _age(one: Seen) -> tuple[str, int, str]:
    """Oldest first, by serial number: unlike times, it is the same after the controller's restart."""
    return one.backend, len(one.id), one.id


def _is_configured(goal: BackendGoal, one: Seen) -> bool:
    return one.config_version == goal.config_version and not one.reconfiguring


def _ready(goal: BackendGoal, seen: Iterable[Seen]) -> list[Seen]:
    """Oldest first; after them the worn ones, of which the oldest comes last: the first to go."""
    ready = _in(lifecycle.READY, goal, seen)
    if worn := [one for one in ready if one.worn]:
        return [one for one in ready if not one.worn] + worn[::-1]
    return ready


def _used(goal: BackendGoal, seen: Sequence[Seen]) -> tuple[list[Seen], list[Seen]]:
    """The ready and starting replicas that the goal has a use for: ready ones first, then by age. And all that live on.

    The worn one whose turn it is to go is only among the latter, where it still serves: so another is started in
    its place.
    """
    count = goal.settings.num_replicas
    ready = _ready(goal, seen)[:count]
    lasting = ready[:-1] if ready and ready[-1].worn else ready
    kept = [*lasting, *_in(lifecycle.STARTING, goal, seen)][:count]
    return kept, kept + [one for one in ready if one not in kept]


def _drains_until(one: Seen, patience: Mapping[str, float]) -> float:
    return one.since + patience.get(one.backend, one.graceful_shutdown_timeout_s)


def _why_stop(one: Seen, patience: Mapping[str, float], now: float) -> str:
    """The reason to stop a replica that nothing needs and no router knows, "" if there is none yet."""
    if one.phase == lifecycle.STARTING:
        return "no longer wanted"
    if one.phase == lifecycle.DRAINED:
        return "drained"
    if one.phase == lifecycle.DRAINING and now >= _drains_until(one, patience):
        allowed = _drains_until(one, patience) - one.since
        return f"still busy after graceful_shutdown_timeout_s = {allowed:g}"
    return ""


# ---------------------------------------------------------------- sentences for people


def _shortfall(
    goal: BackendGoal,
    alive: Sequence[Seen],
    failures: Failures | None,
    now: float,
    waits_for: Mapping[str, str],
) -> str:
    ready = [one for one in alive if one.phase == lifecycle.READY]
    configured = sum(_is_configured(goal, one) for one in ready)
    text = (
        f"backend {goal.tag!r} version {goal.version}: "
        f"{len(ready)} of {goal.settings.num_replicas} replicas are ready"
    )
    if starting := len(alive) - len(ready):
        text += f", {starting} starting{_lacking(alive, waits_for)}"
    if configured < len(ready):
        text += f", {len(ready) - configured} without the newest user_config yet"
    if failures is None:
        return text
    wait_s = _next_try(failures) - now
    when = f"; next try in {wait_s:.1f} s" if wait_s > 0 and len(alive) < goal.settings.num_replicas else ""
    return f"{text}; failures in a row: {failures.count}, the last: {failures.error}{when}"


def _lacking(alive: Sequence[Seen], waits_for: Mapping[str, str]) -> str:
    """What the starting ones wait for, and how many wait for the same."""
    waiting: dict[str, list[str]] = {}
    for one in alive:
        if one.phase == lifecycle.STARTING and (why := waits_for.get(one.id)):
            waiting.setdefault(why, []).append(one.id)
    return f" ({'; '.join(_wait(ids, why) for why, ids in waiting.items())})" if waiting else ""


def _wait(ids: Sequence[str], why: str) -> str:
    who = f"replica {ids[0]} waits" if len(ids) == 1 else f"replica {ids[0]} and {len(ids) - 1} more wait"
    return f"{who} {why}" if why.startswith("for ") else f"{who}: {why}"


def _farewell(one: Seen, patience: Mapping[str, float], now: float) -> str:
    who = f"replica {one.id} leaves" + (f", since {one.worn}" if one.worn else "")
    if one.routed:
        return f"{who}: a router may still send to it"
    if one.phase == lifecycle.DRAINING:
        left_s = max(0.0, _drains_until(one, patience) - now)
        return f"{who}: it finishes its requests, for {left_s:.1f} s at most"
    return f"{who}: it is {one.phase}"
