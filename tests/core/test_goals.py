"""core/goals.py: each change of the public API, its errors, and that an error changes nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from headgate.core import goals as change
from headgate.core.reconcile import Failures, Seen
from headgate.core.state import BackendGoal, BackendView, Facts, Goals, ReplicaAddress, Settings
from headgate.errors import ArgumentError, ConfigError

PLAIN, BATCH = Facts(), Facts(accepts_batch=True)


def backend(tag, version=1, **more):
    return BackendGoal(tag, version, "code", Settings(), PLAIN, **more)


def world(*tags):
    goals = Goals()
    for tag in tags or ("iris", "rose"):
        goals = change.add_backend(goals, backend(tag))
    return goals


def routed(route="/a", methods=("GET",), name="a", goals=None, **more):
    goals = world() if goals is None else goals
    return change.add_endpoint(goals, name, backend="iris", route=route, methods=list(methods), **more)


# ---------------------------------------------------------------- backends


def test_backends_keep_the_order_of_their_creation():
    assert [goal.tag for goal in world("b", "a", "c").backends] == ["b", "a", "c"]


def test_a_tag_is_taken_once():
    with pytest.raises(ConfigError, match="'iris' exists"):
        change.add_backend(world(), backend("iris"))


def test_a_repeated_call_finds_its_backend_registered():
    goals = change.add_backend(world(), backend("lily", call="c1"))

    assert change.add_backend(goals, backend("lily", call="c1")) is goals
    with pytest.raises(ConfigError):
        change.add_backend(goals, backend("lily", call="c2"))


def test_an_unknown_backend_is_named_beside_the_known_ones():
    with pytest.raises(ConfigError, match="no backend 'lily'; the backends are: 'iris', 'rose'"):
        change.find_backend(world(), "lily")
    with pytest.raises(ConfigError, match="no backend 'lily'; there are no backends yet"):
        change.find_backend(Goals(), "lily")


def test_a_new_version_takes_the_old_place():
    goals = change.replace_backend(world(), backend("iris", version=2))

    assert [(goal.tag, goal.version) for goal in goals.backends] == [("iris", 2), ("rose", 1)]


def test_a_version_that_is_not_newer_is_refused_unless_the_call_is_repeated():
    goals = change.replace_backend(world(), backend("iris", version=2, call="c1"))

    assert change.replace_backend(goals, backend("iris", version=2, call="c1")) is goals
    with pytest.raises(ConfigError, match="updated to version 2"):
        change.replace_backend(goals, backend("iris", version=2, call="c2"))
    with pytest.raises(ConfigError, match="lily"):
        change.replace_backend(goals, backend("lily", version=9))


def test_the_next_version_is_above_all_that_ever_ran():
    assert change.next_version(world(), "iris") == 2
    assert change.next_version(world(), "iris", [1, 4]) == 5
    assert change.next_version(world(), "lily") == 1
    assert change.next_version(world(), "lily", [2]) == 3


def test_a_change_of_config_changes_only_what_it_names():
    goals = change.change_config(world(), "iris", {"num_replicas": 3})
    goals = change.change_config(goals, "iris", {"idempotent": True}, call="c2")
    iris = change.find_backend(goals, "iris")

    assert iris.given == {"num_replicas": 3, "idempotent": True}
    assert iris.settings == Settings(num_replicas=3, idempotent=True)
    assert (iris.version, iris.config_version, iris.call) == (1, 0, "c2")
    assert change.find_backend(goals, "rose") == change.find_backend(world(), "rose")


def test_a_new_batch_size_resolves_concurrent_queries_anew():
    goals = Goals(backends=(replace(backend("iris"), facts=BATCH),))
    goals = change.change_config(goals, "iris", {"max_batch_size": 6})

    assert change.find_backend(goals, "iris").settings.max_concurrent_queries == 12


def test_a_bad_config_or_an_unknown_backend_is_an_error():
    with pytest.raises(ConfigError, match="accept_batch"):
        change.change_config(world(), "iris", {"max_batch_size": 2})
    with pytest.raises(ConfigError, match="lily"):
        change.change_config(world(), "lily", {})


def test_a_new_user_config_gets_a_version_that_no_replica_ever_saw():
    goals = change.change_config(world(), "iris", {}, user_config="h1")
    assert change.find_backend(goals, "iris").config_version == 1

    same = change.change_config(goals, "iris", {}, user_config="h1")
    assert change.find_backend(same, "iris").config_version == 1

    none = change.change_config(goals, "iris", {}, user_config=None, used=4)
    assert change.find_backend(none, "iris").config_version == 5
    assert change.find_backend(none, "iris").user_config is None


def test_a_repeated_change_of_config_is_made_once():
    goals = change.change_config(world(), "iris", {}, user_config="h1", call="c1")

    assert change.change_config(goals, "iris", {}, user_config="h1", call="c1") is goals


def test_a_backend_in_use_stays():
    goals = change.set_traffic(routed(), "a", {"rose": 1.0, "iris": 0.0})
    for tag in ("iris", "rose"):
        with pytest.raises(ConfigError, match=f"'{tag}' is used by endpoint 'a'"):
            change.remove_backend(goals, tag)


def test_a_shadow_is_a_use_too():
    goals = change.set_shadow(routed(), "a", "rose", 0.5)
    with pytest.raises(ConfigError, match="'rose' is used by endpoint 'a'"):
        change.remove_backend(goals, "rose")

    unused = change.set_shadow(goals, "a", "rose", 0)
    assert change.remove_backend(unused, "rose").backends == world("iris").backends


def test_removing_what_is_not_there_is_no_error():
    assert change.remove_backend(world(), "lily") == world()
    assert change.remove_endpoint(world(), "a") == world()


# ---------------------------------------------------------------- endpoints


def test_an_endpoint_sends_all_to_its_backend():
    endpoint = change.find_endpoint(routed("/a", ["get", "Post"]), "a")

    assert (endpoint.route, endpoint.methods) == ("/a", ("GET", "POST"))
    assert endpoint.traffic.weights == (("iris", 1.0),)


@pytest.mark.parametrize(
    "wrong",
    [
        {"name": 3},
        {"backend": None},
        {"backend": 3},
        {"route": 3},
        {"route": "a"},
        {"route": ""},
        {"methods": "GET"},
        {"methods": ("GET",)},
        {"methods": ["GET", 3]},
        {"methods": None},
    ],
)
def test_an_argument_of_the_wrong_type_is_a_type_error(wrong):
    arguments = {"name": "a", "backend": "iris", "route": "/a", "methods": ["GET"], **wrong}
    with pytest.raises(ArgumentError):
        change.add_endpoint(world(), arguments.pop("name"), **arguments)


@pytest.mark.parametrize("route", ["/{a}/{a}", "/{a:odd}", "/{}"])
def test_a_malformed_route_is_a_value_error(route):
    with pytest.raises(ConfigError):
        routed(route)


def test_an_endpoint_that_no_request_could_reach_is_refused():
    with pytest.raises(ConfigError, match="methods is empty"):
        routed(methods=[])
    with pytest.raises(ConfigError, match="headgate's own"):
        routed("/-/mine")


def test_an_unregistered_backend_is_named():
    with pytest.raises(ConfigError, match=r"'lily'.*'iris', 'rose'"):
        change.add_endpoint(world(), "a", backend="lily", route=None, methods=["GET"])


def test_a_name_is_taken_once_and_the_message_knows_what_was_meant():
    with pytest.raises(ConfigError, match="set_traffic"):
        routed(goals=routed())
    with pytest.raises(ConfigError, match="use another name"):
        routed("/b", goals=routed())
    with pytest.raises(ConfigError, match="use another name"):
        routed(methods=["POST"], goals=routed())


def test_a_route_is_taken_once_whatever_the_methods():
    with pytest.raises(ConfigError, match="belongs to endpoint 'a'"):
        routed(methods=["POST"], name="b", goals=routed())


def test_endpoints_without_a_route_live_side_by_side():
    goals = routed(None, name="c", goals=routed(None, name="b", goals=routed()))

    assert [goal.endpoint.name for goal in goals.endpoints] == ["a", "b", "c"]


def test_a_route_that_an_earlier_one_contains_is_refused():
    with pytest.raises(ConfigError, match=r"'/\{x\}' of endpoint 'a' comes first"):
        routed("/b", name="b", goals=routed("/{x}"))


@pytest.mark.parametrize(
    ("earlier", "later", "fits"),
    [
        (["GET"], ["POST"], True),
        (["GET"], ["GET", "POST"], True),
        (["GET", "POST"], ["GET"], False),
        (["GET"], ["HEAD"], False),
        (["HEAD"], ["GET"], True),
    ],
)
def test_a_contained_route_fits_in_if_it_answers_a_method_more(earlier, later, fits):
    goals = routed("/{x}", earlier)
    if fits:
        assert len(routed("/b", later, name="b", goals=goals).endpoints) == 2
    else:
        with pytest.raises(ConfigError):
            routed("/b", later, name="b", goals=goals)


def test_the_narrower_route_may_come_first():
    assert len(routed("/{x}", name="b", goals=routed("/b")).endpoints) == 2


def test_a_repeated_call_finds_its_endpoint():
    goals = routed(call="c1")

    assert routed(goals=goals, call="c1") is goals


def test_a_removed_endpoint_leaves_its_name_and_route_free():
    assert routed(goals=change.remove_endpoint(routed(), "a")) == routed()


def test_a_split_replaces_the_old_one_and_shadows_stay():
    goals = change.set_shadow(routed(), "a", "rose", 0.25)
    goals = change.set_traffic(goals, "a", {"iris": 0.5, "rose": 0.5}, call="c1")
    traffic = change.find_endpoint(goals, "a").traffic

    assert traffic.weights == (("iris", 0.5), ("rose", 0.5))
    assert traffic.shadows == (("rose", 0.25),)
    assert goals.endpoints[0].call == "c1"


def test_only_the_named_endpoint_changes():
    goals = routed(None, name="b", goals=routed())
    changed = change.set_traffic(goals, "a", {"rose": 1})

    assert changed.endpoints[1] == goals.endpoints[1]


@pytest.mark.parametrize(
    "weights", [{}, {"lily": 1.0}, {"iris": 0.5}, {"iris": -1, "rose": 2}, {"iris": "1"}]
)
def test_a_bad_split_is_a_value_error(weights):
    with pytest.raises(ConfigError):
        change.set_traffic(routed(), "a", weights)


def test_traffic_of_an_unknown_endpoint_is_a_value_error():
    with pytest.raises(ConfigError, match="no endpoint 'b'; the endpoints are: 'a'"):
        change.set_traffic(routed(), "b", {"iris": 1})
    with pytest.raises(ConfigError, match="no endpoint 'b'"):
        change.set_shadow(routed(), "b", "iris", 0.5)


def test_a_shadow_needs_a_backend_and_a_share():
    with pytest.raises(ConfigError, match="lily"):
        change.set_shadow(routed(), "a", "lily", 0.5)
    for proportion in (1.5, -0.1, "half", True, None):
        with pytest.raises(ArgumentError):
            change.set_shadow(routed(), "a", "rose", proportion)


# ---------------------------------------------------------------- snapshot


def test_a_snapshot_lists_the_ready_replicas_of_the_goal_and_says_why_there_are_none():
    seen = [
        Seen("iris#1", "iris", 1, "ready", 0.0, address="/run/1", pid=11, node="n1"),
        Seen("iris#2", "iris", 2, "ready", 0.0),
        Seen("lily#3", "lily", 1, "ready", 0.0),
    ]
    failures = {("rose", 1): Failures(2, 0.0, "ValueError: thorn")}
    shown = change.snapshot(routed(goals=world("iris", "rose", "tulip")), seen, 7, True, failures)

    assert (shown.version, shown.ready) == (7, True)
    assert shown.endpoints == (change.find_endpoint(routed(), "a"),)
    assert shown.backends == (
        BackendView("iris", 1, Settings(), (ReplicaAddress("iris#1", "/run/1", 11, "n1"),)),
        BackendView("rose", 1, Settings(), (), "its replicas fail: ValueError: thorn"),
        BackendView("tulip", 1, Settings(), (), "its replicas are starting"),
    )


# ---------------------------------------------------------------- properties

NAMES = st.sampled_from(["iris", "rose", "lily"])
ROUTES = st.sampled_from([None, "/a", "/{x}", "/a/{y:int}", "bad"])
STEPS = st.one_of(
    st.tuples(st.just("add_backend"), NAMES),
    st.tuples(st.just("remove_backend"), NAMES),
    st.tuples(st.just("add_endpoint"), NAMES, NAMES, ROUTES),
    st.tuples(st.just("remove_endpoint"), NAMES),
    st.tuples(st.just("set_traffic"), NAMES, st.dictionaries(NAMES, st.sampled_from([0.0, 0.5, 1.0]))),
    st.tuples(st.just("set_shadow"), NAMES, NAMES, st.sampled_from([0.0, 0.5, 2.0])),
)


def performed(goals, step):
    match step:
        case ("add_backend", tag):
            return change.add_backend(goals, backend(tag))
        case ("add_endpoint", name, tag, route):
            return change.add_endpoint(goals, name, backend=tag, route=route, methods=["GET"])
        case (verb, *arguments):
            return getattr(change, verb)(goals, *arguments)


@given(st.lists(STEPS, max_size=20))
def test_whatever_users_do_the_goals_hold_together(steps):
    goals = Goals()
    for step in steps:
        try:
            goals = performed(goals, step)
        except (ConfigError, ArgumentError):
            continue
        tags = [goal.tag for goal in goals.backends]
        names = [goal.endpoint.name for goal in goals.endpoints]
        routes = [goal.endpoint.route for goal in goals.endpoints if goal.endpoint.route]
        assert all(len(set(group)) == len(group) for group in (tags, names, routes))
        for goal in goals.endpoints:
            traffic = goal.endpoint.traffic
            assert {tag for tag, _ in traffic.weights + traffic.shadows} <= set(tags)
            assert sum(share for _, share in traffic.weights) == pytest.approx(1.0)
