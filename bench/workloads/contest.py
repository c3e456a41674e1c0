"""Servers side by side: each is measured in turn, round after round, A B C A B C.

All servers run for the whole contest. One that is not quiet when nobody asks it (Ray's daemons, busy pollers) would
slow the others down: it is frozen (SIGSTOP) while it is not its turn.

Whoever cannot be started, or fails while it is measured, is absent with its reason; the others go on.
"""

from __future__ import annotations

import http.client
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
WATCH_S = 0.5
WARM_UP_S = 1
FAILURES = (servers.NoServer, MeasureFailed, wrk.WrkFailed, OSError, http.client.HTTPException)

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


class Side(NamedTuple):
    """A contender and its server, which answers. `restless`: it is frozen while it is not its turn."""

    contender: Contender
    server: servers.Server
    restless: bool


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


def fastest(contenders: Iterable[Contender]) -> list[Contender]:
    """Of headgate all; of a peer whose plain handlers take threads of a pool only its `async def` ones.

    >>> sides = [Contender(name, job) for name in ("headgate", "starlette") for job in ("json", "json_async")]
    >>> [f"{side.peer} {side.job}" for side in fastest([*sides, Contender("floor", "json")])]
    ['headgate json', 'headgate json_async', 'starlette json_async', 'floor json']
    """
    found = list(contenders)
    others = {each.peer for each in found if each.job == "json_async" and not each.peer.startswith("headgate")}
    return [each for each in found if each.job != "json" or each.peer not in others]


def contest(
    session: Session, workload: str, contenders: Iterable[Contender], cases: Mapping[str, Measure]
) -> None:
    """Measure every case with every contender, as often as the session has rounds.

    A contender with a `case` of its own has its figures under that name.
    """
    with ExitStack() as stack:
        sides = [side for each in contenders if (side := started(session, workload, each, cases, stack))]
        stack.callback(interrupt, [side.server for side in sides])
        if restless := ", ".join(side.contender.name for side in sides if side.restless):
            session.say(f"{workload} not quiet when idle, so frozen while it is not their turn: {restless}")
        for number in range(session.options.rounds):
            for case, measure in cases.items():
                for side in [each for each in sides if not each.restless]:
                    if not sampled(session, workload, number, side, {case: measure}):
                        sides.remove(side)
            for side in [each for each in sides if each.restless]:
                if not own_turn(session, workload, number, side, cases):
                    sides.remove(side)


def interrupt(running: Iterable[servers.Server]) -> None:
    """All of them before the first is waited for, since each takes its time."""
    for server in running:
        server.interrupt()


def started(
    session: Session, workload: str, contender: Contender, cases: Mapping[str, Measure], stack: ExitStack
) -> Side | None:
    """A server in the stack, warm unless time is short, frozen if it is restless; None, and absent, if that failed."""
    try:
        server = stack.enter_context(
            servers.running(
                contender.peer, contender.job, replicas=contender.replicas, routes=contender.routes
            )
        )
        session.note_versions(contender.peer)
        if not session.options.quick:
            warm_up(server, cases)
    except FAILURES as error:
        session.add_absent(workload, contender.name, str(error))
        return None
    side = Side(contender, server, not is_quiet(server))
    if side.restless:
        server.freeze()
    return side


def own_turn(session: Session, workload: str, number: int, side: Side, cases: Mapping[str, Measure]) -> bool:
    """All cases of a server that is frozen before and after; it may first do what it missed meanwhile."""
    side.server.thaw()
    try:
        warm_up(side.server, cases)
    except FAILURES as error:
        session.add_absent(workload, side.contender.name, f"after a pause: {error}")
        return False
    taken = sampled(session, workload, number, side, cases)
    side.server.freeze()
    return taken


def warm_up(server: servers.Server, cases: Mapping[str, Measure]) -> None:
    next(iter(cases.values()))(server, WARM_UP_S)
    settle(server)


def settle(server: servers.Server) -> None:
    """Until it has answered what the last load left behind: a slow one would still be at it in its next case."""
    servers.ask(server.port, server.request)


def sampled(session: Session, workload: str, number: int, side: Side, cases: Mapping[str, Measure]) -> bool:
    """Whether the figures could be taken; who failed is absent."""
    for case, measure in cases.items():
        try:
            figures = measure(side.server, session.options.seconds)
            settle(side.server)
        except FAILURES as error:
            session.add_absent(workload, side.contender.name, f"{case}: {error}")
            return False
        session.add(workload, side.contender.case or case, side.contender.name, number, figures)
    return True


def is_quiet(server: servers.Server) -> bool:
    """Whether it leaves the processor alone while nobody asks it; one tick of the clock says nothing."""
    for _ in range(WATCHES):
        before = cpu_us(server)
        time.sleep(WATCH_S)
        spent = sum(cpu_us(server).values()) - sum(before.values())
        if spent <= max(QUIET * WATCH_S * 1e6, processes.TICK_US):
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
