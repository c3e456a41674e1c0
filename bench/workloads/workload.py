"""What a workload is: how it is measured, and how its figures are shown. The workloads themselves are beside this."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .session import Session


class Column(NamedTuple):
    """One column of a table: a figure of a case, divided by `per` and formatted.

    form   a format; "ratio": headgate's figure over the row's, in the same rounds; "parts": each part of the figure
    """

    heading: str
    case: str
    figure: str
    form: str = ",.0f"
    per: float = 1.0


class Table(NamedTuple):
    """Contenders by columns, those with most of the first column on top, or least if `least_first`."""

    title: str
    columns: tuple[Column, ...]
    least_first: bool = False


class Row(NamedTuple):
    """A figure of a Sheet; as in Column."""

    heading: str
    figure: str
    form: str
    per: float


class Sheet(NamedTuple):
    """Figures by cases, of one contender."""

    title: str
    contender: str
    cases: tuple[str, ...]
    rows: tuple[Row, ...]


class Bars(NamedTuple):
    """A bar per contender, one below the other. `log`: a logarithmic scale, where peers are far apart."""

    file: str
    title: str
    unit: str
    case: str
    figure: str
    per: float = 1.0
    log: bool = False


class Parts(NamedTuple):
    """As Bars, of a figure with parts (CPU time by process), which are stacked."""

    file: str
    title: str
    unit: str
    case: str
    figure: str


class Lines(NamedTuple):
    """A line per contender through the cases, whose names begin with a number: the x axis.

    `linear` draws what the first point would give if all grew with x.
    """

    file: str
    title: str
    x: str
    unit: str
    cases: tuple[str, ...]
    figure: str
    per: float = 1.0
    linear: bool = False


class Curves(NamedTuple):
    """Latency by percentile, a line per contender, from the figure's percentiles."""

    file: str
    title: str
    case: str
    figure: str = "curve_us"


Plot = Bars | Parts | Lines | Curves


class Workload(NamedTuple):
    """One of W1 to W10. `measure` adds its figures to the session; `about` says what is done, in sentences."""

    id: str
    title: str
    about: str
    measure: Callable[[Session], None]
    tables: tuple[Table | Sheet, ...]
    plots: tuple[Plot, ...] = ()
