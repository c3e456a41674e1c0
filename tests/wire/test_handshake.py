"""wire/handshake.py: who is let in, who is not, and that nothing is left of those who are not.

Each side is tested against the bytes that another may send, on virtual time.
"""

from __future__ import annotations

import asyncio
import hmac
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import leftovers
import pytest
import virtual_time

from headgate.errors import ProtocolError
from headgate.wire.address import address_of, listen
from headgate.wire.greeting import TIMEOUT_S, VERSION, wire_name
from headgate.wire.handshake import MAX_FDS, accept, dial

TOKEN = b"t" * 32
GREETING = struct.Struct("<4sHH32s64s")
ANSWER = struct.Struct("<4sHH32sQ32s")
NONCE = b"n" * 32
NOBODY = 65534

#: Becomes another user, says so, and then dials or listens.
AS_SOMEBODY_ELSE = f"""
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
os.setgroups([]); os.setgid({NOBODY}); os.setuid({NOBODY})
if sys.argv[1] == "dial":
    sock.connect(sys.argv[2])
else:
    sock.bind(sys.argv[2]); sock.listen(); os.chmod(sys.argv[2], 0o777)
print("there", flush=True)
sys.stdin.read()
"""


def greeting(name: bytes = b"driver", magic: bytes = b"HGT1", version: int = VERSION) -> bytes:
    return GREETING.pack(magic, version, 0, NONCE, name)


def proof(role: bytes, dialer_nonce: bytes, acceptor_nonce: bytes, token: bytes = TOKEN) -> bytes:
    return hmac.digest(token, role + dialer_nonce + acceptor_nonce, "sha256")


class Raw:
    """The other side, byte by byte."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await asyncio.get_running_loop().sock_recv(self.sock, size - len(data))
            if not piece:
                break
            data += piece
        return data


def accepting(dialer: Callable[[Raw], Awaitable[object]]) -> tuple[str, list[int], bytes]:
    """What `accept` makes of that dialer: (name, fds, bytes that were left for the link)."""

    async def main() -> tuple[str, list[int], bytes]:
        ours, theirs = socket.socketpair()
        with ours, theirs:
            other = asyncio.ensure_future(dialer(Raw(theirs)))
            try:
                name, fds = await accept(ours, TOKEN)
                await other
                try:
                    return name, fds, ours.recv(100)
                except BlockingIOError:
                    return name, fds, b""
            finally:
                other.cancel()

    return virtual_time.run(main())


def dialing(
    path: Path, acceptor: Callable[[Raw], Awaitable[object]], name: str = "driver", fds: Sequence[int] = ()
) -> tuple[bytes, int]:
    """What `dial` makes of that acceptor: (bytes that were left for the link, pid)."""

    async def serve(listener: socket.socket) -> None:
        sock, _ = await asyncio.get_running_loop().sock_accept(listener)
        with sock:
            await acceptor(Raw(sock))

    async def main() -> tuple[bytes, int]:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            listener.setblocking(False)
            other = asyncio.ensure_future(serve(listener))
            try:
                sock, pid = await dial(str(path), TOKEN, name, fds)
                with sock:
                    assert not sock.getblocking()
                    await other
                    return sock.recv(100), pid
            finally:
                other.cancel()
                await asyncio.wait([other])

    return virtual_time.run(main())


async def honest_dialer(peer: Raw) -> None:
    await peer.send(greeting())
    _, _, _, nonce, _, _ = ANSWER.unpack(await peer.receive(ANSWER.size))
    await peer.send(proof(b"dialer", NONCE, nonce) + b"frames")


async def honest_acceptor(peer: Raw) -> None:
    _, _, _, nonce, _ = GREETING.unpack(await peer.receive(GREETING.size))
    await peer.send(ANSWER.pack(b"HGT1", VERSION, 0, NONCE, 77, proof(b"acceptor", nonce, NONCE)) + b"frames")
    assert await peer.receive(32) == proof(b"dialer", nonce, NONCE)


async def silence(peer: Raw) -> None:
    await asyncio.sleep(3600)


@pytest.fixture(autouse=True)
def every_descriptor_is_closed() -> Iterator[None]:
    before = leftovers.descriptors()
    yield
    assert leftovers.descriptors() == before


@pytest.fixture
def files() -> Iterator[list[int]]:
    """Four open files to pass along."""
    opened = [os.open("/dev/null", os.O_RDONLY) for _ in range(4)]
    yield opened
    for fd in opened:
        os.close(fd)


# --- those who belong together ---------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, MAX_FDS])
@pytest.mark.parametrize(
    "name", ["d", "iris#0001", "é" * 32, "x" * 65, "é" * 33], ids=["d", "iris", "full", "long", "long é"]
)
def test_two_of_one_instance_know_each_other(short_dir: Path, files: list[int], name: str, count: int) -> None:
    async def acceptor(peer: Raw) -> None:
        known, fds = await accept(peer.sock, TOKEN)
        assert known == wire_name(name)
        assert len(fds) == count
        assert not any(map(os.get_inheritable, fds))
        for fd in fds:
            os.close(fd)
        await peer.send(b"frames")

    assert dialing(short_dir / "s", acceptor, name, files[:count]) == (b"frames", os.getpid())


def test_what_follows_the_handshake_belongs_to_the_link(short_dir: Path) -> None:
    assert accepting(honest_dialer) == ("driver", [], b"frames")
    assert dialing(short_dir / "s", honest_acceptor) == (b"frames", 77)


def test_bytes_may_come_one_by_one(short_dir: Path) -> None:
    class Slow(Raw):
        async def send(self, data: bytes) -> None:
            for place in range(len(data)):
                await super().send(data[place : place + 1])
                await asyncio.sleep(0.001)

    assert accepting(lambda peer: honest_dialer(Slow(peer.sock)))[0] == "driver"
    assert dialing(short_dir / "s", lambda peer: honest_acceptor(Slow(peer.sock)))[1] == 77


def test_a_name_too_long_to_send_becomes_a_digest_of_its_own() -> None:
    assert wire_name("x" * 64) == "x" * 64
    digests = {wire_name("x" * 65), wire_name("x" * 66), wire_name("é" * 33)}

    assert len(digests) == 3
    assert all(len(digest.encode()) == 64 for digest in digests)


def meeting(address: str, fds: Sequence[int] = (), token: bytes = TOKEN) -> tuple[int, list[int], str]:
    """What two make of each other at a listener's address: (pid, fds that came, name)."""

    async def main() -> tuple[int, list[int], str]:
        loop = asyncio.get_running_loop()
        with listen(address) as listener:
            listener.setblocking(False)
            dialing = asyncio.ensure_future(dial(address_of(listener), token, "driver", fds))
            theirs, _ = await loop.sock_accept(listener)
            with theirs:
                try:
                    name, came = await accept(theirs, TOKEN)
                    ours, pid = await dialing
                    with ours:
                        await loop.sock_sendall(ours, b"frames")
                        assert await loop.sock_recv(theirs, 100) == b"frames"
                        assert is_prepared(ours) == is_prepared(theirs) == address.startswith("tcp")
                    return pid, came, name
                finally:
                    dialing.cancel()
                    await asyncio.wait([dialing])

    return asyncio.run(main())


def is_prepared(sock: socket.socket) -> bool:
    return sock.family != socket.AF_UNIX and bool(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))


def test_an_abstract_socket_is_as_good_as_a_path(files: list[int]) -> None:
    pid, fds, name = meeting("@headgate-test-handshake", files[:2])
    assert (pid, len(fds), name) == (os.getpid(), 2, "driver")
    for fd in fds:
        os.close(fd)


def test_over_tcp_no_descriptors_pass_and_a_pid_means_nothing(files: list[int]) -> None:
    assert meeting("tcp://127.0.0.1:0", files[:2]) == (0, [], "driver")


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "@headgate-test-handshake"])
def test_without_the_token_no_address_lets_anybody_in(address: str) -> None:
    with pytest.raises(ProtocolError, match="closed the connection"):  # the dialer is the first to see it
        meeting(address, token=b"guess" * 6)


# --- those who do not ------------------------------------------------------------------------------


def test_a_dialer_without_the_token_is_refused() -> None:
    async def dialer(peer: Raw) -> None:
        await peer.send(greeting())
        _, _, _, nonce, _, _ = ANSWER.unpack(await peer.receive(ANSWER.size))
        await peer.send(proof(b"dialer", NONCE, nonce, token=b"guess" * 6))

    with pytest.raises(ProtocolError, match="the dialer does not hold this instance's token"):
        accepting(dialer)


def test_an_acceptor_without_the_token_is_refused_and_told_nothing(short_dir: Path) -> None:
    heard = []

    async def acceptor(peer: Raw) -> None:
        _, _, _, nonce, _ = GREETING.unpack(await peer.receive(GREETING.size))
        forged = proof(b"acceptor", nonce, NONCE, token=b"guess" * 6)
        await peer.send(ANSWER.pack(b"HGT1", VERSION, 0, NONCE, 77, forged))
        heard.append(await peer.receive(1))

    with pytest.raises(ProtocolError, match=r"whoever listens on .* does not hold this instance's token"):
        dialing(short_dir / "s", acceptor)
    assert heard in ([], [b""])


def test_a_proof_that_is_sent_back_proves_nothing() -> None:
    async def dialer(peer: Raw) -> None:
        await peer.send(greeting())
        *_, theirs = ANSWER.unpack(await peer.receive(ANSWER.size))
        await peer.send(theirs)

    with pytest.raises(ProtocolError, match="does not hold this instance's token"):
        accepting(dialer)


def test_a_dialer_s_proof_is_none_of_an_acceptor(short_dir: Path) -> None:
    async def acceptor(peer: Raw) -> None:
        _, _, _, nonce, _ = GREETING.unpack(await peer.receive(GREETING.size))
        await peer.send(ANSWER.pack(b"HGT1", VERSION, 0, NONCE, 77, proof(b"dialer", nonce, NONCE)))

    with pytest.raises(ProtocolError, match="does not hold this instance's token"):
        dialing(short_dir / "s", acceptor)


def test_a_proof_of_another_time_proves_nothing() -> None:
    heard: list[bytes] = []

    async def overheard(peer: Raw) -> None:
        await peer.send(greeting())
        _, _, _, nonce, _, _ = ANSWER.unpack(await peer.receive(ANSWER.size))
        heard.append(proof(b"dialer", NONCE, nonce))
        await peer.send(heard[0])

    async def again(peer: Raw) -> None:
        await peer.send(greeting())
        await peer.receive(ANSWER.size)
        await peer.send(heard[0])

    assert accepting(overheard)[0] == "driver"
    with pytest.raises(ProtocolError, match="does not hold this instance's token"):
        accepting(again)


@pytest.mark.parametrize(
    ("hello", "why"),
    [
        (greeting(magic=b"HTTP"), "does not speak headgate's protocol"),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" + b" " * 100, "does not speak headgate's protocol"),
        (greeting(version=VERSION + 1), f"speaks wire version {VERSION + 1}, this process version {VERSION}"),
    ],
)
def test_a_dialer_of_another_kind_is_refused_unanswered(hello: bytes, why: str) -> None:
    heard = []

    async def dialer(peer: Raw) -> None:
        await peer.send(hello)
        heard.append(await peer.receive(1))

    with pytest.raises(ProtocolError, match=why):
        accepting(dialer)
    assert not any(heard)


@pytest.mark.parametrize(("magic", "version"), [(b"HTTP", VERSION), (b"HGT1", VERSION + 1)])
def test_an_acceptor_of_another_kind_is_refused(short_dir: Path, magic: bytes, version: int) -> None:
    async def acceptor(peer: Raw) -> None:
        _, _, _, nonce, _ = GREETING.unpack(await peer.receive(GREETING.size))
        await peer.send(ANSWER.pack(magic, version, 0, NONCE, 77, proof(b"acceptor", nonce, NONCE)))

    with pytest.raises(ProtocolError, match=r"protocol|wire version"):
        dialing(short_dir / "s", acceptor)


@pytest.mark.parametrize("size", [0, 1, GREETING.size - 1])
def test_a_dialer_that_leaves_half_way_is_no_dialer(size: int) -> None:
    async def dialer(peer: Raw) -> None:
        await peer.send(greeting()[:size])
        peer.sock.close()

    with pytest.raises(ProtocolError, match="closed the connection in the middle of the handshake"):
        accepting(dialer)


def test_an_acceptor_that_leaves_half_way_is_no_acceptor(short_dir: Path) -> None:
    async def acceptor(peer: Raw) -> None:
        await peer.receive(GREETING.size)

    with pytest.raises(ProtocolError, match="closed the connection in the middle of the handshake"):
        dialing(short_dir / "s", acceptor)


def test_more_descriptors_than_a_handshake_may_pass_are_refused_and_closed(files: list[int]) -> None:
    async def dialer(peer: Raw) -> None:
        socket.send_fds(peer.sock, [greeting()], files[: MAX_FDS + 1])

    with pytest.raises(ProtocolError, match="more file descriptors than a handshake may"):
        accepting(dialer)


def test_a_dialer_cannot_pass_descriptors_with_each_byte(files: list[int]) -> None:
    """It is refused at the first one too many, not when its greeting is complete."""

    async def dialer(peer: Raw) -> None:
        for place in range(3):
            socket.send_fds(peer.sock, [greeting()[place : place + 1]], files[:1])
            await asyncio.sleep(0.01)
        await asyncio.sleep(3600)

    with pytest.raises(ProtocolError, match="more file descriptors than a handshake may"):
        accepting(dialer)


def test_the_descriptors_of_a_dialer_that_is_refused_are_closed(files: list[int]) -> None:
    async def version(peer: Raw) -> None:
        socket.send_fds(peer.sock, [greeting(version=9)], files[:2])

    async def token(peer: Raw) -> None:
        socket.send_fds(peer.sock, [greeting()], files[:2])
        await peer.receive(ANSWER.size)
        await peer.send(b"\0" * 32)

    async def half(peer: Raw) -> None:
        socket.send_fds(peer.sock, [greeting()[:9]], files[:2])
        await asyncio.sleep(3600)

    for dialer in (version, token, half):
        with pytest.raises(ProtocolError):
            accepting(dialer)


# --- those who say nothing --------------------------------------------------------------------------


def seconds_of(call: Callable[[], Awaitable[Any]]) -> float:
    async def main() -> float:
        with pytest.raises(ProtocolError, match=f"within {TIMEOUT_S:g} s"):
            await call()
        return asyncio.get_running_loop().time()

    return virtual_time.run(main())


@pytest.mark.parametrize("said", [b"", greeting()[:-1], greeting(), greeting() + b"\0" * 31])
def test_a_dialer_that_falls_silent_is_given_up(said: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(said)
        assert seconds_of(lambda: accept(ours, TOKEN)) == pytest.approx(TIMEOUT_S)


def test_an_acceptor_that_says_nothing_is_given_up(short_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "s"))
        listener.listen()
        assert seconds_of(lambda: dial(str(short_dir / "s"), TOKEN, "d")) == pytest.approx(TIMEOUT_S)


def test_a_listener_whose_queue_stays_full_is_given_up(short_dir: Path) -> None:
    path = str(short_dir / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(path)
        listener.listen(0)
        first.connect(path)
        assert seconds_of(lambda: dial(path, TOKEN, "d")) == pytest.approx(TIMEOUT_S)


def test_a_machine_that_does_not_answer_holds_up_neither_the_loop_nor_the_dialer_for_long() -> None:
    async def main() -> None:
        turns = 0
        with socket.socket() as full:  # its queue is full: the kernel drops what else knocks
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            place = full.getsockname()
            with socket.create_connection(place):
                dialing = asyncio.ensure_future(dial(f"tcp://127.0.0.1:{place[1]}", TOKEN, "d"))
                while not dialing.done():
                    turns += 1
                    await asyncio.sleep(0.01)
        with pytest.raises(ProtocolError, match=f"within {TIMEOUT_S:g} s"):
            await dialing
        assert turns > 20

    asyncio.run(main())


def test_where_nobody_listens_over_tcp_is_an_error_at_once(free_port: int) -> None:
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(dial(f"tcp://127.0.0.1:{free_port}", TOKEN, "d"))


@pytest.mark.parametrize("address", ["", "control.sock", "tcp://", "tcp://host", "http://127.0.0.1:80"])
def test_what_is_no_address_is_not_dialled(address: str) -> None:
    with pytest.raises(ProtocolError, match="is not the address of a socket"):
        virtual_time.run(dial(address, TOKEN, "d"))


def test_where_nobody_listens_is_an_error_at_once(short_dir: Path) -> None:
    with pytest.raises(FileNotFoundError):
        virtual_time.run(dial(str(short_dir / "s"), TOKEN, "d"))
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "s"))
    with pytest.raises(ConnectionRefusedError):
        virtual_time.run(dial(str(short_dir / "s"), TOKEN, "d"))


# --- those who are somebody else ---------------------------------------------------------------------


@pytest.fixture
def somebody_else(short_dir: Path) -> Iterator[Callable[[str], None]]:
    """Another user's process that dials or listens on the test's socket."""
    if os.geteuid() != 0:
        pytest.skip("only root can start a process of another user")
    short_dir.chmod(0o777)
    command = [sys.executable, "-S", "-c", AS_SOMEBODY_ELSE]
    started: list[subprocess.Popen[bytes]] = []

    def start(how: str) -> None:
        pipe = subprocess.PIPE
        process = subprocess.Popen([*command, how, str(short_dir / "s")], stdin=pipe, stdout=pipe)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"

    yield start
    for process in started:
        process.communicate(timeout=20)


def test_another_user_s_process_is_not_let_in(
    short_dir: Path, somebody_else: Callable[[str], None]
) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_dir / "s"))
        (short_dir / "s").chmod(0o777)
        listener.listen()
        somebody_else("dial")
        sock, _ = listener.accept()
        with sock, pytest.raises(ProtocolError, match=f"runs as user {NOBODY}, this process as 0"):
            virtual_time.run(accept(sock, TOKEN))


def test_another_user_s_listener_is_not_greeted(
    short_dir: Path, somebody_else: Callable[[str], None]
) -> None:
    somebody_else("listen")
    with pytest.raises(ProtocolError, match=f"runs as user {NOBODY}, this process as 0"):
        virtual_time.run(dial(str(short_dir / "s"), TOKEN, "d"))
