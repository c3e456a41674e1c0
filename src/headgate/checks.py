"""What a value must be: checks that return it as it is kept, or raise `Refused` with what is wanted instead.

The fields that use them are in config.py; how a field turns a refusal into an error, options.py.
"""

from __future__ import annotations

import math
import numbers
import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

#: Values cross processes as msgpack, whose integers have 64 bits.
MAX_INTEGER = 2**63 - 1
_VISIBLE = re.compile("[!-~]+").fullmatch


class Refused(Exception):
    """A check's verdict; its text completes "must be ..."."""


Check = Callable[[object], T]


def number_in(value: object) -> int | float | None:
    """The finite number that `value` is or spells, else None. A bool is not a number."""
    if isinstance(value, numbers.Integral):
        return None if isinstance(value, bool) else int(value)
    if not isinstance(value, (str, numbers.Real)):
        return None
    try:
        return int(value) if isinstance(value, str) else finite(value)
    except ValueError:
        return finite(value)


def finite(value: Any) -> float | None:
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def integer(low: int, high: int | None = None) -> Check[int]:
    """Accepts whole numbers of low..high, both included."""
    top = MAX_INTEGER if high is None else high
    both = f"an integer from {low} to {top}"
    wants = f"an integer >= {low}" if high is None else both

    def check(value: object) -> int:
        found = number_in(value)
        if found is None or found != int(found) or found < low:
            raise Refused(wants)
        if found > top:
            raise Refused(both)
        return int(found)

    return check


def positive(value: object) -> float:
    found = finite(number_in(value) or 0)
    if found is None or found <= 0:
        raise Refused("a number > 0")
    return found


def not_negative(value: object) -> float:
    number = number_in(value)
    found = None if number is None else finite(number)
    if found is None or found < 0:
        raise Refused("a number >= 0")
    return found


def boolean(value: object) -> bool:
    if not isinstance(value, bool):
        raise Refused("True or False")
    return value


def anything(value: object) -> Any:
    return value


def text(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise Refused("a string that is not empty")
    return value


def token(value: object) -> str:
    """A secret that fits into a header; a newline left over from reading a file would never match."""
    if not isinstance(value, str) or not _VISIBLE(value):
        raise Refused("a string of visible ASCII characters without spaces")
    return value


def file_path(value: object) -> str:
    path = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(path, str) or not path:
        raise Refused("a path (str or os.PathLike)")
    return path


def addresses(value: object) -> str:
    """Comma-separated; a list is joined. "*" is everybody, "" nobody."""
    if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
        return ",".join(value)
    if not isinstance(value, str):
        raise Refused("a comma-separated string or a list of addresses")
    return value


def middleware_list(value: object) -> list[Any]:
    # Starlette is not imported here (27 ms); what marks its Middleware is the class it will build.
    if not isinstance(value, (list, tuple)) or not all(hasattr(item, "cls") for item in value):
        raise Refused("a list of starlette.middleware.Middleware")
    return list(value)


def json_value(value: object) -> Any:
    """Accepts what JSON and msgpack hold, and makes it of their own types: a tuple becomes a list."""
    if value is None or isinstance(value, bool | str):
        return _encodable(value)
    if isinstance(value, numbers.Integral):
        return _within_64_bits(int(value))
    if isinstance(value, numbers.Real):
        if (found := finite(value)) is None:
            raise Refused(f"{short(value)} is no finite number")
        return found
    if isinstance(value, list | tuple):
        return [json_value(item) for item in value]
    if not isinstance(value, dict):
        raise Refused(f"{short(value)} is a {kind_of(value)}")
    if strange := [key for key in value if not isinstance(key, str)]:
        raise Refused(f"the key {short(strange[0])} is a {kind_of(strange[0])}")
    return {_encodable(key): json_value(item) for key, item in value.items()}


def _encodable(value: T) -> T:
    try:
        if isinstance(value, str):
            value.encode()
    except UnicodeEncodeError:
        raise Refused(f"{value!a} is text that UTF-8 cannot encode") from None
    return value


def _within_64_bits(value: int) -> int:
    if abs(value) > MAX_INTEGER:
        raise Refused(f"{short(value)} does not fit into 64 bits")
    return value


def optional(check: Check[T]) -> Check[T | None]:
    """Accepts None too."""

    def checked(value: object) -> T | None:
        if value is None:
            return None
        try:
            return check(value)
        except Refused as refused:
            raise Refused(f"{refused} or None") from None

    return checked


# -- Words for errors. -------------------------------------------------------------------------------


def kind_of(value: object) -> str:
    return type(value).__name__


def short(value: object) -> str:
    try:
        shown = repr(value)
    except ValueError:  # an int of more digits than Python prints
        shown = f"a very large {kind_of(value)}"
    return shown if len(shown) <= 80 else shown[:77] + "..."
