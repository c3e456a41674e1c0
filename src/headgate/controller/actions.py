"""How an action of the plan is performed: what the engine is told, and what the fleet remembers of it.

Which action, and when, is decided in core/reconcile.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from headgate import logs
from headgate.controller.failpoints import reach
from headgate.controller.fleet import LOCAL, Fleet
from headgate.controller.store import Store
from headgate.core import lifecycle
from headgate.core.reconcile import Drain, Reconfigure, Seen, Stop, Version
from headgate.core.state import BackendGoal
from headgate.engine.interface import Engine
from headgate.wire import messages

log = logs.get("controller")


class Actions:
    """Does to the replicas what was planned."""

    def __init__(self, engine: Engine, store: Store, fleet: Fleet) -> None:
        self._engine = engine
        self._store = store
        self._fleet = fleet
        self._patience: dict[str, float] = {}  # how long replicas of a backend may drain

    async def start(self, name: str, goal: BackendGoal) -> None:
        """Start a replica of `goal` that the fleet counts as `name`. Raises what the engine raises."""
        reach("replica.before_start")
        id = await self._engine.start_replica(self._spec(goal))
        reach("replica.asked")
        processes = {process.id: process for process in self._engine.observe()}
        pid, node = (processes[id].pid, processes[id].node) if id in processes else (0, LOCAL)
        if self._fleet.born(name, id, pid, node):
            reach("replica.started")
            log.debug("replica %s starts, version %d", id, goal.version)
        else:  # nobody wants it any more
            self._engine.kill(id)

    def perform(
        self, action: Reconfigure | Drain | Stop, wanted: Mapping[Version, BackendGoal], now: float
    ) -> None:
        """Do it; `wanted` holds the goals and candidates by version."""
        one = self._fleet.seen[action.id]
        match action:
            case Reconfigure(id, config_version):
                self._configure(id, wanted[one.backend, one.version], config_version)
                self._fleet.configuring(id, config_version)
            case Drain(id):
                patience = self._patience.get(one.backend, one.graceful_shutdown_timeout_s)
                reach("drain.before")
                self._engine.tell(id, messages.Drain(patience))
                reach("drain.told")
                self._fleet.drained(id, now)
                log.debug("replica %s drains", id)
            case Stop(id, reason):
                reach("stop.before")
                self._engine.kill(id)
                reach("stop.told")
                self._fleet.stopped(id, now)
                log.info("replica %s is stopped: %s", id, reason)

    def tell_limits(self, goal: BackendGoal, replicas: Iterable[Seen]) -> None:
        """Give new limits to `replicas`, those of `goal` that run already."""
        self._patience[goal.tag] = goal.settings.graceful_shutdown_timeout_s
        for one in replicas:
            is_free = one.phase == lifecycle.READY and not one.reconfiguring
            if is_free and self._fleet.told(one.id, goal.settings):
                self._configure(one.id, goal, one.config_version)

    def _configure(self, id: str, goal: BackendGoal, config_version: int) -> None:
        same = config_version == goal.config_version
        path = self._store.path(goal.user_config) if same and goal.user_config else None
        reach("configure.before")
        self._engine.tell(id, messages.Configure(goal.settings, config_version, path))
        reach("configure.told")
        self._fleet.told(id, goal.settings)

    def _spec(self, goal: BackendGoal) -> messages.ReplicaSpec:
        return messages.ReplicaSpec(
            goal.tag,
            goal.version,
            self._store.path(goal.code),
            goal.settings,
            self._store.path(goal.user_config) if goal.user_config else None,
            goal.config_version,
            goal.env,
            goal.resources,
        )
