"""How a handle gets to its instance, also after it was unpickled or its process was forked."""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import Future
from typing import TYPE_CHECKING

from headgate import instance as instances
from headgate.errors import InstanceError
from headgate.homes import home_of
from headgate.lanes import Lane, lane_of
from headgate.wire.calling import OVER

if TYPE_CHECKING:
    from headgate.instance import Instance


class Reach:
    """The instance with that key; it is joined at the first use if this process is not part of it."""

    __slots__ = ("_instance", "_joining", "_lane", "_lock", "key")

    def __init__(self, key: str, instance: Instance | None = None) -> None:
        self.key = key
        self._instance = instance
        self._lane: Lane | None = None  # the one used last
        self._lock = threading.Lock()
        self._joining: tuple[int, Future[Instance]] | None = None  # by the process with that pid

    def lane_of_thread(self) -> Lane:
        """The lane of the headgate thread, for a sync handle. InstanceError as `instance`."""
        lane = self._lane
        if lane is None or lane.closed or not lane.instance.usable:
            instance = self.instance()
            self._lane = lane = lane_of(instance, instance.thread.loop)
        return lane

    def lane_at_hand(self) -> Lane | None:
        """The lane of the running loop if it is the one used last, and still there."""
        lane = self._lane
        if lane is None or lane.loop is not asyncio.get_running_loop() or lane.closed or not lane.instance.usable:
            return None
        return lane

    async def lane_here(self) -> Lane:
        """The lane of the running loop, for an async handle. InstanceError as `instance`, without blocking the loop."""
        lane = self.lane_at_hand()
        if lane is None:
            loop = asyncio.get_running_loop()
            instance = self.instance() if self._is_joined else await asyncio.wrap_future(self._join_aside())
            self._lane = lane = lane_of(instance, loop)
        return lane

    @property
    def _is_joined(self) -> bool:
        return self._instance is not None and self._instance.pid == os.getpid()

    def instance(self) -> Instance:
        """The instance; blocks while this process joins it. InstanceError if it was shut down or does not run."""
        if not self._is_joined:
            with self._lock:
                self._instance = self._join()
        instance = self._instance
        assert instance is not None
        if not instance.usable:
            raise InstanceError(OVER)
        return instance

    def _join_aside(self) -> Future[Instance]:
        """`instance()`, on a thread of its own, which all who come meanwhile wait for."""
        joining = self._joining
        if joining is None or joining[0] != os.getpid():
            self._joining = joining = os.getpid(), Future()
            joining[1].set_running_or_notify_cancel()  # who gives up waiting does not cancel it for the others
            threading.Thread(target=self._work, args=(joining[1],), name="headgate-join", daemon=True).start()
        return joining[1]

    def _work(self, answer: Future[Instance]) -> None:
        try:
            instance = self.instance()
        except BaseException as error:  # noqa: BLE001 - it belongs to those who wait
            self._joining = None  # the next call tries again
            answer.set_exception(error)
        else:
            self._joining = None
            answer.set_result(instance)

    def _join(self) -> Instance:
        own = instances.own()
        if own is not None and own.key == self.key:
            instance = own
        else:
            instance = instances.joined(self.key) or instances.join(home_of(self.key))
        instance.follow()
        return instance
