"""The HTTP proxies of the instance: as many as wanted, each replaced when it ends.

They share a listener that the engine holds, so nobody is refused while one is replaced. A proxy
that had joined is replaced at once; one that ends before it ever did is tried again after a
back-off, and whoever waits for the instance to be ready hears why.
"""

from __future__ import annotations

import asyncio
import logging

from msgspec import Struct

from headgate import logs
from headgate.controller.publisher import PeerLike
from headgate.core.reconcile import backoff_s
from headgate.engine.interface import Engine
from headgate.errors import HeadgateError, InstanceError

log = logs.get("proxies")


class ProxyView(Struct, frozen=True):
    """One proxy, for status."""

    id: str
    pid: int
    joined: bool


class Proxies:
    """What the controller knows of its proxies; `wanted` of them are kept running."""

    def __init__(self, engine: Engine, wanted: int) -> None:
        self.wanted = wanted
        self.failures = 0
        self.error = ""
        self._engine = engine
        self._running: dict[str, PeerLike | None] = {}
        self._pids: dict[str, int] = {}
        self._starting = 0
        self._next_try = float("-inf")

    def adopt(self, id: str, pid: int) -> None:
        """A proxy exists."""
        self._running.setdefault(id, None)
        self._pids[id] = pid

    def joined(self, peer: PeerLike) -> None:
        """A proxy has connected."""
        if peer.id in self._running:
            self._running[peer.id] = peer
            self.failures = 0

    def ended(self, id: str, cause: str, now: float) -> bool:
        """A process is gone; whether it was a proxy."""
        if id not in self._running:
            return False
        log.log(logging.WARNING if self.wanted else logging.DEBUG, "proxy %s is gone: %s", id, cause)
        if self._running.pop(id) is None and self.wanted:
            self._failed(cause, now)
        del self._pids[id]
        return True

    def take_missing(self, now: float) -> int:
        """How many are to be started now; the caller starts each of them."""
        if now < self._next_try:
            return 0
        missing = max(0, self.wanted - len(self._running) - self._starting)
        self._starting += missing
        return missing

    def next_look(self, now: float) -> float | None:
        """When a back-off runs out."""
        short = self.wanted > len(self._running) + self._starting
        return self._next_try if short and self._next_try > now else None

    async def start(self) -> None:
        """Start one that was taken; a failure is remembered, not raised."""
        try:
            id = await self._engine.start_proxy()
        except HeadgateError as error:
            self._failed(str(error), asyncio.get_running_loop().time())
            return
        finally:
            self._starting -= 1
        pids = {process.id: process.pid for process in self._engine.observe()}
        if id in pids:
            self.adopt(id, pids[id])
            log.info("proxy %s started", id)
        else:
            self._failed("it ended at once", asyncio.get_running_loop().time())

    def peers(self) -> list[PeerLike | None]:
        """The connections of the running ones, None for one that has not connected yet."""
        return list(self._running.values())

    def views(self) -> list[ProxyView]:
        """For status."""
        return [ProxyView(id, self._pids[id], peer is not None) for id, peer in self._running.items()]

    def unmet(self, now: float) -> tuple[str, ...]:
        """What is waited for and why, as reconcile.unmet says it of replicas."""
        up = sum(peer is not None for peer in self._running.values())
        if up >= self.wanted:
            return ()
        text = f"{up} of {self.wanted} HTTP proxies are up"
        if self.failures:
            text += f"; failures in a row: {self.failures}, the last: {self.error}"
        wait_s = (self.next_look(now) or now) - now
        return (f"{text}; next try in {wait_s:.1f} s" if wait_s > 0 else text,)

    def check(self) -> None:
        """Raises InstanceError if none has come up and the last try failed."""
        if self.failures and not any(self._running.values()):
            raise InstanceError(
                f"the HTTP proxy does not start: {self.error}; its log says why, on the stderr of the "
                "process that called start()"
            )

    def _failed(self, cause: str, now: float) -> None:
        self.failures += 1
        self.error = cause
        self._next_try = now + backoff_s(self.failures)
