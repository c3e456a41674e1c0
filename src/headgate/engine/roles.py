"""The kinds of children that a supervisor forks, by dotted name, and what it imports for them beforehand.

A child starts with everything that its supervisor has imported. The imports are done one at a
time, when nothing else is to be done, in the order in which the children are wanted.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple


class Role(NamedTuple):
    """A kind of child.

    target    "module:function"; called with the ChildBoot, what it returns is the exit status
    title     the process's name in ps
    preload   modules that the supervisor imports before the first fork of this kind; in steps of a
              few milliseconds, because between two of them it answers what it is asked
    unasked   one is forked right after the first controller, which finds it there
    """

    target: str
    title: str
    preload: tuple[str, ...] = ()
    unasked: bool = False


ROLES: Mapping[str, Role] = {
    "controller": Role(
        "headgate.processes:controller_main",
        "headgate-ctl",
        # As the proxy, it imports its own modules beside the supervisor.
        preload=("headgate.eventloop", "headgate.wire.control"),
    ),
    "proxy": Role(
        "headgate.processes:proxy_main",
        "headgate-proxy",
        # It imports its own modules beside the supervisor, which is busy with the replicas'.
        unasked=True,  # it boots beside the controller: 40 ms earlier
    ),
    "replica": Role(
        "headgate.processes:replica_main",
        "headgate-rep",
        preload=(
            "json",
            "headgate.replica.slim",
            "anyio.abc",
            "tempfile",
            "starlette.requests",
            "cloudpickle",
            "headgate.replica.process",
            "headgate.wire.thread",
            "headgate.routers",
        ),
    ),
}

#: On a node of a cluster: an agent in the controller's place, and a proxy when the controller asks for it.
AGENT_ROLES: Mapping[str, Role] = {
    "controller": Role(
        "headgate.processes:agent_main",
        "headgate-agent",
        preload=("headgate.eventloop", "headgate.wire.control", "headgate.engine.agent"),
    ),
    "proxy": ROLES["proxy"]._replace(unasked=False),
}


class Preloads:
    """The imports that are still to be done for these roles; true while there are any."""

    def __init__(self, roles: Mapping[str, Role], *, with_proxy: bool) -> None:
        wanted = [role for role in roles if with_proxy or role != "proxy"]
        self._left = deque((role, module) for role in wanted for module in roles[role].preload)

    def __bool__(self) -> bool:
        return bool(self._left)

    def do_one(self) -> None:
        """Import the next module. What is imported stays: frozen in the end, a collection does not look at it."""
        _, module = self._left.popleft()
        try:
            importlib.import_module(module)
        except Exception:  # noqa: BLE001 - shown here; the child that needs it fails the same way
            sys.excepthook(*sys.exc_info())
        if not self._left:
            gc.freeze()
            gc.enable()

    def do_for(self, role: str) -> None:
        """Import what children of that kind begin with."""
        while any(wanted == role for wanted, _ in self._left):
            self.do_one()
