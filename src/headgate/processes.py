"""The entry points of headgate's own processes, by dotted name, so that the engine imports none of them.

The supervisor is executed (engine/ignition.py) and forks the others (engine/supervisor.py), each of
which gets one ChildBoot: who it is and the sockets that its role may hold. What they return is
the exit status; the controller's 0 ends the instance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from headgate.engine.boot import ChildBoot


def supervisor_main(boot_fd: int) -> NoReturn:
    """Run the supervisor of the instance whose boot record is at `boot_fd`."""
    from headgate.engine import boot, supervisor

    supervisor.main(boot.read(boot_fd))


def agent_supervisor_main(boot_fd: int) -> NoReturn:
    """Run the supervisor of a node of a cluster, whose controller is elsewhere."""
    from headgate.engine import boot, roles, supervisor

    supervisor.main(boot.read(boot_fd), roles.AGENT_ROLES)


def controller_main(child: ChildBoot) -> int | None:
    """Run the controller until the instance shuts down."""
    from headgate.controller.serving import main

    return main(child)


def agent_main(child: ChildBoot) -> int | None:
    """Stand between the node's supervisor and the controller until the instance is over."""
    from headgate.engine.agent import main

    return main(child)


def proxy_main(child: ChildBoot) -> int | None:
    """Run an HTTP proxy until it is told to leave."""
    from headgate.proxy.server import main

    return main(child)


def replica_main(child: ChildBoot) -> int | None:
    """Run one replica of the backend that the controller assigns to it."""
    from headgate.replica.process import main

    return main(child)
