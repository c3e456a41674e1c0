"""Python values as bytes between headgate's own processes.

The first byte says how the rest is to be read: nothing, bytes, text, a pickle whose large buffers
follow it, a cloudpickle; or it is that of a pickle. None, bytes and str skip pickle altogether. What the
receiver could not find by name (anything of `__main__`, a local class) travels by value, with
cloudpickle.

`encode` copies nothing that is large: it returns buffers to be written one after the other.
`decode` gives values that own their memory, so the caller may reuse the buffer it passed in; unless it
gives that away (`own`): then large arrays are views of it. That is why large buffers begin at multiples
of `ALIGNMENT`.

Only for authenticated links: decoding runs code of the sender's choice. The frames around a
payload are core/framing.py; errors of headgate itself travel as text, errors.to_wire.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from headgate.errors import BackendError, HeadgateError, ProtocolError, SerializationError

NONE, BYTES, TEXT, _, PICKLE_WITH_BUFFERS, CLOUDPICKLE = range(6)
#: A pickle's own first byte: it goes as it is.
PICKLE = pickle.PROTO[0]

_ERROR = msgspec.msgpack.Decoder(tuple[str, str, bytes | None])  # text, traceback, payload

Buffer = bytes | bytearray | memoryview

#: Buffers of this size and more begin where any array may, and can be left where they lie.
LARGE_BYTES = 64 * 1024
ALIGNMENT = 64

_COUNT = struct.Struct("<BI")  # kind, number of lengths that follow: the pickle's, then each buffer's
_NONE, _BYTES, _TEXT, _CLOUDPICKLE = (bytes((kind,)) for kind in (NONE, BYTES, TEXT, CLOUDPICKLE))
#: What needs no second look once it is pickled: it has neither buffers nor names.
_NUMBERS = frozenset((float, bool))
_dumps, _loads = pickle.dumps, pickle.loads
#: The pickle of an int of 32 bits, a quarter of the time that the pickler takes.
_pack_int = struct.Struct("<3sic").pack
_INT, _STOP = pickle.PROTO + b"\x05" + pickle.BININT, pickle.STOP
#: bytes and text up to this size go in one buffer with their first byte.
_JOIN_BYTES = 4096


def encode(value: object) -> list[Buffer]:
    """`value` as buffers to be sent in this order.

    Raises SerializationError naming the type and the reason, or the HeadgateError that an object
    raises because it is not meant to travel (a Client, for one).
    """
    kind = type(value)
    if kind is int:
        try:
            return [_pack_int(_INT, value, _STOP)]
        except struct.error:  # a large one
            return [_dumps(value, 5)]
    if kind in _NUMBERS:
        return [_dumps(value, 5)]
    if value is None:
        return [_NONE]
    if kind is bytes:
        return [_BYTES, value] if len(value) > _JOIN_BYTES else [_BYTES + value]  # type: ignore[list-item, arg-type, operator]
    if kind is str:
        try:
            text = value.encode()  # type: ignore[attr-defined]
        except UnicodeEncodeError:  # a lone surrogate, which pickle can carry
            pass
        else:
            return [_TEXT, text] if len(text) > _JOIN_BYTES else [_TEXT + text]
    if kind is bytearray:
        value = pickle.PickleBuffer(value)  # type: ignore[arg-type]
    return _encode_pickle(value)


def decode(buffer: Buffer, own: bool = False) -> Any:
    """The value that `encode` was given.

    own   whether the buffer, which is writable, becomes the value's: nobody else may use it any more.
          (A large pickle.PickleBuffer inside of something else then arrives as a memoryview.)

    Raises ProtocolError for bytes that `encode` did not make, SerializationError for a value that
    cannot be rebuilt here.
    """
    try:
        kind = buffer[0]
    except IndexError:
        kind = -1
    if kind == PICKLE:
        try:
            return _loads(buffer)
        except Exception as error:  # the classes named in it run their own code
            raise _not_rebuilt(error) from error
    view = memoryview(buffer)
    if kind == BYTES:
        return bytes(view[1:])
    if kind == TEXT:
        return str(view[1:], "utf-8")
    if kind == NONE:
        return None
    if kind == CLOUDPICKLE:
        return _load(view[1:], ())
    if kind == PICKLE_WITH_BUFFERS:
        pickled, *buffers = _split(view)
        kept = [each if own and len(each) >= LARGE_BYTES else bytearray(each) for each in buffers]
        value = _load(pickled, kept)  # whose buffers are writable, aligned, and its own
        return bytearray(value) if any(value is each for each in kept) and type(value) is memoryview else value
    raise ProtocolError(f"a payload begins with {kind}; this version knows {NONE} to {CLOUDPICKLE}, and {PICKLE}")


def encode_error(error: BaseException, traceback_text: str) -> bytes:
    """An exception of user code with its traceback; one that does not pickle travels as its text."""
    cause = error.__cause__
    if isinstance(error, BackendError) and type(cause) in type(error).__mro__:
        error = cause or error  # a call of another backend failed: its user's error, not our wrapping
    try:
        pickled = b"".join(encode(error)) if _may_be_raised_elsewhere(error) else None
    except HeadgateError:
        pickled = None
    return msgspec.msgpack.encode((error_text(error), _shown(traceback_text), pickled))


def decode_error(data: Buffer) -> HeadgateError:
    """A BackendError that is also an instance of the user's class if that can be rebuilt here.

    An error of headgate's own that came without a traceback is no failure of user code: it is itself.
    """
    try:
        text, traceback_text, pickled = _ERROR.decode(data)
    except msgspec.DecodeError as reason:
        raise ProtocolError(f"this is not an encoded error: {reason}") from None
    error = BackendError(text)
    if pickled is not None:
        try:
            cause = decode(pickled)
            if isinstance(cause, HeadgateError) and not traceback_text:
                return cause
            error = cause if isinstance(cause, BackendError) else BackendError.wrap(cause, traceback_text)
        except Exception:  # noqa: BLE001 - the user's class runs its own code while it is rebuilt
            error = BackendError(text)
    if error.remote_traceback != traceback_text:
        error.told(traceback_text)
    return error


def error_text(error: BaseException) -> str:
    """ "TypeName: message", whatever the exception's own `__str__` does; no traceback."""
    name = type(error).__name__
    try:
        shown = str(error)
    except Exception:  # noqa: BLE001 - the user's class
        shown = "(its message cannot be shown)"
    return _shown(f"{name}: {shown}" if shown else name)


def _shown(text: str) -> str:
    """`text` without lone surrogates, which UTF-8 cannot carry."""
    return text.encode("utf-8", "backslashreplace").decode()


def _may_be_raised_elsewhere(error: BaseException) -> bool:
    """Whether raising it in a caller means "that failed" and not "stop": asyncio and generators
    take SystemExit, CancelledError or StopIteration as their own."""
    return isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration)


def _encode_pickle(value: object) -> list[Buffer]:
    buffers: list[pickle.PickleBuffer] = []
    try:
        pickled = _dumps(value, 5, buffer_callback=buffers.append)
        by_name = b"__main__" not in pickled
    except Exception:  # noqa: BLE001 - user classes raise anything here; cloudpickle is tried next
        by_name = False
    if not by_name:
        buffers.clear()
        pickled = _cloudpickle(value, buffers.append)
    if not buffers:
        return [pickled] if by_name else [_CLOUDPICKLE, pickled]
    contents: list[Buffer] = [pickled, *(each.raw() for each in buffers)]
    lengths = [len(content) for content in contents]
    parts: list[Buffer] = [_COUNT.pack(PICKLE_WITH_BUFFERS, len(lengths)) + struct.pack(f"<{len(lengths)}Q", *lengths)]
    end = len(parts[0])
    for content, start in zip(contents, _starts(end, lengths), strict=True):
        if start > end:
            parts.append(bytes(start - end))
        parts.append(content)
        end = start + len(content)
    return parts


def _starts(at: int, lengths: Iterable[int]) -> list[int]:
    """Where the contents of these lengths begin, the first not before `at`."""
    starts = []
    for length in lengths:
        if length >= LARGE_BYTES:
            at = -(-at // ALIGNMENT) * ALIGNMENT
        starts.append(at)
        at += length
    return starts


def _cloudpickle(value: object, keep: Callable[[pickle.PickleBuffer], Any]) -> bytes:
    file = io.BytesIO()
    try:
        _cloud_pickler()(file, protocol=5, buffer_callback=keep).dump(value)
    except HeadgateError:
        raise
    except Exception as error:  # whatever a user's __reduce__ raises
        kind = type(value)
        raise SerializationError(
            f"a value of type {kind.__module__}.{kind.__qualname__} cannot be sent to another process "
            f"({error_text(error)}); send something that pickles"
        ) from error
    return file.getvalue()


@functools.cache
def _cloud_pickler() -> Callable[..., pickle.Pickler]:
    from cloudpickle import Pickler  # 10 ms, and most values never need it

    class CloudPickler(Pickler):  # type: ignore[misc]
        """cloudpickle, but a memoryview stays one."""

        dispatch_table = Pickler.dispatch_table.new_child({memoryview: _reduce_view})

    return CloudPickler


def _reduce_view(view: memoryview) -> tuple[Callable[..., memoryview], tuple[Any, ...]]:
    if not view.c_contiguous:
        return _view, (bytearray(view.tobytes()), view.format, view.shape)
    return _view, (pickle.PickleBuffer(view), view.format, view.shape)


def _view(buffer: Buffer, form: str, shape: tuple[int, ...]) -> memoryview:
    view = memoryview(buffer).cast("B")
    return view if (form, len(shape)) == ("B", 1) else view.cast(form, list(shape))  # type: ignore[call-overload]


def _split(view: memoryview) -> list[memoryview]:
    """The pickle and its buffers."""
    try:
        count = _COUNT.unpack_from(view)[1]
        lengths = struct.unpack_from(f"<{count}Q", view, _COUNT.size)
    except struct.error as error:
        raise ProtocolError(f"a payload's table of lengths is cut short: {error}") from None
    starts = _starts(_COUNT.size + 8 * count, lengths)
    if count == 0 or starts[-1] + lengths[-1] != len(view):
        raise ProtocolError(f"a payload of {len(view)} bytes does not have the lengths it states")
    return [view[start : start + length] for start, length in zip(starts, lengths, strict=True)]


def _load(pickled: Buffer, buffers: Any) -> Any:
    try:
        return _loads(pickled, buffers=buffers)
    except Exception as error:  # as in `decode`
        raise _not_rebuilt(error) from error


def _not_rebuilt(error: Exception) -> SerializationError:
    return SerializationError(
        f"a value from another process cannot be rebuilt here ({error_text(error)}); "
        "the class must be importable on both sides, and unpickle"
    )
