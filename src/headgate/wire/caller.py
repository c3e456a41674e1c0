"""Whoever waits for a request's answer, and what the links to replicas need of their router."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from headgate.core import framing

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from headgate.core.assignment import ReplicaSet
    from headgate.core.state import Endpoint
    from headgate.errors import HeadgateError
    from headgate.wire.link import Source
    from headgate.wire.replica_link import ReplicaLink
    from headgate.wire.segments import Segment

NEVER = float("inf")

_pack = framing.HEADER.pack


class Hub(Protocol):
    """What a link needs of the router (router.Router)."""

    token: bytes
    name: str
    node: str
    arena_fd: int | None
    loop: asyncio.AbstractEventLoop
    on_free: Callable[[int], None]
    timed: set[Caller]

    def hold(self, caller: Caller, version: int) -> None: ...


class Line(Protocol):
    """What a link needs of its backend's waiting line (backend_route.py)."""

    replicas: ReplicaSet

    @property
    def trouble(self) -> str: ...
    def dispatch(self) -> None: ...
    def again(self, caller: Caller) -> None: ...
    def refused(self, caller: Caller) -> None: ...
    def answered(self, count: int) -> None: ...
    def lost(self, link: ReplicaLink) -> None: ...
    def recover(self, caller: Caller, started: bool) -> None: ...
    def withdraw(self, caller: Caller) -> None: ...


class Caller:
    """Whoever waits for a request's answer; also the request, as the wire wants it.

    Exactly one of on_reply, on_error, on_failure, or on_reply_start .. on_reply_end ends it;
    on_failure may also cut a streamed answer short. None of them may raise.
    """

    # the request
    meta = b""
    head = b""
    body: Any = b""
    flags = 0
    deadline = NEVER  # of the loop's clock
    segment: Segment | None = None  # with the body, while it is needed; `flags` have SEGMENT
    unlimited = False  # may wait in a line of any length
    # the router's own notes
    order = 0
    endpoint: Endpoint | None = None
    shard_key: str | None = None
    backend: Line | None = None
    link: ReplicaLink | None = None
    slot = 0
    tries = 0
    ran_twice = False
    answering = False  # the first part of an answer has arrived
    gone = False  # gave up

    @property
    def retrying(self) -> bool:
        """Whether a replica has it now, and not the first one (core/retries.py)."""
        return self.tries > 0 and self.link is not None

    def on_assigned(self) -> None:
        """It was sent to a replica; called again if it has to go elsewhere."""

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        """The whole answer: payload source[start:end]."""

    def on_reply_start(
        self, arg: int, flags: int, meta_len: int, source: Source, start: int, end: int
    ) -> None:
        """An answer of which more follows."""

    def on_data(self, source: Source, start: int, end: int) -> None:
        """A further part of the answer."""

    def on_reply_end(self) -> None:
        """The end of an answer in parts."""

    def on_error(self, status: int, flags: int, meta_len: int, source: Source, start: int, end: int) -> None:
        """The replica answered with an error."""

    def on_failure(self, error: HeadgateError) -> None:
        """There is no answer, or no more of it."""

    def on_refused(self) -> None:
        """The replica it was sent to did not take it."""

    def inline(self) -> tuple[int, Any]:
        """(flags, body) for a replica that shares no memory with this process."""
        segment = self.segment
        if segment is None:
            return self.flags & ~framing.SEGMENT, self.body
        return self.flags & ~framing.SEGMENT, segment.view()

    def original(self) -> Caller | None:
        """The request that a shadow of this one copies; None if it cannot be copied."""
        return self

    def grant(self, size: int) -> None:
        """Let the replica send `size` more bytes of a streamed answer."""
        if self.link is not None:
            self.link.send(_pack(0, framing.CREDIT, 0, 0, self.slot, size))


class Abandoned(Caller):
    """Holds a slot whose caller has gone; lets a streamed answer run dry."""

    gone = True

    def __init__(self, caller: Caller) -> None:
        self.link, self.slot = caller.link, caller.slot
        self.on_refused = caller.on_refused  # type: ignore[method-assign]

    def on_data(self, source: Source, start: int, end: int) -> None:
        self.grant(end - start)
