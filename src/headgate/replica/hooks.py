"""`reconfigure` and `check_health`: a class's hooks, run on the thread that the class is written for.

That is the plain thread, where its constructor and its calls run; for a class whose `__call__` is
async it is the replica's loop. The class decides, not the hook: an `async def` hook of a
plain class runs to its end on the plain thread, on one loop that is kept for it, and a plain
hook of an async class runs on the loop. Whatever a hook raises becomes a BackendStartError here.

A check_health that does not return is noticed by watch.py, which is told when one begins.
"""

from __future__ import annotations

import asyncio
import logging
import pickle
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from headgate import eventloop
from headgate.errors import BackendStartError
from headgate.replica.callable import LoadedCallable, Method, start_error

if TYPE_CHECKING:
    from headgate.core.state import Settings
    from headgate.replica.plain import PlainThread
    from headgate.replica.watch import HealthWatch

log = logging.getLogger("headgate.replica")


class Hooks:
    """The hooks of `loaded`, the code of the backend `tag`; `read` gets a user_config's pickle by its path."""

    def __init__(self, tag: str, loaded: LoadedCallable, plain: PlainThread, read: Callable[[str], bytes]) -> None:
        self._tag = tag
        self._loaded = loaded
        self._plain = plain
        self._read = read
        self._kept_loop: asyncio.AbstractEventLoop | None = None

    # --- reconfigure ---

    def has_reconfigure(self) -> bool:
        """Whether a user_config can be given to the class."""
        return self._loaded.hook("reconfigure") is not None

    def reconfigure_here(self, path: str) -> None:
        """Give the class the user_config at `path`; called on the plain thread."""
        hook = self._hook("reconfigure")
        self._run_here(hook, partial(self._give, hook, path))

    async def reconfigure_on_loop(self, path: str) -> None:
        """The same for an async class; called on the replica's loop."""
        hook = self._hook("reconfigure")
        await self._run_on_loop(hook, partial(self._give, hook, path))

    async def reconfigure(self, path: str) -> None:
        """The same for either, in its turn; called on the replica's loop."""
        if self._loaded.facts.is_async:
            await self.reconfigure_on_loop(path)
        else:
            await self._on_plain(partial(self.reconfigure_here, path))

    def _give(self, hook: Method, path: str) -> Any:
        return hook.function(pickle.loads(self._read(path)))

    # --- check_health ---

    async def watch_health(
        self, settings: Callable[[], Settings], watch: HealthWatch, tell: Callable[[str], None]
    ) -> None:
        """Ask check_health from time to time, between calls, and tell what it says: "" or what it raised."""
        hook = self._hook("check_health")
        while True:
            await asyncio.sleep(settings().health_check_period_s)
            try:
                if self._loaded.facts.is_async:
                    await self._check_on_loop(hook, watch)
                else:
                    await self._on_plain(partial(self._check_here, hook, watch))
            except BackendStartError as error:
                log.warning("%s", error)
                tell(str(error))
            else:
                tell("")

    def _check_here(self, hook: Method, watch: HealthWatch) -> None:
        with watch.running(lambda: True):
            self._run_here(hook, hook.function)

    async def _check_on_loop(self, hook: Method, watch: HealthWatch) -> None:
        if not hook.is_async:
            with watch.running(lambda: True):
                await self._run_on_loop(hook, hook.function)
            return
        coroutine = hook.function()
        with watch.running(lambda: bool(getattr(coroutine, "cr_running", True))):
            await self._run_on_loop(hook, lambda: coroutine)

    # --- either ---

    def _hook(self, name: str) -> Method:
        hook = self._loaded.hook(name)
        assert hook is not None, f"{self._loaded.name} has no {name}"
        return hook

    def _run_here(self, hook: Method, call: Callable[[], Any]) -> None:
        if hook.is_async:
            if self._kept_loop is None:
                self._kept_loop = eventloop.new_event_loop()
            self._kept_loop.run_until_complete(self._run_on_loop(hook, call))
            return
        try:
            call()
        except BaseException as error:
            raise self._error(hook, error) from error

    async def _run_on_loop(self, hook: Method, call: Callable[[], Any]) -> None:
        try:
            result = call()
            if hook.is_async:
                await result
        except BaseException as error:
            raise self._error(hook, error) from error

    def _error(self, hook: Method, error: BaseException) -> BackendStartError:
        return start_error(f"{hook.name} of backend {self._tag!r} raised", error)

    async def _on_plain(self, function: Callable[[], None]) -> None:
        """Run it on the plain thread, after the calls that are there already, and wait for it."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()

        def run() -> None:
            try:
                function()
            except BackendStartError as error:
                loop.call_soon_threadsafe(answer.set_exception, error)
            else:
                loop.call_soon_threadsafe(answer.set_result, None)

        self._plain.put(run)
        await answer
