"""Nothing that came over HTTP, and nothing from a stranger on a socket, is ever unpickled.

Every process of the instance carries an audit hook that writes down each look-up of a name that a
pickle asks for. The pickles that are sent would make a folder, if anybody read them.
"""

from __future__ import annotations

import base64
import itertools
import os
import pickle
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes

import httpx
import pytest
from running import key_of, one_instance, pid_of

import headgate
from headgate.core import framing
from headgate.wire.handshake import VERSION

#: The hook gets into processes by the environment, and those of Ray's workers have the node's.
pytestmark = pytest.mark.local("the audit hook does not get into Ray's workers")

HOOK = """
import os, sys

def write_down(event, arguments, path=os.environ["HEADGATE_TEST_PICKLES"]):
    if event == "pickle.find_class":
        with open("/proc/self/comm") as comm, open(path, "a") as log:
            print(comm.read().strip(), *arguments, file=log, flush=True)

sys.addaudithook(write_down)
"""
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
    log: Path

    @property
    def address(self) -> str:
        return str(self.client.http_address)

    def bombs(self) -> list[bytes]:
        return [pickle.dumps(Bomb(self.made), protocol) for protocol in (0, 2, 5)]

    def looked_up(self) -> list[str]:
        """What a pickle asked for: "process module name" each."""
        return self.log.read_text().splitlines() if self.log.exists() else []


def reads_all(request: Any) -> Any:
    """A handler that touches whatever a request has, and sends the body back."""
    from starlette.responses import Response

    seen = repr([request.url, dict(request.query_params), dict(request.headers), dict(request.cookies)])
    return Response(bytes(request.data), headers={"x-seen": str(len(seen))})


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("hook")
    (folder / "sitecustomize.py").write_text(HOOK)
    log = folder / "log"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADGATE_TEST_PICKLES", str(log))
        patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        with one_instance(http_options={"port": 0}) as client:
            client.create_backend("reads", reads_all)
            client.create_endpoint("reads", backend="reads", route="/reads/{rest:path}", methods=["GET", "POST", "PUT"])
            yield Stage(client, folder / "made", log)


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
        assert b"HEADGATE_TEST_PICKLES=" in environ
    assert stage.looked_up(), "the replica, forked like the others, has read its code"


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
    url = httpx.URL(stage.address)
    with socket.create_connection((url.host, url.port or 80), timeout=20) as sock:
        sock.sendall(data)
        return answered(sock)


def answered(sock: socket.socket) -> bytes:
    received = b""
    try:
        while piece := sock.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    return received


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
                assert len(answered(sock)) in (0, ANSWER_BYTES), "no more than the answer to a greeting"
