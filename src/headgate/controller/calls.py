"""What clients call: one method for each, and how long it waits before it answers.

A call checks, changes the goals through core/goals.py, and answers when the change is in force and
what it promised has happened. Calls are repeated by clients that got no answer: one that is
still running answers all who asked, one whose change is stored already waits for its effects only.

Whatever fails is answered as an error of headgate.errors. The names and parameters are the wire's;
the Python API is api.py.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import UNSET, Struct
from msgspec.structs import asdict, replace

from headgate import errors, logs
from headgate.controller.status import endpoints, status
from headgate.core import goals as change
from headgate.core import reconcile
from headgate.core.state import BackendGoal, Facts, Goals
from headgate.errors import HeadgateError, InstanceError, ProtocolError
from headgate.wire import messages

if TYPE_CHECKING:
    from headgate.controller.controller import Controller
    from headgate.controller.publisher import PeerLike

log = logs.get("calls")

#: How long the proxies may take to finish what they have when the instance shuts down.
GOODBYE_S = 20.0
#: How long a failed reconfigure waits until the old user_config is in force again everywhere.
REVERT_S = 10.0


class Code(Struct):
    """The parameters of create_backend and update_backend."""

    tag: str
    code: bytes
    facts: Facts | None = None
    given: dict[str, Any] = {}
    user_config: bytes | None = None
    env: dict[str, str] | None = None
    num_gpus: float = 0.0


class Config(Struct):
    """The parameters of update_backend_config."""

    tag: str
    given: dict[str, Any] = {}
    user_config: bytes | None = None
    has_user_config: bool = False


class Calls:
    """The public calls of one controller."""

    def __init__(self, controller: Controller, http: str | None = None) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._controller = controller
        self._http = http
        self._running: dict[str, asyncio.Task[Any]] = {}

    # --- answering ---

    def answer(self, peer: PeerLike, request: messages.Request) -> None:
        """Run a call and send its answer to `peer`."""
        task = self._running.get(request.call)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._run(request))
            self._running[request.call] = task
            task.add_done_callback(lambda task: self._running.pop(request.call, None))
        task.add_done_callback(lambda task: _respond(peer, request, task))

    async def _run(self, request: messages.Request) -> Any:
        method = getattr(self, f"do_{request.method}", None)
        if method is None:
            raise ProtocolError(f"the controller has no call {request.method!r}")
        if request.method not in _ALWAYS:
            self._check_open()
        try:
            return await method(request.call, msgspec.msgpack.decode(request.params))
        except msgspec.MsgspecError as error:
            raise ProtocolError(f"{request.method}: {error}") from None

    def _check_open(self) -> None:
        if self._controller.leaving:
            raise InstanceError("the instance has already been shut down; call headgate.start() for a new one")
        if self._controller.lost is not None:
            raise self._controller.lost

    # --- the instance ---

    async def do_start_info(self, call: str, params: Any) -> Any:
        controller = self._controller
        return {"ready": self._is_ready(), "http": self._http, "incarnation": controller.incarnation}

    async def do_wait_ready(self, call: str, params: Any) -> Any:
        proxies = self._controller.proxies
        await self._controller.until(lambda: self._is_ready() or proxies.failures > 0)
        if not self._is_ready():
            proxies.check()
        return await self.do_start_info(call, params)

    def _is_ready(self) -> bool:
        controller = self._controller
        if controller.adopting or controller.leaving:
            return False
        peers = controller.proxies.peers()
        follow = [peer is not None and controller.publisher.follows(peer) for peer in peers]
        return len(peers) >= controller.proxies.wanted and all(follow)

    async def do_status(self, call: str, params: Any) -> Any:
        return status(self._controller, self._is_ready(), self._http)

    async def do_shutdown(self, call: str, params: Any) -> Any:
        """Proxies finish, replicas finish, then the controller ends and with it everything."""
        controller = self._controller
        controller.leaving = True
        controller.proxies.wanted = 0
        for goal in controller.deployments.candidates():
            controller.deployments.cancel(goal.tag, "the instance shuts down")
        controller.engine.stop_accepting()
        controller.tick()
        for peer in controller.proxies.peers():
            if peer is not None:
                peer.tell(messages.Goodbye(GOODBYE_S))
        late = asyncio.get_running_loop().call_later(GOODBYE_S + 1.0, self._kill_proxies)
        await controller.until(lambda: not controller.proxies.peers())
        late.cancel()
        controller.abandon_goals()
        await controller.until(lambda: not controller.fleet.seen)
        asyncio.get_running_loop().call_soon(self._end)

    def _kill_proxies(self) -> None:
        for view in self._controller.proxies.views():
            self._controller.kill(view.id, "it did not finish in time")

    def _end(self) -> None:
        if not self.over.done():
            self.over.set_result(None)

    # --- backends ---

    async def do_create_backend(self, call: str, params: Any) -> None:
        new = msgspec.convert(params, Code)
        async with self._controller.deployments.turn(new.tag):
            if self._is_repeat(new.tag, call):
                return await self._settled(new.tag)
            goal = self._goal(new, BackendGoal(new.tag, 0, "", change.resolve({}, Facts()), Facts()), call)
            change.add_backend(self._controller.goals, goal)
            await self._deploy(goal, new.facts is None, change.add_backend)
        return None

    async def do_update_backend(self, call: str, params: Any) -> None:
        new = msgspec.convert(params, Code)
        async with self._controller.deployments.turn(new.tag):
            if self._is_repeat(new.tag, call):
                return await self._settled(new.tag)
            old = change.find_backend(self._controller.goals, new.tag)
            goal = self._goal(new, old, call)
            await self._deploy(goal, new.facts is None, change.replace_backend)
        return None

    def _goal(self, new: Code, old: BackendGoal, call: str) -> BackendGoal:
        """The goal for new code; what is not given is as it was."""
        controller = self._controller
        # Code that only a replica can load is taken at its word until one has.
        facts = new.facts or Facts(accepts_batch=True)
        given = {**old.given, **new.given}
        settings = change.resolve(given, facts)
        user_config = old.user_config if new.user_config is None else controller.store.put(new.user_config)
        version = change.next_version(controller.goals, new.tag, controller.fleet.versions(new.tag))
        return BackendGoal(
            new.tag,
            version,
            controller.store.put(new.code),
            settings,
            facts,
            given,
            user_config,
            old.config_version,
            old.env if new.env is None else tuple(sorted(new.env.items())),
            new.num_gpus,
            call,
        )

    async def _deploy(self, goal: BackendGoal, learn: bool, store: Any) -> None:
        """Try `goal` out; with `learn`, what its replicas say of the code is part of what is stored."""

        def commit(goals: Goals, reached: BackendGoal) -> Goals:
            facts = self._controller.fleet.facts(reached) if learn else None
            if facts is not None:
                reached = replace(reached, facts=facts, settings=change.resolve(reached.given, facts))
            changed: Goals = store(goals, reached)
            return changed

        await self._controller.deploy(goal, commit)

    def _is_repeat(self, tag: str, call: str) -> bool:
        return any(goal.tag == tag and goal.call == call for goal in self._controller.goals.backends)

    async def _settled(self, tag: str) -> None:
        """Wait until a stored change of a backend has had its effect."""
        controller = self._controller
        await controller.until(lambda: self._is_settled(tag))
        await controller.publisher.in_force(controller.publisher.snapshot.version)

    def _is_settled(self, tag: str) -> bool:
        """Whether the backend has the replicas that it should have and no others of its version."""
        for goal in self._controller.goals.backends:
            if goal.tag == tag:
                there = self._controller.fleet.of(tag)
                same = [one for one in there if one.version == goal.version]
                return reconcile.reached(goal, there) and len(same) <= goal.settings.num_replicas
        return True

    async def do_update_backend_config(self, call: str, params: Any) -> None:
        new = msgspec.convert(params, Config)
        controller = self._controller
        async with controller.deployments.turn(new.tag):
            if not self._is_repeat(new.tag, call):
                blob: Any = UNSET
                if new.has_user_config:
                    blob = None if new.user_config is None else controller.store.put(new.user_config)
                used = controller.fleet.newest_config(new.tag)
                goals = change.change_config(
                    controller.goals, new.tag, new.given, user_config=blob, used=used, call=call
                )
                await self._try_config(change.find_backend(goals, new.tag))
            await self._settled(new.tag)

    async def _try_config(self, goal: BackendGoal) -> None:
        try:
            await self._controller.deploy(goal, _put)
        except errors.BackendStartError:
            try:
                async with asyncio.timeout(REVERT_S):
                    await self._settled(goal.tag)
            except TimeoutError:
                log.error("backend %s has not gone back to its old user_config", goal.tag)
            raise

    async def do_delete_backend(self, call: str, params: Any) -> None:
        tag, force = params["tag"], params.get("force", False)
        controller = self._controller
        change.remove_backend(controller.goals, tag)
        controller.deployments.cancel(tag, f"backend {tag!r} was deleted while it was being started")
        async with controller.deployments.turn(tag):
            version = controller.commit(lambda goals: change.remove_backend(goals, tag))
            await controller.publisher.in_force(version)
            if force:
                controller.stop_now(tag)
            await controller.until(lambda: not controller.fleet.of(tag))

    async def do_list_backends(self, call: str, params: Any) -> Any:
        return {goal.tag: self._described(goal) for goal in self._controller.goals.backends}

    def _described(self, goal: BackendGoal) -> dict[str, Any]:
        blob = None
        if goal.user_config is not None:
            with open(self._controller.store.path(goal.user_config), "rb") as file:
                blob = file.read()
        return {"given": goal.given, "settings": asdict(goal.settings), "user_config": blob}

    # --- endpoints ---

    async def _in_force(self, new: Any) -> None:
        await self._controller.publisher.in_force(self._controller.commit(new))

    async def do_create_endpoint(self, call: str, params: Any) -> None:
        name, backend, route, methods = (params.get(key) for key in ("name", "backend", "route", "methods"))
        await self._in_force(
            lambda goals: change.add_endpoint(
                goals, name, backend=backend, route=route, methods=methods, call=call
            )
        )

    async def do_delete_endpoint(self, call: str, params: Any) -> None:
        await self._in_force(lambda goals: change.remove_endpoint(goals, params["name"]))

    async def do_set_traffic(self, call: str, params: Any) -> None:
        name, weights = params["endpoint"], params["weights"]
        await self._in_force(lambda goals: change.set_traffic(goals, name, weights, call=call))

    async def do_shadow_traffic(self, call: str, params: Any) -> None:
        name, tag, share = params["endpoint"], params["tag"], params["proportion"]
        await self._in_force(lambda goals: change.set_shadow(goals, name, tag, share, call=call))

    async def do_list_endpoints(self, call: str, params: Any) -> Any:
        return {one.pop("name"): one for one in endpoints(self._controller.goals)}


#: Calls that a controller answers whatever has become of it.
_ALWAYS = frozenset({"start_info", "status", "shutdown"})


def _put(goals: Goals, goal: BackendGoal) -> Goals:
    return replace(goals, backends=tuple(goal if old.tag == goal.tag else old for old in goals.backends))


def _respond(peer: PeerLike, request: messages.Request, task: asyncio.Task[Any]) -> None:
    if task.cancelled():
        return
    error = task.exception()
    if error is None:
        value = msgspec.Raw(msgspec.msgpack.encode(task.result()))
        peer.tell(messages.Response(request.id, value))
        return
    if not isinstance(error, HeadgateError):
        log.error("%s failed", request.method, exc_info=error)
        error = HeadgateError(
            f"{request.method} failed in the controller: {type(error).__name__}: {error}; its log has the "
            "traceback; this is a bug of headgate, please report it"
        )
    peer.tell(messages.Response(request.id, error=errors.to_wire(error)))
