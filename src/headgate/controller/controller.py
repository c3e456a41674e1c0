"""The controller: observe, plan, act, publish, and so again after each event.

An event (a report, an exit, a call, an acknowledgement, a timer that ran out) asks for a tick. A
tick looks at what runs, publishes what routers are to obey, and performs what core/reconcile.py
plans; with nothing to do it costs microseconds. Nothing polls and nothing sleeps: who waits for
something is looked at after each tick.

The goals change in one place, `commit`: stored first, then in force. After a restart the same
steps run from what was stored and what is seen; there is no recovery. What users call is calls.py,
who is connected peers.py, how an action is performed actions.py, how it all begins takeover.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from msgspec.structs import replace

from headgate import logs
from headgate.controller.actions import Actions
from headgate.controller.deployments import Deployments
from headgate.controller.failpoints import reach
from headgate.controller.fleet import Fleet, Setback
from headgate.controller.proxies import Proxies
from headgate.controller.publisher import PeerLike, Publisher
from headgate.controller.store import Store, StoreError
from headgate.controller.takeover import Listening, Takeover
from headgate.core import goals as change
from headgate.core import lifecycle, reconcile
from headgate.core.reconcile import Seen, Start, Stop
from headgate.core.state import BackendGoal, Goals
from headgate.engine.interface import Appeared, Engine, Event, Exited, NodesChanged, Process, Reported
from headgate.errors import HeadgateError, ProtocolError
from headgate.wire import messages

log = logs.get("controller")

#: How long a new controller waits for the processes that it found to say how they are.
ADOPT_S = 1.0
#: How long it holds that there may be routers which have not reconnected yet. One that comes later is
#: answered by draining replicas that it must go elsewhere.
UNKNOWN_ROUTERS_S = 0.5
#: The failpoints of what replicas say.
_POINTS = {
    (lifecycle.STARTING, lifecycle.READY): "replica.ready",
    (lifecycle.DRAINING, lifecycle.DRAINED): "drain.ended",
}


class Controller:
    """The one writer of an instance's goals.

    incarnation   1, and one more with each restart
    location      on which nodes there are to be HTTP proxies, a DeploymentMode; None: on none
    """

    def __init__(
        self, engine: Engine, store: Store, *, incarnation: int = 1, location: str | None = None
    ) -> None:
        self.engine = engine
        self.store = store
        self.incarnation = incarnation
        self.goals = Goals()
        self.fleet = Fleet()
        self.deployments = Deployments()
        self.proxies = Proxies(engine, location)
        self.publisher = Publisher(incarnation << 32, on_silent=self._proxy_silent, on_change=self.poke)
        self.lost: StoreError | None = None
        self.leaving = False
        self._actions = Actions(engine, store, self.fleet)
        self._takeover = Takeover()
        self._routers_unknown = incarnation > 1
        self._early: list[Event] = []  # of processes that are not known yet, but soon will be
        self._births = 0
        self._ticking = False
        self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def looked(self) -> bool:
        """Whether it is known what runs."""
        return self._takeover.looked

    @property
    def adopting(self) -> bool:
        """Whether what was found running is still waited for; nothing is changed before it has spoken."""
        return not self._takeover.over

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    # --- the start ---

    async def open(self) -> None:
        """Load the goals and take over what runs; goals are pursued when all of it has reported.

        Processes may connect, report and call meanwhile: what they say counts once it is known what runs.
        """
        await self.engine.open(self.on_event)
        self._load(is_empty=not any(process.kind == "replica" for process in self.engine.observe()))
        reach("takeover.loaded")
        for process in self.engine.observe():
            self._adopt(process)
        self._takeover.looked = True
        self._hear_early()
        if self._routers_unknown:
            Listening(UNKNOWN_ROUTERS_S, self._routers_known)
        if self._takeover.is_complete:
            self._adopted()
        else:
            Listening(ADOPT_S, self._adopted)
        self.poke()

    def _adopt(self, process: Process) -> None:
        """A process ran before this controller did."""
        if self.adopting:
            self._takeover.found(process.id)
        if process.kind == "proxy":
            self.proxies.adopt(process.id, process.pid, process.node, self.loop.time())
        else:
            self.fleet.adopt(
                process.id, process.backend, process.version, process.pid, process.node, self.loop.time()
            )

    def _load(self, *, is_empty: bool) -> None:
        try:
            if is_empty and self.store.is_new():
                self.store.begin()
            self.goals = self.store.load()
        except StoreError as error:
            self.lost = error
            log.error("%s", error)

    def said_hello(self, id: str) -> None:
        """A process that may have been found running has connected."""
        self._takeover.said(id)
        if self._takeover.is_complete:
            self._adopted()

    def _adopted(self) -> None:
        if self.adopting:
            self._takeover.end()
            reach("takeover.over")
            if self.lost is None:
                self._collect_blobs()
            self.poke()

    def _routers_known(self) -> None:
        self._routers_unknown = False
        self.poke()

    def close(self) -> None:
        """Do nothing any more; whoever waits for something is left to wait."""
        self.publisher.close()
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()

    def abandon_goals(self) -> None:
        """Want nothing any more; what was stored goes with the run directory."""
        self.goals, self.lost = Goals(), None
        self._routers_known()

    # --- the goals ---

    def commit(self, new: Callable[[Goals], Goals]) -> int:
        """Change the goals: stored, then published; the version of the snapshot that says so.

        Raises what `new` raises and StoreError, and then nothing has changed.
        """
        goals = new(self.goals)
        if goals != self.goals:
            self.store.save(goals)
            before, self.goals = self.goals, goals
            reach("goals.taken")
            if goals.backends != before.backends:
                self._collect_blobs()
            reach("blobs.collected")
        self.tick()
        return self.publisher.snapshot.version

    async def deploy(self, goal: BackendGoal, commit: Callable[[Goals, BackendGoal], Goals]) -> None:
        """Try `goal` out, make it a goal by way of `commit`, return when that is in force.

        Raises BackendStartError with the replica's own words, and then all is as it was.
        """
        self.fleet.forget_failures(self._versions())
        deployment = self.deployments.begin(goal)
        try:
            self.poke()
            reach("deploy.begun")
            await deployment.done
            reach("deploy.reached")
            version = self.commit(lambda goals: commit(goals, goal))
        finally:
            self.deployments.end(deployment)
            self.fleet.forget_failures(self._versions())
            self._collect_blobs()
            self.poke()
        reach("deploy.ended")
        await self.in_force(version)

    async def in_force(self, version: int) -> None:
        """Wait until each process that follows has that snapshot in force, was fenced, or is gone."""
        await self.publisher.in_force(version)
        reach("change.in_force")

    def _versions(self) -> set[reconcile.Version]:
        wanted = (*self.goals.backends, *self.deployments.candidates())
        return {(goal.tag, goal.version) for goal in wanted}

    def _collect_blobs(self) -> None:
        wanted = (*self.goals.backends, *self.deployments.candidates())
        self.store.collect(name for goal in wanted for name in (goal.code, goal.user_config) if name)

    # --- the loop ---

    def poke(self) -> None:
        """Something happened: tick in this turn of the event loop, once."""
        if not self._ticking:
            self._ticking = True
            self.loop.call_soon(self.tick)

    async def until(self, holds: Callable[[], bool]) -> None:
        """Wait until `holds`; it is asked after each tick."""
        if not holds():
            waiter: asyncio.Future[None] = self.loop.create_future()
            self._waiting.append((holds, waiter))
            await waiter

    def tick(self) -> None:
        """Bring what runs one step closer to the goals."""
        self._ticking = False
        if self._closed:
            return
        if self.looked:
            self._step(self.loop.time())
        waiting, self._waiting = self._waiting, []
        for holds, waiter in waiting:
            if not holds():
                self._waiting.append((holds, waiter))
            elif not waiter.done():
                waiter.set_result(None)

    def _step(self, now: float) -> None:
        for id in self.proxies.take_late(now):
            self.kill(id, "it has not connected in time")
        for node in self.proxies.take_missing(now):
            self.spawn(self._start_proxy(node))
        if not self.adopting and self.lost is None:
            self._publish()
            self.deployments.settle(list(self.fleet.seen.values()))
            self._act(now)
        self._look_again(now)

    def observed(self) -> list[Seen]:
        """The replicas, each with whether a router may still send to it."""
        unknown, routed = self._routers_unknown, self.publisher.routed(self.fleet.seen)
        return [
            replace(one, routed=True)
            if one.id in routed or (unknown and one.phase != lifecycle.STARTING)
            else one
            for one in self.fleet.seen.values()
        ]

    def _publish(self) -> None:
        seen = list(self.fleet.seen.values())
        self.publisher.publish(
            change.snapshot(self.goals, seen, 0, not self.leaving, self.fleet.failures)
        )

    def _look_again(self, now: float) -> None:
        """Set the timer for what time alone will change."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        moments = [self.proxies.next_look(now)]
        if not self.adopting and self.lost is None:
            candidates = self.deployments.candidates()
            moments.append(
                reconcile.next_look(
                    self.goals, self.fleet.seen.values(), self.fleet.failures, now, candidates=candidates
                )
            )
        known = [moment for moment in moments if moment is not None]
        if known:
            self._timer = self.loop.call_at(min(known), self.tick)

    def _act(self, now: float) -> None:
        candidates = self.deployments.candidates()
        wanted = {(goal.tag, goal.version): goal for goal in (*self.goals.backends, *candidates)}
        for action in reconcile.plan(
            self.goals, self.observed(), self.fleet.failures, now, candidates=candidates
        ):
            if isinstance(action, Start):
                goal = wanted[action.backend, action.version]
                self.spawn(self._start_replica(self.fleet.ask(goal, now), goal))
            else:
                self._actions.perform(action, wanted, now)
        there = reconcile.by_version(self.fleet.seen.values())
        for version, goal in wanted.items():
            self._actions.tell_limits(goal, there.get(version, ()))

    async def _start_replica(self, name: str, goal: BackendGoal) -> None:
        self._births += 1
        try:
            await self._actions.start(name, goal)
        except HeadgateError as error:
            self._set_back(self.fleet.ended(name, str(error), self.loop.time()))
        finally:
            self._births -= 1
            self._hear_early()
            self.poke()

    async def _start_proxy(self, node: str) -> None:
        await self.proxies.start(node)
        self.poke()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine; nobody waits for it."""
        task = self.loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(_log_failure)

    # --- events ---

    def on_event(self, event: Event) -> None:
        """A process of the engine reported, appeared or ended, or a node came or left."""
        if not self.looked:
            self._early.append(event)
            return
        match event:
            case NodesChanged():
                log.info("the nodes are now: %s", ", ".join(self.engine.nodes()) or "none")
            case Appeared(process):
                self._adopt(process)
            case Exited():
                self._on_exit(event)
            case Reported(id) if id not in self.fleet.seen:
                self._keep(event)
            case Reported(id, messages.Health(error, hangs)):
                if not self.fleet.checked(id, error, self.loop.time(), hangs=hangs):
                    return  # as before, which is what most checks say
            case Reported(id, messages.Report() as report):
                self._on_report(id, report, self.loop.time())
        self.poke()

    def _on_exit(self, event: Exited) -> None:
        now = self.loop.time()
        self.said_hello(event.id)
        if self.proxies.ended(event.id, event.cause, now):
            return
        if event.id not in self.fleet.seen:
            self._keep(event)
            return
        reach("replica.gone")
        expected = self.fleet.seen[event.id].phase == lifecycle.STOPPING
        self._set_back(self.fleet.ended(event.id, event.cause, now))
        log.log(logging.DEBUG if expected else logging.WARNING, "replica %s is gone: %s", event.id, event.cause)

    def _keep(self, event: Reported | Exited) -> None:
        """An event of a process that is not known: it may be one whose start has not been answered yet."""
        if self._births:
            self._early.append(event)

    def _hear_early(self) -> None:
        early, self._early = self._early, []
        for event in early:
            self.on_event(event)

    def _on_report(self, id: str, report: messages.Report, now: float) -> None:
        before = self.fleet.seen[id].phase
        if point := _POINTS.get((before, report.phase)):
            reach(point)
        try:
            self._set_back(self.fleet.reported(id, report, now))
        except ProtocolError as error:
            log.error("replica %s is killed: %s", id, error)
            self.engine.kill(id)
        if self.fleet.seen[id].phase != before:
            level = logging.INFO if report.phase == lifecycle.READY else logging.DEBUG
            log.log(level, "replica %s is %s", id, report.phase)
        if report.phase == "failed":
            self.engine.kill(id)

    def _set_back(self, setback: Setback | None) -> None:
        """A replica failed: the change being tried out is given up, or it is tried again later."""
        if setback is None:
            return
        tag, version = setback.version
        log.warning("%s failed: %s", setback.who(), setback.error)
        goal = next((one for one in self.goals.backends if (one.tag, one.version) == (tag, version)), None)
        if (setback.first_steps or goal is None) and self.deployments.blame(setback.version, setback.problem()):
            return
        if goal is not None and setback.config_version == goal.config_version:
            # It cannot take what the others have: only a new process can.
            self.fleet.broken(setback.id, setback.error, self.loop.time())
            self.engine.kill(setback.id)

    def stop_now(self, tag: str) -> None:
        """End the replicas of a backend without letting them finish."""
        for one in self.fleet.of(tag):
            self._actions.perform(Stop(one.id, "by force"), {}, self.loop.time())
        self.poke()

    def kill(self, id: str, reason: str) -> None:
        """End a process that does not do its part."""
        log.warning("%s is killed: %s", id, reason)
        self.engine.kill(id)

    def _proxy_silent(self, peer: PeerLike) -> None:
        self.kill(peer.id, "it does not follow snapshots")


def _log_failure(task: asyncio.Task[Any]) -> None:
    if not task.cancelled() and task.exception() is not None:
        log.error("a task of the controller failed", exc_info=task.exception())
