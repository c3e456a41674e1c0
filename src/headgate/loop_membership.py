"""A membership on an event loop of headgate's own: the headgate thread, its control connection, and the routers.

Every process with a handle has one, and every replica. What follows the snapshots is here; a process that only
makes calls does without (line_membership.py), and does not import this, which brings asyncio.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

from headgate.core.state import Snapshot
from headgate.errors import ControllerUnavailable
from headgate.membership import Part
from headgate.routers import Routers, on_loop
from headgate.wire import messages
from headgate.wire.control import ControlClient
from headgate.wire.home import Home
from headgate.wire.thread import HeadgateThread

if TYPE_CHECKING:
    from headgate.router import Router

_FIRST_SNAPSHOT_S = 10.0


class LoopMembership:
    """The headgate thread and what it holds.

    home          the way to the instance
    me            who this process is
    on_snapshot   called with each newer snapshot, on the headgate thread
    on_gone       called once, on the headgate thread, when the instance is over

    Neither of the two may hold the Instance, whose end is to end this.
    """

    routers: Routers  # from `begin` on
    control: ControlClient  # from `join` on, before its first message comes

    def __init__(
        self,
        home: Home,
        me: messages.Hello,
        on_snapshot: Callable[[Snapshot], None],
        on_gone: Callable[[], None],
    ) -> None:
        self.thread = HeadgateThread()
        self._home = home
        self._me = me
        self._on_snapshot = on_snapshot
        self._on_gone = on_gone
        self._greeting: _Greeting

    def begin(self) -> None:
        """Start the thread; nothing is connected yet."""
        self.thread.start()
        self.routers = Routers(self._home.token, self._me.id, self._me.node, self.thread.loop)

    def join(self, part: Part, timeout_s: float | None) -> None:
        """Connect. Raises InstanceError if nobody listens, and TimeoutError; then it was left."""
        self._greeting = _Greeting(self._me, part)
        try:
            self.thread.connect(lambda: self._make_control(part), timeout_s)
        except BaseException:
            self.leave()
            raise
        watch = getattr(self._home, "watch", None)
        if watch is not None:
            watch(self.control.end_threadsafe)

    def _make_control(self, part: Part) -> ControlClient:
        self.control = ControlClient(
            self._home.find,
            self._home.token,
            self._greeting,
            on_message=part.on_message,
            on_snapshot=self._on_snapshot,
            on_gone=self._on_gone,
        )
        return self.control

    def follow(self) -> None:
        """Have snapshots from now on; returns once the first is here. Raises ControllerUnavailable."""
        if not self._greeting.follows:
            self._greeting.follows = True
            self.thread.loop.call_soon_threadsafe(self.control.tell, messages.Follow())
        if not self.control.snapshot.version:
            try:
                self.thread.run(self.control.newer_than(0), _FIRST_SNAPSHOT_S)
            except TimeoutError:
                raise ControllerUnavailable(
                    f"the controller sent no snapshot within {_FIRST_SNAPSHOT_S:g} s; it is safe to try again"
                ) from None

    def call(self, method: str, params: dict[str, Any], timeout_s: float | None) -> Any:
        """A call of the controller, from any thread but the headgate thread. Raises as Instance.call."""
        return self.thread.run(self.control.call(method, params), timeout_s)

    def router(self) -> Router:
        """The router of the running loop, following the newest snapshot."""
        return self.routers.here(self.control.snapshot)

    def leave(self) -> None:
        """Close routers and the connection and end the thread; the instance goes on. Idempotent."""
        if self._me.pid != os.getpid():  # a fork has none of these
            return
        self.routers.close()
        if hasattr(self, "control"):
            on_loop(self.thread.loop, self.control.close)
        self.thread.stop()


class _Greeting:
    """Makes the first message of each connection. The control client has it, so it holds neither that nor routers."""

    def __init__(self, me: messages.Hello, part: Part) -> None:
        self.follows = me.role == "client"
        self._me = me
        self._part = part

    def __call__(self, version: int) -> messages.Hello:
        part = self._part
        return msgspec.structs.replace(
            self._me,
            follows=self.follows,
            snapshot_version=version,
            report=part.report(),
            routers=part.routers(),
        )
