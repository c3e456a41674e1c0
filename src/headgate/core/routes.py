"""Find the endpoint of a path: templates like "/api/{user_id:int}", redirects, 405, 404.

The rule is Starlette's: the first registered route that matches path and method; else the
first that matches the path decides on 405; else a redirect to the path with its trailing
slash added or removed, if that one is routed. Its Router is the oracle in the tests, down
to `$`, which also matches before a final newline.

A table of many routes costs about what one costs: static routes stand in a dict, the
others under the values of their literal segments, and what those cannot tell apart is one
regular expression. Paths come in percent-decoded. Who answers is core/traffic.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import zip_longest
from operator import itemgetter
from typing import Any, Literal, TypeAlias
from uuid import UUID  # msgspec has imported it already

from msgspec import Struct

from headgate.errors import ArgumentError, ConfigError

#: int() refuses more digits than this (CPython's default limit), so such a segment does not match.
MAX_INT_DIGITS = 4300

_REGEX: Mapping[str, str] = {
    "str": r"([^/]+)",
    "int": rf"([0-9]{{1,{MAX_INT_DIGITS}}})",
    "float": r"([0-9]+(?:\.[0-9]+)?)",
    "path": r"(.*)",
    "uuid": r"([0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12})",
}
_PARAMETER = re.compile(r"\{([a-zA-Z_][a-zA-Z0-9_]*)(?::([a-zA-Z_][a-zA-Z0-9_]*))?\}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_KEPT = 16384  # templates, and parts of them: with each new table nearly all come again

_TOGETHER = 50  # routes in one regular expression, at most

Raw: TypeAlias = tuple[str, ...]
Outcome: TypeAlias = (
    tuple[Literal["match"], str, Raw]
    | tuple[Literal["redirect"], str]
    | tuple[Literal["method_not_allowed"], tuple[str, ...]]
    | tuple[Literal["not_found"]]
)
_Found: TypeAlias = tuple[int, Raw]  # number of the route, its raw parameters
_Match: TypeAlias = Callable[[str], re.Match[str] | None]
_Member: TypeAlias = tuple[int, "Route", str, _Match]
#: A regular expression and its route; or, of several, the last group of each alternative -> its
#: route and its part of all groups.
_Group: TypeAlias = tuple[_Match, int, dict[int | None, tuple[int, slice]] | None]
#: How to read the literal segments of a path, and the routes under each of their values.
_Shape: TypeAlias = tuple[Callable[[Sequence[str]], Any], dict[Any, _Group]]


class Route(Struct, frozen=True):
    """One template, taken apart: `params` are (name, converter) pairs, `regex` has one group for each."""

    template: str
    params: tuple[tuple[str, str], ...]
    regex: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """Matches a whole percent-decoded path; `re` keeps what was compiled last."""
        return re.compile(self.regex + "$")


def compile_route(template: str) -> Route:
    """Take a template apart.

    >>> compile_route("/api/{user_id:int}/{name}").params
    (('user_id', 'int'), ('name', 'str'))

    Raises ArgumentError (not a str that starts with "/") and ConfigError (malformed).
    """
    if not isinstance(template, str) or not template.startswith("/"):
        raise ArgumentError(f"route must be a str that starts with '/', got {template!r}")
    return _compile(template)


@lru_cache(maxsize=_KEPT)
def _compile(template: str) -> Route:
    if _CONTROL.search(template):
        raise ConfigError(f"route {template!r} contains a control character; remove it")
    if any(brace in _PARAMETER.sub("", template) for brace in "{}"):
        raise ConfigError(
            f"route {template!r}: malformed parameter; write {{name}} or {{name:converter}}, "
            "the name in letters, digits and '_'"
        )
    params: dict[str, str] = {}
    for found in _PARAMETER.finditer(template):
        name, converter = found[1], found[2] or "str"
        if converter not in _REGEX:
            known = ", ".join(_REGEX)
            raise ConfigError(f"route {template!r}: unknown converter {converter!r}; use one of {known}")
        if name in params:
            raise ConfigError(f"route {template!r}: the parameter name {name!r} stands in it twice")
        params[name] = converter
    return Route(template=template, params=tuple(params.items()), regex=_regex(template))


def convert(route: Route, raw: Sequence[str]) -> dict[str, Any]:
    """`request.path_params`: the raw values of a match, each as its converter's type."""
    return {
        name: _CONVERT[kind](value) for (name, kind), value in zip(route.params, raw, strict=True)
    }


def contains(earlier: str, later: str) -> bool:
    """Whether each path of `later` is one of `earlier`, judged segment by segment; in doubt False.

    A final "{rest:path}" takes all that is left (newlines, which it does not match, do not count).
    """
    mine_first, theirs_first = _first(earlier), _first(later)
    if mine_first and theirs_first and mine_first != theirs_first:  # as most of a thousand are: no path is of both
        return False
    first, second = compile_route(earlier), compile_route(later)
    if first.regex == second.regex:
        return True
    mine, theirs = earlier.split("/"), later.split("/")
    if "path" in dict(first.params).values():
        if not second.params:
            return first.pattern.match(later) is not None
        if len(theirs) < len(mine) or not _is_parameter(mine[-1], "path"):
            return False
        mine.pop()
        theirs = theirs[: len(mine)]
    if len(mine) != len(theirs) or any(":path}" in part for part in mine + theirs):
        return False
    return all(map(_segment_contains, mine, theirs))


def near(templates: Sequence[str], path: str) -> list[str]:
    """Up to three templates that `path` may have meant, the closest first; for the text of a 404.

    Looks at no more than 16 templates and 200 characters, so that an unknown path stays cheap.
    """
    from difflib import get_close_matches

    if len(templates) > 16:
        templates = [template for template in templates if template[:3] == path[:3]][:16]
    path = path[:200]
    segments = path.split("/")
    filled: dict[str, str] = {}
    for template in templates:  # parameters are no difference: let them have what the path has there
        parts = zip_longest(template.split("/"), segments, fillvalue="")
        filled.setdefault("/".join(b if "{" in a else a for a, b in parts).rstrip("/"), template)
    return [filled[text] for text in get_close_matches(path.rstrip("/"), filled, n=3, cutoff=0.7)]


class RouteTable:
    """All routes of one snapshot, in the order of their creation.

    entries   (endpoint name, template, methods) each; no methods at all means every method

    >>> table = RouteTable([("hello", "/hello", ("GET",)), ("user", "/user/{id:int}", ("POST",))])
    >>> table.match("/user/7", "POST")
    ('match', 'user', ('7',))
    >>> table.match("/user/7", "GET")
    ('method_not_allowed', ('POST',))
    >>> table.match("/hello/", "GET")
    ('redirect', '/hello')
    """

    __slots__ = ("_any_method", "_by_method", "_entries", "_names", "_whole", "templates")

    def __init__(self, entries: Iterable[tuple[str, str, Sequence[str]]]) -> None:
        self._entries = [
            (name, compile_route(template), _served(tuple(methods))) for name, template, methods in entries
        ]
        self._names = [name for name, _, _ in self._entries]
        self.templates = tuple(route.template for _, route, _ in self._entries)
        indexes: dict[tuple[int, ...], _Index] = {}  # GET and HEAD, and most often all, share one
        self._whole = self._index(range(len(self._entries)), indexes)
        self._any_method = self._index(self._numbers(""), indexes)
        known = {method for _, _, methods in self._entries for method in methods}
        self._by_method = {method: self._index(self._numbers(method), indexes) for method in known}

    def _numbers(self, method: str) -> list[int]:
        return [n for n, (_, _, methods) in enumerate(self._entries) if not methods or method in methods]

    def _index(self, numbers: Iterable[int], known: dict[tuple[int, ...], _Index]) -> _Index:
        key = tuple(numbers)
        if key not in known:
            known[key] = _Index([(number, self._entries[number][1]) for number in key])
        return known[key]

    def match(self, path: str, method: str) -> Outcome:
        """What to do with a request: its endpoint and raw parameters, or why there is none.

        `path` is percent-decoded, `method` as sent. A redirect's path is decoded too; it may begin
        with "//", so a Location needs scheme and host before it.
        """
        found = self._by_method.get(method, self._any_method).first(path)
        if found is not None:
            return "match", self._names[found[0]], found[1]
        partial = self._whole.first(path)
        if partial is not None:
            return "method_not_allowed", self._entries[partial[0]][2]
        other = path.rstrip("/") if path.endswith("/") else path + "/"
        if self._whole.first(other) is not None:
            return "redirect", other
        return ("not_found",)


class _Index:
    """Some routes, in order, and the first of them that matches a path."""

    __slots__ = ("_depth", "_shapes", "_static")

    def __init__(self, routes: Sequence[tuple[int, Route]]) -> None:
        typed = [(number, route) for number, route in routes if route.params]
        self._depth, self._shapes = _shapes(typed)
        self._static: dict[str, _Found] = {}
        for number, route in routes:
            if not route.params:
                winner = self._typed(route.template, route.template)
                if winner is None or number < winner[0]:
                    self._static.setdefault(route.template, (number, ()))

    def first(self, path: str) -> _Found | None:
        found = self._static.get(path)
        if found is not None:
            return found
        if "\n" not in path or not path.endswith("\n"):
            return self._typed(path, path)
        bare = path[:-1]  # `$` matches before the newline too
        all_found = (self._static.get(bare), self._typed(bare, path), self._typed(path, path))
        return min((found for found in all_found if found is not None), default=None)

    def _typed(self, key: str, path: str) -> _Found | None:
        segments = key.split("/", self._depth)
        best: _Found | None = None
        for literals_of, groups in self._shapes[len(segments)]:
            group = groups.get(literals_of(segments))
            if group is None:
                continue
            match, number, alternatives = group
            found = match(path)
            if found is not None:
                raw = found.groups()
                if alternatives is not None:
                    number, own = alternatives[found.lastindex]
                    raw = raw[own]
                if best is None or number < best[0]:
                    best = number, raw
        return best


def _shapes(routes: Iterable[tuple[int, Route]]) -> tuple[int, list[tuple[_Shape, ...]]]:
    """How often to split a path, and the shapes that a path of that many pieces may have.

    A shape is a number of segments (or, before a "path" parameter, a least number) and which
    of them are literal.
    """
    shapes: dict[tuple[tuple[int, ...], int, bool], dict[Any, list[_Member]]] = {}
    for number, route in routes:
        shape, key, rest, match = _anatomy(route.template)
        shapes.setdefault(shape, {}).setdefault(key, []).append((number, route, rest, match))
    built = [
        (least, is_open, (itemgetter(*literal), {key: _group(part) for key, part in groups.items()}))
        for (literal, least, is_open), all_groups in shapes.items()
        for groups in _in_blocks(all_groups)
    ]
    depth = max((least for least, _, _ in built), default=0)
    return depth, [
        tuple(shape for least, is_open, shape in built if least == pieces or (is_open and least < pieces))
        for pieces in range(depth + 2)
    ]


def _in_blocks(groups: Mapping[Any, list[_Member]]) -> Iterator[dict[Any, list[_Member]]]:
    """The first members of each group, then the next: a further route leaves most regular expressions as they were.

    To compile one of a thousand alternatives takes a tenth of a second, in which a proxy answers nobody.
    """
    largest = max(map(len, groups.values()))
    for at in range(0, largest, _TOGETHER):
        yield {key: members[at : at + _TOGETHER] for key, members in groups.items() if len(members) > at}


@lru_cache(maxsize=_KEPT)
def _anatomy(template: str) -> tuple[tuple[tuple[int, ...], int, bool], Any, str, _Match]:
    """What of a route's place in a table is the same in every table.

    Its shape (which segments are literal, the least number of them, whether more may follow), the values
    of the literal ones, and the regular expression for the rest.
    """
    segments = [_same(part) for part in template.split("/")]
    opens = next((at for at, part in enumerate(segments) if ":path}" in part), None)
    literal = tuple(at for at, part in enumerate(segments[:opens]) if at and "{" not in part) or (0,)
    least = len(segments) if opens is None else opens + 1
    rest = _rest(segments, literal)
    return (literal, least, opens is not None), itemgetter(*literal)(segments), rest, _matcher(rest)


@lru_cache(maxsize=_KEPT)
def _same(text: str) -> str:
    """Equal segments are one object: fewer cache lines to touch."""
    return text


@lru_cache(maxsize=_KEPT)
def _matcher(regex: str) -> _Match:
    """As `re` keeps what it compiled, but for more than a few hundred of them."""
    return re.compile(regex).match


def _rest(segments: Sequence[str], literal: Sequence[int]) -> str:
    """The regular expression that is left to check once the literal segments are known to be right.

    Routes that differ only in those share it, so that a thousand stay in the processor's cache.
    """
    parts = ("[^/]*" if at and at in literal else _regex(part) for at, part in enumerate(segments))
    return "/".join(parts) + "$"


def _group(members: Sequence[_Member]) -> _Group:
    """Routes that have shape and literal segments in common: one regular expression, in their order."""
    if len(members) == 1:
        number, _, _, match = members[0]
        return match, number, None
    match = _matcher("|".join(rest for _, _, rest, _ in members))
    alternatives: dict[int | None, tuple[int, slice]] = {}
    end = 0
    for number, route, _, _ in members:
        start, end = end, end + len(route.params)
        alternatives[end] = number, slice(start, end)
    return match, -1, alternatives


@lru_cache(maxsize=_KEPT)
def _served(methods: tuple[str, ...]) -> tuple[str, ...]:
    """The methods in capitals, each once; GET brings HEAD."""
    given = [method.upper() for method in methods]
    return tuple(dict.fromkeys([*given, "HEAD"] if "GET" in given else given))


@lru_cache(maxsize=_KEPT)
def _regex(text: str) -> str:
    """The regular expression of a template, or of a segment of one, without anchors."""
    regex, at = "", 0
    for found in _PARAMETER.finditer(text):
        regex += re.escape(text[at : found.start()]) + _REGEX[found[2] or "str"]
        at = found.end()
    return regex + re.escape(text[at:])


@lru_cache(maxsize=_KEPT)
def _first(template: str) -> str:
    """The first segment, with which each of its paths begins; "" if that is a parameter, or empty."""
    first = template.split("/", 2)[1]
    return "" if "{" in first else first


def _is_parameter(segment: str, converter: str) -> bool:
    found = _PARAMETER.fullmatch(segment)
    return found is not None and (found[2] or "str") == converter


def _segment_contains(mine: str, theirs: str) -> bool:
    if "{" not in mine:
        return mine == theirs
    regex = _regex(mine)
    if "{" not in theirs:
        return re.fullmatch(regex, theirs) is not None
    if regex == _regex(theirs) or _is_parameter(mine, "str"):
        return True
    return _is_parameter(mine, "float") and _is_parameter(theirs, "int")


_CONVERT: Mapping[str, Callable[[str], Any]] = {
    "str": str, "int": int, "float": float, "path": str, "uuid": UUID,
}  # fmt: skip
