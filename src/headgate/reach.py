"""How a handle gets to its instance, also after it was unpickled or its process was forked."""

from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

from headgate import instance as instances
from headgate.errors import InstanceError
from headgate.homes import home_of
from headgate.lanes import Lane, lane_of
from headgate.wire.control import OVER

if TYPE_CHECKING:
    from headgate.instance import Instance


class Reach:
    """The instance with that key; it is joined at the first use if this process is not part of it."""

    __slots__ = ("_instance", "_lane", "_lock", "key")

    def __init__(self, key: str, instance: Instance | None = None) -> None:
        self.key = key
        self._instance = instance
        self._lane: Lane | None = None  # the one used last
        self._lock = threading.Lock()

    def lane_of_thread(self) -> Lane:
        """The lane of the headgate thread, for a sync handle. InstanceError as `instance`."""
        lane = self._lane
        if lane is None or lane.closed or not lane.instance.usable:
            instance = self.instance()
            self._lane = lane = lane_of(instance, instance.thread.loop)
        return lane

    def lane_here(self) -> Lane:
        """The lane of the running loop, for an async handle. InstanceError as `instance`."""
        loop = asyncio.get_running_loop()
        lane = self._lane
        if lane is None or lane.loop is not loop or lane.closed or not lane.instance.usable:
            self._lane = lane = lane_of(self.instance(), loop)
        return lane

    def instance(self) -> Instance:
        """The instance. InstanceError if it was shut down or does not run."""
        instance = self._instance
        if instance is None or instance.pid != os.getpid():
            with self._lock:
                instance = self._instance = self._join()
        if not instance.usable:
            raise InstanceError(OVER)
        return instance

    def _join(self) -> Instance:
        own = instances.own()
        if own is not None and own.key == self.key:
            instance = own
        else:
            instance = instances.joined(self.key) or instances.join(home_of(self.key))
        instance.follow()
        return instance
