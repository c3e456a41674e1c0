"""Choosing GPUs."""

from __future__ import annotations

import pytest

from headgate.engine import gpus
from headgate.errors import InstanceError


def test_a_whole_gpu_is_given_once() -> None:
    assert gpus.pick(["0", "1", "2"], [("1", 1.0)], 2) == ("0", "2")


def test_fractions_fill_a_gpu_before_they_open_another() -> None:
    assert gpus.pick(["0", "1"], [("1", 0.5)], 0.5) == ("1",)
    assert gpus.pick(["0", "1"], [("1", 0.5)], 0.6) == ("0",)


def test_ten_tenths_fit() -> None:
    assert gpus.pick(["0"], [("0", 0.1)] * 9, 0.1) == ("0",)


def test_a_gpu_that_is_no_longer_there_is_not_counted() -> None:
    assert gpus.pick(["0"], [("7", 1.0)], 1) == ("0",)


@pytest.mark.parametrize(
    ("there", "taken", "wanted", "told"),
    [
        ([], [], 1, "this machine has 0 GPUs, 0 of them free"),
        (["0", "1"], [("0", 0.5)], 2, "this machine has 2 GPUs, 1.5 of them free"),
        (["0", "1", "2"], [], 1.5, "must be a whole number"),
    ],
)
def test_what_cannot_be_given_is_told_with_numbers(
    there: list[str], taken: list[tuple[str, float]], wanted: float, told: str
) -> None:
    with pytest.raises(InstanceError, match=told):
        gpus.pick(there, taken, wanted)


def test_no_gpu_at_all_can_be_chosen_by_the_environment() -> None:
    assert gpus.visible({gpus.VARIABLE: ""}, ["nvidia0"]) == ()


def test_this_machine_can_be_asked() -> None:
    assert isinstance(gpus.here(), tuple)
