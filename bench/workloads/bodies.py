"""W4: bodies of 1 MiB, in, and in and out."""

from __future__ import annotations

from .closed_loop import in_detail
from .contest import closed_loop, contest, of_all_peers
from .session import Session
from .workload import Bars, Table, Workload

CONNECTIONS = 8
IN = "1 MiB in"
IN_AND_OUT = "1 MiB in and out"


def measure(session: Session) -> None:
    takers = of_all_peers(session, "W4", {"length": "", "length_view": "view"})
    contest(session, "W4", takers, {IN: closed_loop(CONNECTIONS)})
    contest(session, "W4", of_all_peers(session, "W4", {"echo": ""}), {IN_AND_OUT: closed_loop(CONNECTIONS)})


ABOUT = """
`POST /length` of 1 MiB, answered with its length (headgate: of `request.data`, and of `request.view`, which copies
nothing); `POST /echo`, answered with the same bytes. 8 connections.
"""

W4 = Workload(
    "W4",
    "bodies of 1 MiB",
    ABOUT,
    measure,
    (Table(IN, in_detail(IN)), Table(IN_AND_OUT, in_detail(IN_AND_OUT))),
    (
        Bars("body-in", "1 MiB in, its length out, 8 connections", "requests/s", IN, "requests_per_s"),
        Bars("body-echo", "1 MiB in and out, 8 connections", "requests/s", IN_AND_OUT, "requests_per_s"),
    ),
)
