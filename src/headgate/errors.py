"""Every error that headgate raises: what happened, and what to do about it.

One tree under `HeadgateError`. A class that has a counterpart among Python's built-ins is
also an instance of it, so `except ValueError` catches a `ConfigError`. A class knows the
HTTP status it becomes (`http_status`) and the short code that machines read (`code`).

`to_wire`/`from_wire` carry an error between headgate's own processes as plain text fields;
errors of user code travel as values, wire/payload.py.
"""

from __future__ import annotations

TYPE_CHECKING = False  # see __init__.py
if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "ArgumentError",
    "BackendError",
    "BackendOverloaded",
    "BackendStartError",
    "ConfigError",
    "ControllerUnavailable",
    "EndpointNotFound",
    "HeadgateError",
    "InstanceError",
    "ProtocolError",
    "RayServeException",
    "ReplicaDied",
    "RequestCancelled",
    "RequestError",
    "RequestTimeout",
    "SerializationError",
]


class HeadgateError(Exception):
    """The root of all errors of this package."""

    http_status = 500
    code = "INTERNAL"

    def __str__(self) -> str:  # KeyError would show the repr of its message
        return str(self.args[0]) if self.args else ""


#: The name under which Ray Serve's client API exported the same root.
RayServeException = HeadgateError


class ConfigError(HeadgateError, ValueError):
    """A value that cannot be used; the message names the field or argument."""

    http_status = 400
    code = "CONFIG"


class ArgumentError(HeadgateError, TypeError):
    """An argument of the wrong type; the message names it and the type that was given."""

    http_status = 400
    code = "ARGUMENT"


class EndpointNotFound(HeadgateError, KeyError):
    """No endpoint of that name."""

    http_status = 404
    code = "ENDPOINT_NOT_FOUND"


class InstanceError(HeadgateError, RuntimeError):
    """The instance is not there, already there, shut down, or not what the call needs."""

    code = "INSTANCE"


class BackendStartError(HeadgateError, RuntimeError):
    """A backend's code could not be loaded, constructed or reconfigured; carries the user's traceback."""

    code = "BACKEND_START"


class ProtocolError(HeadgateError):
    """A peer broke the wire protocol or failed its authentication."""

    code = "PROTOCOL"


class ControllerUnavailable(HeadgateError, ConnectionError):
    """The controller did not answer; the change may or may not have happened, repeating it is safe."""

    http_status = 503
    code = "CONTROLLER_UNAVAILABLE"


class RequestError(HeadgateError):
    """One request failed."""

    code = "REQUEST_FAILED"


class BackendOverloaded(RequestError):
    """Too many requests wait for the backend already."""

    http_status = 503
    code = "BACKEND_OVERLOADED"
    #: Seconds after which a retry makes sense; the Retry-After header.
    retry_after_s: int = 1


class RequestTimeout(RequestError, TimeoutError):
    """The request's deadline passed."""

    http_status = 504
    code = "REQUEST_TIMEOUT"


class ReplicaDied(RequestError):
    """The replica died while it ran the request; the request is not run again."""

    http_status = 502
    code = "REPLICA_DIED"
    #: Whether user code may have begun to run.
    started: bool = True


class SerializationError(RequestError, TypeError):
    """A value cannot travel between processes, or cannot be turned into a response."""

    http_status = 500
    code = "SERIALIZATION"


class RequestCancelled(RequestError):
    """The caller cancelled the request or went away."""

    http_status = 499
    code = "REQUEST_CANCELLED"


class BackendError(RequestError):
    """User code raised.

    What a handle's caller gets is an instance of this *and* of the user's own exception
    class where that class can be rebuilt here (see `wrap`). Its text is the user's; the traceback
    in the replica is shown below it, and stands in `remote_traceback`.
    """

    code = "BACKEND_ERROR"
    #: The traceback in the replica, as text.
    remote_traceback: str = ""

    @staticmethod
    def wrap(cause: BaseException, remote_traceback: str) -> BackendError:
        """An error that is a BackendError and an instance of `type(cause)`, with its args and attributes.

        >>> error = BackendError.wrap(KeyError("k"), "Traceback ...")
        >>> isinstance(error, BackendError), isinstance(error, KeyError), error.args
        (True, True, ('k',))
        """
        kind = type(cause)
        try:
            joined = type(kind.__name__, (BackendError, kind), {"__module__": kind.__module__})
            error: BackendError = joined.__new__(joined, *cause.args)
            error.args = cause.args
            error.__dict__.update(cause.__dict__)
        except (TypeError, ValueError, AttributeError):  # final class, foreign layout, odd constructor
            error = BackendError(f"{kind.__name__}: {cause}")
        error.told(remote_traceback)
        return error

    def told(self, remote_traceback: str) -> None:
        """Keep the replica's traceback, and have it shown wherever this error's own is."""
        self.remote_traceback = remote_traceback
        if remote_traceback:
            self.add_note(f"\nIn the replica:\n{remote_traceback}")

    def __str__(self) -> str:
        mro = type(self).__mro__[1:]
        users = next(kind for kind in mro if "__str__" in kind.__dict__ and not issubclass(kind, HeadgateError))
        return str(users.__str__(self)) or ", ".join(map(str, self.args))  # some need their __init__ for it


_BY_NAME: Mapping[str, type[HeadgateError]] = {
    kind.__name__: kind
    for kind in (
        HeadgateError, ConfigError, ArgumentError, EndpointNotFound, InstanceError, BackendStartError,
        ProtocolError, ControllerUnavailable, RequestError, BackendOverloaded, RequestTimeout,
        ReplicaDied, SerializationError, RequestCancelled, BackendError,
    )
}  # fmt: skip


def to_wire(error: HeadgateError) -> tuple[str, str]:
    """(class name, message) of an error of this module."""
    for kind in type(error).__mro__:
        if _BY_NAME.get(kind.__name__) is kind:
            return kind.__name__, str(error)
    raise AssertionError("every HeadgateError has a class of this module among its bases")


def from_wire(name: str, message: str) -> HeadgateError:
    """The error that `to_wire` described; an unknown name gives a plain HeadgateError."""
    return _BY_NAME.get(name, HeadgateError)(message)
