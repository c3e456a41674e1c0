"""What the proxy answers by itself."""

from __future__ import annotations

import json

import pytest
from fakes import SNAPSHOT, Wire, get

from headgate.core.state import Snapshot
from headgate.errors import ReplicaDied
from headgate.proxy import admin


def page(path: str, method: str = "GET", snapshot: Snapshot = SNAPSHOT, leaving: bool = False) -> admin.Local:
    return admin.page(path, method, snapshot, leaving)


def test_routes_shows_every_endpoint_with_its_methods_as_given() -> None:
    assert json.loads(page("/-/routes").body) == {
        "/hello": ["hello", ["GET", "POST"]],
        "/user/{id:int}/{rest:path}": ["user", ["GET"]],
        "headless": ["headless", ["GET"]],
        "/shadowed": ["shadowed", ["POST"]],
    }


@pytest.mark.parametrize(
    ("snapshot", "leaving", "status"),
    [(SNAPSHOT, False, 200), (SNAPSHOT, True, 503), (Snapshot(), False, 503), (Snapshot(version=3), False, 503)],
)
def test_healthz_is_200_only_when_ready(snapshot: Snapshot, leaving: bool, status: int) -> None:
    assert page("/-/healthz", "GET", snapshot, leaving).status == status


def test_other_pages_are_not_there() -> None:
    assert page("/-/secrets").status == 404


def test_pages_can_only_be_read() -> None:
    answer = page("/-/routes", "POST")
    assert (answer.status, b"allow: GET, HEAD\r\n" in answer.block) == (405, True)


def test_an_unknown_path_is_named_with_what_is_near() -> None:
    wire = Wire()
    wire.receive(get("/helo"))
    output = wire.output
    assert output.startswith(b"HTTP/1.1 404 ")
    assert b"'/helo'" in output
    assert b"/hello" in output
    assert b"/-/routes" in output


def test_a_wrong_method_says_which_are_right() -> None:
    wire = Wire()
    wire.receive(get(method="DELETE"))
    assert b"\r\nallow: GET, POST, HEAD\r\n" in wire.output


@pytest.mark.parametrize(
    ("path", "location"),
    [
        ("/hello/", b"http://x/hello"),
        ("/hello/?a=b", b"http://x/hello?a=b"),
        ("//hello/", None),
        ("/hello%2F", b"http://x/hello"),
    ],
)
def test_a_trailing_slash_redirects(path: str, location: bytes | None) -> None:
    wire = Wire()
    wire.receive(get(path))
    output = wire.output
    if location is None:
        assert output.startswith(b"HTTP/1.1 404 ")
    else:
        assert output.startswith(b"HTTP/1.1 307 ")
        assert b"\r\nlocation: " + location + b"\r\n" in output


def test_an_error_is_json_for_those_who_accept_it() -> None:
    wire = Wire()
    wire.router.fails = ReplicaDied("gone")
    wire.receive(get("/hello", "Accept: application/json"))
    head, _, body = wire.output.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"x-headgate-started: 1" in head
    problem = json.loads(body)
    assert (problem["status"], problem["code"], problem["title"]) == (502, "REPLICA_DIED", "Bad Gateway")


def test_pages_come_before_routes_and_head_gets_no_body() -> None:
    wire = Wire()
    wire.receive(get("/-/healthz", method="HEAD"))
    output = wire.output
    assert output.startswith(b"HTTP/1.1 200 ")
    assert output.endswith(b"\r\n\r\n")
    assert b"content-length: 2\r\n" in output


def test_a_path_cannot_write_header_lines() -> None:
    wire = Wire()
    wire.receive(get("/hello%0d%0aa:b/"))
    assert wire.output.partition(b"\r\n\r\n")[0].count(b"\r\na:") == 0
