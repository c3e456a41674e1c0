"""The routers of one process in an instance: one on the headgate thread for sync handles, one for each event
loop of the user's that has an async handle.

Each follows the newest snapshot; a router and its links end with their loop. A loop that was just
closed says nothing: what it has left open is found when the next router is made, the next snapshot
comes, or the membership ends (loop_membership.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable
from functools import partial
from typing import TYPE_CHECKING

from headgate.core.state import Snapshot

if TYPE_CHECKING:
    from headgate.router import Router
    from headgate.wire.replica_link import ReplicaLink


class Routers:
    """Makes a router where it is first wanted.

    name       of this process in the instance
    own_loop   the headgate thread's, which ends with the membership
    """

    def __init__(self, token: bytes, name: str, node: str, own_loop: asyncio.AbstractEventLoop) -> None:
        self._token = token
        self._name = name
        self._node = node
        self._own_loop = own_loop
        # And what sees the loop's end if it is the user's.
        self._of: dict[asyncio.AbstractEventLoop, tuple[Router, LoopEnd | None]] = {}

    def here(self, snapshot: Snapshot) -> Router:
        """The router of the running loop, following `snapshot`, the newest."""
        loop = asyncio.get_running_loop()
        router, _ = self._of.get(loop, (None, None))
        if router is None or router.closed:
            from headgate.router import Router  # 5 ms and 1 MB that only requests cost, not control calls

            self._end_closed()
            router = Router(self._token, self._name, node=self._node)
            is_users = loop is not self._own_loop
            self._of[loop] = router, LoopEnd(partial(self._end, router)) if is_users else None
        if router.snapshot is not snapshot:
            router.follow(snapshot)
        return router

    def spread(self, snapshot: Snapshot) -> None:
        """Have all follow `snapshot`; on the headgate thread."""
        self._end_closed()
        for loop, (router, _) in list(self._of.items()):
            if loop is self._own_loop:
                router.follow(snapshot)
            else:
                on_loop(loop, partial(router.follow, snapshot))

    def close(self) -> None:
        """The membership ends; on any thread."""
        for loop, (router, _) in list(self._of.items()):
            on_loop(loop, router.close)
        self._end_closed()

    def _end(self, router: Router) -> None:
        """The loop of `router` ends: nothing here is to hold either of them."""
        router.close()
        if self._of.get(router.loop, (None, None))[0] is router:
            del self._of[router.loop]

    def _end_closed(self) -> None:
        """End those whose loops were closed without a word to anybody; on any thread."""
        for loop in [loop for loop in list(self._of) if loop.is_closed()]:
            router, _ = self._of.pop(loop, (None, None))
            if router is not None:  # else another thread has it
                _end_without_loop(router)


def on_loop(loop: asyncio.AbstractEventLoop, function: Callable[[], object]) -> None:
    """Call `function` on a loop of any thread; nothing happens if that was closed."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function)


def _end_without_loop(router: Router) -> None:
    router.closed = True  # nothing is dialled any more
    for backend in list(router.backends.values()):
        for link in list(backend.links.values()):
            _end_link_without_loop(link)
    with contextlib.suppress(RuntimeError):  # a task cannot be cancelled any more
        router.close()


def _end_link_without_loop(link: ReplicaLink) -> None:
    """As `discard`, and then what the loop would have done in its next turn.

    uvloop's transports are closed with it. asyncio's would keep the socket, and warn of it when it is collected.
    """
    transport = link._transport
    with contextlib.suppress(RuntimeError):  # the transport has no loop to tell
        link.discard()
    link.discard()
    lose = getattr(transport, "_call_connection_lost", link.connection_lost)
    lose(None)


class LoopEnd:
    """Calls `close` when the running loop ends; perhaps twice.

    asyncio.run first cancels all tasks that there are. What they begin in their last moments comes too
    late for that, and is ended when async generators are shut down, which is next.
    """

    def __init__(self, close: Callable[[], object]) -> None:
        self._task = asyncio.get_running_loop().create_task(self._until_cancelled())
        self._task._log_destroy_pending = False  # type: ignore[attr-defined]  # a loop may just close
        self._task.add_done_callback(lambda task: close())  # a `finally` is not run if it is cancelled before it began
        self._generator = self._until_shut_down(close)
        with contextlib.suppress(StopIteration):  # it has come to its yield, and the loop knows it
            self._generator.asend(None).send(None)

    def now(self) -> None:
        """Do not wait for the loop's end."""
        self._task.cancel()

    @staticmethod
    async def _until_cancelled() -> None:
        await asyncio.get_running_loop().create_future()

    @staticmethod
    async def _until_shut_down(close: Callable[[], object]) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            close()
