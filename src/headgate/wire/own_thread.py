"""A thread of headgate's own in a user's process.

It holds a connection, takes no signals and runs nothing of the user's; but what the user has let go of may be collected
on it, and end something. Rule: nothing that takes long is done there, since requests and the controller wait for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from headgate.signals import withhold_signals


class OwnThread(threading.Thread):
    """A daemon thread that runs `work`.

    >>> found = []
    >>> thread = OwnThread(lambda: found.append(is_own()))
    >>> thread.start()
    >>> thread.join()
    >>> found, is_own()
    ([True], False)
    """

    def __init__(self, work: Callable[[], object], name: str = "headgate") -> None:
        super().__init__(target=work, name=name, daemon=True)

    def run(self) -> None:
        withhold_signals()
        super().run()


def is_own() -> bool:
    """Whether this is called on a thread of headgate's own."""
    return isinstance(threading.current_thread(), OwnThread)
