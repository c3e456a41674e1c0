"""Changes of backends on their way: a goal that is tried out before it counts.

The replicas of a candidate are started beside those that serve. When all of them are ready it may
become the goal; the first that fails ends it, and everything stays as it was. One
backend has one change at a time; the next waits its turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from weakref import WeakValueDictionary

from headgate.core import reconcile
from headgate.core.reconcile import Seen, Version
from headgate.core.state import BackendGoal
from headgate.errors import BackendStartError, HeadgateError


class Deployment:
    """One candidate; `done` is resolved when it is reached, or raises why it is not to be."""

    def __init__(self, goal: BackendGoal) -> None:
        self.goal = goal
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail(self, error: HeadgateError) -> None:
        """Give it up; the caller gets `error`."""
        if not self.done.done():
            self.done.set_exception(error)


class Deployments:
    """All candidates, and the turns of each backend."""

    def __init__(self) -> None:
        self._running: list[Deployment] = []
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def turn(self, tag: str) -> asyncio.Lock:
        """To be held by whoever changes the backend `tag`."""
        turn = self._turns.get(tag)
        if turn is None:
            turn = self._turns[tag] = asyncio.Lock()
        return turn

    def begin(self, goal: BackendGoal) -> Deployment:
        """Try `goal` out."""
        deployment = Deployment(goal)
        self._running.append(deployment)
        return deployment

    def end(self, deployment: Deployment) -> None:
        """It is a goal now, or was given up."""
        self._running.remove(deployment)

    def candidates(self) -> list[BackendGoal]:
        """What is tried out now, but for what was given up."""
        return [one.goal for one in self._running if not _failed(one)]

    def settle(self, seen: Iterable[Seen]) -> None:
        """Tell those whose replicas are all ready."""
        for one in self._running:
            if not one.done.done() and reconcile.reached(one.goal, seen):
                one.done.set_result(None)

    def blame(self, version: Version, error: HeadgateError) -> bool:
        """Give up the candidate of `version`, if there is one."""
        found = [one for one in self._running if (one.goal.tag, one.goal.version) == version]
        for one in found:
            one.fail(error)
        return bool(found)

    def cancel(self, tag: str, text: str) -> None:
        """Give up what is tried out of the backend `tag`."""
        for one in self._running:
            if one.goal.tag == tag:
                one.fail(BackendStartError(text))


def _failed(one: Deployment) -> bool:
    return one.done.done() and (one.done.cancelled() or one.done.exception() is not None)
