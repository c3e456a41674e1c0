"""The load of the other tests sees what is wrong: no request is left out, no connection is closed unseen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from http_load import Answer, Load, get, load

GOOD = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"

#: What no client may take for an answer -> what is said of it.
MALFORMED = {
    b"HTTP/1.1 abc OK\r\ncontent-length: 0\r\n\r\n": "bad status line",
    b"200 OK\r\ncontent-length: 0\r\n\r\n": "bad status line",
    b"\r\n\r\n": "bad status line",
    b"HTTP/1.1 200 OK\r\n\r\n": "bad framing",
    b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n": "bad framing",
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab": "bad framing",
    b"HTTP/1.1 200 OK\r\nnot a header\r\n\r\n": "bad header",
    b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n": "bad framing",
    CHUNKED + b"x\r\n": "bad chunk size",
    CHUNKED + b"1\r\nabc": "bad end of a chunk",
    CHUNKED + b"0\r\nab": "bad end of a chunk",
    b"HTTP/1.1 200 OK\r\nlong: " + b"x" * 2**23: "LimitOverrunError",
    GOOD + GOOD: "not asked for",
    GOOD.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n") + b"more": "not asked for",
}


@asynccontextmanager
async def server(answer: Callable[[int], bytes], closes: bool = False) -> AsyncIterator[str]:
    """Its address. It answers its n-th request with answer(n), and `closes` the connection then."""
    count = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                count += 1
                writer.write(answer(count))
                if closes:
                    break
        except (OSError, EOFError):
            pass  # the client has gone
        finally:
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        host, port = listening.sockets[0].getsockname()
        yield f"http://{host}:{port}"


async def loaded(answer: Callable[[int], bytes], closes: bool = False, proxy_dies: bool = False) -> Load:
    async with server(answer, closes) as address, load(address, "/", proxy_dies=proxy_dies) as running:
        await asyncio.sleep(0.05)
    return running


def test_a_load_that_is_served_has_an_answer_for_each_request() -> None:
    running = asyncio.run(loaded(lambda number: GOOD))

    assert len(running.answers) == len(running.asked) == running.sent >= 5
    assert running.failed == {}
    assert running.closed == []


@pytest.mark.parametrize("malformed", MALFORMED, ids=range(len(MALFORMED)))
def test_one_malformed_answer_is_an_error_whatever_the_test_is_about(malformed: bytes) -> None:
    with pytest.raises(AssertionError, match=MALFORMED[malformed]):
        asyncio.run(loaded(lambda number: malformed if number == 3 else GOOD, proxy_dies=True))


def test_a_request_with_a_malformed_answer_is_a_failed_one() -> None:
    async def main() -> Load:
        async with server(lambda number: b"nonsense\r\n\r\n") as address:
            running = Load(address, "/", 100)
            task = asyncio.create_task(running.run())
            await asyncio.sleep(0.05)
            await running.finish()
            await task
        return running

    running = asyncio.run(main())
    assert len(running.failed) == running.sent >= 1
    assert all(one.is_lost for one in running.asked)
    assert running.failed["r0"] == Answer(0, {}, b"ValueError: bad status line 'nonsense'")


def test_a_server_that_closes_what_it_said_it_keeps_is_an_error() -> None:
    with pytest.raises(AssertionError, match="closed by a server that said it keeps them"):
        asyncio.run(loaded(lambda number: GOOD, closes=True))

    running = asyncio.run(loaded(lambda number: GOOD, closes=True, proxy_dies=True))
    assert running.failed == {}
    assert len(running.closed) >= 4


def test_a_server_that_says_it_closes_may_close() -> None:
    closing = GOOD.replace(b"OK\r\n", b"OK\r\nconnection: close\r\n")

    assert asyncio.run(loaded(lambda number: closing, closes=True)).closed == []


def test_a_latency_counts_from_when_the_request_was_due() -> None:
    """A client that is held up itself does not leave out what came to wait."""

    async def main() -> Load:
        async with server(lambda number: GOOD) as address, load(address, "/", 100) as running:
            time.sleep(0.3)
            await asyncio.sleep(0.05)
        return running

    running = asyncio.run(main())
    assert max(one.took_s for one in running.asked) >= 0.25
    assert all(one.due <= one.sent <= one.ended for one in running.asked)


def test_a_load_knows_how_fast_it_was() -> None:
    running = asyncio.run(loaded(lambda number: GOOD))

    assert 30 <= running.sent_per_s <= 200


def test_an_answer_alone_may_be_malformed_too() -> None:
    async def main() -> None:
        async with server(lambda number: b"HTTP/1.1 200\r\ncontent-length: 0\r\n\r\n") as address:
            await get(address, "/")

    with pytest.raises(ValueError, match="bad status line"):
        asyncio.run(main())
