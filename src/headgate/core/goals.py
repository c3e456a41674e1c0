"""The changes that users may ask for: `Goals` in, new `Goals` out, or a typed error and nothing changed.

Each function says yes or no to one call of the public API, exactly as its contract lists the
errors. A change names the control call that asked for it (`call`): when a client repeats a
call because it got no answer, the goals that already hold it come back as they are.

`snapshot` turns goals and what runs into what routers obey. Which replicas run is
core/reconcile.py; what a single config field may hold is headgate/config.py; who changes goals
are controller/calls.py and controller/backends.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from msgspec import UNSET, UnsetType
from msgspec.structs import replace

from headgate.core import reconcile, routes, traffic
from headgate.core.defaults import resolve
from headgate.core.state import (
    BackendGoal,
    BackendView,
    Endpoint,
    EndpointGoal,
    Goals,
    ReplicaAddress,
    Snapshot,
    Traffic,
)
from headgate.errors import ArgumentError, ConfigError

#: Routes below it are headgate's own.
RESERVED = "/-/"


# ---------------------------------------------------------------- backends


def find_backend(goals: Goals, tag: str) -> BackendGoal:
    """The backend of that tag; raises ConfigError if there is none."""
    for goal in goals.backends:
        if goal.tag == tag:
            return goal
    raise ConfigError(f"there is no backend {tag!r}; {_known('backends', _tags(goals))}")


def next_version(goals: Goals, tag: str, used: Iterable[int] = ()) -> int:
    """The version for new code: above the backend's and above `used`, those of replicas that still run."""
    return 1 + max([goal.version for goal in goals.backends if goal.tag == tag] + list(used), default=0)


def add_backend(goals: Goals, new: BackendGoal) -> Goals:
    """`goals` with a further backend; raises ConfigError if the tag is taken."""
    for goal in goals.backends:
        if goal.tag == new.tag and _repeats(goal.call, new.call):
            return goals
        if goal.tag == new.tag:
            raise ConfigError(
                f"backend {new.tag!r} exists; use another tag, update_backend for new code, "
                "or delete_backend first"
            )
    return replace(goals, backends=(*goals.backends, new))


def replace_backend(goals: Goals, new: BackendGoal) -> Goals:
    """`goals` with a new version of a backend, at its old place.

    Raises ConfigError if there is no such backend, or if it has moved on to that version meanwhile.
    """
    old = find_backend(goals, new.tag)
    if _repeats(old.call, new.call):
        return goals
    if new.version <= old.version:
        raise ConfigError(
            f"backend {new.tag!r} was updated to version {old.version} while version {new.version} "
            "was being started; call update_backend again"
        )
    return _with_backend(goals, new)


def change_config(
    goals: Goals,
    tag: str,
    given: Mapping[str, Any],
    *,
    user_config: str | UnsetType | None = UNSET,
    used: int = 0,
    call: str = "",
) -> Goals:
    """`goals` with the fields of `given` changed, all others as they were.

    user_config   the content hash of the new one; unset leaves it as it is
    used          the highest config_version that any replica was ever sent; a new one is above it

    Raises ConfigError for an unknown backend, or for fields that do not go with its code.
    """
    old = find_backend(goals, tag)
    if _repeats(old.call, call):
        return goals
    merged = {**old.given, **given}
    new = replace(old, given=merged, settings=resolve(merged, old.facts), call=call)
    if user_config is not UNSET and user_config != old.user_config:
        new = replace(new, user_config=user_config, config_version=max(old.config_version, used) + 1)
    return _with_backend(goals, new)


def remove_backend(goals: Goals, tag: str) -> Goals:
    """`goals` without the backend; an unknown one is no error.

    Raises ConfigError while the traffic or the shadows of an endpoint name it, even at weight 0.
    """
    for goal in goals.endpoints:
        if tag in traffic.uses(goal.endpoint.traffic):
            raise ConfigError(
                f"backend {tag!r} is used by endpoint {goal.endpoint.name!r}; take it out with "
                "set_traffic and shadow_traffic, or delete the endpoint first"
            )
    return replace(goals, backends=tuple(goal for goal in goals.backends if goal.tag != tag))


# ---------------------------------------------------------------- endpoints


def find_endpoint(goals: Goals, name: str) -> Endpoint:
    """The endpoint of that name; raises ConfigError if there is none."""
    for goal in goals.endpoints:
        if goal.endpoint.name == name:
            return goal.endpoint
    known = [goal.endpoint.name for goal in goals.endpoints]
    raise ConfigError(f"there is no endpoint {name!r}; {_known('endpoints', known)}")


def add_endpoint(
    goals: Goals, name: object, *, backend: object, route: object, methods: object, call: str = ""
) -> Goals:
    """`goals` with a further endpoint, all of whose requests go to `backend`.

    Raises ArgumentError for an argument of the wrong type; ConfigError for an unregistered backend,
    a name or route that is taken, a malformed route, or one that could never be reached.
    """
    new = _checked_endpoint(name, backend, route, methods)
    for goal in goals.endpoints:
        if goal.endpoint.name == new.name and _repeats(goal.call, call):
            return goals
    if backend not in _tags(goals):
        raise ConfigError(
            f"endpoint {name!r}: there is no backend {backend!r}; {_known('backends', _tags(goals))}"
        )
    for goal in goals.endpoints:
        _check_room(goal.endpoint, new)
    return replace(goals, endpoints=(*goals.endpoints, EndpointGoal(new, call)))


def remove_endpoint(goals: Goals, name: str) -> Goals:
    """`goals` without the endpoint; an unknown one is no error, and backends stay."""
    return replace(goals, endpoints=tuple(goal for goal in goals.endpoints if goal.endpoint.name != name))


def set_traffic(goals: Goals, name: str, weights: object, *, call: str = "") -> Goals:
    """`goals` with the endpoint's requests split anew; its shadows stay.

    Raises ConfigError for an unknown endpoint, an unregistered backend or a bad share.
    """
    old = find_endpoint(goals, name)
    shares = traffic.check_weights(name, weights, _tags(goals))
    return _with_endpoint(goals, replace(old, traffic=traffic.with_weights(old.traffic, shares)), call)


def set_shadow(goals: Goals, name: str, tag: str, proportion: object, *, call: str = "") -> Goals:
    """`goals` with that share of the endpoint's requests also sent to `tag`; 0 takes the shadow away.

    Raises ArgumentError unless `proportion` is a number in [0, 1], ConfigError for an unknown
    endpoint or backend.
    """
    share = traffic.check_proportion(proportion)
    old = find_endpoint(goals, name)
    find_backend(goals, tag)
    return _with_endpoint(goals, replace(old, traffic=traffic.with_shadow(old.traffic, tag, share)), call)


# ---------------------------------------------------------------- what routers get


def snapshot(
    goals: Goals,
    observed: Sequence[reconcile.Seen],
    version: int,
    ready: bool,
    failures: Mapping[reconcile.Version, reconcile.Failures] = {},
) -> Snapshot:
    """What routers are to obey, given what runs now."""
    there = reconcile.by_version(observed)
    return Snapshot(
        version=version,
        endpoints=tuple(goal.endpoint for goal in goals.endpoints),
        backends=tuple(
            _view(goal, there.get((goal.tag, goal.version), ()), failures.get((goal.tag, goal.version)))
            for goal in goals.backends
        ),
        ready=ready,
    )


def _view(
    goal: BackendGoal, observed: Sequence[reconcile.Seen], failures: reconcile.Failures | None
) -> BackendView:
    replicas = tuple(
        ReplicaAddress(one.id, one.address, one.pid, one.node, one.remote)
        for one in reconcile.serving(goal, observed)
    )
    trouble = ""
    if not replicas:
        trouble = f"its replicas fail: {failures.error}" if failures else "its replicas are starting"
    return BackendView(goal.tag, goal.version, goal.settings, replicas, trouble)


# ---------------------------------------------------------------- details


def _repeats(stored: str, call: str) -> bool:
    return bool(call) and stored == call


def _tags(goals: Goals) -> tuple[str, ...]:
    return tuple(goal.tag for goal in goals.backends)


def _known(nouns: str, names: Sequence[str]) -> str:
    return f"the {nouns} are: {', '.join(map(repr, names))}" if names else f"there are no {nouns} yet"


def _with_backend(goals: Goals, new: BackendGoal) -> Goals:
    return replace(goals, backends=tuple(new if old.tag == new.tag else old for old in goals.backends))


def _with_endpoint(goals: Goals, new: Endpoint, call: str) -> Goals:
    changed = EndpointGoal(new, call)
    return replace(
        goals,
        endpoints=tuple(changed if old.endpoint.name == new.name else old for old in goals.endpoints),
    )


def _checked_endpoint(name: object, backend: object, route: object, methods: object) -> Endpoint:
    if not isinstance(name, str):
        raise ArgumentError(f"endpoint name must be a str, got {name!r}")
    if not isinstance(backend, str):
        raise ArgumentError(f"endpoint {name!r}: backend must be the tag of one, a str, got {backend!r}")
    path = None if route is None else _checked_route(name, route)
    if not isinstance(methods, list) or not all(isinstance(method, str) for method in methods):
        raise ArgumentError(f"endpoint {name!r}: methods must be a list of str, got {methods!r}")
    if not methods:
        raise ConfigError(f"endpoint {name!r}: methods is empty, so that no request could reach it")
    upper = tuple(method.upper() for method in methods)
    return Endpoint(name, path, upper, Traffic(weights=((backend, 1.0),)))


def _checked_route(name: str, route: object) -> str:
    if not isinstance(route, str) or not route.startswith("/"):
        raise ArgumentError(f"endpoint {name!r}: route must be a str that starts with '/', got {route!r}")
    if route.startswith(RESERVED):
        raise ConfigError(f"endpoint {name!r}: routes under {RESERVED!r} are headgate's own, got {route!r}")
    routes.compile_route(route)
    return route


def _check_room(old: Endpoint, new: Endpoint) -> None:
    """Raises ConfigError if `old` leaves no room for `new`."""
    if old.name == new.name:
        if old.route == new.route and set(old.methods) == set(new.methods):
            raise ConfigError(
                f"endpoint {new.name!r} exists with this route and these methods; "
                "use set_traffic to change which backends serve it"
            )
        raise ConfigError(f"endpoint {new.name!r} exists; use another name, or delete_endpoint first")
    if old.route is None or new.route is None:
        return
    if old.route == new.route:
        raise ConfigError(f"route {new.route!r} belongs to endpoint {old.name!r}; one route has one endpoint")
    if _answered(new.methods) <= _answered(old.methods) and routes.contains(old.route, new.route):
        raise ConfigError(
            f"endpoint {new.name!r}: route {new.route!r} could never be reached, because {old.route!r} of "
            f"endpoint {old.name!r} comes first and takes every such path; create the narrower route first"
        )


@lru_cache(maxsize=256)
def _answered(methods: tuple[str, ...]) -> frozenset[str]:
    """The methods that an endpoint with these answers; GET answers HEAD."""
    return frozenset(methods) | ({"HEAD"} if "GET" in methods else set())
