"""Rollouts and incidents as readable files: what is said to a controller, and what it then does.

Each block of scenarios/*.txt holds commands, a line of dashes, and what follows from them. The
controller here is the smallest one that the decisions of core/ allow: it performs actions
at once and on a clock that is a number, and keeps nothing but what a real one keeps.

A file that begins with `simulation SEED` is played by a whole instance on a virtual clock instead, with faults and
requests (tests/simulation): what `scripts/simulate` prints for a seed that breaks a rule, and every rule must hold.
Its commands are sim_world.World's.

`REWRITE=1 pytest tests/test_scenarios.py` writes the outcome into the files; review the diff.

Commands:
    create TAG [FIELD=VALUE ...]    deploy a new backend          update TAG [...]   deploy new code
    config TAG [FIELD=VALUE ...]    change the config             delete TAG         remove it
    endpoint NAME TAG               create an endpoint            drop NAME          delete it
    ready ID ...                    replicas have started, or have reconfigured
    raise ID ERROR                  user code raised in it        die ID             its process ended
    idle ID ...                     draining replicas have nothing left to do
    ack                             every router follows the newest snapshot
    wait [SECONDS]                  time passes; without a number, until time alone changes something
    restart                         the controller ends and another takes over
    status                          what is waited for
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace
from simulation import sim_history

from headgate.core import goals as change
from headgate.core import lifecycle, reconcile
from headgate.core.defaults import resolve
from headgate.core.reconcile import Drain, Failures, Reconfigure, Seen, Start, Stop
from headgate.core.state import BackendGoal, Facts, Goals, Snapshot
from headgate.errors import ConfigError

SCENARIOS = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))
DASHES = "----"


class World:
    """A controller with engine and routers, all in memory; `said` collects what happens."""

    def __init__(self) -> None:
        self.now = 0.0
        self.goals = Goals()
        self.candidates: list[BackendGoal] = []
        self.seen: dict[str, Seen] = {}
        self.failures: dict[tuple[str, int], Failures] = {}
        self.newest = Snapshot(ready=True)
        self.followed: list[set[str]] = [set()]  # the replicas in each snapshot that some router may follow
        self.started = 0
        self.said: list[str] = []

    def run(self, line: str) -> None:
        """Perform one command and all that follows from it."""
        command, *words = line.split()
        try:
            getattr(self, f"do_{command}")(*words)
        except ConfigError as error:
            self.said.append(f"refused: {error}")
        for _ in range(10):
            if not self.tick():
                return
        raise AssertionError("the plan never comes to rest")

    def tick(self) -> bool:
        """Commit what is reached, publish what is new, perform the plan; whether anything was done."""
        before = len(self.said)
        for candidate in [one for one in self.candidates if reconcile.reached(one, self.seen.values())]:
            self.candidates.remove(candidate)
            self.commit(candidate)
        self.publish()
        for action in reconcile.plan(
            self.goals, self.observed(), self.failures, self.now, candidates=self.candidates
        ):
            self.perform(action)
        return len(self.said) > before

    def observed(self) -> list[Seen]:
        routed = set().union(*self.followed)
        return [replace(one, routed=one.id in routed) for one in self.seen.values()]

    def commit(self, new: BackendGoal) -> None:
        tags = [goal.tag for goal in self.goals.backends]
        if new.tag not in tags:
            self.goals = change.add_backend(self.goals, new)
        elif change.find_backend(self.goals, new.tag).version != new.version:
            self.goals = change.replace_backend(self.goals, new)
        else:
            backends = tuple(new if goal.tag == new.tag else goal for goal in self.goals.backends)
            self.goals = replace(self.goals, backends=backends)
        self.said.append(f"deployed {new.tag} v{new.version} x{new.settings.num_replicas}")

    def publish(self) -> None:
        version = self.newest.version
        fresh = change.snapshot(self.goals, self.observed(), version, True, self.failures)
        if fresh == self.newest:
            return
        self.newest = replace(fresh, version=version + 1)
        self.followed.append({one.id for view in fresh.backends for one in view.replicas})
        self.said.append(f"publish {version + 1}: {' '.join(_shown(fresh)) or 'nothing'}")

    def perform(self, action: reconcile.Action) -> None:
        match action:
            case Start(tag, version):
                self.started += 1
                one = f"{tag}#{self.started}"
                wanted = reconcile.all_wanted(self.goals, self.candidates)[tag, version]
                self.seen[one] = Seen(
                    one, tag, version, lifecycle.STARTING, self.now, config_version=wanted.config_version
                )
                self.said.append(f"start {one} (v{version})")
            case Reconfigure(one, version):
                self.seen[one] = replace(self.seen[one], reconfiguring=True, config_version=version)
                self.said.append(f"reconfigure {one}")
            case Drain(one):
                self.seen[one] = reconcile.heard(self.seen[one], lifecycle.DRAIN, self.now)
                self.said.append(f"drain {one}")
            case Stop(one, reason):
                del self.seen[one]
                self.said.append(f"stop {one} ({reason})")

    # ------------------------------------------------------------ commands

    def do_create(self, tag: str, *fields: str) -> None:
        new = BackendGoal(tag, self.next_version(tag), "code", resolve({}, Facts()), Facts())
        change.add_backend(self.goals, new)
        self.candidates.append(_changed(Goals(backends=(new,)), tag, fields))

    def do_update(self, tag: str, *fields: str) -> None:
        new = replace(_changed(self.goals, tag, fields), version=self.next_version(tag))
        change.replace_backend(self.goals, new)
        self.candidates.append(new)

    def do_config(self, tag: str, *fields: str) -> None:
        self.candidates.append(_changed(self.goals, tag, fields))

    def do_delete(self, tag: str) -> None:
        self.candidates = [one for one in self.candidates if one.tag != tag]
        self.goals = change.remove_backend(self.goals, tag)

    def do_endpoint(self, name: str, tag: str) -> None:
        self.goals = change.add_endpoint(self.goals, name, backend=tag, route=None, methods=["GET"])

    def do_drop(self, name: str) -> None:
        self.goals = change.remove_endpoint(self.goals, name)

    def do_ready(self, *ids: str) -> None:
        for one in ids:
            told = replace(self.seen[one], reconfiguring=False)
            self.seen[one] = reconcile.heard(told, lifecycle.STARTED, self.now)

    def do_idle(self, *ids: str) -> None:
        for one in ids:
            self.seen[one] = reconcile.heard(self.seen[one], lifecycle.IDLE, self.now)

    def do_raise(self, one: str, *error: str) -> None:
        if self.seen[one].reconfiguring:
            unsure = replace(self.seen[one], reconfiguring=False, config_version=reconcile.UNKNOWN_CONFIG)
            self.seen[one] = unsure
            self.withdraw(unsure, " ".join(error))
        else:
            self.end(one, lifecycle.FAILED, " ".join(error))

    def do_die(self, one: str) -> None:
        self.end(one, lifecycle.ENDED, "its process ended")

    def do_ack(self) -> None:
        del self.followed[:-1]

    def do_wait(self, seconds: str = "") -> None:
        moment = reconcile.next_look(
            self.goals, self.observed(), self.failures, self.now, candidates=self.candidates
        )
        if not seconds and moment is None:
            self.said.append("time changes nothing")
            return
        later = self.now + float(seconds) if seconds else moment
        assert later is not None
        if not seconds:
            self.said.append(f"after {later - self.now:.1f} s")
        self.now = later

    def do_restart(self) -> None:
        """Goals and what runs stay; a replica that drains is in no snapshot that anyone follows."""
        self.candidates, self.failures = [], {}
        self.followed = [{one.id for one in self.seen.values() if one.phase == lifecycle.READY}]
        self.newest = Snapshot(version=self.newest.version)

    def do_status(self) -> None:
        waits = reconcile.unmet(
            self.goals, self.observed(), self.failures, self.now, candidates=self.candidates
        )
        self.said.extend(waits or ["all is as wanted"])

    # ------------------------------------------------------------ what they share

    def next_version(self, tag: str) -> int:
        used = [one.version for one in self.seen.values() if one.backend == tag]
        return change.next_version(self.goals, tag, used)

    def end(self, one: str, event: str, error: str) -> None:
        dead = self.seen.pop(one)
        starting = dead.phase == lifecycle.STARTING
        if starting and self.withdraw(dead, error):
            return
        if lifecycle.is_failure(dead.phase, event):
            version = dead.backend, dead.version
            self.failures[version] = reconcile.failed(self.failures.get(version), dead, self.now, error)

    def withdraw(self, dead: Seen, error: str) -> bool:
        """Give up the candidate that `dead` belongs to, if there is one."""
        for candidate in self.candidates:
            if (candidate.tag, candidate.version) == (dead.backend, dead.version):
                self.candidates.remove(candidate)
                self.said.append(f"not deployed {candidate.tag} v{candidate.version}: {error}")
                return True
        return False


def _changed(goals: Goals, tag: str, fields: tuple[str, ...]) -> BackendGoal:
    given = dict(field.split("=") for field in fields)
    user_config = given.pop("user_config", change.find_backend(goals, tag).user_config)
    numbers = {name: float(value) if "_s" in name else int(value) for name, value in given.items()}
    return change.find_backend(change.change_config(goals, tag, numbers, user_config=user_config), tag)


def _shown(snapshot: Snapshot) -> Iterator[str]:
    for view in snapshot.backends:
        ids = " ".join(one.id for one in view.replicas) or view.trouble
        yield f"{view.tag} v{view.version} [{ids}]"
    for endpoint in snapshot.endpoints:
        yield f"endpoint {endpoint.name}"


def outcome(text: str) -> str:
    """The scenario with what really happens below each line of dashes."""
    blocks = []
    for block in text.strip().split("\n\n"):
        lines = block.splitlines()
        blocks.append(lines[: lines.index(DASHES)] if DASHES in lines else lines)
    is_simulation = any(line.startswith(f"{sim_history.FIRST} ") for line in blocks[0])
    said = sim_history.outcome(blocks) if is_simulation else _said(blocks)
    shown = ["\n".join([*block, DASHES, *(lines or ["nothing"])]) for block, lines in zip(blocks, said, strict=True)]
    return "\n\n".join(shown) + "\n"


def _said(blocks: list[list[str]]) -> Iterator[list[str]]:
    world = World()
    for block in blocks:
        world.said = []
        for line in block:
            if not line.startswith("# "):
                world.run(line)
        yield world.said


@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_the_controller_does_what_the_scenario_says(path: Path) -> None:
    text = path.read_text()
    really = outcome(text)
    assert "BROKEN" not in really, really
    if os.environ.get("REWRITE") == "1":
        path.write_text(really)
    else:
        assert really == text, f"{path.name} differs; REWRITE=1 writes the outcome, then review the diff"


def test_there_are_scenarios() -> None:
    assert SCENARIOS


@pytest.mark.parametrize("seed", range(100))
def test_no_order_of_events_takes_away_a_replica_that_a_router_may_choose(seed: int) -> None:
    chance = random.Random(seed)
    world = World()
    for line in ("create iris num_replicas=2", "ready iris#1 iris#2", "ack"):
        world.run(line)
    for _ in range(60):
        world.run(_some_event(world, chance))

        (iris,) = world.newest.backends
        assert len(iris.replicas) >= 2, world.said
        for one in set().union(*world.followed):
            assert world.seen[one].phase == lifecycle.READY, world.said


def _some_event(world: World, chance: random.Random) -> str:
    """Anything that may happen while nothing that serves dies."""
    events = ["ack", "wait 0.5", "restart"]
    if not world.candidates:
        events += ["update iris", *(f"config iris num_replicas={count}" for count in (2, 3, 4))]
    for one in world.seen.values():
        if one.phase == lifecycle.STARTING:
            events += [f"ready {one.id}", f"raise {one.id} ValueError", f"die {one.id}"]
        elif one.phase == lifecycle.DRAINING:
            events += [f"idle {one.id}", f"die {one.id}"]
    return chance.choice(events)
