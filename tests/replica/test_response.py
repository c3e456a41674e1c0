"""Results become answers: text, bytes, streams, JSON, Starlette's responses, errors."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
import sys
import types
import uuid

import msgspec
import needs
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette import responses
from starlette.background import BackgroundTask

from headgate.errors import BackendError, SerializationError
from headgate.replica import response
from headgate.replica.response import (
    JSON,
    NDJSON,
    OCTETS,
    OWN_HEADERS,
    TEXT,
    UTF8_TEXT,
    Asgi,
    Stream,
    check_batch_result,
    encode,
    encode_json,
    error_reply,
    stream_item,
    stream_kind,
)

numpy = needs.module("numpy")


class Color(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


class Text(str):
    __slots__ = ()


@dataclasses.dataclass
class Point:
    x: int
    y: object


Pair = collections.namedtuple("Pair", "a b")


class Record(msgspec.Struct):
    a: int
    b: object


# -- Which answer


@pytest.mark.parametrize(
    ("result", "reply"),
    [
        (None, (200, TEXT, None, b"")),
        (b"\xff\0", (200, TEXT, None, b"\xff\0")),
        (bytearray(b"a"), (200, TEXT, None, b"a")),
        (memoryview(b"abc")[::2], (200, TEXT, None, b"ac")),
        ("ü", (200, UTF8_TEXT, None, "ü".encode())),
        (Text("a"), (200, UTF8_TEXT, None, b"a")),
        ({"a": 1}, (200, JSON, None, b'{"a":1}')),
        ([], (200, JSON, None, b"[]")),
        (True, (200, JSON, None, b"true")),
        (1.5, (200, JSON, None, b"1.5")),
        (ValueError("boom"), (200, JSON, None, b'"boom"')),
    ],
)
def test_a_plain_result_is_a_whole_reply(result, reply):
    assert encode(result) == reply


def test_text_that_is_not_unicode_is_refused():
    with pytest.raises(SerializationError, match="UTF-8"):
        encode("\ud800")


def test_generators_are_streams():
    async def later():
        yield 1

    plain, asynchronous = encode(n for n in "ab"), encode(later())

    assert isinstance(plain, Stream)
    assert not plain.is_async
    assert isinstance(asynchronous, Stream)
    assert asynchronous.is_async


@pytest.mark.parametrize(
    ("items", "kind", "sent"),
    [
        (["a", "ü", b"raw"], TEXT, [b"a", "ü".encode(), b"raw"]),
        ([b"a", bytearray(b"b"), "c"], OCTETS, [b"a", b"b", b"c"]),
        ([{"a": 1}, "s", math.nan], NDJSON, [b'{"a":1}\n', b'"s"\n', b"NaN\n"]),
        ([None], NDJSON, [b"null\n"]),
    ],
)
def test_the_first_item_decides_what_a_stream_is(items, kind, sent):
    assert stream_kind(items[0]) == kind
    assert [stream_item(item, kind) for item in items] == sent


def test_a_stream_does_not_change_its_kind():
    with pytest.raises(SerializationError, match="began with str yielded dict"):
        stream_item({}, TEXT)


# -- Starlette's responses


@pytest.mark.parametrize(
    ("result", "status", "block", "body"),
    [
        (responses.Response(b"a"), 200, b"", b"a"),
        (
            responses.PlainTextResponse("ü", 201),
            201,
            b"content-type: text/plain; charset=utf-8\r\n",
            "ü".encode(),
        ),
        (responses.HTMLResponse("<p>"), 200, b"content-type: text/html; charset=utf-8\r\n", b"<p>"),
        (responses.JSONResponse({"a": 1}), 200, b"content-type: application/json\r\n", b'{"a":1}'),
        (responses.RedirectResponse("/ü"), 307, b"location: /%C3%BC\r\n", b""),
        (responses.Response(b"a", 204), 204, b"", b""),
        (
            responses.Response(b"a", headers={"Transfer-Encoding": "chunked", "X-A": ""}),
            200,
            b"x-a: \r\n",
            b"a",
        ),
    ],
)
def test_a_response_without_a_stream_is_a_whole_reply(result, status, block, body):
    assert encode(result) == (status, OWN_HEADERS, block, body)


def test_each_cookie_has_its_line():
    result = responses.Response()
    result.set_cookie("a", "1")
    result.set_cookie("b", "2")

    assert encode(result)[2].count(b"set-cookie: ") == 2


class Own(responses.Response):
    async def __call__(self, scope, receive, send):
        """Answers in its own way."""


@pytest.mark.parametrize(
    "result",
    [
        responses.StreamingResponse(iter("ab")),
        responses.FileResponse(__file__),
        responses.Response(background=BackgroundTask(print)),
        Own(),
    ],
)
def test_a_response_that_does_more_is_run(result):
    answer = encode(result)

    assert isinstance(answer, Asgi)
    assert answer.response is result


@pytest.mark.parametrize(
    "headers",
    [{"x-a": "b\r\nset-cookie: c"}, {"x-a": "\n"}, {"x-a": "\0"}, {"x a": "b"}, {"a:b": "c"}, {"": "c"}],
)
def test_a_header_cannot_break_out_of_its_line(headers):
    with pytest.raises(SerializationError, match="the response header"):
        encode(responses.Response(headers=headers))


@pytest.mark.parametrize("status", [100, 199, 600])
def test_a_status_that_is_not_final_is_refused(status):
    with pytest.raises(SerializationError, match=f"status {status}"):
        encode(responses.Response(status_code=status))


# -- JSON

plain_trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text()
    | st.floats()
    | st.binary().map(lambda raw: raw.hex().encode()),
    lambda inner: (
        st.lists(inner) | st.tuples(inner) | st.dictionaries(st.text() | st.integers() | st.none(), inner)
    ),
    max_leaves=12,
)


def as_json_has_it(value):
    return json.loads(json.dumps(value, default=lambda raw: raw.decode()))


@given(plain_trees)
def test_json_is_what_json_dumps_writes(value):
    assert repr(json.loads(encode_json(value))) == repr(as_json_has_it(value))


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"a": b"\xc3\xbc"}, '{"a":"ü"}'),
        ([bytearray(b"a"), memoryview(b"b")], '["a","b"]'),
        ([math.nan, math.inf, -math.inf], "[NaN,Infinity,-Infinity]"),
        ([1.0, math.inf, -math.inf], "[1.0,Infinity,-Infinity]"),
        ({"a": math.nan}, '{"a":NaN}'),
        ([5e307, 9e307], "[5e307,9e307]"),
        ([1.0, "a", b"b"], '[1.0,"a","b"]'),
        ([1.0, numpy.float64(2.5)], "[1.0,2.5]"),
        ([1.0, 2**70], f"[1.0,{2**70}]"),
        (2**100, str(2**100)),
        ([[2**64]], f"[[{2**64}]]"),
        ("\ud800", '"\\ud800"'),
        ({"ü": "\ud800"}, '{"\\u00fc":"\\ud800"}'),
        (datetime.datetime(2024, 1, 2, 3, 4, 5, tzinfo=datetime.UTC), '"2024-01-02T03:04:05+00:00"'),
        ([datetime.date(2024, 1, 2), datetime.time(3, 4)], '["2024-01-02","03:04:00"]'),
        (datetime.timedelta(minutes=1), "60.0"),
        (uuid.UUID(int=1), '"00000000-0000-0000-0000-000000000001"'),
        (decimal.Decimal("1.10"), '"1.10"'),
        (pathlib.Path("/a/b"), '"/a/b"'),
        ([Color.RED, Level.HIGH], '["red",3]'),
        ([{1}, frozenset("a"), collections.deque([1]), range(2), {"k": 1}.values(), {"k": 1}.keys()],
         '[[1],["a"],[1],[0,1],[1],["k"]]'),
        (Point(1, [Point(2, b"b")]), '{"x":1,"y":[{"x":2,"y":"b"}]}'),
        (Pair(1, {2}), "[1,[2]]"),
        (Record(1, math.nan), '{"a":1,"b":NaN}'),
        (types.MappingProxyType({"a": 1}), '{"a":1}'),
        ({"error": ValueError("boom")}, '{"error":"boom"}'),
        ({1: "a", None: "b", False: "c", 1.5: "d"}, '{"1":"a","null":"b","false":"c","1.5":"d"}'),
        ({b"k": {uuid.UUID(int=1): [Color.RED]}}, '{"k":{"00000000-0000-0000-0000-000000000001":["red"]}}'),
        ({Color.RED: Point(1, {numpy.int64(2): (None, {3})})}, '{"red":{"x":1,"y":{"2":[null,[3]]}}}'),
    ],
)  # fmt: skip
def test_json_of_what_people_return(value, text):
    assert encode_json(value).decode() == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (numpy.arange(4).reshape(2, 2), "[[0,1],[2,3]]"),
        (numpy.array([1.5, math.nan]), "[1.5,NaN]"),
        (numpy.array(3), "3"),
        (numpy.array([b"a", b"b"]), '["a","b"]'),
        (numpy.array([{"a": {1}}, None], dtype=object), '[{"a":[1]},null]'),
        (numpy.array([1, 2], dtype="longdouble"), "[1.0,2.0]"),
        (numpy.array(["2024-01-02T03:04"], dtype="datetime64[ns]"), '["2024-01-02T03:04:00.000000000"]'),
        ([numpy.float32(0.5), numpy.float64(0.5), numpy.int64(7), numpy.bool_(True)], "[0.5,0.5,7,true]"),
        ([numpy.longdouble(1), numpy.datetime64("2024-01-02"), numpy.str_("s")], '[1.0,"2024-01-02","s"]'),
        ({"p": numpy.float32(0.25), "a": numpy.ones(2, "u1")}, '{"p":0.25,"a":[1,1]}'),
    ],
)
def test_json_of_numpy_arrays_and_scalars(value, text):
    assert encode_json(value).decode() == text


def test_json_of_pydantic_models():
    pydantic = needs.module("pydantic")

    class Inner(pydantic.BaseModel):
        when: datetime.date
        score: float = math.nan

    class Model(pydantic.BaseModel, arbitrary_types_allowed=True):
        inner: Inner
        array: object = None

    model = Model(inner=Inner(when="2024-01-02"))
    assert encode_json([model]) == b'[{"inner":{"when":"2024-01-02","score":NaN},"array":null}]'
    assert encode_json(Model(inner=model.inner, array=numpy.arange(2))).endswith(b'"array":[0,1]}')


def test_json_of_models_of_old_pydantic(monkeypatch):
    class BaseModel:
        def dict(self):
            return {"a": {1}}

    monkeypatch.setitem(sys.modules, "pydantic", types.SimpleNamespace(BaseModel=BaseModel))

    assert encode_json(BaseModel()) == b'{"a":[1]}'


def test_json_of_models_that_say_how(monkeypatch):
    class BaseModel:
        def __init__(self, value):
            self.value = value

        def model_dump(self, mode="python"):
            if mode == "json" and isinstance(self.value, set):
                raise ValueError("unknown type")
            return {mode: self.value}

    monkeypatch.setitem(sys.modules, "pydantic", types.SimpleNamespace(BaseModel=BaseModel))

    assert encode_json([BaseModel(1), BaseModel({2})]) == b'[{"json":1},{"python":[2]}]'


def test_json_of_classes_of_attrs():
    class Attrs:
        __attrs_attrs__ = (types.SimpleNamespace(name="a"),)
        a = {1}  # noqa: RUF012

    assert encode_json(Attrs()) == b'{"a":[1]}'


async def unawaited():
    """Never awaited."""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object(), "type object"),
        ({"a": [object]}, "type type"),
        ([1j], "complex"),
        ({(1, 2): 3}, "dict key of type tuple"),
        ({"a": b"\xff"}, "bytes in JSON must be UTF-8"),
        (numpy.complex128(1j), "complex"),
        (dict, "type type"),
    ],
)
def test_what_json_does_not_have_is_named(value, text):
    with pytest.raises(SerializationError, match=text):
        encode(value)


def test_a_coroutine_is_answered_with_what_to_do():
    coroutine = unawaited()
    with pytest.raises(SerializationError, match="await it"):
        encode(coroutine)
    coroutine.close()


@pytest.mark.parametrize("key", ["a", b"a"])
def test_a_cycle_is_refused(key):
    value = {}
    value[key] = [value]

    with pytest.raises(SerializationError, match=r"Circular|nested too deeply"):
        encode(value)


# -- Errors


def test_an_error_is_named_and_its_traceback_shown_only_on_request():
    assert error_reply(KeyError("k"), "secret", expose=False) == (500, UTF8_TEXT, None, b"KeyError: 'k'")
    assert error_reply(ValueError("v"), "shown", expose=True)[3] == b"ValueError: v\n\nshown"
    assert error_reply(ValueError(), "", expose=True)[3] == b"ValueError"


def test_another_backends_traceback_is_not_shown_either():
    error = BackendError.wrap(ValueError("v"), "secret")

    assert error_reply(error, "", expose=False)[3] == b"ValueError: v"


def test_text_of_an_error_is_always_utf8():
    assert error_reply(ValueError("\ud800"), "\ud801", expose=True)[3] == b"ValueError: \\ud800\n\n\\ud801"


# -- Batches


@pytest.mark.parametrize(
    "result",
    [[1, 2, 3], (1, 2, 3), numpy.array([1, 2, 3]), range(1, 4), (n for n in (1, 2, 3)), map(int, "123")],
)
def test_an_ordered_result_of_the_right_length_is_taken(result):
    assert check_batch_result(result, 3) == [1, 2, 3]


@pytest.mark.parametrize(
    ("result", "name"),
    [
        ({1: 2}, "dict"), ({1, 2, 3}, "set"), (frozenset("abc"), "frozenset"), ("abc", "str"),
        (b"abc", "bytes"),
        (None, "NoneType"), (3, "int"), (numpy.array(3), "numpy.ndarray"), (collections.Counter(), "Counter"),
    ],
)  # fmt: skip
def test_a_result_that_is_not_ordered_is_named(result, name):
    with pytest.raises(BackendError, match=f"returned .*{name} for 3 requests"):
        check_batch_result(result, 3)


@pytest.mark.parametrize(
    ("result", "given"),
    [
        ([1, 2], "2 results"),
        ([], "0 results"),
        ([1] * 9, "9 results"),
        ((n for n in "ab"), "2 results"),
        (iter(int, 1), "more than 3 results"),
    ],
)
def test_a_result_of_another_length_names_both(result, given):
    with pytest.raises(BackendError, match=f"{given} for 3 requests"):
        check_batch_result(result, 3)


def test_what_an_iterable_raises_is_the_users():
    with pytest.raises(TypeError, match="int"):
        check_batch_result(map(len, [1, 2]), 2)


def test_neither_pydantic_nor_numpy_is_imported():
    assert not {"pydantic", "numpy"} & set(vars(response))
