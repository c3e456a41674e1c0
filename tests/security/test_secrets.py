"""What clients and users entrust to an instance is in no log, no process list, no page and nobody else's answer."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import re
import signal
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from promises import Promise
from running import eventually, instance_pids, is_alive, key_of, one_instance, output_in, pid_of

import headgate

pytestmark = pytest.mark.local("logs and files of Ray are Ray's")

FROM_CLIENTS = ("query", "authorization", "cookie", "header", "body", "data", "kwargs", "malformed")
FROM_USERS = ("argument", "config", "environment", "token")
#: A connection for each request.
HTTP = httpx.Client(timeout=20, limits=httpx.Limits(max_keepalive_connections=0))
OPTIONS = {"port": 0, "head_timeout_s": 0.5, "body_timeout_s": 0.5, "max_body_bytes": 100_000}


class Canaries:
    """A word for each place where a secret may be, that stands nowhere else."""

    def __init__(self) -> None:
        self._mark = f"CANARY{os.urandom(6).hex()}"
        for place in (*FROM_CLIENTS, *FROM_USERS):
            setattr(self, place, f"{self._mark}-{place}-")

    def __getattr__(self, place: str) -> str:
        raise AttributeError(place)

    def found_in(self, content: bytes | str) -> set[str]:
        """The places whose secrets are shown there, plainly or encoded."""
        text = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        return {name.decode() for name in re.findall(rb"%b-([a-z]+)-" % self._mark.encode(), text)}


class Holder:
    """Has a secret, gets secrets, and fails as it is told."""

    def __init__(self, secret: str, fails: bool = False) -> None:
        self.secret = secret
        self.environment = os.environ.get("IT_SECRET")
        if fails:
            raise ValueError("this constructor fails")

    def reconfigure(self, user_config: Any) -> None:
        self.user_config = user_config

    async def __call__(self, request: Any) -> Any:
        body = await request.body()
        match request.query_params.get("how"):
            case "raise":
                raise ValueError("this handler fails")
            case "exit":
                os._exit(3)
            case "segfault":
                ctypes.string_at(0)
            case "slow":
                await asyncio.sleep(30)
            case "block":
                time.sleep(1.3)
            case "object":
                return object()
            case "stream":
                return broken_stream(body)
            case "memory":
                return {"environment": self.environment, "secret": self.secret}
        return "done"


def broken_stream(body: bytes) -> Iterator[str]:
    yield "a part"
    raise RuntimeError("this stream breaks")


HOWS = ("", "raise", "exit", "segfault", "slow", "block", "object", "stream")


class Stage(NamedTuple):
    client: headgate.Client
    canary: Any
    log: Path
    answers: list[bytes]  # all that any client got

    @property
    def key(self) -> str:
        return key_of(self.client)

    def ask(self, path: str, how: str = "", method: str = "POST", **more: Any) -> int:
        """A request with a secret wherever there may be one; its status, 0 if the connection broke."""
        canary = self.canary
        headers = {
            "authorization": f"Bearer {canary.authorization}",
            "cookie": f"session={canary.cookie}",
            "x-api-key": canary.header,
            "accept": "application/json" if more.pop("json", False) else "*/*",
        }
        url = f"{self.client.http_address}{path}?how={how}&key={canary.query}"
        content = None if method == "GET" else canary.body
        try:
            answer = HTTP.request(method, url, headers={**headers, **more}, content=content)
        except httpx.TransportError:
            return 0
        self.answers.append(repr(answer.headers).encode() + answer.content)
        return answer.status_code

    def say(self, said: str, patience_s: float = 20.0) -> bytes:
        """Bytes that are no request, or not all of one."""
        host, _, port = str(self.client.http_address).removeprefix("http://").rpartition(":")
        received = b""
        with socket.create_connection((host, int(port)), patience_s) as sock, contextlib.suppress(OSError):
            sock.sendall(said.encode())
            while piece := sock.recv(65536):
                received += piece
        self.answers.append(received)
        return received


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    canary: Any = Canaries()
    log = tmp_path / "log"
    with contextlib.ExitStack() as stack:
        with output_in(log):
            client = stack.enter_context(one_instance(http_options={**OPTIONS, "admin_token": canary.token}))
        client.create_backend(
            "it", Holder, canary.argument,
            config={"num_replicas": 2, "user_config": {"key": canary.config}, "request_timeout_s": 0.5},
            env={"IT_SECRET": canary.environment},
        )  # fmt: skip
        client.create_endpoint("it", backend="it", route="/it", methods=["GET", "POST"])
        yield Stage(client, canary, log, [])


def at_once(function: Callable[..., object], arguments: list[tuple[Any, ...]]) -> None:
    with ThreadPoolExecutor(len(arguments)) as pool:
        for future in [pool.submit(function, *each) for each in arguments]:
            future.result()


def serve_all_faults(stage: Stage) -> int:
    """Each way in which a request may end; how many requests."""
    count = len(stage.answers)
    at_once(lambda how, json: stage.ask("/it", how, json=json), [(how, json) for how in HOWS for json in (False, True)])
    eventually(lambda: stage.ask("/it") == 200)
    for path, method in (
        ("/nothing", "GET"),
        ("/it", "PUT"),
        ("/it/", "POST"),
        ("/-/routes", "POST"),
        ("/-/what", "GET"),
    ):
        stage.ask(path, method=method)
    canary = stage.canary
    head = f"POST /it?key={canary.query} HTTP/1.1\r\nHost: a\r\nAuthorization: {canary.authorization}\r\n"
    broken = (
        f"{head}Bad {canary.malformed}: x\r\n\r\n",
        f"{head}Cookie : {canary.cookie}\r\n\r\n",
        f"{head}X: \x01{canary.header}\r\n\r\n",
        f"{head}Content-Length: {canary.malformed}\r\n\r\n",
        f"{head}Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n{canary.body}",
        f"{head}Transfer-Encoding: {canary.malformed}\r\n\r\n",
        f"{head}Transfer-Encoding: chunked\r\n\r\n{canary.body}\r\n",
        f"{head}Content-Length: 100001\r\n\r\n{canary.body}",
        f"{head}Content-Length: 1000\r\n\r\n{canary.body}",  # and no more
        f"{head}Cookie: {canary.cookie}",
        f"{head}X: {canary.header * 2000}\r\n\r\n",
        f"GET /it?{canary.query * 400} HTTP/1.1\r\nHost: a\r\n\r\n",
        f"GET /it?{canary.query} HTTP/9.9\r\nHost: a\r\n\r\n",
        f"{canary.malformed}\r\n\r\n",
        f"GET /%00{canary.malformed} HTTP/1.1\r\nHost: a\r\n\r\n",
    )
    at_once(stage.say, [(said,) for said in broken])
    return len(stage.answers) - count


def call_by_handle(stage: Stage) -> int:
    """The same for calls from Python: what the caller is told is his own, what others see is not."""
    handle = stage.client.get_handle("it")
    canary = stage.canary
    for how in HOWS:
        with contextlib.suppress(Exception):
            handle.call({"secret": canary.data, "how": how}, how=how, secret=canary.kwargs)
    with contextlib.suppress(Exception):
        handle.call({"secret": canary.data, "lock": threading.Lock()})
    with contextlib.suppress(Exception):
        handle.options(method_name=f"no_{canary.data}").call(canary.data)
    return len(HOWS) + 2


def kill_at_every_stage(stage: Stage) -> int:
    """kill -9 of each process while requests run."""
    kills = 0
    for title in ("headgate-rep", "headgate-proxy", "headgate-ctl"):
        pid = pid_of(stage.key, title)
        killing = threading.Timer(0.2, os.kill, (pid, signal.SIGKILL))
        killing.start()
        at_once(stage.ask, [("/it", "slow")] * 6)
        killing.join()
        kills += 1
        eventually(lambda pid=pid: not is_alive(pid))
        eventually(lambda: stage.ask("/it") == 200)
    eventually(lambda: stage.client.status().proxies)
    return kills


def fail_to_deploy(stage: Stage) -> int:
    client, canary = stage.client, stage.canary
    bad: list[dict[str, Any]] = [
        {"code": Holder, "args": (canary.argument, True)},
        {"code": Holder, "args": (canary.argument, threading.Lock())},
        {"code": Holder, "args": (canary.argument, 1, 2, 3)},
        {"code": "no.such:module", "args": (canary.argument,)},
        {"code": Holder, "args": (canary.argument,), "env": {"IT_SECRET": canary.environment, "A=B": "x"}},
        {"code": Holder, "args": (canary.argument,), "config": {"max_batch_size": 7, "user_config": canary.config}},
    ]
    for number, each in enumerate(bad):
        with pytest.raises(headgate.HeadgateError):
            client.create_backend(
                f"bad{number}", each["code"], *each["args"], config=each.get("config"),
                env=each.get("env", {"IT_SECRET": canary.environment}),
            )  # fmt: skip
    with pytest.raises(headgate.HeadgateError):
        client.update_backend("it", Holder, canary.argument, True)
    return len(bad) + 1


@pytest.mark.promise(
    "secrets: of clients and users, in no log, /proc, page, status or other client's answer, whatever fails"
)
def test_secrets_stay_where_they_belong(promise: Promise, stage: Stage) -> None:
    canary = stage.canary
    requests = calls = kills = deploys = 0
    for _ in range(promise.size(full=10, small=1)):
        requests += serve_all_faults(stage)
        calls += call_by_handle(stage)
        kills += kill_at_every_stage(stage)
        deploys += fail_to_deploy(stage)
    assert stage.ask("/it", "memory") == 200
    assert canary.found_in(stage.answers.pop()) == {"argument", "environment"}, "user code has what it was given"

    statuses = {int(found) for found in re.findall(r"HTTP/1.1 (\d+)|", " ".join(map(str, stage.answers))) if found}
    assert {400, 408, 413, 414, 431} <= statuses, statuses
    looked = look_around(stage)
    promise.says(f"{requests:,} requests, {calls} calls, {kills} kills, {deploys} failed deploys")
    promise.none_of(looked, "places that show one")


def look_around(stage: Stage) -> int:
    """Search everything that others may see; how many places."""
    client, canary = stage.client, stage.canary
    shown: dict[str, bytes] = {f"answer {number}": answer for number, answer in enumerate(stage.answers)}
    for name, answer in list(shown.items()):
        if b"'location': " in answer:  # a redirect leads its own client to the same query
            shown[name] = re.sub(rb"key=\S+", b"", answer)
    log = stage.log.read_bytes()
    assert b"this handler fails" in log
    assert b"this constructor fails" in log
    assert b"Fatal Python error" in log, "faulthandler's stack"
    shown["the log"] = log
    for pid in (os.getpid(), *instance_pids(stage.key)):
        for name in ("cmdline", "environ", "comm"):
            shown[f"/proc/{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    shown["status"] = repr(client.status()).encode()
    shown["client"] = repr(client).encode()
    for page in ("/-/routes", "/-/healthz", "/-/", "/nothing", "/it"):
        shown[page] = HTTP.get(f"{client.http_address}{page}").content
    kept: dict[str, set[str]] = {}
    for path in Path(stage.key).rglob("*"):
        if path.is_file():
            kept[str(path)] = canary.found_in(path.read_bytes())
    for where, content in shown.items():
        assert not canary.found_in(content), (where, context(content, canary))
    for where, found in kept.items():
        assert not found & {*FROM_CLIENTS, "token"}, where
        if found:
            assert stat.S_IMODE(os.stat(where).st_mode) == 0o600, where
    assert set.union(*kept.values()) <= {"argument", "config", "environment"}
    return len(shown) + len(kept)


def context(content: bytes, canary: Any) -> bytes:
    place = content.find(canary._mark.encode())
    return content[max(0, place - 300) : place + 100]


def test_an_answer_to_one_never_holds_what_another_sent(stage: Stage) -> None:
    """Errors, time-outs and broken streams of many at once: each answer speaks of its own request only."""
    marks: dict[int, bytes] = {}
    seen: dict[int, bytes] = {}

    def ask(number: int) -> None:
        marks[number] = f"MINE{number:04d}{os.urandom(8).hex()}".encode()
        how = ("", "raise", "slow", "object", "stream")[number % 5]
        url = f"{stage.client.http_address}{('/it', '/nothing')[number % 2]}?how={how}&mine={marks[number].decode()}"
        try:
            answer = HTTP.post(url, content=marks[number] * 50, headers={"x-request-id": marks[number].decode()})
            seen[number] = repr(answer.headers).encode() + answer.content
        except httpx.TransportError as error:
            seen[number] = repr(error).encode()

    at_once(ask, [(number,) for number in range(60)])
    assert len(seen) == 60
    for number, content in seen.items():
        assert not [other for other, mark in marks.items() if other != number and mark in content]
