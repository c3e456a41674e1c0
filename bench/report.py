"""Figures for people: tables, also for the terminal, and docs/performance.md, whose hand-written parts stay.

In that file everything between `<!-- NAME -->` and `<!-- /NAME -->` is written here: NAME is `machine`, `peers`,
`targets`, or a workload. The plots are plots.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import figures
import targets
from peers import PEERS
from record import Record
from workloads import WORKLOADS
from workloads.workload import Column, Sheet, Table, Workload

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "performance.md"
PLOTS = DOCS / "performance"
#: The record that the page was made from.
PUBLISHED = DOCS / "performance.json"
OURS = "headgate"
NOTHING = "–"
NUMBER = re.compile(r"|–|-?[\d,.]+( [×µa-zA-Z]+)?")


class NoMarker(Exception):
    """The page lacks the place for a part of the report."""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns of numbers to the right, others to the left.

    >>> print(table(["who", "requests/s"], [["headgate", "9"]]))
    | who      | requests/s |
    |:---------|-----------:|
    | headgate |          9 |
    """
    body = [list(row) for row in rows]
    columns = []
    for heading, *cells in zip(head, *body, strict=True):
        width = max(map(len, [heading, *cells]))
        if all(NUMBER.fullmatch(each) for each in cells):
            columns.append([heading.rjust(width), "-" * width + ":", *(each.rjust(width) for each in cells)])
        else:
            columns.append([heading.ljust(width), ":" + "-" * width, *(each.ljust(width) for each in cells)])
    lines = list(zip(*columns, strict=True))
    shown = ["| " + " | ".join(line) + " |" for line in lines]
    shown[1] = "|" + "|".join(each + "-" if each[0] == ":" else "-" + each for each in lines[1]) + "|"
    return "\n".join(shown)


def cell(record: Record, workload: str, contender: str, column: Column) -> str:
    """One figure of one contender, formatted; a dash if there is none."""
    rounds = record.rounds(workload, column.case, contender)
    value = figures.middle(rounds.values()).get(column.figure)
    if value is None:
        return NOTHING
    if column.form == "parts":
        return parts(value)
    if column.form == "ratio":
        found = figures.ratio(record.rounds(workload, column.case, OURS), [rounds], column.figure)
        return NOTHING if found is None else f"{found:.2f} ×"
    return format(value / column.per, column.form)


def parts(value: dict[str, float]) -> str:
    """What is worth a word.

    >>> parts({"headgate-rep": 2.2, "headgate-proxy": 8.71, "python": 0.01})
    'headgate-proxy 8.7, headgate-rep 2.2'
    """
    largest = sorted(value.items(), key=lambda each: -each[1])
    return ", ".join(f"{name} {us:.1f}" for name, us in largest if us >= 0.05) or NOTHING


def in_order(record: Record, workload: str, shown: Table) -> list[str]:
    """Who is in the table, by its first column."""
    names = record.contenders(workload, {column.case for column in shown.columns})
    first = shown.columns[0]

    def key(name: str) -> float:
        value = record.middle(workload, first.case, name).get(first.figure)
        if value is None:
            return float("inf")
        return float(value) if shown.least_first else -float(value)

    return sorted(names, key=key)


def rendered(record: Record, workload: str, shown: Table | Sheet) -> str:
    """A table with its title, or "" if there is nothing in it."""
    if isinstance(shown, Sheet):
        return rendered_sheet(record, workload, shown)
    present = set(record.cases(workload))
    columns = [column for column in shown.columns if column.case in present]
    names = in_order(record, workload, shown._replace(columns=tuple(columns))) if columns else []
    if not names:
        return ""
    rows = [[name, *(cell(record, workload, name, column) for column in columns)] for name in names]
    text = table(["", *(column.heading for column in columns)], rows)
    return "\n\n".join(part for part in (titled(shown.title), text, remarks(record, workload, columns, names)) if part)


def rendered_sheet(record: Record, workload: str, shown: Sheet) -> str:
    present = set(record.cases(workload))
    cases = [case for case in shown.cases if case in present]
    rows = [
        [row.heading, *(cell(record, workload, shown.contender, Column("", case, *row[1:])) for case in cases)]
        for row in shown.rows
    ]
    return f"{titled(shown.title)}\n\n{table(['', *cases], rows)}" if cases else ""


def titled(title: str) -> str:
    return f"**{title[0].upper()}{title[1:]}**" if title else ""


def remarks(record: Record, workload: str, columns: Sequence[Column], names: Sequence[str]) -> str:
    """How far the rounds of the first column differ, and who failed."""
    first = columns[0]
    spreads = [
        figures.spread(rounds.values(), first.figure)
        for name in names
        if len(rounds := record.rounds(workload, first.case, name)) > 1
    ]
    found = []
    if spreads:
        middle = sorted(spreads)[len(spreads) // 2]
        found.append(f"Rounds of one side differ by {middle:.0%} (median of all sides), at most by {max(spreads):.0%}.")
    for name in names:
        for case in dict.fromkeys(column.case for column in columns):
            if failed := record.middle(workload, case, name).get("failed"):
                found.append(f"{name}, {case}: **{failed} failed**; its figures mean little.")
    return "\n".join(found)


def section(record: Record, workload: Workload, plots: Sequence[str] = ()) -> str:
    """All that there is to say of a workload: what is done, its tables and plots, and who is absent."""
    tables = [text for shown in workload.tables if (text := rendered(record, workload.id, shown))]
    images = [f"![{file}](performance/{file}.svg)" for file in plots]
    absent = [f"- {name}: {one_line(why)}" for name, why in record.absent(workload.id).items()]
    parts_of_it = [workload.about.strip(), *(tables or ["Not measured yet."]), "\n".join(images)]
    if absent:
        parts_of_it.append("Absent:\n" + "\n".join(absent))
    return "\n\n".join(part for part in parts_of_it if part)


def one_line(text: str) -> str:
    """The first line of a reason, without places of this machine.

    >>> one_line("it ended with 1: /home/me/x/serve.py: no\\nmore")
    'it ended with 1: …/serve.py: no'
    """
    return re.sub(r"(/[\w.@+-]+)+/", "…/", text.partition("\n")[0])[:200]


def targets_table(record: Record, *, only_measured: bool = False) -> str:
    rows = []
    for target in targets.TARGETS:
        value = targets.reached(record, target)
        if value is None and only_measured:
            continue
        shown = NOTHING if value is None else f"{value:.3g}{target.suffix}"
        rows.append([target.figure.workload, target.text, target.wanted, shown, targets.verdict(target, value)])
    if not rows:
        return "None of them was measured."
    return table(["", "what", "wanted", "measured", ""], rows)


def machine_table(record: Record) -> str:
    """A line per run, and the runs' options."""
    names = ["at", "cpu", "cores", "memory_gib", "kernel", "python", "yardstick_us", "load_before"]
    rows = [
        [*(str(run["machine"].get(name, "")) for name in names), f"{run['rounds']} × {run['seconds']} s", run["code"]]
        for run in record.data["runs"].values()
    ]
    return table(
        [
            "run", "processor", "cores", "GiB", "Linux", "Python", "yardstick µs", "load before", "rounds",
            "headgate's sources",
        ],
        rows,
    )  # fmt: skip


def peers_table(record: Record) -> str:
    versions: dict[str, Any] = {}
    for run in record.data["runs"].values():
        versions |= run.get("versions", {})
    rows = [
        [name, peer.title, ", ".join(f"{dist} {number}" for dist, number in versions[name].items()), peer.note]
        for name, peer in PEERS.items()
        if name in versions
    ]
    if not rows:
        return "None measured yet."
    return table(["name", "what", "versions", "to know"], rows)


def between(text: str, name: str, content: str) -> str:
    """The text with that content between the markers of that name.

    >>> between("a <!-- W1 -->old<!-- /W1 --> b", "W1", "new")
    'a <!-- W1 -->\\n\\nnew\\n\\n<!-- /W1 --> b'
    """
    pattern = re.compile(rf"(<!-- {name} -->).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(text):
        raise NoMarker(f"{PAGE.name} has no place for {name}: it takes <!-- {name} --> and <!-- /{name} -->")
    return pattern.sub(lambda match: f"{match[1]}\n\n{content}\n\n{match[2]}", text)


def write(record: Record) -> None:
    """The page, its plots and its record."""
    import plots

    text = PAGE.read_text()
    text = between(text, "machine", machine_table(record))
    text = between(text, "peers", peers_table(record))
    text = between(text, "targets", targets_table(record))
    for workload in WORKLOADS.values():
        drawn = [plot.file for plot in workload.plots if plots.draw(record, workload.id, plot, PLOTS)]
        text = between(text, workload.id, section(record, workload, drawn))
    PAGE.write_text(text)
    record.write(PUBLISHED)
