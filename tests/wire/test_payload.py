"""Values and errors come out of a payload as they went in, or with an error that says why not."""

from __future__ import annotations

import asyncio
import enum
import os
import pickle
import subprocess
import sys
import threading
import traceback

import needs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.errors import (
    BackendError,
    EndpointNotFound,
    InstanceError,
    ProtocolError,
    ReplicaDied,
    SerializationError,
)
from headgate.wire import payload

numpy = needs.module("numpy")


def there_and_back(value):
    return payload.decode(b"".join(payload.encode(value)))


class Color(enum.Enum):
    RED = 1


class Odd(Exception):
    """Pickles, but does not unpickle."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


class Silent(Exception):
    def __str__(self):
        raise RuntimeError("no text")


scalars = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(allow_nan=False)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(scalars, inner),
    max_leaves=10,
)


@given(values)
def test_a_value_comes_back_with_its_type(value):
    back = there_and_back(value)

    assert back == value
    assert type(back) is type(value)


@pytest.mark.parametrize(
    "value", ["\ud800", {"a": "__main__"}, {1, 2}, frozenset("a"), Color.RED, 1j, int, len]
)
def test_what_msgpack_could_not_carry_comes_back(value):
    assert there_and_back(value) == value


@pytest.mark.parametrize("value", [b"", b"abc", "", "ü", None])
def test_bytes_text_and_none_are_not_pickled(value):
    assert payload.encode(value)[0][0] in (payload.NONE, payload.BYTES, payload.TEXT)
    assert there_and_back(value) == value


@pytest.mark.parametrize(
    "value", [2**31, 2**70, int.from_bytes(b"__main__"), 1.5, True, [1, "a"], ("a", None)], ids=str
)
def test_what_needs_no_buffers_is_its_pickle(value):
    assert payload.encode(value) == [pickle.dumps(value, 5)]
    assert there_and_back(value) == value


@pytest.mark.parametrize("value", [0, -1, 255, 2**31 - 1, -(2**31)])
def test_a_small_int_is_a_pickle_too(value):
    assert [pickle.loads(part) for part in payload.encode(value)] == [value]
    assert there_and_back(value) == value


def test_a_subclass_of_a_number_is_one_where_it_arrives():
    assert type(there_and_back(Color.RED)) is Color


def test_bytes_are_not_copied():
    value = b"x" * 100_000

    assert payload.encode(value)[1] is value


def test_an_array_is_not_copied_when_it_is_sent_and_is_writable_where_it_arrives():
    array = numpy.arange(1000.0).reshape(10, 100)
    parts = payload.encode({"a": array})

    assert parts[0][0] == payload.PICKLE_WITH_BUFFERS
    assert numpy.shares_memory(numpy.frombuffer(parts[-1]), array)
    sent = b"".join(parts)
    back = payload.decode(sent)["a"]
    assert (back == array).all()
    back[0, 0] = 7.0
    assert payload.decode(sent)["a"][0, 0] == 0.0


def test_a_read_only_array_stays_read_only():
    array = numpy.arange(10)
    array.flags.writeable = False

    assert not there_and_back(array).flags.writeable


@pytest.mark.parametrize(
    "array", [numpy.arange(20)[::2], numpy.zeros((3, 4), order="F"), numpy.zeros((0, 3))]
)
def test_arrays_of_any_layout_come_back(array):
    assert (there_and_back(array) == array).all()
    assert there_and_back(array).shape == array.shape


def owned(value):
    """What becomes of a value whose receiver may keep the buffer, and that buffer."""
    buffer = bytearray(b"".join(payload.encode(value)))
    return payload.decode(memoryview(buffer), own=True), buffer


@pytest.mark.parametrize("before", range(0, 65, 13))
def test_a_large_array_is_a_view_of_a_buffer_that_it_may_keep_and_lies_as_arrays_do(before):
    value, buffer = owned({"pad": b"x" * before, "a": numpy.arange(100_000.0), "b": numpy.arange(90_000, dtype="c16")})

    lying = numpy.frombuffer(buffer, numpy.uint8)
    for array in (value["a"], value["b"]):
        assert numpy.shares_memory(array, lying)
        assert (array.ctypes.data - lying.ctypes.data) % payload.ALIGNMENT == 0
        assert array.flags.writeable
    assert value["a"][-1] == 99_999.0
    assert value["b"][-1] == 89_999


def test_a_small_array_and_text_do_not_keep_the_buffer():
    for value in (numpy.arange(100), [b"x" * 100_000], "x" * 100_000, b"x" * 100_000, {1: "x" * 100_000}):
        back, buffer = owned(value)
        buffer[:] = bytes(len(buffer))
        assert numpy.array_equal(back, value) if isinstance(value, numpy.ndarray) else back == value
        buffer.append(0)  # nothing refers to it


def test_what_keeps_the_buffer_has_its_type_still():
    read_only = numpy.arange(100_000)
    read_only.flags.writeable = False

    assert not owned(read_only)[0].flags.writeable
    assert type(owned(bytearray(100_000))[0]) is bytearray
    view = owned(memoryview(numpy.arange(100_000, dtype="i4").reshape(2, 50_000)))[0]
    assert (view.format, view.shape) == ("i", (2, 50_000))


@given(st.lists(st.integers(0, 3 * payload.LARGE_BYTES), max_size=6))
def test_buffers_of_all_sizes_come_back(sizes):
    value = [numpy.full(size, number, numpy.uint8) for number, size in enumerate(sizes)]

    for back in (there_and_back(value), owned(value)[0]):
        assert all(numpy.array_equal(one, other) for one, other in zip(value, back, strict=True))


def test_a_bytearray_stays_one():
    back = there_and_back(bytearray(b"abc"))

    assert type(back) is bytearray
    assert back == b"abc"


@pytest.mark.parametrize(
    "view",
    [
        memoryview(b"abcdef"),
        memoryview(bytearray(b"abcdef")),
        memoryview(b"abcdef")[::2],
        memoryview(numpy.arange(6, dtype="i4").reshape(2, 3)),
    ],
)
def test_a_memoryview_stays_one(view):
    back = there_and_back({"inside": view})["inside"]

    assert back == view
    assert (back.format, back.shape) == (view.format, view.shape)


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_the_value_does_not_depend_on_the_buffer_it_came_in(wrap):
    buffer = wrap(b"".join(payload.encode([b"abc", numpy.arange(3), bytearray(b"d")])))
    back = payload.decode(buffer)
    if wrap is bytearray:
        buffer[:] = bytes(len(buffer))

    assert back[0] == b"abc"
    assert back[1].tolist() == [0, 1, 2]


def test_a_local_class_travels_by_value():
    class Local:
        def __init__(self):
            self.n = 3

    assert there_and_back(Local()).n == 3
    assert there_and_back(lambda x: x + 1)(2) == 3


def test_a_class_of_main_travels_by_value():
    script = (
        "import sys, numpy\n"
        "from headgate.wire import payload\n"
        "class Mine:\n"
        "    data = numpy.arange(3)\n"
        "    def __init__(self): self.array = numpy.arange(5)\n"
        "sys.stdout.buffer.write(b''.join(payload.encode(Mine())))\n"
    )
    sent = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout

    assert payload.decode(sent).array.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [threading.Lock(), [threading.Lock()], (n for n in "ab")])
def test_what_does_not_pickle_is_named(value):
    with pytest.raises(SerializationError, match=f"{type(value).__name__} cannot be sent to another process"):
        payload.encode(value)


def test_an_object_that_refuses_to_travel_says_so_itself():
    class Client:
        def __reduce__(self):
            raise InstanceError("use connect()")

    with pytest.raises(InstanceError, match=r"use connect\(\)"):
        payload.encode({"client": Client()})


def test_a_missing_module_is_named():
    sent = b"".join(payload.encode(Color.RED)).replace(b"test_payload", b"test_gone_ad")

    with pytest.raises(SerializationError, match="test_gone_ad"):
        payload.decode(sent)


@pytest.mark.parametrize(
    "data", [b"", b"\x09", b"\x04", b"\x04\x02\0\0\0\1", b"\x04\0\0\0\0", b"\x04\1\0\0\0" + b"\x09" * 9]
)
def test_bytes_that_are_no_payload_are_refused(data):
    with pytest.raises(ProtocolError):
        payload.decode(data)


# -- Errors


def raised_there(error, traceback_text="Traceback of the replica"):
    return payload.decode_error(payload.encode_error(error, traceback_text))


def test_an_error_is_of_the_users_class_and_carries_the_traceback():
    error = raised_there(KeyError("k"))

    assert isinstance(error, KeyError)
    assert isinstance(error, BackendError)
    assert error.args == ("k",)
    assert str(error) == "'k'"  # the user's own text
    assert "Traceback of the replica" in "".join(traceback.format_exception(error))
    assert error.remote_traceback == "Traceback of the replica"


def test_an_error_of_a_local_class_is_of_that_class():
    class Mine(ValueError):
        pass

    error = Mine("m")
    error.detail = 7
    back = raised_there(error)

    assert isinstance(back, Mine)
    assert back.detail == 7


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Odd(1, 2), "Odd: 1 and 2"),
        (ValueError(threading.Lock()), "ValueError: <unlocked"),
        (Silent(threading.Lock()), r"Silent: \(its message cannot be shown\)"),
        (ValueError("\ud800", threading.Lock()), r"\\ud800"),
    ],
)
def test_an_error_that_does_not_pickle_travels_as_text(error, text):
    back = raised_there(error)

    assert isinstance(back, BackendError)
    with pytest.raises(BackendError, match=text):
        raise back


@pytest.mark.parametrize(
    "kind", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, StopIteration]
)
def test_what_would_stop_the_caller_is_a_plain_backend_error(kind):
    back = raised_there(kind("stop"))

    assert type(back) is BackendError
    assert f"{kind.__name__}: stop" in str(back)


def test_an_error_that_came_through_two_backends_keeps_its_class():
    first = raised_there(KeyError("k"))
    back = raised_there(first, "Traceback of the second")

    assert isinstance(back, KeyError)
    assert isinstance(back, BackendError)
    assert back.remote_traceback == "Traceback of the second"


def test_a_backend_error_without_class_stays_one():
    back = raised_there(raised_there(SystemExit(3)), "second")

    assert type(back) is BackendError
    assert "SystemExit: 3" in str(back)


def test_headgates_own_error_without_a_traceback_is_itself():
    assert type(raised_there(EndpointNotFound("no method"), "")) is EndpointNotFound
    assert isinstance(raised_there(ReplicaDied("in user code"), "traceback"), BackendError)


def test_bytes_that_are_no_error_are_refused():
    with pytest.raises(ProtocolError, match="not an encoded error"):
        payload.decode_error(b"\xc1")


def test_cloudpickle_is_imported_late():
    script = "import sys, headgate.wire.payload; assert 'cloudpickle' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env=os.environ)
