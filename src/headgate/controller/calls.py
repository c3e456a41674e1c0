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

from headgate import errors, logs
from headgate.controller.backends import Backends
from headgate.controller.failpoints import reach
from headgate.controller.status import endpoints, status
from headgate.core import goals as change
from headgate.errors import HeadgateError, InstanceError, ProtocolError
from headgate.wire import messages

if TYPE_CHECKING:
    from headgate.controller.controller import Controller
    from headgate.controller.publisher import PeerLike

log = logs.get("calls")

#: How long the proxies may take to finish what they have when the instance shuts down.
GOODBYE_S = 20.0

class Calls:
    """The public calls of one controller."""

    def __init__(self, controller: Controller) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._controller = controller
        self._backends = Backends(controller)
        self._running: dict[str, asyncio.Task[Any]] = {}

    # --- answering ---

    def answer(self, peer: PeerLike, node: str, request: messages.Request) -> None:
        """Run a call of `peer`, a process of `node`, and send it the answer."""
        task = self._running.get(request.call)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._run(request, node))
            self._running[request.call] = task
            task.add_done_callback(lambda task: self._running.pop(request.call, None))
        task.add_done_callback(lambda task: _respond(peer, request, task))

    async def _run(self, request: messages.Request, node: str) -> Any:
        name = f"do_{request.method}"
        method = getattr(self, name, None) or getattr(self._backends, name, None)
        if method is None:
            raise ProtocolError(f"the controller has no call {request.method!r}")
        if _is_change(request):
            reach("call.received")
        if request.method not in _ALWAYS:
            await self._controller.until(lambda: not self._controller.adopting)
            self._check_open()
        if request.method in _OF_A_NODE:
            return await method(node)
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

    async def do_start_info(self, node: str) -> Any:
        """What a process of `node` has to know of the instance; `http` is the proxy that it may use."""
        controller = self._controller
        return {
            "ready": self._is_ready(),
            "http": controller.proxies.address(node),
            "incarnation": controller.incarnation,
        }

    async def do_wait_ready(self, node: str) -> Any:
        proxies = self._controller.proxies
        await self._controller.until(lambda: self._is_ready() or proxies.fails())
        if not self._is_ready():
            proxies.check()
        return await self.do_start_info(node)

    def _is_ready(self) -> bool:
        controller = self._controller
        if controller.adopting or controller.leaving:
            return False
        up = controller.proxies.up()
        follow = all(controller.publisher.follows(peer) for peer in up.values())
        return follow and len(up) == len(controller.proxies.wanted()) and not controller.proxies.has_lost_home

    async def do_status(self, call: str, params: Any) -> Any:
        await self._controller.until(lambda: not self._controller.adopting)
        return status(self._controller, self._is_ready())

    async def do_shutdown(self, call: str, params: Any) -> Any:
        """Proxies finish, replicas finish, then the controller ends and with it everything."""
        controller = self._controller
        await controller.until(lambda: controller.looked)
        controller.leaving = True
        controller.proxies.want_none()
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

    # --- endpoints ---

    async def _in_force(self, new: Any) -> None:
        await self._controller.in_force(self._controller.commit(new))

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
#: Calls whose answer depends on the asker's node, and on nothing else.
_OF_A_NODE = frozenset({"start_info", "wait_ready"})


def _respond(peer: PeerLike, request: messages.Request, task: asyncio.Task[Any]) -> None:
    if task.cancelled():
        return
    if _is_change(request):
        reach("answer.before")
    peer.tell(_response(request, task))
    if _is_change(request):
        reach("answer.sent")


def _response(request: messages.Request, task: asyncio.Task[Any]) -> messages.Response:
    error = task.exception()
    if error is None:
        return messages.Response(request.id, msgspec.Raw(msgspec.msgpack.encode(task.result())))
    if not isinstance(error, HeadgateError):
        log.error("%s failed", request.method, exc_info=error)
        error = HeadgateError(
            f"{request.method} failed in the controller: {type(error).__name__}: {error}; its log has the "
            "traceback; this is a bug of headgate, please report it"
        )
    return messages.Response(request.id, error=errors.to_wire(error))


def _is_change(request: messages.Request) -> bool:
    return request.method.startswith(("create_", "update_", "delete_", "set_", "shadow_"))
