"""The agents of a Ray cluster's nodes, as the controller sees them: each leads to one supervisor and its proxy.

To start a proxy on a node: its agent actor is made (or found), has the supervisor run (engine/node.py),
and the supervisor's own agent process dials the controller; what it is asked then is what the local
engine asks its supervisor (engine/supervised.py). The actor is needed for the first step only.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from headgate import logs
from headgate.engine import cluster
from headgate.engine.interface import Appeared, Event, Exited, Process
from headgate.engine.ray_records import Meeting, Origin, Records, pack
from headgate.engine.supervised import Supervised
from headgate.errors import InstanceError
from headgate.wire import messages
from headgate.wire.control import Peer

log = logs.get("agents")

PREFIX = "agent@"
#: How long an agent's actor may take to be there and to have the supervisor run.
OPEN_S = 30.0
#: How long the supervisor's agent process may take from there to its Hello.
DIAL_S = 10.0
#: How long an agent process whose connection ended may stay away before its supervisor counts as ended.
LOST_S = 2.0
_PORT = "port"
_ADDRESSES = "http/"


def name_of(node: str) -> str:
    """The name of a node's agent: of its actor, and of the process that dials."""
    return f"{PREFIX}{node[:8]}"


class _Agent:
    """One node's."""

    def __init__(self, node: str, on_exit: Callable[[str, str], None]) -> None:
        self.node = node
        self.peer: Peer | None = None
        self.listed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.supervised = Supervised(self._send, on_exit=on_exit, node=node)

    def _send(self, data: bytes) -> None:
        if self.peer is not None:
            self.peer.tell(messages.Ask(data))


class Agents:
    """All of them.

    on_event   hears of proxies that appear and of those that ended
    """

    def __init__(
        self, origin: Origin, records: Records, on_event: Callable[[Event], None]
    ) -> None:
        self._origin = origin
        self._records = records
        self._on_event = on_event
        self._agents: dict[str, _Agent] = {}  # by node
        self._http: dict[str, str] = {}  # node -> URL
        self._port = int(origin.http.get("port") or 0)
        self._opening = asyncio.Lock()
        self._listing: set[asyncio.Task[None]] = set()

    async def load(self) -> None:
        """Remember what an earlier controller wrote down."""
        names = await cluster.apart(self._records.names)
        for name in names:
            if name.startswith(_ADDRESSES):
                found = await cluster.apart(self._records.get, name)
                if found is not None:
                    self._http[name.removeprefix(_ADDRESSES)] = found.decode()
        if port := await cluster.apart(self._records.get, _PORT):
            self._port = int(port)

    async def tell(self, names: list[str], meeting: Meeting) -> None:
        """Tell the actors of an earlier controller's agents where this one listens."""
        for name in names:
            actor = await cluster.apart(cluster.find, self._origin.scope, name)
            if actor is not None:
                actor.follow.remote(pack(meeting))

    # --- proxies ---

    async def start_proxy(self, node: str, meeting: Meeting) -> str:
        """A proxy on that node: the one that runs, or a new one. Raises InstanceError."""
        agent = await self._reach(node, meeting)
        for id, known in agent.supervised.known.items():
            if known.child.role == "proxy":
                return id
        # A supervisor numbers its children, and the next one on this node begins at 1 again.
        return await agent.supervised.fork("proxy", f"proxy@{node[:8]}-{os.urandom(2).hex()}")

    async def _reach(self, node: str, meeting: Meeting) -> _Agent:
        agent = self._of(node)
        if not agent.listed.done():
            await self._open(node, meeting)
            try:
                async with asyncio.timeout(DIAL_S):
                    await asyncio.shield(agent.listed)
            except TimeoutError:
                raise InstanceError(f"the agent of node {node[:8]} did not connect within {DIAL_S:g} s") from None
        return agent

    async def _open(self, node: str, meeting: Meeting) -> None:
        if self._port:
            await self._open_at(node, meeting)
            return
        async with self._opening:  # the first one picks the port for all
            await self._open_at(node, meeting)

    async def _open_at(self, node: str, meeting: Meeting) -> None:
        try:
            actor = await cluster.apart(
                cluster.start_agent, pack(self._origin), self._origin.scope, name_of(node), node, timeout_s=OPEN_S
            )
            answer = actor.open.remote(self._port, pack(meeting))
            self._http[node] = url = await cluster.ask(answer, OPEN_S)
            await cluster.apart(self._records.put, _ADDRESSES + node, url.encode())
            if not self._port:
                self._port = int(url.rpartition(":")[2])
                await cluster.apart(self._records.put, _PORT, str(self._port).encode())
        except TimeoutError:
            raise InstanceError(f"node {node[:8]} did not start its supervisor in time; try again") from None
        except OSError as error:
            raise InstanceError(f"node {node[:8]} could not start its supervisor: {error}") from error

    def address(self, node: str) -> str | None:
        """The URL of the proxy on that node."""
        return self._http.get(node)

    def observe(self) -> list[Process]:
        """The proxies of all nodes."""
        return [
            known.process
            for agent in self._agents.values()
            for known in agent.supervised.known.values()
            if known.child.role == "proxy"
        ]

    def peer_of(self, id: str) -> Supervised | None:
        """The supervisor whose child that process is."""
        for agent in self._agents.values():
            if id in agent.supervised.known:
                return agent.supervised
        return None

    def stop_accepting(self) -> None:
        """Have all supervisors close their listeners."""
        for agent in self._agents.values():
            agent.supervised.close_listener()

    # --- connections ---

    def hello(self, peer: Peer, hello: messages.Hello) -> None:
        """An agent has dialed, for the first time or again."""
        agent = self._of(hello.node)
        agent.peer = peer
        task = asyncio.get_running_loop().create_task(self._list(agent))
        self._listing.add(task)
        task.add_done_callback(self._listing.discard)

    async def _list(self, agent: _Agent) -> None:
        try:
            found = await agent.supervised.list()
        except InstanceError:  # it is gone again
            return
        for known in found:
            self._on_event(Appeared(known.process))
        if not agent.listed.done():
            agent.listed.set_result(None)

    def answer(self, peer: Peer, data: bytes) -> None:
        """What a supervisor said."""
        for agent in self._agents.values():
            if agent.peer is peer:
                agent.supervised.hear(data)

    def gone(self, peer: Peer) -> None:
        """The connection of an agent has ended; it dials again, unless its supervisor has ended."""
        for agent in self._agents.values():
            if agent.peer is peer:
                agent.peer = None
                asyncio.get_running_loop().call_later(LOST_S, self._lost, agent)

    def _lost(self, agent: _Agent) -> None:
        if agent.peer is None and agent.listed.done():
            agent.listed = asyncio.get_running_loop().create_future()
            agent.supervised.lost("its supervisor ended")

    def left(self, node: str) -> None:
        """A node has left the cluster."""
        agent = self._agents.pop(node, None)
        self._http.pop(node, None)
        if agent is not None:
            agent.supervised.lost("its node left the cluster")

    def _of(self, node: str) -> _Agent:
        agent = self._agents.get(node)
        if agent is None:
            agent = self._agents[node] = _Agent(node, self._exited)
        return agent

    def _exited(self, id: str, cause: str) -> None:
        self._on_event(Exited(id, cause))

    # --- the end ---

    async def close(self, names: list[str]) -> None:
        """End all supervisors and actors; `names` are those of the actors that live."""
        actors = [await cluster.apart(cluster.find, self._origin.scope, name) for name in names]
        there = [actor for actor in actors if actor is not None]
        answers = [actor.end.remote() for actor in there]
        for answer in answers:
            try:
                await cluster.ask(answer)
            except (TimeoutError, InstanceError) as error:
                log.warning("an agent did not end its supervisor: %s", error or "no answer")
        for actor in there:
            cluster.kill(actor)
        for agent in self._agents.values():
            agent.supervised.lost("the instance is over")
