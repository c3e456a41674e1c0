"""`remote` where replicas are actors: reserve a slot, then call the actor that granted it.

    handle ── CALL with RESERVE, no body ──> replica     waits in line, counts, expires like any call
           <── its token: the grant ───────              the slot is held from here on
           ── actor.serve(token, arguments) ─> actor     by Ray, which returns its own ref
           <── END ────────────────────────              answered: the slot is free

What keeps a request from being assigned is raised before the grant. From then on Ray's ref carries
the outcome, and the reservation only keeps count: however it ends, it ends in silence.

Whoever calls goes on when the actor is known, which takes a moment the first time: nobody looks for
an actor on a caller's loop.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import sys
from collections.abc import Callable
from typing import Any, Protocol

from headgate.calls import Call, Target, Way
from headgate.core import framing
from headgate.errors import ControllerUnavailable, HeadgateError, InstanceError, ProtocolError, SerializationError
from headgate.router import Caller
from headgate.wire import payload

log = logging.getLogger("headgate.handle")

#: How long a granted request waits until its replica's actor is known.
LOOK_S = 5.0


class Refs(Protocol):
    """The engine's own refs."""

    def is_ref(self, value: object) -> bool:
        """Whether it is one; cheap."""

    def get(self, refs: list[Any], timeout: float | None) -> list[Any]:
        """Their values. RequestTimeout after `timeout` seconds; raises what the first one ended with."""

    def wait(self, refs: list[Any], num_returns: int, timeout: float | None) -> tuple[list[Any], list[Any]]:
        """(ready, not ready), as headgate.wait."""


class Actors(Refs, Protocol):
    """Replicas that are actors: what `home.actors` of an instance is."""

    def ready(self, replica_id: str, then: Callable[[HeadgateError | None], None]) -> bool:
        """Whether the replica's actor is known; if not, `then(None)` once it is, or `then(why not)`.

        That is on some thread, perhaps at once, or never if nobody can tell.
        """

    def serve(self, replica_id: str, token: int, data: Any, kwargs: dict[str, Any]) -> Any:
        """Call the replica for the slot that it granted; the ref of its answer, at once.

        No argument is a ref. Raises the engine's error if one does not pickle.
        """

    def courier(
        self, key: str, endpoint: str, missing_ok: bool, options: dict[str, Any], data: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Have arguments that are refs resolved, and then the call made; the ref of its answer, at once."""


class ActorWay(Way, Protocol):
    """A call's way where replicas are actors."""

    actors: Actors | None


_refs: Refs | None = None


def use(refs: Refs | None) -> None:
    """What `refs_here` finds from now on; None: it looks for Ray's again."""
    global _refs
    _refs = refs


def refs_here() -> Refs | None:
    """The engine's own refs if this process can have any. Imports nothing to find out that it cannot."""
    if _refs is None and "ray" in sys.modules:
        from headgate.engine.ray_home import RayActors

        use(RayActors("", ""))  # of no instance: for refs alone
    return _refs


class Reservation(Call):
    """A call that asks for a slot. `assigned`: it was granted, by `replica` under `token`."""

    token = 0
    replica = ""
    data: Any = None
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - replaced, never changed
    unclaimable: HeadgateError | None = None  # why its replica's actor cannot be called
    _original: Caller | None = None

    def __init__(self, lane: ActorWay, target: Target) -> None:
        super().__init__(lane, target)
        self._actors = lane.actors
        self.flags = target.flags | framing.RESERVE

    def fill(self, data: object, kwargs: dict[str, Any]) -> None:
        """Keep the arguments: they do not travel with it."""
        self.data, self.kwargs = data, kwargs
        self.meta = self.target.meta(bool(kwargs))
        if self.lane.shadowed(self.target.endpoint):  # here, since it may run code of the user's
            self.original()

    def original(self) -> Caller | None:
        """The request with its arguments, for shadows. None if they cannot travel so: there are none then."""
        if self._original is None:
            copy = Caller()
            copy.meta, copy.flags = self.meta, self.target.flags
            arguments = (self.data, self.kwargs) if self.kwargs else self.data
            try:
                copy.body = b"".join(payload.encode(arguments))
            except Exception as error:  # noqa: BLE001 - whatever it is, the request itself goes on
                log.warning("a request to endpoint %r has no shadow: %s", self.target.endpoint, error)
                return None
            self._original = copy
        return self._original

    # --- what the router calls ---

    def on_assigned(self) -> None:
        """Nothing yet: the replica may be full."""

    def on_reply_start(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        assert self.link is not None
        self.token = int.from_bytes(source[start + meta_len : end], "little")
        self.replica = self.link.replica.id
        self._look(self.token)

    def _look(self, token: int) -> None:
        """Go on with the grant when the replica's actor is known."""
        lane = self.lane

        def found(problem: HeadgateError | None) -> None:
            with contextlib.suppress(InstanceError):  # the loop has ended, and all its calls
                lane.run(self._found, token, problem)

        assert self._actors is not None
        if self._actors.ready(self.replica, found):
            super().on_assigned()
        else:
            late = ControllerUnavailable(
                f"replica {self.replica} was not found within {LOOK_S:g} s: the head of the cluster does not answer; "
                "try again when it is back, `ray status` tells. handle.call() does not need it"
            )
            lane.loop.call_later(LOOK_S, self._found, token, late)

    def _found(self, token: int, problem: HeadgateError | None) -> None:
        if token == self.token and not (self.assigned or self.done):  # else it was lost, and granted elsewhere
            self.unclaimable = problem
            super().on_assigned()

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self.on_reply_end()

    def on_reply_end(self) -> None:
        if self.assigned:
            self._end(None)
        else:
            self.on_failure(ProtocolError("a replica answered a reservation without a grant"))

    def on_error(self, status: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        if self.assigned:
            self._end(None)
        else:
            super().on_error(status, flags, meta_len, source, start, end)

    def _end(self, raw: Any) -> None:
        self._original = None
        super()._end(raw)


def claim(actors: Actors, granted: Reservation) -> Any:
    """Call the actor; the ref of its answer. If that fails the slot is given back."""
    data, kwargs = granted.data, granted.kwargs
    granted.data, granted.kwargs = None, {}
    if granted.unclaimable is not None:
        granted.lane.cancel(granted)
        raise granted.unclaimable
    try:
        return actors.serve(granted.replica, granted.token, data, kwargs)
    except BaseException as error:
        granted.lane.cancel(granted)
        named = _unsendable(error, [data, *kwargs.values()])
        if named is None:
            raise
        raise named from error


def send_courier(actors: Actors, key: str, target: Target, data: Any, kwargs: dict[str, Any]) -> Any:
    """A call whose arguments are refs; the ref of its answer. SerializationError."""
    options = {name: getattr(target.options, name) for name in target.options.__struct_fields__}
    try:
        return actors.courier(key, target.endpoint, target.missing_ok, options, data, kwargs)
    except Exception as error:
        sent = [value for value in (data, *kwargs.values()) if not actors.is_ref(value)]
        named = _unsendable(error, sent)
        if named is None:
            raise
        raise named from error


def _unsendable(error: BaseException, sent: list[Any]) -> SerializationError | None:
    """The error that names the argument which does not pickle, None if that is not why."""
    if not isinstance(error, Exception):
        return None
    for value in sent:
        try:
            payload.encode(value)
        except SerializationError as found:
            return found
    if isinstance(error, TypeError | pickle.PicklingError):
        return SerializationError(f"an argument cannot be sent to another process ({payload.error_text(error)})")
    return None
