"""Medians and ratios of what rounds gave.

A round's figures are numbers by name; a figure that has parts (CPU time by process) is a mapping of
its own. A ratio is taken inside each round, then its median over the rounds: a slow minute of the
machine hits both of its sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

#: One side's figures of one round, as JSON holds them.
Figures = Mapping[str, Any]


def middle(rounds: Iterable[Figures]) -> dict[str, Any]:
    """The median of each figure over the rounds that have it; failures are added up.

    >>> middle([{"p50": 1.0, "failed": 1}, {"p50": 9.0, "failed": 1}, {"p50": 2.0, "failed": 0}])
    {'p50': 2.0, 'failed': 2}
    >>> middle([{"cpu_us": {"proxy": 8.0}}, {"cpu_us": {"proxy": 10.0, "replica": 2.0}}])
    {'cpu_us': {'proxy': 9.0, 'replica': 2.0}}
    """
    all_of: dict[str, list[Any]] = {}
    for figures in rounds:
        for name, value in figures.items():
            all_of.setdefault(name, []).append(value)
    return {name: _middle(name, values) for name, values in all_of.items()}


def _middle(name: str, values: list[Any]) -> Any:
    if isinstance(values[0], Mapping):
        return middle(values)
    return sum(values) if name == "failed" else median(values)


def ratio(
    ours: Mapping[str, Figures], theirs: Iterable[Mapping[str, Figures]], of: str, to: str = ""
) -> float | None:
    """The median over the rounds of ours / the largest of theirs; None if they share no round.

    Rounds go by their keys. `of` is the figure above the line, `to` the one below it, if that is another.

    >>> ours = {"a": {"rate": 300.0}, "b": {"rate": 200.0}, "c": {"rate": 90.0}}
    >>> ratio(ours, [{"a": {"rate": 100.0}, "b": {"rate": 100.0}}], "rate")
    2.5
    >>> ratio(ours, [{"x": {"rate": 100.0}}], "rate") is None
    True
    >>> ratio({"a": {"p99": 6.0, "p50": 4.0}}, [{"a": {"p99": 6.0, "p50": 4.0}}], "p99", "p50")
    1.5
    """
    sides = list(theirs)
    found = []
    for key, figures in ours.items():
        below = [side[key].get(to or of, 0.0) for side in sides if key in side]
        if of in figures and len(below) == len(sides) and any(below):
            found.append(figures[of] / max(below))
    return median(found) if found else None


def spread(rounds: Iterable[Figures], of: str) -> float:
    """(largest - smallest) / median of one figure: how much the rounds disagree.

    >>> spread([{"rate": 90.0}, {"rate": 100.0}, {"rate": 120.0}], "rate")
    0.3
    """
    values = [figures[of] for figures in rounds if of in figures]
    return (max(values) - min(values)) / median(values) if values and median(values) else 0.0
