"""W7: a typed route among 1, 100 and 1,000."""

from __future__ import annotations

from .closed_loop import in_detail
from .contest import closed_loop, contest, of_all_peers
from .session import Session
from .workload import Column, Lines, Table, Workload

COUNTS = (1, 100, 1000)
QUICK_COUNTS = (1, 1000)
CONNECTIONS = 64


def case(routes: int) -> str:
    """
    >>> case(1), case(1000)
    ('1 route', '1,000 routes')
    """
    return f"{routes:,} route{'s' if routes > 1 else ''}"


def measure(session: Session) -> None:
    counts = QUICK_COUNTS if session.options.quick else COUNTS
    contenders = [
        each._replace(routes=count, case=case(count))
        for each in of_all_peers(session, "W7", {"typed": ""})
        for count in counts
    ]
    contest(session, "W7", contenders, {"": closed_loop(CONNECTIONS)})


ABOUT = """
`GET /api/42/2.5` of the route `/api/{user_id:int}/{number:float}`, which is in the middle of 1, 100 and 1,000
routes; both parameters are converted and answered as JSON. 64 connections.
"""

W7 = Workload(
    "W7",
    "a typed route among many",
    ABOUT,
    measure,
    (
        Table("requests/s by routes", tuple(Column(case(count), case(count), "requests_per_s") for count in COUNTS)),
        Table(
            "CPU µs per request by routes",
            tuple(Column(case(count), case(count), "cpu_us", ".1f") for count in COUNTS),
            least_first=True,
        ),
        Table("among 1,000 routes", in_detail(case(1000))),
    ),
    (Lines("routes", "A typed route among many", "routes", "requests/s", tuple(map(case, COUNTS)), "requests_per_s"),),
)
