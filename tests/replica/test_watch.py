"""A check_health that does not return is noticed; one that could not run is not blamed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from headgate.core.state import Settings
from headgate.replica.watch import HealthWatch


def watch() -> tuple[HealthWatch, list[str]]:
    said: list[str] = []
    worker: Any = SimpleNamespace(settings=Settings(health_check_timeout_s=2.0))
    return HealthWatch(worker, said.append), said


def looks(health: HealthWatch, seconds: int, *, held_up: bool = False, away: bool = False) -> None:
    check = health._check
    begun = check.looked_at if check else 0.0
    for n in range(1, seconds + 1):
        health.look(begun + n, was_held_up=held_up, was_away=away)


def test_one_that_does_not_return_is_told_again_and_again() -> None:
    health, said = watch()
    with health.running(lambda: True):
        looks(health, 1)
        assert said == []
        looks(health, 4)
    assert said == ["check_health did not return in 2 s"] * 2
    looks(health, 9)
    assert len(said) == 2


def test_time_in_which_something_else_held_up_the_loop_does_not_count() -> None:
    health, said = watch()
    with health.running(lambda: False):
        looks(health, 30, held_up=True)
        looks(health, 30, away=True)
        assert said == []
        looks(health, 3)
    assert len(said) == 1


def test_one_that_itself_holds_up_the_loop_is_told() -> None:
    health, said = watch()
    with health.running(lambda: True):
        looks(health, 3, held_up=True)
    assert len(said) == 1
