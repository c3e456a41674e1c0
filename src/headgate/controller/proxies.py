"""The HTTP proxies of the instance: one on each node that is to have one, each replaced when it ends.

The proxies of a node share a listener that the engine holds, so nobody is refused while one is
replaced. A proxy that had joined is replaced at once; one that ends before it ever did is tried
again after a back-off of its node, and whoever waits for the instance to be ready hears why.

Which nodes are to have one is core/placement.py.
"""

from __future__ import annotations

import asyncio
import logging

from msgspec import Struct

from headgate import logs
from headgate.controller.publisher import PeerLike
from headgate.core import placement
from headgate.core.reconcile import backoff_s
from headgate.engine.interface import Engine, Process
from headgate.errors import HeadgateError, InstanceError
from headgate.wire.address import is_loopback

log = logs.get("proxies")

#: How long a proxy may take to connect; its middlewares are loaded before. Nothing pings it until then.
JOIN_S = 60.0
#: So many connections of proxies that the engine has not named yet are remembered.
EARLY = 1000


class ProxyView(Struct, frozen=True):
    """One proxy, for status."""

    id: str
    pid: int
    node: str
    joined: bool


class _Proxy:
    def __init__(self, pid: int, node: str, late_at: float) -> None:
        self.pid = pid
        self.node = node
        self.late_at = late_at
        self.peer: PeerLike | None = None


class _Tries:
    """What became of the starts on one node since a proxy was last up there."""

    def __init__(self) -> None:
        self.starting = False
        self.failures = 0
        self.error = ""
        self.next_try = float("-inf")

    def failed(self, cause: str, now: float) -> None:
        self.failures += 1
        self.error = cause
        self.next_try = now + backoff_s(self.failures)


class Proxies:
    """What the controller knows of its proxies.

    location   where they are to run, a DeploymentMode; None: nowhere
    """

    def __init__(self, engine: Engine, location: str | None) -> None:
        self._engine = engine
        self._location = location
        self._running: dict[str, _Proxy] = {}
        self._early: dict[str, PeerLike] = {}
        self._tries: dict[str, _Tries] = {}

    # --- what is heard ---

    def adopt(self, id: str, pid: int, node: str, now: float) -> None:
        """A proxy exists."""
        if id not in self._running:
            proxy = self._running[id] = _Proxy(pid, node, now + JOIN_S)
            early = self._early.pop(id, None)
            if early is not None:
                self._up(proxy, early)

    def joined(self, peer: PeerLike) -> None:
        """A proxy has connected, perhaps before the engine has said that it exists."""
        proxy = self._running.get(peer.id)
        if proxy is not None:
            self._up(proxy, peer)
            return
        self._early[peer.id] = peer
        if len(self._early) > EARLY:
            del self._early[next(iter(self._early))]

    def left(self, peer: PeerLike) -> None:
        """The connection of a proxy has ended."""
        if self._early.get(peer.id) is peer:
            del self._early[peer.id]

    def _up(self, proxy: _Proxy, peer: PeerLike) -> None:
        proxy.peer = peer
        proxy.pid = peer.pid or proxy.pid
        tries = self._tries.get(proxy.node)
        if tries is not None:
            tries.failures = 0

    def ended(self, id: str, cause: str, now: float) -> bool:
        """A process is gone; whether it was a proxy."""
        proxy = self._running.pop(id, None)
        if proxy is None:
            return False
        is_wanted = proxy.node in self.wanted()
        log.log(logging.WARNING if is_wanted else logging.DEBUG, "proxy %s is gone: %s", id, cause)
        if is_wanted and proxy.peer is None:
            self._of(proxy.node).failed(cause, now)
        return True

    # --- what is wanted ---

    def wanted(self) -> tuple[str, ...]:
        """The nodes that are to have a proxy."""
        return placement.proxy_nodes(self._location, self._engine.home_node, self._engine.nodes())

    def want_none(self) -> None:
        """From now on none is to run; those that do are told elsewhere."""
        self._location = None

    @property
    def has_lost_home(self) -> bool:
        """Whether the only node that is to have a proxy has left: there is none until it is back."""
        is_anywhere = placement.proxy_nodes(self._location, self._engine.home_node, (self._engine.home_node,))
        return bool(is_anywhere) and not self.wanted()

    def take_missing(self, now: float) -> list[str]:
        """The nodes on which to start one now; the caller does, on each of them."""
        wanted = self.wanted()
        for node in self._tries.keys() - set(wanted):
            if not self._tries[node].starting:
                del self._tries[node]
        found = [node for node in self._missing(wanted) if self._of(node).next_try <= now]
        for node in found:
            self._of(node).starting = True
        return found

    def take_late(self, now: float) -> list[str]:
        """The proxies that have not connected in time; the caller kills them."""
        found = {id: proxy for id, proxy in self._running.items() if proxy.peer is None and proxy.late_at <= now}
        for proxy in found.values():
            proxy.late_at = float("inf")
        return list(found)

    def next_look(self, now: float) -> float | None:
        """When the next back-off runs out, or a proxy is late."""
        moments = [self._of(node).next_try for node in self._missing(self.wanted())]
        moments += [proxy.late_at for proxy in self._running.values() if proxy.peer is None]
        return min((moment for moment in moments if moment > now), default=None)

    def _missing(self, wanted: tuple[str, ...]) -> list[str]:
        there = {proxy.node for proxy in self._running.values()}
        return [node for node in wanted if node not in there and not self._of(node).starting]

    def _of(self, node: str) -> _Tries:
        return self._tries.setdefault(node, _Tries())

    async def start(self, node: str) -> None:
        """Start one on a node that was taken; a failure is remembered, not raised."""
        tries = self._of(node)
        try:
            id = await self._engine.start_proxy(node)
        except HeadgateError as error:
            tries.failed(str(error), asyncio.get_running_loop().time())
            return
        finally:
            tries.starting = False
        process = _find(self._engine, id)
        if process is not None:
            self.adopt(id, process.pid, process.node, asyncio.get_running_loop().time())
            log.info("proxy %s started", id)
        else:
            self._early.pop(id, None)
            tries.failed("it ended at once", asyncio.get_running_loop().time())

    # --- questions ---

    def peers(self) -> list[PeerLike | None]:
        """The connections of the running ones, None for one that has not connected yet."""
        return [proxy.peer for proxy in self._running.values()]

    def up(self) -> dict[str, PeerLike]:
        """The connection of the proxy on each wanted node that has one."""
        wanted = self.wanted()
        return {
            proxy.node: proxy.peer
            for proxy in self._running.values()
            if proxy.peer is not None and proxy.node in wanted
        }

    def views(self) -> list[ProxyView]:
        """For status."""
        return [
            ProxyView(id, proxy.pid, proxy.node, proxy.peer is not None) for id, proxy in self._running.items()
        ]

    def address(self, node: str) -> str | None:
        """What processes of `node` reach a proxy at: the one there, else that of the home node."""
        here, home = self._engine.http_address(node), self._engine.home_node
        if here is not None or node == home:
            return here
        there = self._engine.http_address(home)
        return None if there is None or is_loopback(there) else there

    def unmet(self, now: float) -> tuple[str, ...]:
        """What is waited for and why, as reconcile.unmet says it of replicas."""
        if self.has_lost_home:
            home = self._engine.home_node
            return (f"the HTTP proxy waits for its node {home}, which has left the cluster",)
        wanted, up = self.wanted(), self.up()
        if len(up) == len(wanted):
            return ()
        late = [node for node in wanted if node not in up]
        text = f"{len(up)} of {len(wanted)} HTTP proxies are up"
        if len(wanted) > 1:
            return tuple(f"{text}; node {node}: {self._trouble(node, now) or 'it starts'}" for node in late)
        trouble = self._trouble(late[0], now)
        return (f"{text}; {trouble}" if trouble else text,)

    def _trouble(self, node: str, now: float) -> str:
        tries = self._of(node)
        if not tries.failures:
            return ""
        text = f"failures in a row: {tries.failures}, the last: {tries.error}"
        is_waiting = node in self._missing((node,)) and tries.next_try > now
        return f"{text}; next try in {tries.next_try - now:.1f} s" if is_waiting else text

    def fails(self) -> bool:
        """Whether the last start on some node failed and none is up there."""
        return any(tries.failures for node, tries in self._tries.items() if node in self.wanted())

    def check(self) -> None:
        """Raises InstanceError if the last start on some node failed and none is up there."""
        wanted = self.wanted()
        for node in wanted:
            if self._of(node).failures:
                where = f" on node {node}" if len(wanted) > 1 else ""
                raise InstanceError(
                    f"the HTTP proxy{where} does not start: {self._of(node).error}; its log says why, on the "
                    "stderr of the process that called start()"
                )


def _find(engine: Engine, id: str) -> Process | None:
    return next((process for process in engine.observe() if process.id == id), None)
