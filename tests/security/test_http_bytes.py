"""Every case of http_cases.py in memory: in one piece, cut at each byte, and in single bytes."""

from __future__ import annotations

import http_in_memory
import pytest
from http_cases import ACCEPT, AFTER, CASES, EITHER, KINDS, REJECT, Case
from http_in_memory import Outcome, Rig, cuts
from promises import Promise

#: Of longer streams (limits), so many places at which they are cut.
PLACES = 300


def test_the_corpus_is_large_and_says_why() -> None:
    assert len(CASES) >= 300
    assert len({case.data for case in CASES}) == len(CASES)
    assert all("§" in case.why for case in CASES)
    assert {case.verdict for case in CASES} == {REJECT, ACCEPT, EITHER}


def fault(case: Case, outcome: Outcome) -> str | None:
    if outcome.broken:
        return f"{case.name}: the connection failed in the proxy"
    return case.fault(outcome.seen, outcome.statuses, outcome.closed)


@pytest.mark.promise("smuggling: 400 and close, the proxy alone says where a request ends (in memory, each cut)")
def test_what_is_refused_and_what_is_seen_does_not_depend_on_how_it_is_cut(promise: Promise) -> None:
    faults: list[str] = []
    streams = pieces = 0
    for case in CASES:
        whole = http_in_memory.run(case.data + AFTER)
        faults += filter(None, [fault(case, whole)])
        for cut in cuts(case.data, PLACES if promise.full else 100):
            pieces += 1
            outcome = http_in_memory.run(*cut, AFTER)
            if outcome != whole:
                faults.append(f"{case.name[:200]} as {[piece[-20:] for piece in cut[:2]]}: {outcome}, whole {whole}")
        streams += 1

    assert not faults, "\n".join(faults[:20])
    verdicts = [case.verdict for case in CASES]
    promise.says(", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (REJECT, ACCEPT, EITHER)))
    promise.none_of(streams + pieces, "streams read otherwise than the RFCs say")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_refused_is_never_followed_by_a_request_on_the_same_connection(kind: str) -> None:
    rig = Rig()
    for case in KINDS[kind]:
        outcome = rig.run(case.data, AFTER, AFTER)
        if outcome.refused:
            assert outcome.seen == list(case.sees if case.verdict == REJECT else ()), case.name
