"""The plots of the report, as SVG that does not change unless its figures do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from record import Record
from workloads.workload import Bars, Curves, Lines, Parts, Plot

matplotlib.use("Agg")
matplotlib.rcParams.update(
    {
        "svg.hashsalt": "headgate",
        "svg.fonttype": "none",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)

from matplotlib import pyplot  # noqa: E402 - the settings above come first
from matplotlib.ticker import FuncFormatter, NullFormatter  # noqa: E402

OURS, THEIRS = "#1f5fa8", "#b9c2cc"
#: Of lines: headgate's variants on other engines or with other limits, and the peers.
OURS_TOO = ("#5b9bd5", "#274b73")
OTHERS = ("#d1495b", "#e2963c", "#3a9d6e", "#8d6bb8", "#8a6a4f", "#c46fa9", "#7f7f7f", "#a3a02f", "#2f9aa8", "#333333")
DASHES = ("-", "--", ":", "-.")
WIDTH, BAR = 7.2, 0.27


def draw(record: Record, workload: str, plot: Plot, folder: Path) -> bool:
    """Write `<plot.file>.svg`; False if there are no figures for it."""
    figure, axes = pyplot.subplots(layout="constrained")
    try:
        match plot:
            case Bars():
                drawn = bars(record, workload, plot, figure, axes)
            case Parts():
                drawn = stacks(record, workload, plot, figure, axes)
            case Lines():
                drawn = lines(record, workload, plot, figure, axes)
            case Curves():
                drawn = curves(record, workload, plot, figure, axes)
        if drawn:
            axes.set_title(plot.title, loc="left")
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / f"{plot.file}.svg", metadata={"Date": None})
        return drawn
    finally:
        pyplot.close(figure)


def values_of(record: Record, workload: str, case: str, figure: str) -> dict[str, Any]:
    """contender -> the median"""
    middles = {name: record.middle(workload, case, name) for name in record.contenders(workload, [case])}
    return {name: middle[figure] for name, middle in middles.items() if figure in middle}


def rows_of(figure: Any, axes: Any, names: Sequence[str]) -> None:
    figure.set_size_inches(WIDTH, 0.9 + BAR * len(names))
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e6e6e6")
    axes.tick_params(axis="y", length=0)


def bars(record: Record, workload: str, plot: Bars, figure: Any, axes: Any) -> bool:
    found = values_of(record, workload, plot.case, plot.figure)
    values = {name: found[name] / plot.per for name in sorted(found, key=lambda name: -found[name])}
    if not values:
        return False
    rows_of(figure, axes, list(values))
    colours = [OURS if is_ours(name) else THEIRS for name in values]
    drawn = axes.barh(range(len(values)), list(values.values()), color=colours)
    axes.bar_label(drawn, [short(value) for value in values.values()], padding=3, fontsize=8)
    if plot.log:
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(min(values.values()) / 3, max(values.values()) * 2)
    else:
        axes.margins(x=0.12)
    axes.set_xlabel(plot.unit)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return True


def stacks(record: Record, workload: str, plot: Parts, figure: Any, axes: Any) -> bool:
    found = values_of(record, workload, plot.case, plot.figure)
    names = sorted(found, key=lambda name: sum(found[name].values()))
    if not names:
        return False
    rows_of(figure, axes, names)
    for row, name in enumerate(names):
        left = 0.0
        largest_first = sorted(found[name].values(), reverse=True)
        for index, us in enumerate(largest_first):
            shade = OURS if is_ours(name) else THEIRS
            axes.barh(row, us, left=left, color=shade, alpha=1.0 - 0.3 * min(index, 2), edgecolor="white")
            left += us
        axes.text(left, row, f" {left:,.0f}", va="center", fontsize=8)
    axes.set_xscale("symlog", linthresh=20)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{plot.unit}; linear to 20, then logarithmic; one shade per process")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    return True


def lines(record: Record, workload: str, plot: Lines, figure: Any, axes: Any) -> bool:
    present = [case for case in plot.cases if case in record.cases(workload)]
    names = record.contenders(workload, present)
    if len(present) < 2:
        return False
    figure.set_size_inches(WIDTH, 4.2)
    styles = styles_of(names)
    for name in names:
        points = [
            (first_number(case), middle[plot.figure] / plot.per)
            for case in present
            if plot.figure in (middle := record.middle(workload, case, name))
        ]
        axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **styles[name])
        if plot.linear:
            (x0, y0), (x1, _) = points[0], points[-1]
            axes.plot([x0, x1], [y0, y0 * x1 / x0], color="#888888", linestyle=":", label="in proportion to one")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks([first_number(case) for case in present])
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.set_minor_formatter(NullFormatter())
    finish(axes, plot.x, plot.unit, many=len(names) > 1 or plot.linear)
    return True


def curves(record: Record, workload: str, plot: Curves, figure: Any, axes: Any) -> bool:
    """The x axis is 1 / (1 - percentile): each nine takes as much room as the one before."""
    found = values_of(record, workload, plot.case, plot.figure)
    if not found:
        return False
    figure.set_size_inches(WIDTH, 4.2)
    styles = styles_of(list(found))
    for name, curve in found.items():
        points = [
            (100.0 / (100.0 - float(percent)), us / 1e3) for percent, us in curve.items() if float(percent) <= 99.99
        ]
        axes.plot(*zip(*points, strict=True), label=name, **styles[name])
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = {1: "0", 2: "50", 10: "90", 100: "99", 1000: "99.9", 10000: "99.99"}
    axes.set_xticks(list(ticks), list(ticks.values()))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    finish(axes, "percentile", "ms", many=True)
    return True


def finish(axes: Any, x: str, y: str, *, many: bool) -> None:
    axes.grid(color="#e6e6e6")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if many:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def styles_of(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour per peer, a dash per variant of it; ours are wide.

    >>> styles = styles_of(["headgate", "floor", "headgate (POST)"])
    >>> styles["headgate"] == {"color": OURS, "linewidth": 2.0, "linestyle": "-"}
    True
    >>> styles["headgate (POST)"]["linestyle"], styles["floor"]["color"] == OURS
    ('--', False)
    """
    variants: dict[str, int] = {}
    colours: dict[str, Any] = {}
    found = {}
    for name in names:
        peer = name.partition(" (")[0]
        if is_ours(peer):
            colours[peer] = OURS if peer == "headgate" else OURS_TOO[len(colours) % len(OURS_TOO)]
        else:
            colours.setdefault(peer, OTHERS[len(colours) % len(OTHERS)])
        dash = DASHES[variants.setdefault(peer, 0) % len(DASHES)]
        variants[peer] += 1
        found[name] = {"color": colours[peer], "linewidth": 2.0 if is_ours(peer) else 1.0, "linestyle": dash}
    return found


def is_ours(name: str) -> bool:
    return name.startswith(("headgate", "handle."))


def first_number(case: str) -> int:
    """
    >>> first_number("1,000 routes")
    1000
    """
    found = re.match(r"[\d,]+", case)
    if found is None:
        raise ValueError(f"the case {case!r} of a line does not begin with a number")
    return int(found[0].replace(",", ""))


def short(value: float) -> str:
    """
    >>> short(126000.0), short(4400.0), short(0.31), short(0.0)
    ('126,000', '4,400', '0.31', '0')
    """
    return f"{value:,.0f}" if value >= 100 or value == 0 else f"{value:.2g}"
