"""Nothing that came over HTTP, and nothing from a stranger on a socket, is ever unpickled.

Every process carries an audit hook that writes down each look-up of a name that a pickle asks for
(tests/pickles.py), in all tests of a run. The pickles that are sent here would make a folder, if anybody read them.
"""

from __future__ import annotations

import base64
import itertools
import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import httpx
import pickles
import pytest
from plain_sockets import connect, read_to_end
from promises import Promise
from running import instance_pids, key_of, one_instance, pid_of

import headgate
from headgate.core import framing
from headgate.wire.greeting import VERSION

#: The hook gets into processes by the environment, and those of Ray's workers have the node's.
pytestmark = pytest.mark.local("the audit hook does not get into Ray's workers")

CONTENT_TYPES = (
    None, "application/octet-stream", "application/x-pickle", "application/python-pickle", "application/json",
    "application/x-msgpack", "application/vnd.ray.serve", "text/plain", "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=b",
)  # fmt: skip
HEADERS = (
    "x-serve-call-method", "x-serve-shard-key", "x-request-id", "cookie", "authorization", "x-forwarded-for",
    "x-headgate-secret", "content-encoding", "if-none-match",
)  # fmt: skip
ANSWER_BYTES = 80  # of the handshake: a nonce and a proof
PAGES = ("/-/", "/-/routes", "/-/healthz", "/-/pickle", "/nothing/here")


class Bomb:
    """What unpickles it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self._folder,)


class Stage(NamedTuple):
    client: headgate.Client
    made: Path  # the folder that is there if a pickle was read

    @property
    def address(self) -> str:
        return str(self.client.http_address)

    def bombs(self) -> list[bytes]:
        return [pickle.dumps(Bomb(self.made), protocol) for protocol in (0, 2, 5)]

    def looked_up(self) -> list[str]:
        """What a pickle asked for in the instance's processes."""
        pids = {str(pid) for pid in instance_pids(key_of(self.client))}
        return [line for line in pickles.lines() if line.split()[1] in pids]


def reads_all(request: Any) -> Any:
    """A handler that touches whatever a request has, and sends the body back."""
    from starlette.responses import Response

    seen = repr([request.url, dict(request.query_params), dict(request.headers), dict(request.cookies)])
    return Response(bytes(request.data), headers={"x-seen": str(len(seen))})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with one_instance(http_options={"port": 0}) as client:
        client.create_backend("reads", reads_all)
        client.create_endpoint("reads", backend="reads", route="/reads/{rest:path}", methods=["GET", "POST", "PUT"])
        yield Stage(client, tmp_path_factory.mktemp("made") / "made")


@pytest.fixture
def http(stage: Stage) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stage.address, timeout=20) as http:
        yield http


@pytest.fixture(autouse=True)
def nothing_was_read(stage: Stage) -> Iterator[None]:
    """The rule of this file. That the hook works is seen by the replica's code, which is a pickle."""
    before = stage.looked_up()
    assert before
    assert {line.split()[0] for line in before} <= {"headgate-rep"}
    assert not any("mkdir" in line for line in before)
    yield
    with httpx.Client(base_url=stage.address, timeout=20) as http:
        assert http.get("/-/healthz").status_code == 200
        assert http.post("/reads/", content=b"still here").content == b"still here"
    assert stage.looked_up() == before
    assert not stage.made.exists()


def pieces(data: bytes) -> Iterator[bytes]:
    for place in range(0, len(data), 7):
        yield data[place : place + 7]


def test_every_process_has_inherited_the_hook(stage: Stage) -> None:
    key = key_of(stage.client)
    for title in ("headgate-super", "headgate-ctl", "headgate-proxy"):
        environ = Path(f"/proc/{pid_of(key, title)}/environ").read_bytes()
        assert pickles.VARIABLE.encode() + b"=" in environ
    assert stage.looked_up(), "the replica, forked like the others, has read its code"


@pytest.mark.promise("pickle: sent to any socket, route, header, content type, it is never read")
def test_pickles_sent_anywhere_are_never_read(promise: Promise, http: httpx.Client, stage: Stage) -> None:
    """Of random kinds and places; each place on its own is below."""
    sent = promise.size(full=5000, small=150)
    for _ in range(sent):
        choose = promise.random.choice
        bomb, method, content_type = (
            choose(stage.bombs()),
            choose(("POST", "PUT", "PATCH", "DELETE")),
            choose(CONTENT_TYPES),
        )
        headers = {"content-type": content_type} if content_type else {}
        headers[choose(HEADERS)] = base64.b64encode(bomb).decode()
        path = choose(("/reads/it", "/reads/", *PAGES))
        content = bomb if promise.random.random() < 0.5 else pieces(bomb)
        answer = http.request(method, f"{path}?q={quote_from_bytes(bomb, safe='')}", content=content, headers=headers)
        assert answer.status_code in (200, 404, 405)
    promise.none_of(sent, "pickles read")


@pytest.mark.parametrize("content_type", CONTENT_TYPES)
def test_a_body_is_bytes_whatever_it_is_said_to_be(http: httpx.Client, stage: Stage, content_type: str | None) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    for bomb, method in itertools.product(stage.bombs(), ("POST", "PUT")):
        assert http.request(method, "/reads/it", content=bomb, headers=headers).content == bomb
        assert http.request(method, "/reads/it", content=pieces(bomb), headers=headers).content == bomb


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_is_text(stage: Stage, name: str) -> None:
    for bomb in stage.bombs():
        for value in (base64.b64encode(bomb), bomb.replace(b"\n", b" ").replace(b"\0", b"").replace(b"\r", b"")):
            head = b"POST /reads/it HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: 2\r\n"
            answer = over_tcp(stage, head + name.encode() + b": " + value + b"\r\n\r\nhi")
            assert answer.startswith(b"HTTP/1.1 ")


def test_a_target_is_text(http: httpx.Client, stage: Stage) -> None:
    for bomb in stage.bombs():
        escaped = quote_from_bytes(bomb, safe="")
        for target in (f"/reads/{escaped}", f"/reads/it?q={escaped}&{escaped}=1", f"/{escaped}"):
            assert http.get(target).status_code in (200, 400, 404)


@pytest.mark.parametrize("page", PAGES)
def test_the_proxy_s_own_pages_take_no_pickle(http: httpx.Client, stage: Stage, page: str) -> None:
    for bomb, method in itertools.product(stage.bombs(), ("GET", "POST", "PUT", "DELETE", "PATCH")):
        assert http.request(method, page, content=bomb).status_code in (200, 404, 405)


def test_a_pickle_in_place_of_a_request_is_none(stage: Stage) -> None:
    for bomb in stage.bombs():
        assert over_tcp(stage, bomb + b"\r\n\r\n").startswith((b"HTTP/1.1 4", b"HTTP/1.1 5"))


def over_tcp(stage: Stage, data: bytes) -> bytes:
    with connect(stage.client) as sock:
        sock.sendall(data)
        return read_to_end(sock)


def test_a_stranger_on_the_sockets_of_the_instance_is_not_listened_to(stage: Stage) -> None:
    sockets = sorted(Path(key_of(stage.client)).glob("*.sock"))
    assert len(sockets) >= 2, "the controller's, and one of each replica"
    for path, bomb in itertools.product(sockets, stage.bombs()):
        greeting = b"HGT1" + VERSION.to_bytes(2, "little") + bytes(2 + 32) + bomb[:64].ljust(64, b"\0")
        frames = b"".join(
            framing.HEADER.pack(len(bomb), kind, flags, meta, 0, 0) + bomb
            for kind in (framing.CONTROL, framing.CALL, framing.DATA)
            for flags, meta in ((0, 0), (framing.VALUE, 0), (framing.VALUE, len(bomb)))
        )
        for said in (bomb * 3, frames, greeting + b"\0" * 32 + frames):
            with socket.socket(socket.AF_UNIX) as sock:
                sock.settimeout(20)
                sock.connect(str(path))
                try:
                    sock.sendall(said)
                    sock.shutdown(socket.SHUT_WR)
                except OSError:  # it was quicker to refuse
                    pass
                assert len(read_to_end(sock)) in (0, ANSWER_BYTES), "no more than the answer to a greeting"


CARELESS = """
import fractions, pickle
import headgate, httpx, pytest
from starlette.middleware import Middleware

class Middle:
    def __init__(self, app, careless):
        self.app, self.careless = app, careless

    async def __call__(self, scope, receive, send):
        if self.careless:
            pickle.loads(pickle.dumps(fractions.Fraction(1)))
        await self.app(scope, receive, send)

@pytest.mark.parametrize("careless", [{careless}])
def test_middlewares(careless):
    with headgate.start(http_options={{"port": 0, "middlewares": [Middleware(Middle, careless=careless)]}}) as client:
        assert httpx.get(client.http_address + "/-/healthz").status_code == 200
"""


@pytest.mark.parametrize("careless", [False, True])
def test_a_run_in_which_a_proxy_unpickles_fails(tmp_path: Path, careless: bool) -> None:
    """A run of its own, of a test that passes; the load of the middlewares themselves may be."""
    (tmp_path / "test_inner.py").write_text(CARELESS.format(careless=careless))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "-c", os.devnull, "."]
    paths = os.pathsep.join((str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")))
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=100
    )
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == careless, done.stdout
    complaints = [line for line in done.stdout.splitlines() if line.startswith("headgate-")]
    assert bool(complaints) == careless
    assert all(line.startswith("headgate-proxy ") and line.endswith(" fractions Fraction") for line in complaints)
