"""The cases of http_cases.py at a real instance over sockets, and behind HAProxy; what a route sees of odd paths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import haproxy
import http_exchange
import pytest
from http_cases import ACCEPT, CASES, EITHER, REJECT, Case
from http_exchange import LAST, Answers, Seen
from promises import Promise
from running import eventually
from under_load import address_of

import headgate

pytestmark = pytest.mark.local("what comes in by HTTP is the proxy's business, the same on both engines")

START = {"http_options": {"port": 0, "forwarded_allow_ips": "192.0.2.1"}}


def place(client: headgate.Client) -> tuple[str, int]:
    host, _, port = address_of(client).removeprefix("http://").rpartition(":")
    return host, int(port)


def fault(case: Case, answers: Answers, seen: list[Seen]) -> str | None:
    if not answers.ended:
        return f"{case.name}: the connection did not end, answered {answers.statuses}"
    plain = [each.plain for each in seen]
    after_answered = bool(plain) and plain[-1][1] == "/after"
    return case.fault(plain, answers.statuses, not after_answered)


def named(verdicts: list[str]) -> str:
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in (REJECT, ACCEPT, EITHER))


@pytest.mark.promise("smuggling: 400 and close, never a second request (real sockets, whole and cut)")
def test_every_case_over_a_socket(client: headgate.Client, promise: Promise, tmp_path: Path) -> None:
    log = tmp_path / "seen"
    http_exchange.serve(client, log)
    rounds = promise.size(10, 1)
    faults: list[str] = []
    for number in range(1 + rounds):
        streams: list[list[bytes]] = []
        for case in CASES:
            at = promise.random.randrange(1, len(case.data)) if number else len(case.data)
            streams.append([case.data + LAST] if not number else [case.data[:at], case.data[at:] + LAST])
        log.write_text("")
        answers = http_exchange.send_all(place(client), streams)
        seen = http_exchange.by_port(http_exchange.seen(log))
        faults += filter(
            None,
            (fault(case, got, seen[got.port]) for case, got in zip(CASES, answers, strict=True)),
        )

    assert not faults, f"{len(faults)}:\n" + "\n".join(faults[:20])
    promise.says(named([case.verdict for case in CASES]))
    promise.none_of(len(CASES) * (1 + rounds), "streams read otherwise than the RFCs say, or answered with 5xx")


@pytest.mark.promise("smuggling: behind HAProxy the app sees the requests that HAProxy saw")
def test_every_case_behind_haproxy(client: headgate.Client, promise: Promise, tmp_path: Path) -> None:
    log = tmp_path / "seen"
    http_exchange.serve(client, log)
    rounds = promise.size(5, 1)
    faults: list[str] = []
    counts = {"seen by both": 0, "forwarded and refused by headgate": 0, "refused by HAProxy": 0}
    with haproxy.in_front_of(place(client), tmp_path) as front:
        for number, name in [(number, name) for number in range(rounds) for name in front.fronts]:
            log.write_text("")
            front.forget()
            streams = []
            for case in CASES:
                at = promise.random.randrange(1, len(case.data)) if number else len(case.data)
                streams.append([case.data[:at], case.data[at:] + LAST] if number else [case.data + LAST])
            answers = http_exchange.send_all(front.fronts[name], streams)
            eventually(lambda: sum(map(len, front.forwarded().values())) >= len(CASES))
            forwarded = front.forwarded()
            seen = http_exchange.seen(log)
            ids = [each.id for each in seen]
            assert len(set(ids)) == len(ids), "the app saw one request twice"
            faults += [f"{name}: seen by the app, unknown to HAProxy: {each}" for each in seen if not each.id]
            for case, got in zip(CASES, answers, strict=True):
                made_out = forwarded[got.port]
                served = [each.id for each in made_out if each.server and each.status in (200, 404, 405)]
                mine = [id for id in ids if id.split("-")[0] == str(got.port)]
                expected = [id for id in served if not _is_local(made_out, id)]
                failed = any(status >= 500 for status in got.statuses) and b"x-request-id" in got.raw
                if mine != expected or not got.ended or failed:  # a 504 of HAProxy's own: the client sent no more
                    views = f"HAProxy {made_out}, app {mine}, {got!r:.300}"
                    faults.append(f"{name}: {case.verdict} {case.name[:200]}: {views}")
                counts["seen by both"] += len(mine)
                counts["forwarded and refused by headgate"] += sum(
                    each.server and each.status not in (200, 404, 405) for each in made_out
                )
                counts["refused by HAProxy"] += sum(not each.server for each in made_out)

    assert not faults, f"{len(faults)}:\n" + "\n".join(faults[:20])
    promise.says(", ".join(f"{what} {count}" for what, count in counts.items()))
    promise.none_of(2 * rounds * len(CASES), "streams of which HAProxy and headgate saw other requests")


def _is_local(made_out: list[haproxy.Forwarded], id: str) -> bool:
    """Whether headgate's proxy answered that one itself."""
    return any(each.id == id and each.status in (404, 405) for each in made_out)


def public(request: Any) -> Any:
    return ["public", request.path_params["rest"]]


def secret(request: Any) -> Any:
    return ["secret", ""]


#: target -> status, and what answers: the endpoint and its part of the path, decoded once and not normalized.
PATHS: dict[bytes, tuple[int, list[str] | None]] = {
    b"/public/a": (200, ["public", "a"]),
    b"/secret": (200, ["secret", ""]),
    b"/%73ecret": (200, ["secret", ""]),
    b"/public/../secret": (200, ["public", "../secret"]),
    b"/public/%2e%2e/secret": (200, ["public", "../secret"]),
    b"/public/%2E%2E%2fsecret": (200, ["public", "../secret"]),
    b"/public/..%5csecret": (200, ["public", "..\\secret"]),
    b"/public/%252e%252e/secret": (200, ["public", "%2e%2e/secret"]),
    b"/public//secret": (200, ["public", "/secret"]),
    b"/public/./a": (200, ["public", "./a"]),
    b"/public/%c0%ae%c0%ae/secret": (200, ["public", "\ufffd\ufffd\ufffd\ufffd/secret"]),
    b"/public/%e0%80%ae": (200, ["public", "\ufffd\ufffd\ufffd"]),
    b"/public/%c0%80": (200, ["public", "\ufffd\ufffd"]),
    b"/public/%ed%a0%80": (200, ["public", "\ufffd\ufffd\ufffd"]),
    b"/public/%uff0e": (200, ["public", "%uff0e"]),
    b"/public/%": (200, ["public", "%"]),
    b"/public/a?b=../secret%00": (200, ["public", "a"]),
    b"/../secret": (404, None),
    b"/./secret": (404, None),
    b"//secret": (404, None),
    b"/%2fsecret": (404, None),
    b"/secret%2f": (307, None),
    b"/secret/": (307, None),
    b"/secret/.": (404, None),
    b"/secret%20": (404, None),
    b"/secret%0a": (200, ["secret", ""]),  # as Starlette's routes: `$` matches before a last line end
    b"/secret%0d%0a": (404, None),
    b"/secret;a": (404, None),
    b"/SECRET": (404, None),
    b"/secret%252f": (404, None),
    b"/%c1%b3ecret": (404, None),
    b"/%2573ecret": (404, None),
    b"/secret%00": (400, None),
    b"/public/%00": (400, None),
    b"/public/../secret%00.txt": (400, None),
    b"/public\\..\\secret": (404, None),
    b"/-/../secret": (404, None),
    b"/public/../-/healthz": (200, ["public", "../-/healthz"]),
}


@pytest.mark.promise("`..`, `%2e%2e`, `//`, overlong UTF-8: routed on the once-decoded path; %00: 400")
def test_paths_are_decoded_once_and_never_normalized(client: headgate.Client, promise: Promise) -> None:
    for code, route in ((public, "/public/{rest:path}"), (secret, "/secret")):
        client.create_backend(code.__name__, code)
        client.create_endpoint(code.__name__, backend=code.__name__, route=route)
    targets = list(PATHS)
    streams = [[b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n" % target] for target in targets]

    for target, answers in zip(targets, http_exchange.send_all(place(client), streams), strict=True):
        status, seen = PATHS[target]
        assert answers.statuses == [status], target
        body = answers.raw.partition(b"\r\n\r\n")[2]
        assert seen is None or json.loads(body) == seen, target
    promise.none_of(len(targets), "targets routed otherwise")


#: Fields of a stranger: what the app must not see, and what it may.
STRIPPED = [
    b"X-Headgate-Started: 1", b"x-headgate-Started: 1", b"X-HEADGATE-: 1", b"X-Headgate-Code:", b"X-Headgate-Modelx: 1",
    b"X-Headgate-Timing-: 1", b"X-Forwarded-For: 1.2.3.4", b"x-forwarded-proto: https", b"X-FORWARDED-HOST: b",
    b"X-Forwarded-Port: 1", b"X-Forwarded-Prefix: /x", b"X-Forwarded-: 1", b"Forwarded: for=1.2.3.4;proto=https",
    b"FORWARDED: by=x", b"X-Headgate-Secret: 1\r\nX-Headgate-Secret: 2", b"X-Forwarded-For: 1\r\nX-Forwarded-For: 2",
]  # fmt: skip
KEPT = [
    b"X-Headgate-Model: iris", b"x-headgate-timing: 1", b"X-HEADGATE-MODEL: a", b"X-Serve-Other: 1",
    b"X-Headgate: 1", b"X-Forwarded: 1", b"X_Headgate_Started: 1", b"XX-Headgate-Started: 1", b"Forwarded-For: 1",
    b"A: X-Headgate-Started: 1", b"X-Real-IP: 1.2.3.4", b"X-Serve-Shard-Key: k",
]  # fmt: skip


def fields_seen(request: Any) -> Any:
    lines = [b"%b: %b" % pair for pair in request.scope["headers"] if pair[0] not in (b"host", b"connection", b"n")]
    return [request.client.host, request.url.scheme, b"\n".join(lines).decode("latin-1")]


@pytest.mark.promise("X-Headgate-* (but -Model, -Timing) stripped, X-Forwarded-* only from trusted peers")
def test_fields_that_a_stranger_may_not_send(client: headgate.Client, promise: Promise) -> None:
    client.create_backend("fields", fields_seen)
    client.create_endpoint("fields", backend="fields", route="/fields")
    both = [b"\r\n".join((first, second)) for first in STRIPPED for second in (*STRIPPED, *KEPT)]
    cases = [*STRIPPED, *KEPT, *(promise.random.sample(both, promise.size(len(both), 100)))]
    head = b"GET /fields HTTP/1.1\r\nHost: a\r\n%b\r\nConnection: close\r\n\r\n"

    for fields, answers in zip(
        cases, http_exchange.send_all(place(client), [[head % fields] for fields in cases], 0.0), strict=True
    ):
        assert answers.statuses == [200], fields
        host, scheme, seen = json.loads(answers.raw.partition(b"\r\n\r\n")[2])
        kept = [line for line in fields.split(b"\r\n") if line in KEPT]
        assert (host, scheme) == ("127.0.0.1", "http"), fields
        assert seen.lower().encode() == b"\n".join(kept).lower(), fields
    promise.none_of(len(cases), "heads of which the app saw what a stranger may not send")
