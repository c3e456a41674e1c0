"""W3: a model that takes 5 ms per call, whatever its batch."""

from __future__ import annotations

from .closed_loop import case, in_detail
from .contest import closed_loop, contest, of_all_peers
from .session import Session
from .workload import Bars, Table, Workload


def measure(session: Session) -> None:
    contest(session, "W3", of_all_peers(session, "W3", {"model": ""}), {case(64): closed_loop(64)})


ABOUT = """
`POST /model` of 256 float32 as raw bytes; the handler multiplies up to 32 of them with a 256 × 256 matrix and takes
5 ms per call. `inprocess` is the bar: a list, a thread and the same model in the process that parses HTTP.
"""

W3 = Workload(
    "W3",
    "a model in batches",
    ABOUT,
    measure,
    (Table("64 connections, batches of up to 32", in_detail(case(64))),),
    (Bars("batching", "A model of 5 ms per batch of up to 32", "requests/s", case(64), "requests_per_s"),),
)
