"""W10: headgate alone, as it grows: replicas, endpoints, backends, idle connections."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import processes
import servers
import wrk
from figures import Figures
from peers.jobs import JOBS, Request
from programs.replicas import HANDLER_S, SLOTS

from .contest import cpu_us
from .program import MeasureFailed, Program, program, run_client
from .session import Session
from .workload import Lines, Row, Sheet, Workload

NAME = "headgate"
REPLICAS = (1, 2, 4, 8, 16)
ENDPOINTS = (1, 10, 100, 1000)
#: A replica each, which is a process. The most of them only once, and where the memory suffices.
BACKENDS, MOST_BACKENDS = (1, 10, 100), 1000
REPLICA_MB, SPARE_MB = 8.0, 2000.0
PROXIES = (1, 2)
IDLE = 2000
#: A quick run takes the ends, and the endpoints once.
QUICK_REPLICAS, QUICK_ENDPOINTS = (1, 16), (1000,)
#: Who asks while something changes.
ASKING = 8
GROW_S = 600.0
FAILURES = (MeasureFailed, wrk.WrkFailed, servers.NoServer, OSError)


def replica_case(count: int) -> str:
    """
    >>> replica_case(1), replica_case(16)
    ('1 replica', '16 replicas')
    """
    return f"{count} replica{'s' if count > 1 else ''}"


def proxy_case(count: int) -> str:
    """
    >>> proxy_case(1), proxy_case(2)
    ('1 proxy', '2 proxies')
    """
    return "1 proxy" if count == 1 else f"{count} proxies"


def size_case(count: int, what: str) -> str:
    """
    >>> size_case(1, "endpoint"), size_case(1000, "endpoint")
    ('1 endpoint', '1,000 endpoints')
    """
    return f"{count:,} {what}{'s' if count > 1 else ''}"


def measure(session: Session) -> None:
    if not session.wants("W10", NAME):
        return
    session.note_versions(NAME)
    others = () if session.options.quick else (grow_backends, keep_idle, grow_proxies)
    for part in (grow_replicas, grow_endpoints, *others):
        try:
            part(session)
        except FAILURES as error:
            session.add_absent("W10", part.__name__, str(error))


def grow_replicas(session: Session) -> None:
    """All instances run at once; those that nobody asks do nothing."""
    ask = Request("GET", "/wait")
    with ExitStack() as stack:
        ports = {}
        for count in QUICK_REPLICAS if session.options.quick else REPLICAS:
            ports[count] = servers.free_port()
            stack.enter_context(program("replicas", count, ports[count]))
        for number in range(-1, session.options.rounds):
            for count, port in ports.items():
                seconds = session.options.seconds if number >= 0 else 1
                load, wrk_cpu = wrk.run(f"http://127.0.0.1:{port}{ask.path}", ask, SLOTS * count, seconds)
                if number >= 0:
                    at_most = count * SLOTS / HANDLER_S
                    found = {**load._asdict(), "share": load.requests_per_s / at_most, "wrk_cpu": wrk_cpu}
                    session.add("W10", replica_case(count), NAME, number, found)


def grow_endpoints(session: Session) -> None:
    quick = session.options.quick
    for number in range(1 if quick else session.options.rounds):
        port = servers.free_port()
        with program("growing", port) as growing:
            for count in QUICK_ENDPOINTS if quick else ENDPOINTS:
                found = growing.ask(GROW_S, endpoints=count)
                found |= publish(growing, port, session.options.seconds)
                session.add("W10", size_case(count, "endpoint"), NAME, number, found)


def publish(growing: Program, port: int, seconds: int) -> Figures:
    """Changes under load, and the same load while nothing changes."""
    calm = load_of(port, seconds)
    growing.tell(publish_for=seconds + 1.0)  # the load's process takes time to start
    changing = load_of(port, seconds)
    return {
        **growing.hear(seconds + 30.0),
        "calm_gap_ms": calm["longest_gap_ms"],
        "gap_ms": changing["longest_gap_ms"],
        "calm_p99_9_us": calm["p99_9_us"],
        "p99_9_us": changing["p99_9_us"],
        "failed": calm["failed"] + changing["failed"],
    }


def load_of(port: int, seconds: int) -> Figures:
    ask = Request("GET", "/answer")
    options = (f"--seconds={seconds}", f"--connections={ASKING}")
    return run_client("open_loop.py", f"http://127.0.0.1:{port}{ask.path}", ask, seconds + 30.0, *options)


def grow_backends(session: Session) -> None:
    for number in range(session.options.rounds):
        with program("growing", servers.free_port()) as growing:
            for count in (*BACKENDS, *most_backends(session, number)):
                found = growing.ask(GROW_S, backends=count)
                sizes = processes.pss_mb(growing.pids)
                found |= {**growing.ask(60.0, publish_for=1.0), "processes": len(sizes), "pss_mb": sum(sizes.values())}
                session.add("W10", size_case(count, "backend"), NAME, number, found)


def most_backends(session: Session, number: int) -> tuple[int, ...]:
    """That many in the last round, if there is room for them."""
    if number < session.options.rounds - 1:
        return ()
    needed, available = MOST_BACKENDS * REPLICA_MB + SPARE_MB, processes.available_mb()
    if available < needed:
        why = f"they take about {needed:,.0f} MB of memory, and {available:,.0f} were available"
        session.add_absent("W10", size_case(MOST_BACKENDS, "backend"), why)
        return ()
    return (MOST_BACKENDS,)


def keep_idle(session: Session) -> None:
    """One connection asks, beside none and beside many that were asked once and stay open."""
    with servers.running("headgate", "json") as server:
        for number in range(session.options.rounds):
            session.add("W10", "0 idle connections", NAME, number, beside_idle(server, session.options.seconds))
            with idle(server.port, IDLE):
                session.add(
                    "W10", f"{IDLE:,} idle connections", NAME, number, beside_idle(server, session.options.seconds)
                )


def grow_proxies(session: Session) -> None:
    """One and two on the same listener, in turns."""
    with ExitStack() as stack:
        sides = {}
        for count in PROXIES:
            port = servers.free_port()
            sides[count] = port, stack.enter_context(program("proxies", count, port))
        for number in range(-1, session.options.rounds):
            for count, (port, running) in sides.items():
                found = of_proxies(port, running, session.options.seconds if number >= 0 else 1)
                if number >= 0:
                    session.add("W10", proxy_case(count), NAME, number, found)


def of_proxies(port: int, running: Program, seconds: int) -> Figures:
    ask = JOBS["json"].request
    before = processes.cpu_us(running.pids)
    load, _ = wrk.run(f"http://127.0.0.1:{port}{ask.path}", ask, 64, seconds)
    spent = processes.cpu_per_request(before, processes.cpu_us(running.pids), load.requests)
    sizes = processes.pss_mb(running.pids)
    return {**load._asdict(), "cpu_us": sum(spent.values()), "cpu_by_process": spent, "pss_mb": sum(sizes.values())}


def beside_idle(server: servers.Server, seconds: int) -> Figures:
    before = cpu_us(server)
    time.sleep(1.0)
    idle_us = sum(cpu_us(server).values()) - sum(before.values())
    alone, _ = wrk.run(server.url, server.request, 1, seconds)
    many, _ = wrk.run(server.url, server.request, 64, seconds)
    return {
        "p50_us": alone.p50_us,
        "p99_us": alone.p99_us,
        "requests_per_s": many.requests_per_s,
        "pss_mb": sum(processes.pss_mb(pid for pid, _ in server.processes()).values()),
        "idle_cpu": idle_us / 1e6,
        "failed": alone.failed + many.failed,
    }


@contextmanager
def idle(port: int, count: int) -> Iterator[None]:
    """So many keep-alive connections, each answered once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count + 200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(count + 200, hard), hard))
    with ExitStack() as stack:
        for _ in range(count):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
            connection.sendall(b"GET /json HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            if not connection.recv(4096).startswith(b"HTTP/1.1 200 "):
                raise MeasureFailed("an idle connection got no answer")
        yield


REPLICA_CASES = tuple(map(replica_case, REPLICAS))
ENDPOINT_CASES = tuple(size_case(count, "endpoint") for count in ENDPOINTS)
BACKEND_CASES = tuple(size_case(count, "backend") for count in (*BACKENDS, MOST_BACKENDS))
PROXY_CASES = tuple(map(proxy_case, PROXIES))
IDLE_CASES = ("0 idle connections", f"{IDLE:,} idle connections")


def by_case(cases: tuple[str, ...], title: str, *rows: tuple[str, str, str, float]) -> Sheet:
    return Sheet(title, NAME, cases, tuple(Row(*row) for row in rows))


ABOUT = """
headgate alone. **Replicas** of 8 slots each with an `async def` handler of 5 ms, 8 connections per replica.
**Endpoints** on one backend, each with a typed route: what creating one costs at that size, the size of the
snapshot that every process gets, the time of `set_traffic`, which returns when the change is in force in every
process, and the longest time without an answer on 8 connections while changes come ten times a second, and while
none come. **Backends** with one replica each, which is a process; 16 are created at a time, but the last ten one after
another, and those are what creating one costs. 1,000 of them only in one round, where there is memory for as many
processes. **Idle connections** that were answered once. **Proxies** on one listener, which no option asks for: W1 with
64 connections.
"""

W10 = Workload(
    "W10",
    "growth",
    ABOUT,
    measure,
    (
        by_case(
            REPLICA_CASES, "replicas",
            ("requests/s", "requests_per_s", ",.0f", 1.0), ("of slots / 5 ms, %", "share", ".0f", 0.01),
            ("p50 ms", "p50_us", ".2f", 1e3), ("p99 ms", "p99_us", ".2f", 1e3), ("wrk's CPU %", "wrk_cpu", ".0f", 0.01),
        ),
        by_case(
            ENDPOINT_CASES, "endpoints",
            ("create_endpoint ms", "create_ms", ".1f", 1.0), ("snapshot kB", "snapshot_kb", ".1f", 1.0),
            ("set_traffic ms", "publish_ms", ".1f", 1.0), ("set_traffic, longest ms", "publish_max_ms", ".1f", 1.0),
            ("longest gap between answers ms, with changes", "gap_ms", ".1f", 1.0),
            ("… without changes", "calm_gap_ms", ".1f", 1.0),
            ("p99.9 ms, with changes", "p99_9_us", ".2f", 1e3), ("… without changes", "calm_p99_9_us", ".2f", 1e3),
            ("requests failed", "failed", ".0f", 1.0),
        ),
        by_case(
            BACKEND_CASES, "backends of one replica",
            ("create_backend ms", "create_ms", ".0f", 1.0), ("all that are new, s", "all_s", ".1f", 1.0),
            ("set_traffic ms", "publish_ms", ".1f", 1.0),
            ("processes", "processes", ".0f", 1.0), ("PSS MB", "pss_mb", ",.0f", 1.0),
        ),
        by_case(
            IDLE_CASES, "idle connections",
            ("p50 ms of one that asks", "p50_us", ".3f", 1e3), ("p99 ms", "p99_us", ".3f", 1e3),
            ("requests/s of 64 that ask", "requests_per_s", ",.0f", 1.0), ("PSS MB", "pss_mb", ".1f", 1.0),
            ("CPU % while nobody asks", "idle_cpu", ".1f", 0.01),
        ),
        by_case(
            PROXY_CASES, "proxies",
            ("requests/s", "requests_per_s", ",.0f", 1.0), ("p50 ms", "p50_us", ".2f", 1e3),
            ("p99 ms", "p99_us", ".2f", 1e3), ("CPU µs per request", "cpu_us", ".1f", 1.0),
            ("PSS MB", "pss_mb", ".1f", 1.0),
        ),
    ),
    (
        Lines(
            "replicas", "An async handler of 5 ms, 8 slots and 8 connections per replica", "replicas", "requests/s",
            REPLICA_CASES, "requests_per_s", linear=True,
        ),
        Lines("publish", "set_traffic, in force in every process", "endpoints", "ms", ENDPOINT_CASES, "publish_ms"),
    ),
)  # fmt: skip
