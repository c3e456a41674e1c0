"""W5: calls from Python, by headgate's handles and of Ray's actors; and arrays of 100 MB."""

from __future__ import annotations

from collections.abc import Mapping

from programs import calling

from .program import MeasureFailed, run_program
from .session import Session
from .workload import Bars, Column, Table, Workload

#: Program -> the peer that says whether it takes part, and how long it may take besides its cases.
PROGRAMS = {"programs.handle_calls": ("headgate", 60.0), "programs.ray_calls": ("ray-serve", 240.0)}
#: Each has at most so many cases, and warms up.
CASES = 20
CALLS = (calling.ONE, calling.MANY, calling.ONE_AWAITED, calling.MANY_AWAITED)
ARRAYS = ("100 MB in", "100 MB out", "100 MB in and out")
#: A Ray of this program's own, which nobody else reaches.
VARIABLES = {"RAY_AUTH_MODE": "disabled"}


def measure(session: Session) -> None:
    """The programs take turns, each with processes of its own: Ray is not quiet while it has nothing to do."""
    programs = {name: slack for name, (peer, slack) in PROGRAMS.items() if session.wants("W5", peer)}
    for peer, _ in PROGRAMS.values():
        if session.wants("W5", peer):
            session.note_versions(peer)
    for number in range(session.options.rounds):
        for program, slack in list(programs.items()):
            seconds = session.options.seconds
            try:
                found = run_program(["-m", program, str(seconds)], slack + CASES * (seconds + 1), VARIABLES)
            except MeasureFailed as error:
                session.add_absent("W5", program, str(error))
                del programs[program]
                continue
            add(session, number, found)


def add(session: Session, number: int, found: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    for contender, cases in found.items():
        for case, figures in cases.items():
            session.add("W5", case, contender, number, figures)


ABOUT = """
Calls of an `async def` handler in another process with a small integer, by a handle and of a Ray actor (in the same
run, in turns): from one thread, from 64 threads, awaited on one event loop. And an array of 100 MB, whose time is
also given in copies: one `numpy.copyto` of the same bytes inside one process, into memory that is there, measured
just before.
"""

W5 = Workload(
    "W5",
    "handles",
    ABOUT,
    measure,
    (
        Table("calls/s", tuple(Column(case, case, "calls_per_s") for case in CALLS)),
        Table(
            "CPU µs per call, all processes",
            tuple(Column(case, case, "cpu_us", ".0f") for case in CALLS),
            least_first=True,
        ),
        Table(
            "100 MB array",
            tuple(
                column
                for case in ARRAYS
                for column in (
                    Column(f"{case[7:]}, ms", case, "took_ms", ".0f"),
                    Column("copies", case, "memcpys", ".2f"),
                )
            ),
            least_first=True,
        ),
    ),
    (
        Bars("handles", calling.MANY_AWAITED, "calls/s", calling.MANY_AWAITED, "calls_per_s", log=True),
        Bars("handles-threads", calling.MANY, "calls/s", calling.MANY, "calls_per_s", log=True),
    ),
)  # fmt: skip
