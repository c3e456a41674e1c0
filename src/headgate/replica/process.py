"""A replica's life: told what to run, loads it, serves, drains.

Three threads. The headgate thread holds the control connection, so that the controller is
answered however busy user code is. The loop reads links and runs `async def` handlers. The plain
thread runs the constructor and everything plain. The thread that calls `run` is whichever of the
last two user code is written for: the process's main thread, which some libraries insist on, where
the process is the replica's own.

Every change of state is one Report (wire/messages.py); what the controller makes of it is its own.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import mmap
import os
import queue
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from headgate import eventloop, logs
from headgate.core.defaults import resolve
from headgate.errors import (
    ArgumentError,
    BackendStartError,
    ConfigError,
    HeadgateError,
    RequestError,
    to_wire,
)
from headgate.instance import Instance
from headgate.replica.callable import Code, LoadedCallable, load
from headgate.replica.context import ReplicaContext, set_replica_context
from headgate.replica.hooks import Hooks
from headgate.replica.links import CallerLink
from headgate.replica.place import Place, addresses
from headgate.replica.plain import PlainThread
from headgate.replica.watch import HealthWatch, LoopWatch
from headgate.replica.wear import Wear
from headgate.replica.worker import Worker
from headgate.wire import messages
from headgate.wire.control import Acceptor
from headgate.wire.greeting import pid_of
from headgate.wire.link import open_link
from headgate.wire.payload import error_text
from headgate.wire.slots import SLOTS, map_memory

if TYPE_CHECKING:
    from headgate.engine.boot import ChildBoot

log = logging.getLogger("headgate.replica")

_SWITCH_INTERVAL_S = 0.0005  # with user code on a thread: p99 of a 2 ms handler 42 -> 35 ms


def main(child: ChildBoot) -> int:
    """Run one replica until the instance ends."""
    logs.configure(backend=child.name, replica=child.id)
    faulthandler.enable()  # here: only this thread, which runs user code, gets a stack for a stack overflow
    Replica(Place.of(child)).run()
    return 0


class Replica:
    """This process, or what of it is the replica's."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.instance = Instance(place.home, place.id, "replica")
        self.report = messages.Report(place.backend, 0, "starting", node=place.home.node)
        self.plain = PlainThread()
        self.worker: Worker | None = None
        self.loaded: LoadedCallable
        self.hooks: Hooks
        self.spec: messages.ReplicaSpec
        self.loop: asyncio.AbstractEventLoop
        self._inbox: queue.SimpleQueue[messages.Assign] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of what the control thread repeats on a reconnect: `report` and these
        self._routers: set[str] = set()
        self._early: list[messages.FromController] = []  # came before there was a worker
        self._fences: dict[str, int] = {}
        self._config_version = 0
        self._acceptor: Acceptor | None = None

    # --- the control connection, on the headgate thread ---

    def _known(self) -> messages.Report | None:
        with self._lock:
            return self.report if self.report.version else None

    def _linked(self, name: str, is_linked: bool) -> None:
        """On the loop: the controller is to know who may send requests, even one that cannot tell it."""
        with self._lock:
            (self._routers.add if is_linked else self._routers.discard)(name)
        self._tell(messages.Linked(name, is_linked))

    def _linked_now(self) -> tuple[str, ...]:
        with self._lock:
            return tuple(self._routers)

    def _message(self, message: messages.FromController) -> None:
        if isinstance(message, messages.Assign):
            self._inbox.put(message)
        elif isinstance(message, messages.Fence):
            self._fence(message)
        elif self.worker is None:
            self._early.append(message)
        else:
            self.loop.call_soon_threadsafe(self._command, message)

    def _fence(self, fence: messages.Fence) -> None:
        """In force when it is answered, however busy the loop is: nothing waits for that."""
        self._fences = fence.peers
        if self.worker is not None:
            self.worker.fence(fence.peers)
        self.instance.control.tell(messages.Fenced(fence.number))

    def say(self, **changes: Any) -> None:
        """Report a change of state."""
        with self._lock:
            self.report = msgspec.structs.replace(self.report, **changes)
            report = self.report
        self._tell(report)

    def _tell(self, message: messages.ToController) -> None:
        self.instance.thread.loop.call_soon_threadsafe(self.instance.control.tell, message)

    # --- from Assign to ready ---

    def run(self) -> None:
        """Be told what to run, run it, and serve until the process is stopped; it does not return before."""
        self.instance.when_gone(self.place.over)  # nobody is left to answer to
        self.instance.join(self._known, self._message, routers=self._linked_now)
        self.spec = self._inbox.get().spec
        set_replica_context(ReplicaContext(self.spec.backend, self.place.id))
        with self._lock:
            self.report = messages.Report(
                self.spec.backend, self.spec.version, "starting", node=self.place.home.node
            )
        try:
            self._load()
        except HeadgateError as error:
            self._fail(error)
            return
        if self.loaded.facts.is_async:
            self._serve_forever(self._run_async)
        else:
            sys.setswitchinterval(_SWITCH_INTERVAL_S)
            self._run_plain()

    def _load(self) -> None:
        os.environ.update(dict(self.spec.env))
        try:
            blob = self.place.read_blob(self.spec.code_path)
        except FileNotFoundError:
            raise BackendStartError(f"backend {self.spec.backend!r} was withdrawn while it started") from None
        try:
            self.loaded = load(blob)
        except (ArgumentError, ConfigError) as error:  # where an import path leads; objects were checked before
            raise type(error)(f"import path {_code_name(blob)!r}: {error}") from None
        resolve({"max_batch_size": self.spec.settings.max_batch_size}, self.loaded.facts)
        self.hooks = Hooks(self.spec.backend, self.loaded, self.plain, self.place.read_blob)

    def _say_failed(self, error: HeadgateError) -> None:
        kind, text = to_wire(error)
        self.say(phase="failed", error=text, error_kind=kind)

    def _fail(self, error: HeadgateError) -> None:
        self._say_failed(error)
        threading.Event().wait()  # the controller stops this process once it has the report

    def _run_plain(self) -> None:
        try:
            self.loaded.construct()
            if (path := self._first_config()) is not None:
                self.hooks.reconfigure_here(path)
        except HeadgateError as error:
            self._fail(error)
            return
        threading.Thread(
            target=self._serve_forever, args=(self._open,), name="headgate-loop", daemon=True
        ).start()
        while True:
            try:
                self.plain.run()
                return
            except BaseException:
                log.exception("the plain thread was interrupted; it goes on")

    async def _run_async(self) -> None:
        try:
            self.loaded.construct()
            if (path := self._first_config()) is not None:
                await self.hooks.reconfigure_on_loop(path)
        except HeadgateError as error:
            self._say_failed(error)
            return
        self.plain.start()
        await self._open()

    def _serve_forever(self, begin: Callable[[], Any]) -> None:
        loop = eventloop.new_event_loop()
        asyncio.set_event_loop(loop)
        self.loop = loop
        task = loop.create_task(begin())
        task.add_done_callback(self._begun)
        while True:
            try:
                loop.run_forever()
                return
            except (SystemExit, KeyboardInterrupt):  # a task of the user's own raised it
                log.exception("a task raised what would end the process; the replica goes on")

    def _begun(self, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or (error := task.exception()) is None:
            return
        if not isinstance(error, OSError):
            log.error("the replica cannot serve", exc_info=error)
        self._say_failed(BackendStartError(f"the replica cannot serve: {error_text(error)}"))

    async def _open(self) -> None:
        """Listen for routers and say so."""
        worker = Worker(
            self.loaded, self.spec.settings, self.plain,
            expose=self.place.expose, on_drained=partial(self.say, phase="drained"), on_linked=self._linked,
        )  # fmt: skip
        listeners = self.place.bind()
        address, remote = addresses(listeners)
        self._acceptor = Acceptor(listeners, self.place.home.token, partial(self._admit, worker))
        self._acceptor.open()
        os.register_at_fork(after_in_child=worker.forked)
        health = HealthWatch(worker, lambda text: self._tell(messages.Health(text, hangs=True)))
        LoopWatch(worker, health).start(self.instance.thread.loop)
        wear = Wear(worker, lambda reason: self.say(worn=reason))
        if self.loaded.has_check_health:
            worker.start_background(
                self.hooks.watch_health(
                    lambda: worker.settings, health, lambda error: self._tell(messages.Health(error))
                )
            )
        gc.collect()
        gc.freeze()
        self.say(
            phase="ready", address=address, remote=remote,
            facts=self.loaded.facts, config_version=self.spec.config_version,
        )  # fmt: skip
        self.worker = worker
        worker.fence(self._fences)
        for message in self._early:
            self._command(message)
        wear.start(self.instance.thread.loop)

    async def _admit(self, worker: Worker, sock: socket.socket, name: str, fds: list[int]) -> None:
        if not fds and sock.family == socket.AF_UNIX:
            sock.close()
            return
        # A router of another node shares no memory: nobody reads its page.
        page = map_memory(fds[0]) if fds else mmap.mmap(-1, SLOTS)
        arena = map_memory(fds[1]) if len(fds) > 1 else None
        link = CallerLink(worker, name, page, arena, pid_of(sock))
        try:
            await open_link(link, sock)
        except OSError:  # no file descriptor is left: it never was one
            worker.lost(link)
            raise

    # --- requests whose arguments come another way (reservation.py), from any thread ---

    def claim(self, token: int, data: Any, kwargs: dict[str, Any] | None = None) -> Future[Any]:
        """The arguments for a slot that was reserved: its result, the exception of user code, or a HeadgateError.

        To be followed by one `answered`. Cancelling the future does nothing: see `give_up`.
        """
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()
        if self.worker is None:
            future.set_exception(RequestError("the replica is not ready: nothing was reserved here"))
        else:
            self.worker.from_any_thread(self.worker.reservations.claim, token, data, kwargs, future)
        return future

    def give_up(self, token: int) -> None:
        """Whoever claimed it does not wait any more: cancel the request."""
        if self.worker is not None:
            self.worker.from_any_thread(self.worker.reservations.give_up, token)

    def answered(self, token: int) -> None:
        """Whoever claimed it has the answer and sends it on now; a drain waits for that."""
        if self.worker is not None:
            self.worker.from_any_thread(self.worker.reservations.answered, token)

    # --- commands, on the loop ---

    def _command(self, message: messages.FromController) -> None:
        worker = self.worker
        assert worker is not None
        if isinstance(message, messages.Drain):
            self.say(phase="draining")
            worker.drain()
        elif isinstance(message, messages.Configure):
            worker.configure(message.settings)
            if message.config_version != self._config_version:
                self._reconfigure(message)

    def _reconfigure(self, message: messages.Configure) -> None:
        assert self.worker is not None
        self._config_version = version = message.config_version
        if message.user_config_path is None:
            self.say(config_version=version, error="")
        elif not self.hooks.has_reconfigure():
            self.say(config_version=version, error=self._no_reconfigure())
        else:
            self.worker.start_background(self._take_config(message.user_config_path, version))

    async def _take_config(self, path: str, version: int) -> None:
        try:
            await self.hooks.reconfigure(path)
        except BackendStartError as error:
            self.say(config_version=version, error=str(error))
        else:
            self.say(config_version=version, error="")

    def _first_config(self) -> str | None:
        """The path of the user_config to begin with."""
        self._config_version = self.spec.config_version
        path = self.spec.user_config_path
        if path is not None and not self.hooks.has_reconfigure():
            raise BackendStartError(self._no_reconfigure())
        return path

    def _no_reconfigure(self) -> str:
        return (
            f"backend {self.spec.backend!r} has a user_config, but its code {self.loaded.name!r} has no "
            "reconfigure(user_config) method to give it to; define one in the class, or leave user_config out"
        )


def _code_name(blob: bytes) -> str:
    return msgspec.msgpack.decode(blob, type=Code).name
