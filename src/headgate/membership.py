"""What a member of an instance does on its control connection, whichever way it is one (instance.py)."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from headgate.wire import messages


class Part(msgspec.Struct, frozen=True):
    """What a process says and hears there besides its calls and the snapshots.

    report       its state, said again on each connection; None: it has none
    on_message   called with each command of the controller, on the thread of the connection
    routers      the names of those that have links to it
    """

    report: Callable[[], messages.Report | None]
    on_message: Callable[[messages.FromController], None]
    routers: Callable[[], tuple[str, ...]]
