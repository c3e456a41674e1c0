"""The loop that headgate's own processes run on, and the one place that imports uvloop.

Rule: only processes that headgate started (controller, proxies, replicas) take their loop from
here. In a user's process headgate works on whatever asyncio loop it finds.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import uvloop

T = TypeVar("T")


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A fresh loop of the fast kind; the caller runs and closes it."""
    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run `main` to its end on a loop of its own: what asyncio.run is elsewhere."""
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        return runner.run(main)
