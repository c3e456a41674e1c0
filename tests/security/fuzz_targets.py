"""What must hold for any bytes at all: for scripts/fuzz, and for the test that replays what it kept.

Each target takes bytes and raises AssertionError, or whatever escapes the code, if something is wrong.

    http        the proxy's reading half: no unexpected exception, no 5xx, the same however it is cut, nothing seen
                after a refusal, and llhttp sees the requests that the app sees
    framing     the frames of a link: the same however they are cut, only ProtocolError
    handshake   what a stranger may send to an acceptor: never let in, only ProtocolError or OSError, nothing left
"""

from __future__ import annotations

import ast
import asyncio
import functools
import os
import re
import socket
import zlib
from collections.abc import Callable
from pathlib import Path

import httptools
from http_in_memory import Outcome, Rig, Seen

from headgate.core import framing as framing_module
from headgate.core.framing import Framer
from headgate.errors import ProtocolError
from headgate.wire.handshake import accept

_BAD_WHITE_SPACE = re.compile(rb"[ \t][;=]|[;=][ \t]").search
CORPUS = Path(__file__).with_name("corpus")
AFTER = b"GET /after HTTP/1.1\r\nHost: a\r\n\r\n"
#: With small limits a fuzzer meets them.
_rig = Rig(max_head_bytes=400, max_target_bytes=100, max_header_fields=8, max_body_bytes=200)


def http(data: bytes) -> None:
    whole = _rig.run(data)
    _check(whole)
    for cut in (*_places(data), *_singles(data)):
        outcome = _rig.run(*cut)
        _check(outcome)
        assert same(whole, outcome), f"in one piece {whole}, as {cut!r:.500} {outcome}"
    if whole.refused:
        assert _rig.run(data, AFTER).seen == whole.seen, "a request was seen after a refusal"
    if not _is_local(whole):
        theirs, stopped = _by_llhttp(_without_upgrade(data))
        mine = [(each.method, _without_upgrade(each.body)) for each in whole.seen]
        if stopped and _BAD_WHITE_SPACE(data):  # around a chunk's extension: llhttp refuses what RFC 9112 §7.1.1 allows
            mine = mine[: len(theirs)]
        assert mine == [(each.method, each.body) for each in theirs[: len(mine)]], f"llhttp saw {theirs}, app {whole}"
        for one, other in zip(whole.seen, theirs, strict=False):
            target = _without_upgrade(one.target.encode()).decode()
            assert target == other.target or not other.target.startswith("/") or "#" in other.target


def _without_upgrade(data: bytes) -> bytes:
    """Upgrades are nothing to us, and the end to llhttp."""
    return re.sub(rb"(?i)upgrade", b"xxxxxxx", data)


def _places(data: bytes) -> list[tuple[bytes, bytes]]:
    """A few cuts in two, other ones for other data."""
    chance = zlib.crc32(data)
    places = {1 + (chance >> shift) % max(1, len(data) - 1) for shift in (0, 8, 16)} if len(data) > 1 else set()
    return [(data[:at], data[at:]) for at in sorted(places)]


def _singles(data: bytes) -> list[list[bytes]]:
    """In single bytes; that takes long, so not all."""
    return [[data[at : at + 1] for at in range(len(data))]] if zlib.crc32(data) % 8 == 0 else []


def _check(outcome: Outcome) -> None:
    assert not outcome.broken, "the connection failed in the proxy"
    assert all(status in (200, 400, 404, 405, 413, 414, 431) for status in outcome.statuses), outcome
    assert not outcome.statuses or not any(status in (400, 413, 414, 431) for status in outcome.statuses[:-1]), outcome


def _is_local(outcome: Outcome) -> bool:
    return 404 in outcome.statuses or 405 in outcome.statuses


def same(first: Outcome, second: Outcome) -> bool:
    """Of two faults the one that came first may be named.

    A body for nobody is not waited for: then the connection ends, if the body did not come with the head.
    """
    if not (_is_local(first) or _is_local(second)):
        if first.refused and second.refused:
            return first.seen == second.seen and first.statuses[:-1] == second.statuses[:-1]
        return first == second
    shorter = min(len(first.seen), len(second.seen))
    return first.seen[:shorter] == second.seen[:shorter]


class _Llhttp:
    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._target = self._body = b""

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self.seen.append(Seen(parser_of[self].get_method().decode(), self._target.decode("latin-1"), self._body))
        self._target = self._body = b""


parser_of: dict[_Llhttp, httptools.HttpRequestParser] = {}


def _by_llhttp(data: bytes) -> tuple[list[Seen], bool]:
    """The requests that llhttp makes out, and whether it refused the rest."""
    seen = _Llhttp()
    parser_of[seen] = parser = httptools.HttpRequestParser(seen)
    stopped = False
    try:
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        stopped = True
    del parser_of[seen]
    return seen.seen, stopped


def framing(data: bytes) -> None:
    limit = framing_module.MAX_FRAME_BYTES
    framing_module.MAX_FRAME_BYTES = 4 * framing_module.BIG
    try:
        whole = _frames(data)
        for cut in (*_places(data), *_singles(data)):
            assert _frames(*cut) == whole
    finally:
        framing_module.MAX_FRAME_BYTES = limit


def _frames(*pieces: bytes) -> tuple[list[tuple[int, ...]], list[bytes], str]:
    """The frames' heads, their contents, and how it ended."""
    framer, heads, contents = Framer(), [], []
    try:
        for piece in pieces:
            while piece:
                if framer.expected:
                    count = min(len(framer.big_buffer()), len(piece))
                    framer.big_buffer()[:count] = piece[:count]
                    frames = framer.big_filled(count)
                else:
                    count = len(piece)
                    frames = framer.feed(piece)
                piece = piece[count:]
                heads += [frame[:5] for frame in frames]
                contents += [bytes(frame[5][frame[6] : frame[7]]) for frame in frames]
                assert all(frame[2] <= frame[7] - frame[6] for frame in frames)
        framer.finish()
        ended = "whole"
    except ProtocolError as error:
        # Of an end inside a frame how much is missing may be known or not: it depends on the cut.
        ended = "inside" if "ended inside" in str(error) else str(error)
        if ended != "inside":  # frames that came in the same piece as a broken header are lost with it
            return [], [], ended
    return heads, contents, ended


def handshake(data: bytes) -> None:
    loop = _loop()
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
        try:
            loop.run_until_complete(accept(ours, b"t" * 32))
        except (ProtocolError, OSError):
            pass
        else:
            raise AssertionError("a stranger was let in")
    assert len(os.listdir("/proc/self/fd")) == before, "a file descriptor was left open"


@functools.cache
def _loop() -> asyncio.AbstractEventLoop:
    """One for all, until `close`."""
    return asyncio.new_event_loop()


def close() -> None:
    """Let go of what the targets keep."""
    if _loop.cache_info().currsize:
        _loop().close()
        _loop.cache_clear()


TARGETS: dict[str, Callable[[bytes], None]] = {"http": http, "framing": framing, "handshake": handshake}


def kept(target: str) -> list[bytes]:
    """The kept corpus: a file with one literal in each line."""
    path = CORPUS / f"{target}.txt"
    return [ast.literal_eval(line) for line in path.read_text().splitlines()] if path.exists() else []
