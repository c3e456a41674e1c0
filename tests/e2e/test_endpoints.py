"""Endpoints and traffic policies: every error, and what holds when a call has returned."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
from running import eventually

import headgate
from headgate import ArgumentError, ConfigError, EndpointNotFound


def one(request: Any) -> int:
    return 1


def two(request: Any) -> int:
    return 2


@pytest.fixture(scope="module")
def backends(shared: headgate.Client) -> headgate.Client:
    """The module's instance with the backends "one" and "two"."""
    for function in (one, two):
        shared.create_backend(function.__name__, function)
        shared.create_endpoint("first", backend=function.__name__)
        shared.get_handle("first").call()  # this process is connected to the replica from now on
        shared.delete_endpoint("first")
    return shared


@pytest.fixture
def serve(backends: headgate.Client) -> Iterator[headgate.Client]:
    yield backends
    for name in backends.list_endpoints():
        backends.delete_endpoint(name)


def call(client: headgate.Client, endpoint: str, **options: Any) -> Any:
    handle = client.get_handle(endpoint)
    return (handle.options(**options) if options else handle).call()


# --- create_endpoint ---


def test_an_endpoint_is_listed_as_it_was_made(serve: headgate.Client) -> None:
    assert serve.create_endpoint("a", backend="one", route="/a/{n:int}", methods=["get", "Post"]) is None
    serve.create_endpoint("b", backend="two")
    assert serve.list_endpoints() == {
        "a": {"route": "/a/{n:int}", "methods": ["GET", "POST"], "traffic": {"one": 1.0}, "shadows": {}},
        "b": {"route": None, "methods": ["GET"], "traffic": {"two": 1.0}, "shadows": {}},
    }
    assert list(serve.list_endpoints()) == ["a", "b"]


def test_it_is_in_force_when_the_call_returns(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one")
    assert call(serve, "a") == 1
    serve.set_traffic("a", {"two": 1})
    assert [call(serve, "a") for _ in range(10)] == [2] * 10


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"backend": None}, TypeError, "backend"),
        ({"backend": one}, TypeError, "function"),
        ({"backend": 7}, TypeError, "int"),
        ({"backend": "three"}, ValueError, "'three'"),
        ({"backend": "one", "route": 3}, TypeError, "route"),
        ({"backend": "one", "route": b"/a"}, TypeError, "route"),
        ({"backend": "one", "route": "a"}, TypeError, "'a'"),
        ({"backend": "one", "route": ""}, TypeError, "route"),
        ({"backend": "one", "route": "/{x:integer}"}, ValueError, "integer"),
        ({"backend": "one", "route": "/{x}/{x}"}, ValueError, "x"),
        ({"backend": "one", "route": "/{}"}, ValueError, "{}"),
        ({"backend": "one", "route": "/-/mine"}, ValueError, "/-/"),
        ({"backend": "one", "methods": "GET"}, TypeError, "methods"),
        ({"backend": "one", "methods": ("GET",)}, TypeError, "methods"),
        ({"backend": "one", "methods": None}, TypeError, "methods"),
        ({"backend": "one", "methods": [1]}, TypeError, "methods"),
        ({"backend": "one", "methods": []}, ValueError, "methods"),
    ],
)
def test_a_bad_endpoint_is_refused_and_nothing_changes(
    serve: headgate.Client, arguments: dict[str, Any], kind: type[Exception], text: str
) -> None:
    with pytest.raises(kind) as error:
        serve.create_endpoint("a", **arguments)
    assert isinstance(error.value, headgate.HeadgateError)
    assert text in str(error.value)
    assert serve.list_endpoints() == {}


def test_an_endpoint_needs_a_backend(serve: headgate.Client) -> None:
    with pytest.raises(TypeError, match="'backend'"):
        serve.create_endpoint("a")  # type: ignore[call-arg]
    assert serve.list_endpoints() == {}


@pytest.mark.parametrize("name", [None, 3, b"a"])
def test_a_name_that_is_no_text_is_refused(serve: headgate.Client, name: Any) -> None:
    with pytest.raises(ArgumentError, match="name"):
        serve.create_endpoint(name, backend="one")


def test_a_name_is_taken_once(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one", route="/a")
    with pytest.raises(ConfigError, match="'a' exists"):
        serve.create_endpoint("a", backend="two", route="/b")
    with pytest.raises(ConfigError, match="set_traffic"):
        serve.create_endpoint("a", backend="two", route="/a")
    assert serve.list_endpoints()["a"]["traffic"] == {"one": 1.0}


def test_a_route_is_taken_once_whatever_the_methods(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one", route="/a", methods=["GET"])
    with pytest.raises(ConfigError, match="'a'"):
        serve.create_endpoint("b", backend="one", route="/a", methods=["POST"])


def test_a_route_that_could_never_be_reached_is_refused(serve: headgate.Client) -> None:
    serve.create_endpoint("wide", backend="one", route="/api/{name}")
    with pytest.raises(ConfigError, match="'wide'"):
        serve.create_endpoint("narrow", backend="one", route="/api/{n:int}")
    serve.create_endpoint("posts", backend="one", route="/api/{n:int}", methods=["POST"])


def test_odd_names_travel(serve: headgate.Client) -> None:
    for name in ("ü/☃ {x}", "x" * 300, "-", "#"):
        serve.create_endpoint(name, backend="one")
        assert call(serve, name) == 1


# --- delete_endpoint ---


def test_a_deleted_endpoint_is_gone_and_its_backend_stays(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one", route="/a")
    handle = serve.get_handle("a")
    assert serve.delete_endpoint("a") is None
    assert serve.list_endpoints() == {}
    assert "one" in serve.list_backends()
    with pytest.raises(EndpointNotFound):
        handle.call()
    with pytest.raises(KeyError):
        serve.get_handle("a")
    serve.create_endpoint("a", backend="two", route="/a")
    assert handle.call() == 2


def test_deleting_an_unknown_endpoint_is_no_error(serve: headgate.Client) -> None:
    serve.delete_endpoint("nobody")


# --- set_traffic ---


def test_traffic_is_split_by_weight(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one")
    serve.set_traffic("a", {"one": 0.5, "two": 0.5})
    handle = serve.get_handle("a")
    seen = Counter(handle.call() for _ in range(200))
    assert 60 <= seen[1] <= 140  # a fair coin: outside once in 10^8
    serve.set_traffic("a", {"one": 0.0, "two": 1.0})
    assert {handle.call() for _ in range(50)} == {2}


def test_a_shard_key_always_meets_the_same_backend(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one")
    serve.set_traffic("a", {"one": 0.5, "two": 0.5})
    first = {key: call(serve, "a", shard_key=key) for key in "abcdefghijklmnop"}
    assert set(first.values()) == {1, 2}
    assert first == {key: call(serve, "a", shard_key=key) for key in first}


@pytest.mark.parametrize(
    "weights",
    [
        {},
        {"one": 0.5},
        {"one": 0.5, "two": 0.500002},
        {"one": 1.5, "two": -0.5},
        {"one": "1"},
        {"one": True},
        {"one": None},
        {"one": float("nan")},
        {"one": float("inf")},
        {"one": 10**400},
        {"one": object()},
        {"three": 1},
        {3: 1},
    ],
)
def test_a_bad_split_is_refused_and_the_old_one_stays(serve: headgate.Client, weights: Any) -> None:
    serve.create_endpoint("a", backend="one")
    with pytest.raises(ValueError, match="'a'"):
        serve.set_traffic("a", weights)
    assert serve.list_endpoints()["a"]["traffic"] == {"one": 1.0}


@pytest.mark.parametrize("weights", [None, [("one", 1)], "one"])
def test_a_split_that_is_no_dict_is_refused(serve: headgate.Client, weights: Any) -> None:
    serve.create_endpoint("a", backend="one")
    with pytest.raises(ArgumentError, match="dict"):
        serve.set_traffic("a", weights)


def test_any_kind_of_number_is_a_weight(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one")
    serve.set_traffic("a", {"one": Fraction(1, 4), "two": 0.7500001})
    assert serve.list_endpoints()["a"]["traffic"] == {"one": 0.25, "two": 0.7500001}
    serve.set_traffic("a", {"one": 1})


def test_traffic_of_an_unknown_endpoint_is_an_error(serve: headgate.Client) -> None:
    with pytest.raises(ConfigError, match="'nobody'"):
        serve.set_traffic("nobody", {"one": 1})


# --- shadow_traffic ---


def test_a_shadow_is_set_and_taken_away(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one")
    serve.shadow_traffic("a", "two", 0.25)
    assert serve.list_endpoints()["a"]["shadows"] == {"two": 0.25}
    serve.shadow_traffic("a", "two", 1)
    assert serve.list_endpoints()["a"] == {
        "route": None, "methods": ["GET"], "traffic": {"one": 1.0}, "shadows": {"two": 1.0},
    }  # fmt: skip
    assert {call(serve, "a") for _ in range(20)} == {1}
    serve.set_traffic("a", {"one": 1.0})
    assert serve.list_endpoints()["a"]["shadows"] == {"two": 1.0}
    serve.shadow_traffic("a", "two", 0)
    assert serve.list_endpoints()["a"]["shadows"] == {}
    serve.shadow_traffic("a", "two", 0.0)  # none was there


def test_a_shadow_gets_the_request_too(serve: headgate.Client, tmp_path: Any) -> None:
    log = tmp_path / "log"

    def note(request: Any) -> None:
        with open(log, "a") as file:
            file.write(f"{request.data}\n")
        raise RuntimeError("nobody hears this")

    serve.create_backend("note", note)
    serve.create_endpoint("a", backend="one")
    serve.shadow_traffic("a", "note", 1.0)
    handle = serve.get_handle("a")
    assert [handle.call(n) for n in range(5)] == [1] * 5
    eventually(lambda: log.exists() and len(log.read_text().split()) == 5)
    serve.delete_endpoint("a")
    serve.delete_backend("note")
    assert sorted(log.read_text().split()) == list("01234")


@pytest.mark.parametrize("proportion", [-0.1, 1.1, "1", None, True, float("nan"), [1]])
def test_a_bad_proportion_is_refused(serve: headgate.Client, proportion: Any) -> None:
    serve.create_endpoint("a", backend="one")
    with pytest.raises(TypeError, match="proportion"):
        serve.shadow_traffic("a", "two", proportion)
    assert serve.list_endpoints()["a"]["shadows"] == {}


def test_shadows_need_an_endpoint_and_a_backend(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one")
    with pytest.raises(ConfigError, match="'nobody'"):
        serve.shadow_traffic("nobody", "two", 0.5)
    with pytest.raises(ConfigError, match="'three'"):
        serve.shadow_traffic("a", "three", 0.5)


# --- what endpoints hold ---


def test_a_backend_in_use_is_not_deleted(serve: headgate.Client) -> None:
    serve.create_endpoint("a", backend="one")
    serve.set_traffic("a", {"one": 1.0, "two": 0.0})
    for force in (False, True):
        with pytest.raises(ConfigError, match=r"'two'.*'a'"):
            serve.delete_backend("two", force=force)
    serve.set_traffic("a", {"one": 1.0})
    serve.shadow_traffic("a", "two", 0.1)
    with pytest.raises(ConfigError, match=r"'two'.*'a'"):
        serve.delete_backend("two")
    assert set(serve.list_backends()) == {"one", "two"}
