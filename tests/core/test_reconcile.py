"""core/reconcile.py: single decisions as literals, and what holds for every input as properties.

Whole rollouts and incidents are in tests/scenarios.
"""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from headgate.core import lifecycle
from headgate.core.goals import snapshot
from headgate.core.reconcile import (
    UNKNOWN_CONFIG,
    Drain,
    Failures,
    Reconfigure,
    Seen,
    Start,
    Stop,
    all_wanted,
    backoff_s,
    by_version,
    failed,
    heard,
    next_look,
    plan,
    reached,
    serving,
    unmet,
)
from headgate.core.state import BackendGoal, Facts, Goals, Settings


def goal(count=1, version=1, tag="iris", config=0, **settings_):
    return BackendGoal(
        tag, version, "code", Settings(num_replicas=count, **settings_), Facts(), config_version=config
    )


def seen(number, phase="ready", version=1, since=0.0, tag="iris", **more):
    return Seen(f"{tag}#{number}", tag, version, phase, since, **more)


def planned(goals, replicas, failures=None, now=0.0, candidates=()):
    return plan(Goals(backends=tuple(goals)), replicas, failures or {}, now, candidates=candidates)


START = Start("iris", 1)


class Counted(list):
    """Replicas that count how often somebody goes through all of them."""

    rounds = 0

    def __iter__(self):
        self.rounds += 1
        return super().__iter__()


def test_many_backends_do_not_each_look_at_all_replicas():
    backends = tuple(goal(tag=f"b{number}") for number in range(100))
    replicas = Counted(seen(1, tag=one.tag) for one in backends)
    assert plan(Goals(backends=backends), replicas, {}, 0.0) == []
    assert unmet(Goals(backends=backends), replicas, {}, 0.0) == ()
    assert len(snapshot(Goals(backends=backends), replicas, 1, True).backends) == 100
    assert replicas.rounds < 10


def test_replicas_are_told_apart_by_backend_and_version():
    one, two, other = seen(1), seen(2, version=2), seen(1, tag="rose")
    assert by_version([one, two, other, one]) == {("iris", 1): [one, one], ("iris", 2): [two], ("rose", 1): [other]}


# ---------------------------------------------------------------- start


def test_what_is_missing_is_started_at_once():
    assert planned([goal(3)], [seen(1)]) == [START, START]


def test_a_replica_that_starts_counts():
    assert planned([goal(2)], [seen(1), seen(2, "starting")]) == []


def test_a_replica_that_leaves_does_not_count():
    leaving = [seen(1, "draining"), seen(2, "stopping"), seen(3, version=2, routed=True)]

    assert planned([goal(1)], leaving) == [START]


def test_a_failed_version_waits_for_its_back_off():
    failures = {("iris", 1): Failures(3, 10.0, "ValueError")}

    assert planned([goal(1)], [], failures, now=10.3) == []
    assert planned([goal(1)], [], failures, now=10.5) == [START]


def test_one_failing_version_does_not_hold_up_another():
    failures = {("iris", 2): Failures(3, 10.0, "ValueError")}

    assert planned([goal(1)], [], failures, now=10.0, candidates=[goal(1, version=2)]) == [START]


def test_the_back_off_doubles_from_a_tenth_of_a_second_to_ten():
    assert [backoff_s(count) for count in range(10)] == [0, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10]
    assert backoff_s(10**9) == 10.0


# ---------------------------------------------------------------- counting failures


def test_failures_in_a_row_are_counted():
    once = failed(None, seen(1, "starting", since=0.0), 1.0, "a")
    twice = failed(once, seen(2, "starting", since=1.1), 1.2, "b")

    assert (once, twice) == (Failures(1, 1.0, "a"), Failures(2, 1.2, "b"))


def test_replicas_that_fail_together_count_once():
    once = failed(None, seen(1, "starting", since=0.0), 1.0, "a")

    assert failed(once, seen(2, "starting", since=0.0), 1.1, "b") == Failures(1, 1.1, "b")


def test_one_that_served_for_a_while_begins_the_count_anew():
    before = Failures(3, 1.0, "a")

    assert failed(before, seen(2, since=2.0), 2.9, "b").count == 1
    assert failed(before, seen(2, since=2.0), 2.7, "b").count == 4


def test_the_death_of_an_old_one_does_not_hide_that_new_ones_cannot_start():
    assert failed(Failures(7, 50.0, "a"), seen(1, since=0.0), 51.0, "b").count == 7


def test_failures_long_ago_are_forgotten():
    assert failed(Failures(7, 0.0, "a"), seen(1, "starting", since=60.0), 61.0, "b").count == 1


# ---------------------------------------------------------------- serve


def test_the_oldest_ready_replicas_of_the_version_serve():
    replicas = [seen(10), seen(9), seen(2, "starting"), seen(3, version=2), seen(1, tag="rose"), seen(8)]

    assert [one.id for one in serving(goal(2), replicas)] == ["iris#8", "iris#9"]


def test_a_goal_is_reached_with_all_replicas_ready_and_configured():
    two = goal(2, config=3)

    assert not reached(two, [seen(1, config_version=3)])
    assert not reached(two, [seen(1, config_version=3), seen(2, config_version=2)])
    assert not reached(two, [seen(1, config_version=3), seen(2, config_version=3, reconfiguring=True)])
    assert reached(two, [seen(1, config_version=3), seen(2, config_version=3)])


# ---------------------------------------------------------------- reconfigure


def test_a_ready_replica_gets_the_wanted_user_config_once():
    one = goal(1, config=2)

    assert planned([one], [seen(1, config_version=1)]) == [Reconfigure("iris#1", 2)]
    assert planned([one], [seen(1, config_version=UNKNOWN_CONFIG)]) == [Reconfigure("iris#1", 2)]
    assert planned([one], [seen(1, config_version=1, reconfiguring=True)]) == []
    assert planned([one], [seen(1, "starting", config_version=1)]) == []


def test_a_candidate_of_the_same_version_is_tried_out_on_what_runs():
    assert planned([goal(1, config=1)], [seen(1, config_version=1)], candidates=[goal(2, config=2)]) == [
        START,
        Reconfigure("iris#1", 2),
    ]


def test_a_candidate_takes_nothing_away():
    two = [seen(1), seen(2)]

    assert planned([goal(2)], two, candidates=[goal(1)]) == []
    assert all_wanted(Goals(backends=(goal(2),)), [goal(1)])["iris", 1].settings.num_replicas == 2


# ---------------------------------------------------------------- drain and stop


def test_a_surplus_replica_drains_once_no_router_follows_it():
    assert planned([goal(1)], [seen(1), seen(2, routed=True)]) == []
    assert planned([goal(1)], [seen(1), seen(2)]) == [Drain("iris#2")]


def test_the_youngest_starting_one_is_stopped_first():
    replicas = [seen(1, "starting"), seen(2), seen(3, "starting")]

    assert planned([goal(2)], replicas) == [Stop("iris#3", "no longer wanted")]


def test_a_replica_of_nobody_drains_or_stops():
    replicas = [seen(1), seen(2, "starting"), seen(3, "drained"), seen(4, routed=True), seen(5, "stopping")]

    assert planned([], replicas) == [
        Drain("iris#1"),
        Stop("iris#2", "no longer wanted"),
        Stop("iris#3", "drained"),
    ]


def test_a_ready_candidate_is_kept():
    assert planned([goal(1)], [seen(1), seen(2, version=2)], candidates=[goal(1, version=2)]) == []


def test_draining_ends_with_the_time_that_the_backend_allows():
    drains = seen(1, "draining", since=10.0, graceful_shutdown_timeout_s=3.0)
    known = goal(0, graceful_shutdown_timeout_s=5.0)
    late = Stop("iris#1", "still busy after graceful_shutdown_timeout_s = 5")

    assert planned([known], [drains], now=14.9) == []
    assert planned([known], [drains], now=15.0) == [late]
    assert planned([], [drains], now=12.9) == []
    assert planned([], [drains], now=13.0) != []


def test_a_routed_replica_is_never_stopped():
    replicas = [seen(1, "draining", routed=True), seen(2, "drained", routed=True)]

    assert planned([], replicas, now=1e9) == []


def test_a_worn_replica_serves_until_a_new_one_is_ready():
    worn, new = seen(1, worn="it is old"), seen(2, "starting")

    assert planned([goal(1)], [worn]) == [START]
    assert planned([goal(1)], [worn, new]) == []
    assert serving(goal(1), [worn, new]) == (worn,)
    assert reached(goal(1), [worn, new])
    ready = replace(new, phase="ready")
    assert serving(goal(1), [worn, ready]) == (ready,)
    assert planned([goal(1)], [replace(worn, routed=True), ready]) == []
    assert planned([goal(1)], [worn, ready]) == [Drain("iris#1")]


def test_of_worn_replicas_one_leaves_at_a_time_the_oldest_first():
    one, two, three = (seen(number, worn="it is old") for number in (1, 2, 3))
    new = seen(4)

    assert planned([goal(3)], [one, two, three]) == [START]
    assert planned([goal(3)], [one, two, three, replace(new, phase="starting")]) == []
    assert set(serving(goal(3), [one, two, three, new])) == {new, two, three}
    assert planned([goal(3)], [one, two, three, new]) == [START, Drain("iris#1")]
    assert planned([goal(3)], [replace(one, phase="draining"), two, three, new]) == [START]


def test_of_worn_replicas_that_are_too_many_one_stays_until_a_new_one_is_ready():
    one, two = (seen(number, worn="it is old") for number in (1, 2))

    assert planned([goal(1)], [one, two]) == [START, Drain("iris#1")]


def test_a_worn_replica_is_the_first_to_go_when_fewer_are_wanted():
    assert planned([goal(1)], [seen(1, worn="it is old"), seen(2)]) == [Drain("iris#1")]


def test_a_worn_replica_whose_successor_fails_serves_on():
    failures = {("iris", 1): Failures(3, last_at=10.0, error="ValueError: no")}
    worn = seen(1, worn="it is old")

    assert planned([goal(1)], [worn], failures, now=10.1) == []
    assert planned([goal(1)], [worn], failures, now=10.4) == [START]


def test_a_worn_replica_takes_a_new_user_config_too():
    assert planned([goal(1, config=1)], [seen(1, worn="it is old")]) == [START, Reconfigure("iris#1", 1)]


def test_the_status_says_which_replica_is_worn_and_why():
    worn = seen(1, worn="it has served 1000 requests (max_requests = 1000)")
    why = "it has served 1000 requests (max_requests = 1000)"
    wanted = Goals(backends=(goal(1),))

    assert unmet(wanted, [worn], {}, 0.0) == (f"replica iris#1 serves until a new one is ready: {why}",)
    assert unmet(wanted, [replace(worn, phase="draining"), seen(2)], {}, 5.0) == (
        f"replica iris#1 leaves, since {why}: it finishes its requests, for 15.0 s at most",
    )


def test_heard_moves_a_replica_and_notes_when():
    one = heard(seen(1, "starting"), lifecycle.STARTED, 5.0)

    assert (one.phase, one.since) == ("ready", 5.0)
    assert heard(one, lifecycle.STARTED, 6.0) is one


# ---------------------------------------------------------------- when to look again, and what to say


def test_time_changes_the_plan_when_a_back_off_or_a_drain_runs_out():
    failures = {("iris", 1): Failures(3, 10.0, "ValueError")}
    goals = Goals(backends=(goal(1),))

    assert next_look(goals, [], {}, 10.0) is None
    assert next_look(goals, [], failures, 10.0) == 10.4
    assert next_look(goals, [], failures, 10.4) is None
    assert next_look(goals, [seen(1, "draining", since=3.0), seen(2)], {}, 10.0) == 23.0


def test_the_status_says_what_is_waited_for_and_why():
    failures = {("iris", 1): Failures(3, 10.0, "ValueError: thorn")}
    goals = Goals(backends=(goal(3, config=1),))
    text = "backend 'iris' version 1: 1 of 3 replicas are ready"
    trouble = "failures in a row: 3, the last: ValueError: thorn"
    one, starts = seen(1, config_version=1), seen(2, "starting")

    assert unmet(goals, [one], {}, 10.0) == (text,)
    assert unmet(goals, [one, starts], {}, 10.0) == (f"{text}, 1 starting",)
    assert unmet(goals, [seen(1)], {}, 10.0) == (f"{text}, 1 without the newest user_config yet",)
    assert unmet(goals, [one], failures, 10.1) == (f"{text}; {trouble}; next try in 0.3 s",)

    enough = [one, starts, seen(3, "starting")]
    assert unmet(goals, enough, failures, 10.1) == (f"{text}, 2 starting; {trouble}",)


def test_the_status_says_what_a_replica_without_a_process_waits_for():
    goals = Goals(backends=(goal(4),))
    lacks = {f"iris#{number}": "for 2 CPUs: the freest node has 1 free" for number in (1, 2, 3)}
    text = "backend 'iris' version 1: 1 of 4 replicas are ready, 3 starting"
    replicas = [seen(1), *(seen(number, "starting") for number in (2, 3, 4))]

    assert unmet(goals, replicas, {}, 0.0, waits_for={"iris#2": lacks["iris#2"]}) == (
        f"{text} (replica iris#2 waits for 2 CPUs: the freest node has 1 free)",
    )
    lacks["iris#4"] = "no node has a GPU"
    assert unmet(goals, replicas, {}, 0.0, waits_for=lacks) == (
        f"{text} (replica iris#2 and 1 more wait for 2 CPUs: the freest node has 1 free; "
        "replica iris#4 waits: no node has a GPU)",
    )


def test_the_status_names_each_replica_that_leaves():
    replicas = [seen(1, routed=True), seen(2, "draining", since=5.0), seen(3, "stopping")]

    assert unmet(Goals(), replicas, {}, 10.0) == (
        "replica iris#1 leaves: a router may still send to it",
        "replica iris#2 leaves: it finishes its requests, for 15.0 s at most",
        "replica iris#3 leaves: it is stopping",
    )


def test_nothing_is_waited_for_when_all_is_as_wanted():
    assert unmet(Goals(backends=(goal(1),)), [seen(1, routed=True)], {}, 0.0) == ()


# ---------------------------------------------------------------- properties

TAGS = st.sampled_from(["iris", "rose"])
VERSIONS = st.integers(1, 3)
CONFIGS = st.integers(0, 2)
TIMES = st.integers(0, 40).map(float)
GOALS = st.builds(goal, st.integers(1, 3), VERSIONS, TAGS, CONFIGS)
BACKENDS = st.lists(GOALS, max_size=2, unique_by=lambda one: one.tag).map(
    lambda ones: Goals(backends=tuple(ones))
)
CANDIDATES = st.lists(GOALS, max_size=2, unique_by=lambda one: one.tag)
REPLICAS = st.lists(
    st.builds(
        seen, st.integers(1, 20), st.sampled_from(lifecycle.PHASES[:-1]), VERSIONS, TIMES, TAGS,
        routed=st.booleans(), config_version=CONFIGS, reconfiguring=st.booleans(),
        worn=st.sampled_from(["", "", "it is old"]),
    ),
    max_size=8, unique_by=lambda one: one.id,
)  # fmt: skip
FAILURES = st.dictionaries(
    st.tuples(TAGS, VERSIONS), st.builds(Failures, st.integers(1, 9), TIMES, st.just("ValueError"))
)


def performed(actions, replicas, now, first=100):
    """The replicas after the engine took the actions; none has answered yet."""
    left = {one.id: one for one in replicas}
    for number, action in enumerate(actions, first):
        match action:
            case Start(tag, version):
                left[f"{tag}#{number}"] = seen(number, "starting", version, now, tag)
            case Reconfigure(one, _):
                left[one] = replace(left[one], reconfiguring=True)
            case Drain(one):
                left[one] = heard(left[one], lifecycle.DRAIN, now)
            case Stop(one, _):
                left[one] = heard(left[one], lifecycle.STOP, now)
    return list(left.values())


@given(BACKENDS, REPLICAS, FAILURES, TIMES, CANDIDATES)
def test_a_replica_that_serves_or_is_routed_is_left_alone(goals, replicas, failures, now, candidates):
    actions = plan(goals, replicas, failures, now, candidates=candidates)
    touched = {action.id for action in actions if isinstance(action, Drain | Stop)}

    assert not touched & {one.id for one in replicas if one.routed}
    assert not touched & {one.id for wanted in goals.backends for one in serving(wanted, replicas)}


@given(BACKENDS, REPLICAS, FAILURES, TIMES, CANDIDATES)
def test_once_performed_there_is_nothing_to_do(goals, replicas, failures, now, candidates):
    actions = plan(goals, replicas, failures, now, candidates=candidates)

    assert plan(goals, performed(actions, replicas, now), failures, now, candidates=candidates) == []


@given(BACKENDS, REPLICAS, FAILURES, TIMES, CANDIDATES, st.randoms(use_true_random=False))
def test_the_order_of_what_is_seen_does_not_count(goals, replicas, failures, now, candidates, chance):
    shuffled = chance.sample(replicas, len(replicas))

    assert plan(goals, replicas, failures, now, candidates=candidates) == plan(
        goals, shuffled, failures, now, candidates=candidates
    )


@given(BACKENDS, REPLICAS, FAILURES, TIMES, CANDIDATES)
def test_nothing_changes_before_the_next_look(goals, replicas, failures, now, candidates):
    moment = next_look(goals, replicas, failures, now, candidates=candidates)
    later = now + 1000.0 if moment is None else (now + moment) / 2

    assert plan(goals, replicas, failures, now, candidates=candidates) == plan(
        goals, replicas, failures, later, candidates=candidates
    )


@given(BACKENDS, REPLICAS, FAILURES, TIMES)
@settings(max_examples=50)
def test_when_everybody_does_as_told_all_gets_as_wanted(goals, replicas, failures, now):
    for round_ in range(1, 9):
        now += 20.0
        replicas = performed(plan(goals, replicas, failures, now), replicas, now, first=100 * round_)
        replicas = [answered(goals, one, now) for one in replicas if one.phase != "stopping"]
        listed = {one.id for wanted in goals.backends for one in serving(wanted, replicas)}
        replicas = [replace(one, routed=one.id in listed) for one in replicas]

    assert unmet(goals, replicas, failures, now) == ()
    assert len(replicas) == sum(wanted.settings.num_replicas for wanted in goals.backends)


def answered(goals, one, now):
    """The replica after it did at once what it was told."""
    configs = {(wanted.tag, wanted.version): wanted.config_version for wanted in goals.backends}
    config = configs.get((one.backend, one.version), 0)
    event = {"starting": lifecycle.STARTED, "draining": lifecycle.IDLE}.get(one.phase)
    told = heard(one, event, now) if event else one
    return replace(told, reconfiguring=False, config_version=config)
