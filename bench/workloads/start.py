"""W6: from nothing to the first answer, what then runs, and how long it takes to be gone."""

from __future__ import annotations

import time

import processes
import servers
from figures import Figures

from .closed_loop import POSTED
from .contest import Contender, of_all_peers
from .session import Session
from .workload import Bars, Column, Table, Workload

CASE = "one start"
SETTLE_S = 0.5
JOBS = {"json": ""}


def measure(session: Session) -> None:
    """One start after another: nothing else runs meanwhile."""
    contenders = of_all_peers(session, "W6", JOBS, otherwise=POSTED)
    for number in range(0 if session.options.quick else -1, session.options.rounds):
        for contender in list(contenders):
            try:
                found = start_and_stop(contender)
            except servers.NoServer as error:
                session.add_absent("W6", contender.name, str(error))
                contenders.remove(contender)
                continue
            session.note_versions(contender.peer)
            if number >= 0:  # the first start of all reads files that later ones find in memory
                session.add("W6", CASE, contender.name, number, found)


def start_and_stop(contender: Contender) -> Figures:
    server = servers.spawn(contender.peer, contender.job)
    stop_s = 0.0
    try:
        server.wait_until_it_answers()
        time.sleep(SETTLE_S)
        sizes = processes.pss_mb(pid for pid, _ in server.processes())
    finally:
        stop_s = server.stop()
    return {
        "first_answer_s": server.first_answer_s,
        "processes": len(sizes),
        "pss_mb": sum(sizes.values()),
        "stop_s": stop_s,
        "failed": len(server.left),
    }


ABOUT = """
The server of W1: the time from its spawn to the first right answer, then after 0.5 s its processes and the sum of
their proportional set sizes (PSS), then the time from SIGINT until none of them lives. Files are in the page cache.
"""

W6 = Workload(
    "W6",
    "start, memory, stop",
    ABOUT,
    measure,
    (
        Table(
            "",
            (
                Column("first answer s", CASE, "first_answer_s", ".3f"),
                Column("processes", CASE, "processes", ".0f"),
                Column("PSS MB", CASE, "pss_mb", ".1f"),
                Column("stop s", CASE, "stop_s", ".3f"),
                Column("had to be killed", CASE, "failed", ".0f"),
            ),
            least_first=True,
        ),
    ),
    (
        Bars("first-answer", "First answer after the spawn", "s", CASE, "first_answer_s", log=True),
        Bars("memory", "Memory of all processes (PSS)", "MB", CASE, "pss_mb", log=True),
    ),
)
