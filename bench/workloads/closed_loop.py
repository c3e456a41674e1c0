"""W1 and W2: a small JSON answer, over and over, by wrk."""

from __future__ import annotations

from .contest import Contender, closed_loop, contest, fastest, of_all_peers
from .session import Session
from .workload import Bars, Column, Lines, Parts, Table, Workload

CONNECTIONS = (1, 16, 64, 256)
QUICK_CONNECTIONS = (1, 64)
VARIANTS = {"json": "", "json_async": "async def"}
#: What a peer does that answers no GET; of Ray Serve, whose GET is one thing and its POST another, both.
POSTED = {"json_post": "POST"}
BOTH = ("headgate", "ray-serve", "ray-serve-throughput")


def case(connections: int) -> str:
    """
    >>> case(1), case(64)
    ('1 connection', '64 connections')
    """
    return f"{connections} connection{'s' if connections > 1 else ''}"


def contenders(session: Session, workload: str, replicas: int) -> list[Contender]:
    """Plain and `async def` handlers."""
    found = of_all_peers(session, workload, VARIANTS, otherwise=POSTED, replicas=replicas)
    if session.options.quick:
        return fastest(found)
    posts = [Contender(name, job, variant, replicas) for name in BOTH for job, variant in POSTED.items()]
    return found + [each for each in posts if session.wants(workload, each.peer)]


def measure_one(session: Session) -> None:
    connections = QUICK_CONNECTIONS if session.options.quick else CONNECTIONS
    contest(
        session, "W1", contenders(session, "W1", 1), {case(count): closed_loop(count) for count in connections}
    )


def measure_two(session: Session) -> None:
    contest(session, "W2", fastest(contenders(session, "W2", 2)), {case(64): closed_loop(64)})


def in_detail(connections: str) -> tuple[Column, ...]:
    """What there is to say of one closed loop."""
    return (
        Column("requests/s", connections, "requests_per_s"),
        Column("headgate is", connections, "requests_per_s", "ratio"),
        Column("p50 ms", connections, "p50_us", ".2f", 1e3),
        Column("p99 ms", connections, "p99_us", ".2f", 1e3),
        Column("CPU µs per request", connections, "cpu_us", ".1f"),
        Column("of which", connections, "cpu_by_process", "parts"),
    )


ABOUT_W1 = """
`GET /json`, answered with 65 bytes of JSON by a handler that does nothing else; keep-alive connections.
"""

W1 = Workload(
    "W1",
    "small JSON, one replica",
    ABOUT_W1,
    measure_one,
    (
        Table("64 connections", in_detail(case(64))),
        Table(
            "requests/s by connections",
            tuple(Column(f"{count}", case(count), "requests_per_s") for count in CONNECTIONS),
        ),
        Table(
            "p50 in ms by connections",
            tuple(Column(f"{count}", case(count), "p50_us", ".3f", 1e3) for count in CONNECTIONS),
            least_first=True,
        ),
    ),
    (
        Bars("json", "Small JSON, 64 connections", "requests/s", case(64), "requests_per_s", log=True),
        Parts("json-cpu", "Small JSON, 64 connections: CPU time", "µs per request", case(64), "cpu_by_process"),
        Lines(
            "json-connections", "Small JSON", "connections", "requests/s",
            tuple(map(case, CONNECTIONS)), "requests_per_s",
        ),
    ),
)  # fmt: skip

ABOUT_W2 = """
As W1 with two replicas, or two worker processes where there is no other. A peer whose plain handlers take threads of
a pool is there with its `async def` ones only, which are faster.
"""

W2 = Workload(
    "W2",
    "small JSON, two replicas",
    ABOUT_W2,
    measure_two,
    (Table("64 connections", in_detail(case(64))),),
)
