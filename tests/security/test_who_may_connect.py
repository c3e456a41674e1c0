"""Who may connect to the sockets of an instance, what lies open for others, and what its own pages tell whom."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import itertools
import json
import os
import pickle
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import leftovers
import needs
import pytest
from hosts import ip
from plain_sockets import read_to_end
from promises import Promise
from running import eventually, instance_pids, key_of, one_instance

import headgate
from headgate.core import framing
from headgate.core.state import Snapshot
from headgate.engine import directory
from headgate.proxy import admin
from headgate.wire.greeting import VERSION
from headgate.wire.handshake import MAX_FDS, dial

pytestmark = pytest.mark.local(
    "the run directory is the local engine's; tests/ray/test_ray_security.py has Ray's ports"
)

START = {"http_options": {"port": 0}}
GREETING = struct.Struct("<4sHH32s64s")
ANSWER = struct.Struct("<4sHH32sQ32s")
NOBODY = 65534
#: How long one may take who says nothing.
SILENCE_S = 1.0


@pytest.fixture
def instance(client: headgate.Client) -> headgate.Client:
    """With something to serve, so that there are sockets of replicas."""
    client.create_backend("it", lambda request: "done", config={"num_replicas": 2})
    client.create_endpoint("it", backend="it", route="/it")
    return client


def get(client: headgate.Client, path: str = "/it", method: str = "GET", **headers: str) -> httpx.Response:
    return httpx.request(method, f"{client.http_address}{path}", headers=headers, timeout=20)


def sockets(client: headgate.Client) -> list[str]:
    found = sorted(str(path) for path in Path(key_of(client)).rglob("*") if path.is_socket())
    assert len(found) >= 3, "the controller's, and one of each replica"
    return found


# --- the challenge -----------------------------------------------------------------------------------


class It:
    """A backend with everything that may hold a secret."""

    def __init__(self, argument: str) -> None:
        self.argument = argument

    def reconfigure(self, user_config: str) -> None:
        self.user_config = user_config

    def __call__(self, request: Any) -> str:
        return "done"


class Stranger:
    """A process of this user that knows all but the token."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SILENCE_S * 20)
        self.sock.connect(path)
        self.nonce = os.urandom(32)

    def greet(self, magic: bytes = b"HGT1", version: int = VERSION, fds: int = 0) -> None:
        hello = GREETING.pack(magic, version, 0, self.nonce, b"driver")
        with open(os.devnull, "rb") as file:
            socket.send_fds(self.sock, [hello], [file.fileno()] * fds)

    def answer(self) -> tuple[bytes, bytes]:
        """The acceptor's nonce and its proof."""
        received = b""
        while len(received) < ANSWER.size:
            piece = self.sock.recv(ANSWER.size - len(received))
            assert piece
            received += piece
        _, _, _, nonce, _, proof = ANSWER.unpack(received)
        return nonce, proof

    def prove(self, token: bytes, role: bytes = b"dialer") -> bytes:
        nonce, _ = self.answer()
        proof = hmac.digest(token, role + self.nonce + nonce, "sha256")
        self.sock.sendall(proof)
        return proof

    def end(self) -> bytes:
        """What still comes until the other side closes the connection."""
        return read_to_end(self.sock)


def wrong_token(stranger: Stranger, token: bytes) -> None:
    stranger.greet()
    stranger.prove(os.urandom(32))


def wrong_role(stranger: Stranger, token: bytes) -> None:
    stranger.greet()
    stranger.prove(token, b"acceptor")


def replayed(stranger: Stranger, token: bytes) -> None:
    """All that an honest dialer said to the same socket a moment ago."""
    honest = Stranger(stranger.path)
    honest.greet()
    proof = honest.prove(token)
    honest.sock.close()
    stranger.nonce = honest.nonce
    stranger.greet()
    stranger.answer()
    stranger.sock.sendall(proof)


def reflected(stranger: Stranger, token: bytes) -> None:
    stranger.greet()
    stranger.sock.sendall(stranger.answer()[1])


def reflected_from_elsewhere(stranger: Stranger, token: bytes) -> None:
    """The stranger has another connection prove the challenge of this one."""
    stranger.greet()
    nonce, _ = stranger.answer()
    other = Stranger(stranger.path)
    other.nonce = nonce
    other.greet()
    stranger.sock.sendall(other.answer()[1])
    other.sock.close()


def truncated(stranger: Stranger, token: bytes) -> None:
    stranger.sock.sendall(GREETING.pack(b"HGT1", VERSION, 0, stranger.nonce, b"driver")[:-1])
    stranger.sock.shutdown(socket.SHUT_WR)


def truncated_proof(stranger: Stranger, token: bytes) -> None:
    stranger.greet()
    nonce, _ = stranger.answer()
    stranger.sock.sendall(hmac.digest(token, b"dialer" + stranger.nonce + nonce, "sha256")[:-1])
    stranger.sock.shutdown(socket.SHUT_WR)


def other_version(stranger: Stranger, token: bytes) -> None:
    stranger.greet(version=VERSION + 1)


def version_zero(stranger: Stranger, token: bytes) -> None:
    stranger.greet(version=0)


def other_protocol(stranger: Stranger, token: bytes) -> None:
    stranger.sock.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".ljust(GREETING.size))


def too_many_descriptors(stranger: Stranger, token: bytes) -> None:
    stranger.greet(fds=MAX_FDS + 1)


def a_hundred_descriptors(stranger: Stranger, token: bytes) -> None:
    stranger.greet(fds=100)


def silence(stranger: Stranger, token: bytes) -> None:
    pass


def silence_later(stranger: Stranger, token: bytes) -> None:
    stranger.greet(fds=MAX_FDS)


def oversized_frame(stranger: Stranger, token: bytes) -> None:
    """Of one who does hold the token."""
    stranger.greet()
    stranger.prove(token)
    with contextlib.suppress(OSError):
        stranger.sock.sendall(
            framing.HEADER.pack(framing.MAX_FRAME_BYTES + 1, framing.CONTROL, 0, 0, 0, 0) + bytes(10**6)
        )


def no_frame(stranger: Stranger, token: bytes) -> None:
    stranger.greet()
    stranger.prove(token)
    with contextlib.suppress(OSError):
        stranger.sock.sendall(b"\xff" * 4096)


BEFORE_THE_ANSWER: tuple[Callable[[Stranger, bytes], None], ...] = (
    truncated, other_version, version_zero, other_protocol, too_many_descriptors, a_hundred_descriptors, silence,
)  # fmt: skip
AFTER_IT = (
    wrong_token, wrong_role, replayed, reflected, reflected_from_elsewhere, truncated_proof, silence_later,
    oversized_frame, no_frame,
)  # fmt: skip


def descriptors_of(client: headgate.Client) -> dict[int, int]:
    return {pid: len(leftovers.descriptors(pid)) for pid in instance_pids(key_of(client))}


@pytest.mark.promise("unix sockets: who does not prove to hold the token is told nothing and closed in 1 s")
def test_strangers_on_the_sockets_are_refused(promise: Promise, instance: headgate.Client) -> None:
    token = directory.read_token(key_of(instance))
    assert get(instance).text == "done"
    before = descriptors_of(instance)
    longest, tries = 0.0, 0
    for _ in range(promise.size(full=20, small=1)):
        waiting = []
        for path, attempt in itertools.product(sockets(instance), (*BEFORE_THE_ANSWER, *AFTER_IT)):
            stranger = Stranger(path)
            attempt(stranger, token)
            waiting.append((attempt, stranger, time.monotonic()))
            tries += 1
        assert get(instance).text == "done"
        for attempt, stranger, begun in waiting:
            said = stranger.end()
            expected = (0, ANSWER.size) if attempt is silence_later else (0,)
            assert len(said) in expected, (attempt, said)
            longest = max(longest, time.monotonic() - begun)
            stranger.sock.close()
        assert get(instance).text == "done"
    promise.none_of(tries, "strangers let in")
    promise.within(longest, SILENCE_S + 0.5, "the last was closed after")
    eventually(lambda: descriptors_of(instance) == before)


def test_one_that_holds_the_token_is_let_in(instance: headgate.Client) -> None:
    """So that the test above does not pass because nobody ever is."""
    token = directory.read_token(key_of(instance))

    async def reach(path: str) -> None:
        sock, pid = await dial(path, token, "test")
        with sock:
            assert pid in instance_pids(key_of(instance))

    for path in sockets(instance):
        asyncio.run(reach(path))


# --- other users -------------------------------------------------------------------------------------

AS_NOBODY = f"""
import os, socket, sys
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
for path in sys.argv[1:]:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    try:
        sock.connect(path)
        sock.sendall(b"HGT1" + ({VERSION}).to_bytes(2, "little") + bytes(98))
        print("connected, heard", len(sock.recv(1000)))
    except PermissionError:
        print("no way in")
    except OSError:
        print("connected, heard 0")
"""


@pytest.mark.promise("unix sockets: another user finds no way in, and is refused by uid where modes would let him")
def test_another_user_is_refused(promise: Promise, instance: headgate.Client) -> None:
    needs.root()
    paths = sockets(instance)
    promise.size(full=len(paths), small=len(paths))
    assert as_nobody(paths) == ["no way in"] * len(paths)

    top = Path(key_of(instance))
    opened = [*top.parents[:2], top]
    assert opened[0].stat().st_mode & 0o777 == 0o700
    before = {path: path.stat().st_mode & 0o777 for path in [*opened, *map(Path, paths)]}
    try:
        for path in before:
            path.chmod(0o777)
        assert as_nobody(paths) == ["connected, heard 0"] * len(paths)
    finally:
        for path, mode in before.items():
            path.chmod(mode)
    assert get(instance).text == "done"
    promise.none_of(2 * len(paths), "connections of another user let in")


def as_nobody(paths: list[str]) -> list[str]:
    done = subprocess.run([sys.executable, "-S", "-c", AS_NOBODY, *paths], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.promise("the run directory: 0700, and 0600 for all in it, whatever the umask is")
def test_what_is_on_disk_is_the_users_own(promise: Promise) -> None:
    seen: dict[Path, int] = {}
    for umask in (0, 0o022):
        before = os.umask(umask)
        try:
            with one_instance(detached=True, **START) as client:
                client.create_backend("it", It, "argument", config={"user_config": "config"})
                client.create_endpoint("it", backend="it", route="/it")
                client.update_backend_config("it", {"num_replicas": 2})
                assert get(client).text == "done"
                top = Path(key_of(client))
                seen.update({path: path.lstat().st_mode for path in (top.parent, top, *top.rglob("*"))})
        finally:
            os.umask(before)
    for path, mode in seen.items():
        assert stat.S_IMODE(mode) == (0o700 if stat.S_ISDIR(mode) else 0o600), (path, stat.filemode(mode))
    kinds = {stat.S_IFMT(mode) for mode in seen.values()}
    assert kinds == {stat.S_IFDIR, stat.S_IFREG, stat.S_IFSOCK}
    promise.none_of(len(seen), "files and folders open to others")


@pytest.mark.promise("the run directory: one that others made, own or may enter is refused")
def test_a_place_that_is_not_ours_is_refused(
    promise: Promise, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    place = short_dir / "headgate"
    refused = 0

    def start() -> None:
        nonlocal refused
        with pytest.raises(headgate.InstanceError, match="not a private directory of this user"):
            headgate.start(detached=True, **START)
        refused += 1

    for mode in (0o755, 0o770, 0o777, 0o1777, 0o701):
        place.mkdir()
        place.chmod(mode)
        start()
        place.rmdir()
    (short_dir / "elsewhere").mkdir(mode=0o700)
    place.symlink_to("elsewhere")
    start()
    place.unlink()
    place.touch(mode=0o600)
    with pytest.raises(headgate.InstanceError):
        headgate.start(**START)
    place.unlink()
    place.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(place, NOBODY, NOBODY)
        start()
    promise.none_of(refused, "starts in such a place")


# --- the token ---------------------------------------------------------------------------------------


@pytest.mark.promise("the token: in memory and one 0600 file, nowhere else")
def test_the_token_is_nowhere_to_be_seen(
    promise: Promise, instance: headgate.Client, capfd: pytest.CaptureFixture[str]
) -> None:
    token = directory.read_token(key_of(instance))
    secrets = [token, token.hex().encode(), base64.b64encode(token), base64.urlsafe_b64encode(token).rstrip(b"=")]
    secrets += [repr(token)[2:-1].encode(), token.hex().upper().encode()]
    shown: dict[str, bytes] = {}
    for pid in (os.getpid(), *instance_pids(key_of(instance))):
        for name in ("cmdline", "environ", "comm", "maps"):
            shown[f"/proc/{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    for handle in (instance.get_handle("it"), instance.get_handle("it", sync=False)):
        shown[repr(handle)] = pickle.dumps(handle)
    shown["status"] = repr(instance.status()).encode()
    shown["client"] = repr(vars(instance)).encode() + repr(instance).encode()
    for page in ("/-/routes", "/-/healthz", "/-/", "/nothing"):
        shown[page] = get(instance, page).content
    for path in Path(key_of(instance)).rglob("*"):
        if path.is_file() and path.name != directory.TOKEN:
            shown[str(path)] = path.read_bytes()
    stranger = Stranger(sockets(instance)[0])
    wrong_token(stranger, token)
    stranger.end()
    stranger.sock.close()
    said = capfd.readouterr()
    shown["the log"] = (said.out + said.err).encode()
    for where, content in shown.items():
        assert not any(secret in content for secret in secrets), where
    promise.none_of(len(shown), "places that show it")


# --- listening ---------------------------------------------------------------------------------------


@pytest.mark.promise("everything listens on 127.0.0.1 or in the run directory unless told otherwise")
def test_nothing_listens_elsewhere(promise: Promise, instance: headgate.Client) -> None:
    instance.update_backend_config("it", {"num_replicas": 3})
    assert get(instance).text == "done"
    tcp, unix = listening(instance_pids(key_of(instance)))
    port = int(str(instance.http_address).rpartition(":")[2])
    assert tcp == {("127.0.0.1", port)}
    assert unix
    assert all(path.startswith(key_of(instance) + "/") for path in unix), unix
    promise.none_of(len(tcp) + len(unix), "listening sockets elsewhere")


def listening(pids: list[int]) -> tuple[set[tuple[str, int]], set[str]]:
    """(addresses and ports, unix addresses) on which these processes listen, or take datagrams."""
    inodes = set()
    for pid in pids:
        inodes |= {target[8:-1] for target in leftovers.descriptors(pid).values() if target.startswith("socket:[")}
    tcp, unix = set(), set()
    for table in ("tcp", "tcp6", "udp", "udp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            fields = line.split()
            address, _, port = fields[1].rpartition(":")
            if fields[9] in inodes and (table.startswith("udp") or fields[3] == leftovers.LISTEN):
                tcp.add((shown(address), int(port, 16)))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split()
        accepts = int(fields[3], 16) & 0x10000
        if fields[6] in inodes and accepts:
            unix.add(fields[7] if len(fields) > 7 else "")
    return tcp, unix


def shown(address: str) -> str:
    words = struct.unpack(f"={len(address) // 8}I", bytes.fromhex(address))
    packed = struct.pack(f">{len(words)}I", *words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


# --- the pages under /-/ -----------------------------------------------------------------------------

ASK = """
import http.client, json, sys
host, port, asked = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
found = []
for method, path, headers in asked:
    connection = http.client.HTTPConnection(host, port, timeout=20)
    connection.request(method, path, body=b"x=1" if method in ("POST", "PUT", "PATCH") else None, headers=headers)
    answer = connection.getresponse()
    found.append([answer.status, answer.read().decode("latin-1")])
    connection.close()
print(json.dumps(found))
"""
#: What anybody who reaches the server may see.
OPEN = {"/-/healthz", "/-/routes", "/-/metrics"}
PAGES = (
    "/-/healthz", "/-/routes", "/-/metrics", "/-/", "/-/status", "/-/state", "/-/replicas", "/-/backends", "/-/config",
    "/-/debug", "/-/dashboard", "/-/stacks", "/-/logs", "/-/env", "/-/shutdown", "/-/drain", "/-/../it", "/-/healthz/",
    "/-/%72outes",
)  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


@pytest.fixture
def outside() -> Iterator[Callable[..., list[tuple[int, str]]]]:
    """Asks from another host, a network namespace with an address of its own, for the server at 10.78.0.1."""
    needs.root()
    name, cable = f"hgs{os.getpid()}", f"hgv{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        ip("address", "add", "10.78.0.1/24", "dev", cable)
        ip("link", "set", cable, "up")
        ip("-n", name, "address", "add", "10.78.0.2/24", "dev", "eth0")
        ip("-n", name, "link", "set", "eth0", "up")

        def ask(port: int, asked: list[tuple[str, str, dict[str, str]]]) -> list[tuple[int, str]]:
            command = [
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-S",
                "-c",
                ASK,
                "10.78.0.1",
                str(port),
                json.dumps(asked),
            ]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
            if done.returncode:
                raise OSError(done.stderr)
            return [(status, body) for status, body in json.loads(done.stdout)]

        yield ask
    finally:
        subprocess.run(["ip", "link", "del", cable], capture_output=True)
        ip("netns", "del", name)


@pytest.mark.promise("/-/ pages change nothing, and show strangers health, routes and metrics only")
def test_pages_for_strangers(promise: Promise, outside: Callable[..., list[tuple[int, str]]]) -> None:
    secret = "canary-" + os.urandom(4).hex()
    with one_instance(http_options={"host": "0.0.0.0", "port": 0, "admin_token": secret}) as client:
        client.create_backend("it", It, secret, config={"user_config": secret}, env={"IT": secret})
        client.create_endpoint("it", backend="it", route="/it")
        port = int(str(client.http_address).rpartition(":")[2])
        before = client.status()
        disguises = ({}, {"X-Forwarded-For": "127.0.0.1"}, {"Host": "localhost"}, {"Authorization": "Bearer guess"})
        asked = [(method, page, headers) for page in PAGES for method in METHODS for headers in disguises]
        found = outside(port, asked)
        for (method, page, _), (status, body) in zip(asked, found, strict=True):
            if status == 200:
                assert page in OPEN or page == "/-/%72outes", f"{page} is open to everybody"
                assert method in ("GET", "HEAD"), f"{page} takes {method}"
            else:
                assert status in (400, 401, 403, 404, 405), (method, page, status)
            assert secret not in body
            assert key_of(client) not in body
            for replica in before.replicas:
                assert str(replica.pid) not in body.replace(str(port), "")
        after = client.status()
        assert (after.endpoints, after.backends, after.replicas, after.proxies) == (
            before.endpoints, before.backends, before.replicas, before.proxies,
        )  # fmt: skip
        assert outside(port, [("GET", "/it", {})]) == [(200, "done")]
        promise.none_of(len(found), "requests that changed or showed more")


def test_an_instance_that_was_not_told_is_not_reached_from_outside(
    instance: headgate.Client, outside: Callable[..., list[tuple[int, str]]]
) -> None:
    port = int(str(instance.http_address).rpartition(":")[2])
    with pytest.raises(OSError, match="Connection refused"):
        outside(port, [("GET", "/it", {})])


def test_all_pages_are_known_here() -> None:
    """A new page under /-/ gets an entry in PAGES, and is in OPEN only if it shows no more than counts."""
    assert admin.PREFIX == "/-/"
    text = admin.page("/-/nothing", "GET", Snapshot(), False).body.decode()
    for page in [word.strip(";,.'") for word in text.split() if word.startswith("/-/")]:
        assert page in PAGES
