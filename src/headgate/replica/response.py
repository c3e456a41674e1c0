"""What a handler returned, as an HTTP answer.

`encode` decides on one of three: a `Reply` that is complete; a `Stream` whose items are yet to be
pulled; an `Asgi` response that has to be run. None is empty text, bytes go out raw, str as
UTF-8, a Starlette Response as it says, anything else is JSON.

JSON here is what `json.dumps` writes (NaN stays NaN), with bytes as text, and models, dataclasses,
arrays, dates and the like as one expects. Plain trees go through msgspec, five times as fast; what
it would write differently is kept away from it by `_is_plain`.

pydantic, numpy, pathlib and starlette.responses are never imported: a value of theirs means that the user has.
"""

from __future__ import annotations

import datetime
import decimal
import enum
import json
import re
import sys
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Set, Sized, ValuesView
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import msgspec

from headgate.errors import BackendError, SerializationError
from headgate.wire.payload import error_text

if TYPE_CHECKING:
    from starlette.responses import Response

#: Content-type codes, indices into the table of core/replies.py; OWN_HEADERS: the header block has it.
TEXT, UTF8_TEXT, JSON, OCTETS, NDJSON, OWN_HEADERS = range(6)

#: status, content-type code, header lines ("name: value\r\n"…) or None, body
Reply: TypeAlias = tuple[int, int, bytes | None, bytes]


class Stream(msgspec.Struct, frozen=True):
    """A generator or async generator. Its first item decides the kind, see `stream_kind`."""

    items: Generator[Any, Any, Any] | AsyncGenerator[Any, Any]

    @property
    def is_async(self) -> bool:
        return isinstance(self.items, AsyncGenerator)


class Asgi(msgspec.Struct, frozen=True):
    """A Starlette response that streams or does more than answer: `await response(scope, receive, send)`."""

    response: Response


def encode(result: object) -> Reply | Stream | Asgi:
    """The answer, status 200 unless a Response says otherwise.

    Raises SerializationError naming the type of what cannot be encoded.
    """
    found = WHOLE.get(type(result))
    if found is not None:
        return 200, found[0], None, found[1](result)
    if isinstance(result, str):
        return 200, UTF8_TEXT, None, _utf8(result)
    if isinstance(result, bytes):
        return 200, TEXT, None, bytes(memoryview(result))  # whatever its class says of its length
    if _is_response(result):
        return _encode_response(result)
    if isinstance(result, Generator | AsyncGenerator):
        return Stream(result)
    if isinstance(result, bytearray | memoryview):
        return 200, TEXT, None, bytes(result)
    return 200, JSON, None, encode_json(result)


def runs_on_loop(result: object) -> bool:
    """Whether `encode` may give something that a task on the loop has to run."""
    return isinstance(result, AsyncGenerator) or _is_response(result)


def stream_kind(first: object) -> int:
    """The content-type code of a stream that begins with this item."""
    if isinstance(first, str):
        return TEXT
    return OCTETS if isinstance(first, bytes | bytearray | memoryview) else NDJSON


def stream_item(item: object, kind: int) -> bytes:
    """One item of a stream of that kind; SerializationError if it does not fit the first one."""
    if kind == NDJSON:
        return encode_json(item) + b"\n"
    if isinstance(item, str):
        return _utf8(item)
    if isinstance(item, bytes | bytearray | memoryview):
        return bytes(item)
    first = "str" if kind == TEXT else "bytes"
    raise SerializationError(f"a stream that began with {first} yielded {_name(item)}; yield {first} only")


def error_reply(error: BaseException, traceback_text: str, expose: bool) -> Reply:
    """500 with "TypeName: message", and the traceback if `expose`."""
    text = error_text(error)
    if expose and traceback_text:
        text = f"{text}\n\n{traceback_text}"
    return 500, UTF8_TEXT, None, text.encode("utf-8", "backslashreplace")


def check_batch_result(result: object, size: int) -> list[Any]:
    """The results of a batch of `size` requests, in their order.

    Raises BackendError, with both lengths or the type, unless it is an ordered iterable of that length.
    """
    if not _is_ordered(result):
        raise BackendError(
            f"the batch handler returned {_name(result)} for {size} requests; "
            "return a list with one result for each request, in their order"
        )
    items = list(islice(result, size + 1))  # type: ignore[call-overload]  # a generator may never end
    if len(items) != size:
        given = f"more than {size}" if len(items) > size else len(items)
        raise BackendError(
            f"the batch handler returned {len(result) if isinstance(result, Sized) else given} results "
            f"for {size} requests; return one result for each request, in their order"
        )
    return items


def _is_ordered(result: object) -> bool:
    if isinstance(result, str | bytes | bytearray | Mapping | Set) or not isinstance(result, Iterable):
        return False
    try:
        iter(result)
    except TypeError:  # an array without dimensions
        return False
    return True


# -- Starlette's responses ------------------------------------------------------------------------

_LINES = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++: [\t -~\x80-\xff]*+\r\n)*+").fullmatch
#: The proxy alone decides how a body is framed.
_FRAMING = (b"content-length", b"transfer-encoding")


def _is_response(result: object) -> TypeGuard[Response]:
    kind = getattr(sys.modules.get("starlette.responses"), "Response", None)
    return kind is not None and isinstance(result, kind)


def _encode_response(response: Response) -> Reply | Asgi:
    from starlette.responses import FileResponse, Response, StreamingResponse

    if (
        response.background is not None
        or type(response).__call__ is not Response.__call__
        or isinstance(response, StreamingResponse | FileResponse)
    ):
        return Asgi(response)
    status = int(response.status_code)
    if not 200 <= status <= 599:
        raise SerializationError(f"{_name(response)} has status {status}; a final status is in 200..599")
    body = b"" if status in (204, 304) else bytes(response.body)
    return status, OWN_HEADERS, header_block(response.raw_headers), body


def header_block(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """Header lines, without those that frame the body.

    SerializationError for a header that would break out of its line.
    """
    lines = [b"%b: %b\r\n" % header for header in headers if header[0].lower() not in _FRAMING]
    block = b"".join(lines)
    if block.count(b"\r\n") != len(lines) or _LINES(block) is None:
        bad = next(line for line in lines if line.count(b"\r\n") != 1 or _LINES(line) is None)
        name = bad.partition(b":")[0]
        raise SerializationError(
            f"the response header {name!r} has a bad name, or holds CR, LF, NUL or another control "
            "character; encode it"
        )
    return block


# -- JSON -----------------------------------------------------------------------------------------


def encode_json(value: object) -> bytes:
    """`value` as compact JSON; SerializationError naming the type of what has no JSON."""
    try:
        if _is_plain(value):
            return _encode_plain(value)
    except (TypeError, ValueError, OverflowError, RecursionError):
        pass  # a lone surrogate, an integer beyond 64 bits, a cycle: json knows or says it better
    try:
        try:
            return _ENCODER.encode(value).encode()
        except SerializationError:
            raise
        except TypeError:  # a key that JSON does not have
            return _ENCODER.encode(_with_text_keys(value)).encode()
        except UnicodeEncodeError:
            return _ASCII_ENCODER.encode(_with_text_keys(value)).encode()
    except RecursionError:
        raise SerializationError(f"{_name(value)} is nested too deeply for JSON") from None
    except ValueError as error:
        raise SerializationError(f"{_name(value)} cannot be encoded as JSON: {error}") from None


def _is_plain(value: Any) -> bool:
    """Whether msgspec writes what json would: only str, int, bool, None, finite floats in lists and dicts."""
    kind = type(value)
    if kind is dict:
        for key in value:
            if type(key) is not str:
                return False
        value = value.values()
    elif kind is list or kind is tuple:
        if value and type(value[0]) is float:  # most often all are
            total = sum(value)
            if type(total) is float and total - total == 0.0:
                return True
    else:
        return False
    for item in value:
        kind = type(item)
        if kind is str or kind is int:
            continue
        if kind is float:
            if item - item != 0.0:
                return False
        elif not (kind is bool or item is None or _is_plain(item)):
            return False
    return True


def _to_json(value: Any) -> Any:
    """What json cannot write, as something that it can, one level deep: json asks again for the rest."""
    for known, convert in _CONVERT:
        if isinstance(value, known):
            return convert(value)
    numpy, pydantic, pathlib = map(sys.modules.get, ("numpy", "pydantic", "pathlib"))
    if pathlib is not None and isinstance(value, pathlib.PurePath):
        return str(value)
    if numpy is not None and isinstance(value, numpy.ndarray | numpy.generic):
        return _numpy_to_json(value, numpy)
    if pydantic is not None and isinstance(value, pydantic.BaseModel):
        return _model_to_json(value)
    kind = type(value)
    if hasattr(kind, "__dataclass_fields__"):
        from dataclasses import fields

        return {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if hasattr(kind, "__attrs_attrs__"):
        return {field.name: getattr(value, field.name) for field in kind.__attrs_attrs__}
    hint = "; await it, or make the handler `async def`" if kind.__name__ == "coroutine" else ""
    raise SerializationError(f"a value of type {_name(value)} cannot be encoded as JSON{hint}")


def _numpy_to_json(value: Any, numpy: Any) -> Any:
    if value.dtype.kind == "M":
        return value.astype(str).tolist()
    if value.dtype == numpy.longdouble:  # tolist() leaves it as it is
        value = value.astype(float)
    return value.tolist()


def _model_to_json(model: Any) -> Any:
    if not hasattr(model, "model_dump"):  # pydantic 1
        return model.dict()
    try:
        return model.model_dump(mode="json")
    except ValueError:  # a field of a type that pydantic does not know: we may
        return model.model_dump()


def _bytes_to_json(value: Any) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError as error:
        raise SerializationError(f"{_name(value)} in JSON must be UTF-8 text: {error}") from None


def _with_text_keys(value: Any) -> Any:
    """`value` in dicts and lists, each key as JSON can have it."""
    if isinstance(value, dict):
        return {_key(key): _with_text_keys(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_text_keys(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    return _with_text_keys(_to_json(value))


def _key(key: Any) -> Any:
    if key is None or isinstance(key, str | int | float):
        return key
    try:
        plain = _to_json(key)
    except SerializationError:
        plain = key
    if plain is None or isinstance(plain, str | int | float):
        return plain
    raise SerializationError(f"a dict key of type {_name(key)} cannot be encoded as JSON; use str keys")


_CONVERT: tuple[tuple[Any, Callable[[Any], Any]], ...] = (
    ((bytes, bytearray, memoryview), _bytes_to_json),
    (enum.Enum, lambda value: value.value),
    ((datetime.date, datetime.time), lambda value: value.isoformat()),  # a datetime is a date
    (datetime.timedelta, datetime.timedelta.total_seconds),
    ((uuid.UUID, decimal.Decimal), str),
    ((Set, deque, range, ValuesView), list),
    (Mapping, dict),
    (BaseException, str),
)
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=_to_json)
_ASCII_ENCODER = json.JSONEncoder(separators=(",", ":"), default=_to_json)
_encode_plain = msgspec.json.Encoder().encode


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise SerializationError(f"a str cannot be sent as UTF-8: {error}") from None


#: Types of results that neither stream nor have to be run -> content-type code, encoder. Looked up first: whether
#: something is a generator, an abstract class says, which takes as long as encoding a small answer.
WHOLE: dict[type, tuple[int, Callable[[Any], bytes]]] = {
    type(None): (TEXT, lambda _: b""),
    bytes: (TEXT, bytes),
    str: (UTF8_TEXT, _utf8),
    **dict.fromkeys((bool, int, float, list, tuple, dict), (JSON, encode_json)),
}


def _name(value: object) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
