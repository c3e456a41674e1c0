"""Servers side by side: each is measured in turn, round after round, A B C A B C.

All servers run for the whole contest, as far as they are quiet when nobody asks them. One that is not (Ray's
daemons, busy pollers) would slow the others down: it is started for its own turn of each round, and ended after it.

Whoever cannot be started, or fails while it is measured, is absent with its reason; the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import peers
import processes
import servers
import wrk
from figures import Figures

from .program import MeasureFailed
from .session import Session

#: Share of one core that a server may use while nobody asks it, and how long it is watched.
QUIET = 0.02
WATCHES = 3  # what has just started may have to settle
WATCH_S, QUICK_WATCH_S = 1.0, 0.3
WARM_UP_S = 1

#: Takes the figures of a server, in so many seconds.
Measure = Callable[[servers.Server, int], Figures]


class Contender(NamedTuple):
    """One side of a contest: a peer that does a job. `variant` tells it from the same peer's others, in its name;
    `case` puts its figures into another case than theirs.
    """

    peer: str
    job: str
    variant: str = ""
    replicas: int = 1
    routes: int = 1
    case: str = ""

    @property
    def name(self) -> str:
        return f"{self.peer} ({self.variant})" if self.variant else self.peer


def of_all_peers(
    session: Session, workload: str, jobs: Mapping[str, str], *, otherwise: Mapping[str, str] = {}, replicas: int = 1
) -> list[Contender]:
    """Every peer that takes part, once for each of the jobs that it does: job -> the variant's name.

    A peer that does none of them does those of `otherwise`; one that does none of these either is absent.
    """
    found = []
    for name, peer in peers.PEERS.items():
        if not session.wants(workload, name):
            continue
        wanted = jobs if any(job in peer.jobs for job in jobs) else otherwise
        does = [Contender(name, job, variant, replicas) for job, variant in wanted.items() if job in peer.jobs]
        if not does:
            session.add_absent(workload, name, peer.cannot[next(iter(jobs))])
        found += does
    return found


def contest(
    session: Session, workload: str, contenders: Iterable[Contender], cases: Mapping[str, Measure]
) -> None:
    """Measure every case with every contender, as often as the session has rounds.

    A contender with a `case` of its own has its figures under that name.
    """
    with ExitStack() as running:
        quiet: dict[Contender, servers.Server] = {}
        restless = []
        for contender in contenders:
            with ExitStack() as starting:
                server = started(session, workload, contender, cases, starting)
                if server is None:
                    continue
                if is_quiet(server, QUICK_WATCH_S if session.options.quick else WATCH_S):
                    quiet[contender] = server
                    running.push(starting.pop_all())
                else:
                    restless.append(contender)
        if restless:
            names = ", ".join(contender.name for contender in restless)
            session.say(f"{workload} not quiet when idle, so each is started for its own turn: {names}")
        for number in range(session.options.rounds):
            for case, measure in cases.items():
                for contender, server in list(quiet.items()):
                    if not sampled(session, workload, case, contender, number, server, measure):
                        del quiet[contender]
            for contender in list(restless):
                if not own_turn(session, workload, contender, number, cases):
                    restless.remove(contender)


def started(
    session: Session, workload: str, contender: Contender, cases: Mapping[str, Measure], stack: ExitStack
) -> servers.Server | None:
    """A server that is warm, in the stack; None, and absent, if that failed."""
    try:
        server = stack.enter_context(
            servers.running(
                contender.peer, contender.job, replicas=contender.replicas, routes=contender.routes
            )
        )
        session.note_versions(contender.peer)
        list(cases.values())[-1](server, WARM_UP_S)
    except (servers.NoServer, MeasureFailed, wrk.WrkFailed, OSError) as error:
        session.add_absent(workload, contender.name, str(error))
        return None
    return server


def sampled(
    session: Session, workload: str, case: str, contender: Contender, number: int, server: servers.Server,
    measure: Measure,
) -> bool:  # fmt: skip
    """Whether the figures could be taken; who failed is absent."""
    try:
        figures = measure(server, session.options.seconds)
        session.add(workload, contender.case or case, contender.name, number, figures)
    except (MeasureFailed, wrk.WrkFailed, OSError) as error:
        session.add_absent(workload, contender.name, f"{case}: {error}")
        return False
    return True


def own_turn(
    session: Session, workload: str, contender: Contender, number: int, cases: Mapping[str, Measure]
) -> bool:
    with ExitStack() as stack:
        server = started(session, workload, contender, cases, stack)
        return server is not None and all(
            sampled(session, workload, case, contender, number, server, measure) for case, measure in cases.items()
        )


def is_quiet(server: servers.Server, seconds: float) -> bool:
    """Whether it leaves the processor alone while nobody asks it; one tick of the clock says nothing."""
    for _ in range(WATCHES):
        before = cpu_us(server)
        time.sleep(seconds)
        spent = sum(cpu_us(server).values()) - sum(before.values())
        if spent <= max(QUIET * seconds * 1e6, processes.TICK_US):
            return True
    return False


def cpu_us(server: servers.Server) -> dict[tuple[int, str], float]:
    """CPU time so far of each process of a server."""
    return processes.cpu_us(pid for pid, _ in server.processes())


def closed_loop(connections: int) -> Measure:
    """Measures with wrk: the next request goes out when the last one is answered."""

    def measure(server: servers.Server, seconds: int) -> Figures:
        before = cpu_us(server)
        load, wrk_cpu = wrk.run(server.url, server.request, connections, seconds)
        spent = processes.cpu_per_request(before, cpu_us(server), load.requests)
        return {
            "requests_per_s": load.requests_per_s,
            "p50_us": load.p50_us,
            "p99_us": load.p99_us,
            "failed": load.failed,
            "cpu_us": sum(spent.values()),
            "cpu_by_process": spent,
            "wrk_cpu": wrk_cpu,
        }

    return measure
