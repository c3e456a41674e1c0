"""Calls of the controller that wait for an answer, and how long they wait for a sign of life.

A call may take as long as it needs: whoever lives pings once a second. When nothing at all was
received for `SILENCE_S` seconds, every call that waits fails. What is counted is ticks of this
loop, so that a process that was held up itself blames nobody.

Whoever sends the calls, again after a reconnect, is control.py.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from headgate.errors import HeadgateError
from headgate.wire import calling, messages
from headgate.wire.calling import SILENCE_S, TICK_S


class Pending:
    """The calls of one process, on one event loop.

    silence_s   for how long nothing may be received while calls wait
    """

    def __init__(self, silence_s: float = SILENCE_S) -> None:
        self._limit = round(silence_s / TICK_S)
        self._calls: dict[int, tuple[messages.Request, asyncio.Future[msgspec.Raw]]] = {}
        self._count = 0
        self._name = os.urandom(8).hex()
        self._silent = 0  # ticks
        self._timer: asyncio.TimerHandle | None = None

    def __iter__(self) -> Iterator[messages.Request]:
        return iter([request for request, _ in self._calls.values()])

    def add(self, method: str, params: dict[str, Any]) -> messages.Request:
        """A new call; ArgumentError if a parameter cannot travel."""
        request = calling.request(self._count + 1, self._name, method, params)
        loop = asyncio.get_running_loop()
        self._count += 1
        self._calls[request.id] = request, loop.create_future()
        if self._timer is None:
            self._silent = 0
            self._timer = loop.call_later(TICK_S, self._tick, loop)
        return request

    async def answer(self, request: messages.Request) -> Any:
        """The answer to a call that was added; raises its error, and ControllerUnavailable."""
        try:
            return msgspec.msgpack.decode(await self._calls[request.id][1])
        finally:
            self._calls.pop(request.id, None)

    def heard(self) -> None:
        """The controller said something."""
        self._silent = 0

    def answered(self, response: messages.Response) -> None:
        """An answer came, perhaps one that nobody waits for any more."""
        _, answer = self._calls.get(response.id, (None, None))
        if answer is None or answer.done():
            return
        if (error := calling.error_of(response)) is not None:
            answer.set_exception(error)
        else:
            answer.set_result(response.value)

    def fail(self, error: HeadgateError) -> None:
        """No call is answered any more."""
        for _, answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self._silent += 1
        if self._silent >= self._limit:
            self._give_up()
        waiting = any(not answer.done() for _, answer in self._calls.values())
        self._timer = loop.call_later(TICK_S, self._tick, loop) if waiting else None

    def _give_up(self) -> None:
        for request, answer in self._calls.values():
            if not answer.done():
                answer.set_exception(calling.no_sign_of_life(request.method))
