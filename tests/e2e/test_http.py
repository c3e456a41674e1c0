"""HTTP with real processes and sockets: what a client sees of an instance."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import needs
import pytest
from plain_sockets import connect, read_to_end
from running import eventually, one_instance
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, StreamingResponse

import headgate

MIB = 1 << 20


def echo(request: Any) -> Any:
    """What the handler saw of the request."""
    return {
        "method": request.method,
        "path": request.url.path,
        "query": dict(request.query_params),
        "params": request.path_params,
        "types": {name: type(value).__name__ for name, value in request.path_params.items()},
        "client": request.client.host,
        "size": len(request.data),
        "sha256": hashlib.sha256(request.view).hexdigest(),
        "id": request.headers.get("x-request-id"),
        "internal": request.headers.get("x-headgate-secret"),
        "forwarded": request.headers.get("x-forwarded-for"),
    }


def result(request: Any) -> Any:
    """One of several kinds of result, by name."""
    kind = request.path_params["kind"]
    if kind == "raise":
        raise ValueError("no such thing")
    if kind == "large":
        return b"x" * (20 * MIB)
    if kind == "endless":
        return (b"y" * 65536 for _ in iter(int, 1))
    if kind == "breaks":
        return broken()
    return {
        "dict": {"a": [1, None, "ü"]},
        "text": "grün",
        "bytes": b"\x00\xff",
        "none": None,
        "response": JSONResponse({"b": 1}, status_code=201, headers={"x-own": "y"}),
        "generator": (part for part in ("a", "b", "c")),
        "stream": StreamingResponse(iter([b"1", b"2"]), media_type="application/x-own"),
    }[kind]


def broken() -> Iterator[str]:
    yield "a"
    raise ValueError("in the middle")


class Methods:
    def __call__(self, request: Any) -> str:
        return "call"

    def other(self, request: Any) -> str:
        return "other"


class Waits:
    """An async handler that notes in a file what becomes of it."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    async def __call__(self, request: Request) -> str:
        self.path.write_text("started")
        try:
            await asyncio.sleep(float(request.query_params.get("s", 30)))
        except asyncio.CancelledError:
            self.path.write_text("cancelled")
            raise
        self.path.write_text("done")
        return "done"


@pytest.fixture(scope="module")
def notes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("notes") / "waits"


LIMITS = {
    "head_timeout_s": 0.4,
    "body_timeout_s": 0.4,
    "write_timeout_s": 0.6,
    "keep_alive_timeout_s": 1.5,
    "max_header_fields": 20,
}


@pytest.fixture(scope="module")
def server(notes: Path) -> Iterator[headgate.Client]:
    with one_instance(http_options={"port": 0, **LIMITS}) as client:
        client.create_backend("echo", echo)
        client.create_endpoint("echo", backend="echo", route="/echo", methods=["GET", "POST"])
        client.create_endpoint("typed", backend="echo", route="/api/{user_id:int}/{number:float}")
        client.create_backend("result", result, config={"max_concurrent_queries": 50})
        client.create_endpoint("result", backend="result", route="/result/{kind}")
        client.create_backend("methods", Methods)
        client.create_endpoint("methods", backend="methods", route="/methods")
        client.create_backend("waits", Waits, str(notes))
        client.create_endpoint("waits", backend="waits", route="/waits")
        yield client


@pytest.fixture
def http(server: headgate.Client) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.http_address, timeout=20) as client:
        yield client


@pytest.fixture
def raw(server: headgate.Client) -> Iterator[socket.socket]:
    with connect(server) as sock:
        yield sock


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end):
        piece = sock.recv(65536)
        assert piece, f"the connection ended after {data!r}"
        data += piece
    return data


# --- requests and results ---


def test_the_handler_sees_the_request(http: httpx.Client) -> None:
    seen = http.post("/echo?a=b%20c", content=b"12345", headers={"x-request-id": "mine"}).json()
    assert (seen["method"], seen["path"], seen["query"], seen["size"]) == ("POST", "/echo", {"a": "b c"}, 5)
    assert (seen["client"], seen["id"]) == ("127.0.0.1", "mine")


def test_path_parameters_are_converted(http: httpx.Client) -> None:
    seen = http.get("/api/123/3.14").json()
    assert seen["params"] == {"user_id": 123, "number": 3.14}
    assert seen["types"] == {"user_id": "int", "number": "float"}
    assert http.get("/api/x/3.14").status_code == 404


@pytest.mark.parametrize(
    ("kind", "content_type", "body"),
    [
        ("dict", "application/json", '{"a":[1,null,"ü"]}'.encode()),
        ("text", "text/plain; charset=utf-8", "grün".encode()),
        ("bytes", "text/plain", b"\x00\xff"),
        ("none", "text/plain", b""),
        ("generator", "text/plain", b"abc"),
        ("stream", "application/x-own", b"12"),
    ],
)
def test_a_result_becomes_an_answer(http: httpx.Client, kind: str, content_type: str, body: bytes) -> None:
    answer = http.get(f"/result/{kind}")
    assert (answer.status_code, answer.content) == (200, body)
    assert answer.headers["content-type"].startswith(content_type)
    assert "date" in answer.headers
    assert "x-request-id" in answer.headers


def test_a_response_object_is_sent_as_it_is(http: httpx.Client) -> None:
    answer = http.get("/result/response")
    assert (answer.status_code, answer.json(), answer.headers["x-own"]) == (201, {"b": 1}, "y")


def test_an_exception_is_a_500_with_its_type_and_message_but_no_traceback(http: httpx.Client) -> None:
    answer = http.get("/result/raise")
    assert answer.status_code == 500
    assert "ValueError: no such thing" in answer.text
    assert "Traceback" not in answer.text


def test_head_has_the_length_of_get(http: httpx.Client) -> None:
    assert http.head("/result/dict").headers["content-length"] == str(len(http.get("/result/dict").content))
    assert http.head("/result/endless").status_code == 200


def test_a_method_of_the_class_can_be_called(http: httpx.Client) -> None:
    for name, status, text in ((None, 200, "call"), ("other", 200, "other"), ("_x", 404, None), ("nope", 404, None)):
        answer = http.get("/methods", headers={"x-serve-call-method": name} if name else {})
        assert answer.status_code == status
        assert text in (None, answer.text)


def test_internal_fields_do_not_come_in(http: httpx.Client) -> None:
    assert http.get("/echo", headers={"X-Headgate-Secret": "1"}).json()["internal"] is None


def test_the_forwarded_client_is_believed_from_loopback(http: httpx.Client) -> None:
    assert http.get("/echo", headers={"X-Forwarded-For": "1.2.3.4"}).json()["client"] == "1.2.3.4"


def test_pages(http: httpx.Client) -> None:
    assert http.get("/-/healthz").status_code == 200
    assert http.get("/-/routes").json()["/echo"] == ["echo", ["GET", "POST"]]
    assert "/-/routes" in http.get("/nope").text
    assert http.get("/echo/").status_code == 307
    assert http.get("/echo/", follow_redirects=True).status_code == 200
    assert http.delete("/echo").headers["allow"] == "GET, POST, HEAD"


# --- bodies ---


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 131073, MIB, 100 * MIB])
def test_a_body_arrives_as_it_was_sent(http: httpx.Client, size: int) -> None:
    body = os.urandom(min(size, MIB)) * (size // MIB or 1)
    for _ in range(1 if size > MIB else 3):
        seen = http.post("/echo", content=body).json()
        assert (seen["size"], seen["sha256"]) == (size, hashlib.sha256(body).hexdigest())


@pytest.mark.parametrize("size", [10, 3 * MIB])
def test_a_chunked_body_arrives_as_it_was_sent(http: httpx.Client, size: int) -> None:
    body = os.urandom(size)
    pieces = [body[at : at + 70_001] for at in range(0, size, 70_001)]
    seen = http.post("/echo", content=iter(pieces)).json()
    assert (seen["size"], seen["sha256"]) == (size, hashlib.sha256(body).hexdigest())


def test_many_large_uploads_at_once(server: headgate.Client) -> None:
    async def run() -> list[Any]:
        async with httpx.AsyncClient(base_url=server.http_address, timeout=30) as client:
            bodies = [bytes([n]) * (MIB + n) for n in range(30)]
            answers = await asyncio.gather(*(client.post("/echo", content=body) for body in bodies))
            return [
                (answer.json()["sha256"], hashlib.sha256(body).hexdigest())
                for answer, body in zip(answers, bodies, strict=True)
            ]

    assert all(got == sent for got, sent in asyncio.run(run()))


def test_a_body_over_the_limit_is_refused_before_it_is_sent(raw: socket.socket) -> None:
    raw.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (100 * MIB + 1))
    assert b" 413 " in read_to_end(raw).splitlines()[0]


def test_a_large_answer_arrives_whole(http: httpx.Client) -> None:
    answer = http.get("/result/large")
    assert len(answer.content) == 20 * MIB
    assert answer.headers["content-length"] == str(20 * MIB)


def test_a_stream_that_breaks_is_seen_as_broken(http: httpx.Client) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        http.get("/result/breaks")


# --- connections ---


def test_pipelined_requests_are_answered_in_order(raw: socket.socket) -> None:
    raw.sendall(b"".join(b"GET /echo?n=%d HTTP/1.1\r\nHost: x\r\n\r\n" % n for n in range(50)))
    data = b""
    while data.count(b"HTTP/1.1 200 OK") < 50 or not data.endswith(b"}"):
        data += raw.recv(65536)
    assert [int(part.split(b'"')[0]) for part in data.split(b'"query":{"n":"')[1:]] == list(range(50))


def test_a_connection_is_kept_and_closed_as_asked(raw: socket.socket) -> None:
    for last in (False, False, True):
        close = b"Connection: close\r\n" if last else b""
        raw.sendall(b"GET /result/dict HTTP/1.1\r\nHost: x\r\n%b\r\n" % close)
        read_until(raw, b"}")
    assert read_to_end(raw) == b""


SMUGGLING = [
    b"Content-Length: 5\r\nTransfer-Encoding: chunked",
    b"Content-Length: 5\r\nContent-Length: 6",
    b"Content-Length: 5\r\nContent-Length: 5",
    b"Content-Length: 5, 5",
    b"Content-Length: +5",
    b"Content-Length: 0x5",
    b"Transfer-Encoding: xchunked",
    b"Transfer-Encoding: chunked, chunked",
    b"Transfer-Encoding:\x0bchunked",
    b"Transfer-Encoding : chunked",
    b"Host: y",
    b"A: b\nTransfer-Encoding: chunked",
    b"A: b\r C: d",
    b"A: b\r\n c",
    b"A: \0",
    b" A: b",
]


@pytest.mark.parametrize("fields", SMUGGLING)
def test_what_could_smuggle_a_request_is_refused(raw: socket.socket, fields: bytes) -> None:
    second = b"GET /echo HTTP/1.1\r\nHost: x\r\n\r\n"
    raw.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\n" + fields + b"\r\n\r\n0\r\n\r\n" + second)
    answer = read_to_end(raw)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert answer.count(b"x-request-id:") == 1


def test_heads_beyond_the_limits_are_refused(server: headgate.Client) -> None:
    for head, status in (
        (b"GET /%b HTTP/1.1\r\nHost: x\r\n\r\n" % (b"x" * 9000), 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\na: %b\r\n\r\n" % (b"x" * 40_000), 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n%b\r\n" % (b"a: b\r\n" * 20), 431),
    ):
        with connect(server) as sock:
            sock.sendall(head)
            assert read_to_end(sock).startswith(b"HTTP/1.1 %d " % status)


def test_slow_clients_get_408_or_are_closed(server: headgate.Client) -> None:
    for part in (b"GET /echo HT", b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"):
        with connect(server) as sock:
            sock.sendall(part)
            began = time.monotonic()
            assert read_to_end(sock).startswith(b"HTTP/1.1 408 ")
            assert 0.3 < time.monotonic() - began < 2.0
    with connect(server) as sock:
        began = time.monotonic()
        assert read_to_end(sock) == b""
        assert 1.3 < time.monotonic() - began < 3.0


def test_a_slow_reader_holds_up_nobody_and_is_closed(server: headgate.Client, http: httpx.Client) -> None:
    readers = [connect(server) for _ in range(10)]
    try:
        for reader in readers:
            reader.sendall(b"GET /result/endless HTTP/1.1\r\nHost: x\r\n\r\n")
        time.sleep(0.1)
        began = time.monotonic()
        assert http.get("/result/dict").status_code == 200
        assert time.monotonic() - began < 0.5
        time.sleep(1.5)
        assert all(not ended_well(reader) for reader in readers)
    finally:
        for reader in readers:
            reader.close()


def ended_well(sock: socket.socket) -> bool:
    data = read_to_end(sock)
    assert data
    return data.endswith(b"0\r\n\r\n")


@pytest.mark.parametrize("how", ["close", "reset", "half"])
def test_an_async_handler_whose_client_goes_is_cancelled(server: headgate.Client, notes: Path, how: str) -> None:
    notes.write_text("")
    with connect(server) as sock:
        sock.sendall(b"GET /waits HTTP/1.1\r\nHost: x\r\n\r\n")
        eventually(lambda: notes.read_text() == "started")
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        if how == "half":
            sock.shutdown(socket.SHUT_WR)
        else:
            sock.close()
        began = time.monotonic()
        eventually(lambda: notes.read_text() == "cancelled")
        assert time.monotonic() - began < 0.5


def test_a_client_that_stays_is_not_cancelled(http: httpx.Client, notes: Path) -> None:
    assert http.get("/waits?s=0.1").text == "done"
    assert notes.read_text() == "done"


def test_expect_continue(raw: socket.socket) -> None:
    raw.sendall(b"POST /echo HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
    assert read_until(raw, b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    raw.sendall(b"abc")
    assert b'"size":3' in read_until(raw, b"}")


# --- failures ---


def test_a_request_that_takes_too_long_is_a_504(server: headgate.Client, http: httpx.Client, notes: Path) -> None:
    server.update_backend_config("waits", {"request_timeout_s": 0.2})
    try:
        answer = http.get("/waits")
        assert answer.status_code == 504
        eventually(lambda: notes.read_text() == "cancelled")
        assert http.get("/waits?s=0").text == "done"
    finally:
        server.update_backend_config("waits", {"request_timeout_s": None})


def test_too_many_waiting_requests_are_a_503(server: headgate.Client, http: httpx.Client, notes: Path) -> None:
    server.update_backend_config("waits", {"max_concurrent_queries": 1, "max_queued_requests": 0})
    try:
        thread = threading.Thread(target=httpx.get, args=(f"{server.http_address}/waits?s=0.3",))
        notes.write_text("")
        thread.start()
        eventually(lambda: notes.read_text() == "started")
        answer = http.get("/waits?s=0")
        thread.join()
        assert answer.status_code == 503
        assert int(answer.headers["retry-after"]) >= 1
    finally:
        server.update_backend_config("waits", {"max_concurrent_queries": 100, "max_queued_requests": None})


def test_a_replica_that_dies_is_a_502_that_says_it_had_started(
    server: headgate.Client, http: httpx.Client, notes: Path
) -> None:
    notes.write_text("")
    answers: list[httpx.Response] = []
    thread = threading.Thread(target=lambda: answers.append(http.get("/waits")))
    thread.start()
    eventually(lambda: notes.read_text() == "started")
    (pid,) = [replica.pid for replica in server.status().replicas if replica.backend == "waits"]
    os.kill(pid, signal.SIGKILL)
    thread.join()
    assert answers[0].status_code == 502
    assert answers[0].headers["x-headgate-started"] == "1"
    assert http.get("/waits?s=0").text == "done"


def test_a_proxy_that_is_killed_is_replaced_and_nobody_is_refused(server: headgate.Client) -> None:
    os.kill(server.status().proxies[0].pid, signal.SIGKILL)
    for _ in range(20):
        assert httpx.get(f"{server.http_address}/result/dict", timeout=10).status_code == 200


def test_what_is_in_flight_at_shutdown_is_finished(tmp_path: Path) -> None:
    with one_instance(http_options={"port": 0}) as client:
        client.create_backend("waits", Waits, str(tmp_path / "note"))
        client.create_endpoint("waits", backend="waits", route="/waits")
        with connect(client) as sock, connect(client) as idle:
            sock.sendall(b"GET /waits?s=0.3 HTTP/1.1\r\nHost: x\r\n\r\n")
            eventually((tmp_path / "note").exists)
            thread = threading.Thread(target=client.shutdown)
            thread.start()
            assert read_to_end(idle) == b""
            answer = read_to_end(sock)
            thread.join()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"\r\nconnection: close\r\n" in answer


# --- middlewares and TLS ---


class Adds:
    def __init__(self, app: Any, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def tagged(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-passed", self.name.encode())]
            await send(message)

        await self.app(scope, receive, tagged)


async def guard(request: Request, call_next: Any) -> Any:
    if request.query_params.get("raise"):
        raise ValueError("in the middleware")
    if request.query_params.get("key") != "right":
        return PlainTextResponse("who are you?", status_code=401)
    return await call_next(request)


def test_middlewares_stand_around_everything() -> None:
    middlewares = [Middleware(BaseHTTPMiddleware, dispatch=guard), Middleware(Adds, name="outer")]
    with one_instance(http_options={"port": 0, "middlewares": middlewares}) as client:
        client.create_backend("echo", echo)
        client.create_endpoint("echo", backend="echo", route="/echo", methods=["GET", "POST"])
        client.create_backend("result", result)
        client.create_endpoint("result", backend="result", route="/result/{kind}")
        with httpx.Client(base_url=client.http_address, timeout=20) as http:
            assert http.get("/echo").status_code == 401
            assert http.get("/-/healthz").status_code == 401
            assert http.get("/echo?raise=1").status_code == 500
            body = os.urandom(3 * MIB)
            answer = http.post("/echo?key=right", content=body)
            assert answer.json()["sha256"] == hashlib.sha256(body).hexdigest()
            assert answer.headers["x-passed"] == "outer"
            assert http.get("/-/healthz?key=right").text == "ok"
            assert http.get("/result/generator?key=right").text == "abc"
            assert len(http.get("/result/large?key=right").content) == 20 * MIB


def test_tls(tmp_path: Path) -> None:
    needs.program("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    options = {"port": 0, "ssl_certfile": str(certificate), "ssl_keyfile": str(key)}
    with one_instance(http_options=options) as client:
        client.create_backend("echo", echo)
        client.create_endpoint("echo", backend="echo", route="/echo", methods=["GET", "POST"])
        assert client.http_address.startswith("https://")
        context = ssl.create_default_context(cafile=str(certificate))
        body = os.urandom(MIB)
        with httpx.Client(base_url=client.http_address, verify=context, timeout=20) as http:
            for content in (b"", b"small", body):
                seen = http.post("/echo", content=content).json()
                assert seen["sha256"] == hashlib.sha256(content).hexdigest()
