"""What the fleet makes of what it hears: failures that count, errors for the caller, and who is replaced."""

from __future__ import annotations

import pytest

from headgate.controller.fleet import EARLY, LINE_CHARS, UNHEALTHY, UNWANTED, Fleet, Setback
from headgate.core.reconcile import UNKNOWN_CONFIG
from headgate.core.state import BackendGoal, Facts, Settings
from headgate.errors import ArgumentError, BackendStartError, ConfigError, ProtocolError
from headgate.wire.messages import Report

GOAL = BackendGoal("iris", 1, "code", Settings(), Facts())
ID = "iris#0001"


def report(phase: str, **more: object) -> Report:
    return Report("iris", 1, phase, **more)  # type: ignore[arg-type]


def starting() -> Fleet:
    fleet = Fleet()
    fleet.born(fleet.ask(GOAL, 0.0), ID, pid=7)
    return fleet


def ready() -> Fleet:
    fleet = starting()
    fleet.reported(ID, report("ready", address="a", facts=Facts(is_async=True)), 1.0)
    return fleet


def problem(setback: Setback | None) -> str:
    assert setback is not None
    return str(setback.problem())


# --- births ---


def test_what_is_asked_for_counts_but_has_no_process_yet() -> None:
    fleet = Fleet()
    name = fleet.ask(GOAL, 0.0)
    assert [one.id for one in fleet.of("iris")] == [name]
    assert fleet.living() == []
    assert fleet.born(name, ID, pid=7)
    assert [(one.id, one.pid) for one in fleet.living()] == [(ID, 7)]


def test_what_was_stopped_before_it_had_a_process_is_not_wanted() -> None:
    fleet = Fleet()
    name = fleet.ask(GOAL, 0.0)
    fleet.stopped(name, 1.0)
    assert fleet.of("iris") == []
    assert fleet.versions("iris") == [GOAL.version]  # it may come yet: its version is not free
    assert not fleet.born(name, ID, pid=7)
    assert fleet.versions("iris") == [GOAL.version]
    fleet.ended(ID, "killed", 2.0)
    assert fleet.versions("iris") == []


def test_what_was_stopped_before_it_had_a_process_and_gets_none_is_forgotten() -> None:
    fleet = Fleet()
    name = fleet.ask(GOAL, 0.0)
    fleet.stopped(name, 1.0)
    assert fleet.ended(name, "no such node", 2.0) is None
    assert fleet.versions("iris") == []
    assert not fleet.born(name, ID, pid=7)


def test_a_worn_replica_is_counted_once_and_why_is_remembered() -> None:
    fleet = ready()
    assert fleet.recycled(GOAL) == (0, "")
    for phase in ("ready", "draining", "drained"):
        fleet.reported(ID, report(phase, address="a", worn="it has served 9 requests"), 2.0)
        assert fleet.seen[ID].worn == "it has served 9 requests"
    assert fleet.ended(ID, "it was told to", 3.0) is None
    assert fleet.recycled(GOAL) == (1, f"replica {ID}: it has served 9 requests")
    assert fleet.failures == {}
    fleet.forget_failures(set())
    assert fleet.recycled(GOAL) == (0, "")


def test_an_adopted_replica_is_as_it_says() -> None:
    fleet = Fleet()
    for _ in range(2):
        fleet.adopt(ID, "iris", 3, 7, "local", 0.0)
    fleet.reported(ID, report("draining", config_version=2), 1.0)
    assert [(one.version, one.phase, one.pid) for one in fleet.living()] == [(3, "draining", 7)]
    assert fleet.versions("iris") == [3]


def test_a_replica_knows_itself_where_it_is() -> None:
    fleet = Fleet()
    fleet.adopt(ID, "iris", 1, 0, "", 0.0)
    fleet.met(ID, 7, "n1")
    assert [(one.pid, one.node) for one in fleet.living()] == [(7, "n1")]
    fleet.reported(ID, report("ready", address="@a", remote="tcp://n2:1", node="n2"), 1.0)
    fleet.reported(ID, report("ready"), 2.0)
    (one,) = fleet.living()
    assert (one.address, one.remote, one.node) == ("@a", "tcp://n2:1", "n2")


@pytest.mark.parametrize("is_adopted", [True, False])
def test_what_connects_before_it_is_known_is_remembered(is_adopted: bool) -> None:
    fleet = Fleet()
    name = fleet.ask(GOAL, 0.0)
    fleet.met(ID, 7, "n1")
    if is_adopted:
        fleet.adopt(ID, "iris", 1, 0, "", 0.0)
    else:
        fleet.born(name, ID, 0, "")
    assert [(one.pid, one.node) for one in fleet.living()] == [(7, "n1")]


def test_what_ends_before_it_is_known_is_forgotten_and_so_are_too_many() -> None:
    fleet = Fleet()
    fleet.met(ID, 7, "n1")
    fleet.ended(ID, "killed", 1.0)
    fleet.adopt(ID, "iris", 1, 0, "", 0.0)
    for number in range(EARLY + 1):
        fleet.met(f"rose#{number}", number + 1, "n1")
    fleet.adopt("rose#0", "rose", 1, 0, "", 0.0)
    fleet.adopt("rose#1", "rose", 1, 0, "", 0.0)
    assert [one.pid for one in fleet.living()] == [0, 0, 2]


# --- failures ---


def test_a_start_without_a_process_names_what_lacks_and_no_name_of_ours() -> None:
    fleet = Fleet()
    setback = fleet.ended(fleet.ask(GOAL, 0.0), "num_gpus=1 cannot be given: this machine has 0 GPUs", 1.0)
    text = problem(setback)
    assert "num_gpus=1 cannot be given" in text
    assert "#" not in text
    assert "mend its code" not in text
    assert setback is not None
    assert setback.who() == "a start of a replica of backend 'iris'"


def test_a_failed_start_carries_the_replica_s_words() -> None:
    setback = starting().reported(ID, report("failed", error="it raised\nKeyError: 'x'"), 1.0)
    assert setback is not None
    assert setback.first_steps
    assert setback.who() == f"replica {ID}"
    assert isinstance(setback.problem(), BackendStartError)
    assert problem(setback).endswith("It said:\nit raised\nKeyError: 'x'")
    assert "mend its code" in problem(setback)


@pytest.mark.parametrize("kind", [ConfigError, ArgumentError])
def test_an_error_of_another_class_stays_of_that_class(kind: type[Exception]) -> None:
    setback = starting().reported(ID, report("failed", error="no way", error_kind=kind.__name__), 1.0)
    assert setback is not None
    assert type(setback.problem()) is kind
    assert problem(setback) == "backend 'iris': no way"


def test_a_death_after_the_report_counts_once() -> None:
    fleet = starting()
    assert fleet.reported(ID, report("failed"), 1.0)
    assert fleet.ended(ID, "killed", 1.1) is None
    assert fleet.failures["iris", 1].count == 1
    assert fleet.failures["iris", 1].error == "it gave no reason"


def test_a_replica_that_was_told_to_drain_may_end() -> None:
    fleet = ready()
    fleet.drained(ID, 2.0)
    assert fleet.ended(ID, "exited with status 0", 3.0) is None
    assert fleet.failures == {}


def test_who_was_ready_is_not_to_blame_for_a_change() -> None:
    setback = ready().ended(ID, "killed by SIGKILL", 100.0)
    assert setback is not None
    assert not setback.first_steps


def test_one_that_is_unknown_changes_nothing() -> None:
    fleet = Fleet()
    assert fleet.reported(ID, report("ready"), 1.0) is None
    assert fleet.ended(ID, "killed", 1.0) is None
    fleet.checked(ID, "ill", 1.0)


def test_a_phase_that_there_is_not_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="asleep"):
        starting().reported(ID, report("asleep"), 1.0)


def test_the_history_is_that_of_the_version_and_its_error_one_short_line() -> None:
    fleet = ready()
    fleet.adopt("iris#0002", "iris", 2, 8, "local", 2.0)
    fleet.ended("iris#0002", "it raised\n  OSError: " + 5000 * "x" + "\n", 3.0)
    assert fleet.history(ID) == (0, "")
    fleet.adopt("iris#0003", "iris", 2, 9, "local", 4.0)
    count, line = fleet.history("iris#0003")
    assert count == 1
    assert line.startswith("OSError: xxx")
    assert len(line) == LINE_CHARS

    fleet.forget_failures({("iris", 1)})
    assert fleet.history("iris#0003") == (0, "")
    assert fleet.failures == {}


# --- reconfigure ---


def test_a_refused_user_config_is_told_and_not_a_restart() -> None:
    fleet = ready()
    fleet.configuring(ID, 4)
    setback = fleet.reported(ID, report("ready", config_version=4, error="LookupError: no"), 2.0)
    assert setback is not None
    assert setback.config_version == 4
    assert "the old one stays" in problem(setback)
    assert fleet.seen[ID].config_version == UNKNOWN_CONFIG
    assert fleet.history(ID) == (0, "LookupError: no")
    assert fleet.newest_config("iris") == 4


def test_a_report_from_before_it_was_told_does_not_answer() -> None:
    fleet = ready()
    fleet.configuring(ID, 4)
    fleet.reported(ID, report("ready", config_version=0), 2.0)
    assert fleet.seen[ID].reconfiguring
    fleet.reported(ID, report("ready", config_version=4), 3.0)
    assert not fleet.seen[ID].reconfiguring


def test_one_that_is_broken_counts_and_stops() -> None:
    fleet = ready()
    assert fleet.broken(ID, "cannot be configured", 2.0)
    assert fleet.seen[ID].phase == "stopping"
    assert fleet.ended(ID, "killed by SIGKILL", 2.1) is None
    assert fleet.failures["iris", 1].count == 1


def test_limits_are_news_once() -> None:
    fleet = ready()
    assert not fleet.told(ID, GOAL.settings)
    new = Settings(graceful_shutdown_timeout_s=3.0)
    assert fleet.told(ID, new)
    assert not fleet.told(ID, new)
    assert fleet.seen[ID].graceful_shutdown_timeout_s == 3.0


# --- health ---


def test_one_that_is_ill_often_enough_in_a_row_is_replaced() -> None:
    fleet = ready()
    for error in (*["ill"] * (UNHEALTHY - 1), "", *["ill"] * (UNHEALTHY - 1)):
        fleet.checked(ID, error, 2.0)
    assert fleet.seen[ID].version == 1
    fleet.checked(ID, "check_health raised\nValueError: ill", 3.0)
    assert fleet.seen[ID].version == UNWANTED
    assert fleet.version(ID) == 1
    assert fleet.failures["iris", 1].error == "its health check failed: ValueError: ill"


def test_one_that_hangs_is_replaced_at_once_and_counts_once() -> None:
    fleet = ready()
    for _ in range(3):
        fleet.checked(ID, "check_health did not return in 30 s", 2.0, hangs=True)
    assert fleet.seen[ID].version == UNWANTED
    assert fleet.failures["iris", 1].count == 1
    assert fleet.history(ID) == (1, "its health check failed: check_health did not return in 30 s")
    assert fleet.ended(ID, "killed", 3.0) is None


def test_one_that_starts_is_not_judged_by_its_health() -> None:
    fleet = starting()
    fleet.checked(ID, "ill", 2.0, hangs=True)
    assert fleet.seen[ID].version == 1


# --- questions ---


def test_facts_are_those_of_a_ready_replica_of_the_version() -> None:
    assert starting().facts(GOAL) is None
    assert ready().facts(GOAL) == Facts(is_async=True)
