"""The kinds of children that a supervisor forks, by dotted name, and what it imports for them beforehand.

A child starts with everything that its supervisor has imported, and shares that memory with it. So no child imports
what the supervisor could have: imported twice it costs time twice, and what is imported after a fork parts the pages of
those that share them (1.5 MB, measured). Only what replicas need comes after the first forks: a quarter of a start, in
which controller and proxy boot.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple


class Role(NamedTuple):
    """A kind of child.

    target    "module:function"; called with the ChildBoot, what it returns is the exit status
    title     the process's name in ps
    preload   modules that the supervisor imports before the first fork of this kind
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
        preload=("headgate.eventloop", "headgate.wire.control", "headgate.engine.local", "headgate.controller.serving"),
    ),
    "proxy": Role(
        "headgate.processes:proxy_main",
        "headgate-proxy",
        preload=("httptools", "headgate.router", "headgate.proxy.server"),
        unasked=True,  # it boots beside the controller
    ),
    "replica": Role(
        "headgate.processes:replica_main",
        "headgate-rep",
        preload=("json", "cloudpickle", "headgate.replica.process"),  # Starlette among what that imports
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


def preload(roles: Iterable[Role]) -> None:
    """Import what children of these kinds begin with. It stays: frozen, their collections do not copy it.

    Not collected before: that would take 14 ms of the start and gain 0.3 MB.
    """
    gc.disable()
    for role in roles:
        for module in role.preload:
            try:
                importlib.import_module(module)
            except Exception:  # noqa: BLE001 - shown here; the child that needs it fails the same way
                sys.excepthook(*sys.exc_info())
    gc.freeze()
    gc.enable()
