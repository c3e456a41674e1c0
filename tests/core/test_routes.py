"""Route templates and tables; Starlette's Router is the oracle."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.routing import Route as StarletteRoute
from starlette.routing import Router

from headgate.core import routes
from headgate.core.routes import RouteTable, compile_route, contains, convert, near
from headgate.errors import ArgumentError, ConfigError

UUID_TEXT = "123e4567-e89b-12d3-a456-426614174000"
Entries = list[tuple[str, str, tuple[str, ...]]]


# --- the oracle ---------------------------------------------------------------------------


class Endpoint:
    """An ASGI application that says who it is and what it was given."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        raise Reached(self.name, scope["path_params"])


class Reached(Exception):
    pass


def starlette_says(entries: Entries, path: str, method: str) -> tuple[Any, ...]:
    """The outcome of Starlette's Router, in the form of `ours`."""
    router = Router([StarletteRoute(route, Endpoint(name), methods=given) for name, route, given in entries])
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "scheme": "http", "query_string": b""}
    scope["headers"] = [(b"host", b"host")]
    try:
        router(scope, None, send).send(None)  # type: ignore[arg-type]  # nothing in it ever waits
    except Reached as reached:
        return ("match", *reached.args)
    except StopIteration:
        pass
    status, headers = sent[0]["status"], dict(sent[0]["headers"])
    if status == 307:
        return "redirect", headers[b"location"].decode()
    if status == 405:
        return "method_not_allowed", set(headers[b"allow"].decode().split(", "))
    assert status == 404
    return ("not_found",)


def ours(entries: Entries, path: str, method: str) -> tuple[Any, ...]:
    outcome = RouteTable(entries).match(path, method)
    if outcome[0] == "match":
        template = next(template for name, template, _ in entries if name == outcome[1])
        return "match", outcome[1], convert(compile_route(template), outcome[2])
    if outcome[0] == "redirect":
        return "redirect", "http://host" + quote(outcome[1], safe=":/%#?=@[]!$&'()*+,;")
    if outcome[0] == "method_not_allowed":
        assert len(set(outcome[1])) == len(outcome[1])
        return "method_not_allowed", set(outcome[1])
    return outcome


# --- what to ask it -------------------------------------------------------------------------

CONVERTERS = st.sampled_from(["", ":str", ":int", ":float", ":path", ":uuid"])
LITERALS = st.sampled_from(["", "a", "b", "ab", "12", "3.14", "a.b", "-", UUID_TEXT, "é"])
PIECES = st.one_of(LITERALS, CONVERTERS.map(lambda converter: "{?" + converter + "}"))
SEGMENTS = st.one_of(PIECES, PIECES, st.tuples(PIECES, LITERALS, PIECES).map("".join))
METHODS = st.lists(st.sampled_from(["GET", "POST", "PUT", "HEAD", "get"]), max_size=3).map(tuple)
VALUES = ["", "a", "b", "ab", "7", "12", "3.14", "a.b", "a-b", "-", UUID_TEXT, "é", "x\n", "%41", "1.", "٣"]
TEXTS = st.sampled_from(VALUES)


@st.composite
def templates(draw: st.DrawFn) -> str:
    parts = "/" + "/".join(draw(st.lists(SEGMENTS, max_size=4))) + draw(st.sampled_from(["", "/"]))
    names = iter(range(20))
    return re.sub(r"\?", lambda _: f"p{next(names)}", parts)


@st.composite
def tables(draw: st.DrawFn) -> Entries:
    drawn = draw(st.lists(templates(), min_size=1, max_size=8))
    return [(f"e{number}", template, draw(METHODS)) for number, template in enumerate(drawn)]


@st.composite
def requests(draw: st.DrawFn) -> tuple[Entries, str, str]:
    entries = draw(tables())
    if draw(st.booleans()):  # a path that was made from one of the templates
        template = draw(st.sampled_from(entries))[1]
        path = re.sub(r"\{[^}]*\}", lambda _: draw(TEXTS), template)
    else:
        path = "/" + "/".join(draw(st.lists(TEXTS, max_size=5)))
    change = draw(st.sampled_from(["", "", "/", "//", "\n", "-"]))
    path = path[:-1] if change == "-" else path + change
    return entries, path, draw(st.sampled_from(["GET", "HEAD", "POST", "PUT", "DELETE", "get"]))


@settings(max_examples=1000, deadline=None)
@given(requests())
def test_every_outcome_is_that_of_starlettes_router(request: tuple[Entries, str, str]) -> None:
    entries, path, method = request
    assert ours(entries, path, method) == starlette_says(entries, path, method)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from("abcdef"), min_size=2, max_size=2), st.randoms(use_true_random=False))
def test_many_routes_that_differ_within_a_segment_agree_too(letters: list[str], random: Any) -> None:
    entries: Entries = []
    for number in range(30):
        kind = random.choice(["int", "str", "float", "path", "uuid"])
        template = f"/{random.choice('abcdef')}-{{x:{kind}}}-{{y}}"
        entries.append((f"e{number}", template, (random.choice(["GET", "PUT"]),)))
    path = f"/{letters[0]}-{random.choice(['7', '7.5', 'x', UUID_TEXT])}-{letters[1]}"
    assert ours(entries, path, "GET") == starlette_says(entries, path, "GET")


# --- literal cases ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "path", "method"),
    [
        ([("e0", "/a", ("POST",)), ("e1", "/{x}", ("GET",))], "/a", "GET"),
        ([("e0", "/{x}", ("GET",)), ("e1", "/a", ("GET",))], "/a", "GET"),
        ([("e0", "/{x}", ("GET",)), ("e1", "/a", ("GET",))], "/a\n", "GET"),
        ([("e0", "/a", ("GET",)), ("e1", "/{x}", ("GET",))], "/a\n", "GET"),
        ([("e0", "/a/{p:path}", ("GET",)), ("e1", "/a/{x}/{y}", ("GET",))], "/a/b/c", "GET"),
        ([("e0", "/a/{x}/{y}", ("GET",)), ("e1", "/a/{p:path}", ("GET",))], "/a/b/c/d/e", "GET"),
        ([("e0", "/{x}/b", ("GET",)), ("e1", "/a/{x}", ("GET",))], "/a/b", "GET"),
        ([("e0", "/a/{x}", ("GET",)), ("e1", "/{x}/b", ("GET",))], "/a/b", "GET"),
        ([("e0", "/a", ("PUT",))], "/a/", "GET"),
        ([("e0", "/a", ())], "/a", "BREW"),
        ([("e0", "/a", ("GET",))], "*", "OPTIONS"),
        ([("e0", "/", ("GET",))], "", "GET"),
        ([("e0", "/", ("GET",))], "//", "GET"),
        ([("e0", "/{p:path}", ("GET",))], "//evil.example/", "GET"),
        ([("e0", "/a-{x:int}", ("GET",)), ("e1", "/a-{y}", ("GET",)), ("e2", "/{z}", ("GET",))], "/a-7", "GET"),
        ([("e0", "/a-{x:int}", ("GET",)), ("e1", "/a-{y}", ("GET",)), ("e2", "/{z}", ("GET",))], "/a-b", "GET"),
        ([("e0", "/a/{x}", ("GET",)), ("e1", "/b/{x}", ("GET",))], "/c/d", "GET"),
        ([("e0", "/{z:int}", ("GET",)), ("e1", "/{x}", ("GET",)), ("e2", "/{x}/{y}", ("GET",))], "/b", "GET"),
    ],
)
def test_where_routes_overlap_the_outcome_is_starlettes(entries: Entries, path: str, method: str) -> None:
    assert ours(entries, path, method) == starlette_says(entries, path, method)


def test_values_are_converted_to_the_types_of_their_converters() -> None:
    route = compile_route("/{a}/{b:str}/{c:int}/{d:float}/{e:uuid}/{f:path}")
    found = route.pattern.match(f"/x/y/007/3/{UUID_TEXT}/p/q")
    assert found is not None
    values = convert(route, found.groups())

    assert values == {"a": "x", "b": "y", "c": 7, "d": 3.0, "e": UUID(UUID_TEXT), "f": "p/q"}
    assert [type(value) for value in values.values()] == [str, str, int, float, UUID, str]


def test_the_example_of_the_contract() -> None:
    route = "/api/{user_id:int}/{number:float}"
    assert ours([("e", route, ("GET",))], "/api/123/3.14", "GET") == (
        "match", "e", {"user_id": 123, "number": 3.14},
    )  # fmt: skip


def test_an_integer_that_python_refuses_to_convert_does_not_match() -> None:
    entries: Entries = [("number", "/{n:int}", ("GET",)), ("text", "/{s}", ("GET",))]
    assert ours(entries, "/" + "9" * 4300, "GET") == ("match", "number", {"n": int("9" * 4300)})
    assert ours(entries, "/" + "9" * 4301, "GET") == ("match", "text", {"s": "9" * 4301})
    assert ours(entries[:1], "/" + "9" * 4301, "GET") == ("not_found",)


def test_allow_names_the_methods_of_the_first_route_in_order_and_the_implied_head() -> None:
    table = RouteTable([("a", "/x/{n}", ("put", "GET", "PUT")), ("b", "/x/{n}", ("POST",))])
    assert table.match("/x/1", "DELETE") == ("method_not_allowed", ("PUT", "GET", "HEAD"))
    assert table.match("/x/1", "POST") == ("match", "b", ("1",))


def test_an_empty_table_finds_nothing() -> None:
    assert RouteTable([]).match("/", "GET") == ("not_found",)
    assert RouteTable([]).match("/a/", "GET") == ("not_found",)


def test_each_of_a_thousand_routes_is_found() -> None:
    table = RouteTable([(f"e{n}", f"/api/r{n}/{{id:int}}", ("GET",)) for n in range(1000)])
    assert [table.match(f"/api/r{n}/{n}", "GET") for n in range(1000)] == [
        ("match", f"e{n}", (str(n),)) for n in range(1000)
    ]


ALIKE = ("/area{}-{{id:int}}", "/{{who}}/u{}-{{id:int}}", "/area{}/{{id:int}}")


@pytest.mark.parametrize("template", ALIKE)
@pytest.mark.parametrize("path", ["/area7-7", "/area120-7", "/x/u3-7", "/x/u119-7", "/x/u120-7", "/area99/7"])
def test_more_alike_routes_than_one_regular_expression_holds_agree_too(template: str, path: str) -> None:
    entries: Entries = [(f"e{n}", template.format(n), ("GET",)) for n in range(120)]
    entries += [("any", "/{who}/{what}", ("GET",)), ("late", template.format(120), ("GET",))]
    assert ours(entries, path, "GET") == starlette_says(entries, path, "GET")


@pytest.mark.parametrize("template", ALIKE)
def test_a_further_route_among_many_compiles_one_regular_expression_of_a_few_routes(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [(f"e{n}", template.format(f"{n}x"), ("GET",)) for n in range(320)]
    RouteTable(entries[:-1])
    compiled: list[str] = []
    compile_, own = re.compile, routes.re

    class Counting:
        escape = staticmethod(own.escape)
        fullmatch = staticmethod(own.fullmatch)

        @staticmethod
        def compile(regex: str) -> re.Pattern[str]:
            compiled.append(regex)
            return compile_(regex)

    monkeypatch.setattr(routes, "re", Counting)
    RouteTable(entries)
    assert len(compiled) <= 2  # its own, and the one with those beside it
    assert sum(regex.count("$") for regex in compiled) <= 60


@pytest.mark.parametrize("template", ["", "a", "a/b", "{x}", None, 7, b"/a", ["/a"]])
def test_a_route_that_is_no_string_from_a_slash_on_is_a_type_error(template: Any) -> None:
    with pytest.raises(ArgumentError, match="must be a str that starts with '/'"):
        compile_route(template)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("/{x:it}", "unknown converter 'it'; use one of str, int, float, path, uuid"),
        ("/{x}/{x:int}", "'x' stands in it twice"),
        ("/{}", "malformed parameter"),
        ("/{:int}", "malformed parameter"),
        ("/{x:}", "malformed parameter"),
        ("/{1x}", "malformed parameter"),
        ("/{x", "malformed parameter"),
        ("/x}", "malformed parameter"),
        ("/{x}}/y", "malformed parameter"),
        ("/{ x }", "malformed parameter"),
        ("/{x/y}", "malformed parameter"),
        ("/x\n", "control character"),
        ("/x\0", "control character"),
    ],
)
def test_a_malformed_template_is_a_value_error_that_names_it(template: str, why: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(why)) as caught:
        compile_route(template)
    assert repr(template) in str(caught.value)


# --- containment --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("/a", "/a"),
        ("/{x}", "/{y}"),
        ("/a-{x:int}", "/a-{y:int}"),
        ("/{x}", "/a"),
        ("/{x}/b", "/a/b"),
        ("/{x}", "/{y:int}"),
        ("/{x}", "/{y:uuid}"),
        ("/{x}", "/a-{y}"),
        ("/{x:float}", "/{y:int}"),
        ("/{x:int}", "/12"),
        ("/{x:float}/{y}", "/1.5/{z:int}"),
        ("/a-{x:int}", "/a-12"),
        ("/{p:path}", "/"),
        ("/{p:path}", "/a/{x}/{q:path}"),
        ("/{x}/{p:path}", "/a/b/{y:int}"),
        ("/{p:path}/b", "/a/b"),
        ("/a{p:path}", "/abc"),
    ],
)
def test_a_route_within_an_earlier_one_is_contained(earlier: str, later: str) -> None:
    assert contains(earlier, later)


@pytest.mark.parametrize(
    ("earlier", "later"),
    [
        ("/a", "/b"),
        ("/a", "/{x}"),
        ("/a", "/a/"),
        ("/{x}", "/"),
        ("/{x}", "/a/b"),
        ("/{x:int}", "/a"),
        ("/{x:int}", "/{y}"),
        ("/{x:int}", "/{y:float}"),
        ("/{x:uuid}", "/{y:int}"),
        ("/{x:float}", "/1-{y:int}"),
        ("/{x}", "/{p:path}"),
        ("/{x}/b", "/{p:path}/b"),
        ("/{x}/{y}", "/{q:path}/b"),
        ("/a/{p:path}", "/a"),
        ("/a/{p:path}", "/b/{x}"),
        ("/a/{p:path}", "/{x}/b"),
        ("/a/b/{p:path}", "/{q:path}/{y}/z"),
        ("/{p:path}/b", "/{x}/b"),  # is contained, but no segment says so
        ("/a{p:path}", "/ab{x}"),  # likewise
        ("/a-{x}", "/a-b{y}"),  # likewise
    ],
)
def test_a_route_that_may_be_reached_beside_an_earlier_one_is_not_contained(earlier: str, later: str) -> None:
    assert not contains(earlier, later)


@settings(max_examples=400, deadline=None)
@given(templates(), st.data())
def test_a_contained_route_never_gets_a_request(later: str, data: st.DataObject) -> None:
    wider = st.sampled_from(["{?}", "{?:int}", "{?:float}", "{?:uuid}", "{?:path}"])
    parts = [data.draw(st.just(part) | wider) for part in later.split("/")[1:]]
    names = iter(range(20))
    earlier = "/" + "/".join(parts[: data.draw(st.integers(1, 5))])
    earlier = re.sub(r"\?", lambda _: f"q{next(names)}", earlier)
    table = RouteTable([("earlier", earlier, ("GET",)), ("later", later, ("GET",))])
    for _ in range(3):
        path = re.sub(r"\{[^}]*\}", lambda _: data.draw(TEXTS), later)
        reached = table.match(path, "GET")[:2] == ("match", "later") and "\n" not in path
        assert not (reached and contains(earlier, later)), (earlier, path)


# --- the text of a 404 ------------------------------------------------------------------------------


def test_near_routes_ignore_what_stands_for_a_parameter() -> None:
    known = ["/users/{id:int}", "/items/{id:int}/parts", "/hello", "/health"]
    assert near(known, "/user/7") == ["/users/{id:int}"]
    assert near(known, "/helo/") == ["/hello"]
    assert near(known, "/item/7/parts") == ["/items/{id:int}/parts"]
    assert near(known, "/zzz") == []
    assert near([], "/") == []


def test_near_names_at_most_three_of_very_many_routes() -> None:
    known = [f"/api/r{n}" for n in range(1000)] + [f"/other/{n}" for n in range(1000)]
    found = near(known, "/api/r")
    assert len(found) == 3
    assert set(found) < set(known)
    assert near(known, "/" + "x/" * 10_000) == []
