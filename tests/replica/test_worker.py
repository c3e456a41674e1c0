"""The worker behind its links: frames in, frames out, on virtual time; plain code runs on the loop here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import msgspec
import pytest
from replica_rig import HEAD, Rig, RouterEnd, pack, served
from starlette.responses import JSONResponse, StreamingResponse

import headgate
from headgate.core import framing
from headgate.core.state import Settings
from headgate.wire import payload
from headgate.wire.greeting import wire_name
from headgate.wire.link import WINDOW_BYTES


def echo(request: Any) -> Any:
    return request.data


async def slow_echo(request: Any) -> Any:
    await asyncio.sleep(1.0)
    return await request.body()


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


@served(echo)
async def test_a_plain_handler_answers(rig: Rig) -> None:
    link = await rig.link()
    link.http(3, b"body")
    assert await link.end(3) == (framing.REPLY, 200, b"body")
    assert link.page[3] == 1


@served(slow_echo, max_concurrent_queries=100)
async def test_async_handlers_run_side_by_side(rig: Rig) -> None:
    link = await rig.link()
    for slot in range(20):
        link.http(slot, b"%d" % slot)
    for slot in range(20):
        assert await link.end(slot) == (framing.REPLY, 200, b"%d" % slot)
    assert asyncio.get_running_loop().time() < 1.2


@served(slow_echo, max_concurrent_queries=2)
async def test_the_limit_holds_over_all_links_and_rooms_go_in_turn(rig: Rig) -> None:
    one, two = await rig.link("one"), await rig.link("two")
    one.http(0)
    one.http(1)
    await asyncio.sleep(0.1)
    one.http(2)
    two.http(0)
    await asyncio.sleep(0.1)
    assert one.ends()[2][0] == two.ends()[0][0] == framing.BUSY
    await asyncio.sleep(2.0)
    assert [kind for kind, *_ in one.got].count(framing.ROOM) == 1
    assert [kind for kind, *_ in two.got].count(framing.ROOM) == 1
    assert rig.worker.admission.reserved == 2


class Raises:
    def __call__(self, request: Any) -> Any:
        raise {"value": ValueError, "exit": SystemExit, "interrupt": KeyboardInterrupt, "stop": StopIteration}[
            request.data.decode()
        ]("on purpose")

    def fine(self, request: Any) -> str:
        return "fine"

    def _hidden(self, request: Any) -> str:
        return "hidden"


@served(Raises)
async def test_whatever_a_handler_raises_is_its_own_request_s_500(rig: Rig) -> None:
    link = await rig.link()
    names = {
        b"value": b"ValueError",
        b"exit": b"SystemExit",
        b"interrupt": b"KeyboardInterrupt",
        b"stop": b"StopIteration",
    }
    for slot, (body, name) in enumerate(names.items()):
        link.http(slot, body)
        assert await link.end(slot) == (framing.ERROR, 500, name + b": on purpose")
    link.http(9, method="fine")
    assert await link.end(9) == (framing.REPLY, 200, b"fine")


@served(Raises)
async def test_methods_that_requests_may_not_call_are_not_found(rig: Rig) -> None:
    link = await rig.link()
    for slot, name in enumerate(["_hidden", "nothing", "reconfigure", "__init__"]):
        link.http(slot, method=name)
        assert (await link.end(slot))[:2] == (framing.ERROR, 404)


async def raise_cancelled(request: Any) -> Any:
    raise asyncio.CancelledError("my own")


@served(raise_cancelled)
async def test_a_cancelled_error_of_the_handler_s_own_is_a_500(rig: Rig) -> None:
    link = await rig.link()
    link.http(0)
    assert (await link.end(0))[:2] == (framing.ERROR, 500)


cancelled: list[str] = []


async def notes_cancel(request: Any) -> None:
    try:
        await asyncio.sleep(100)
    except asyncio.CancelledError:
        cancelled.append(request.request_id)
        raise


@served(notes_cancel)
async def test_a_cancel_reaches_an_async_handler_and_frees_its_slot(rig: Rig) -> None:
    cancelled.clear()
    link = await rig.link()
    link.http(7)
    await asyncio.sleep(0.1)
    link.frame(framing.CANCEL, 7)
    assert (await link.end(7))[:2] == (framing.ERROR, 499)
    assert cancelled == ["id7"]
    assert rig.worker.admission.held == 0


@served(notes_cancel)
async def test_a_router_that_goes_away_cancels_its_requests(rig: Rig) -> None:
    cancelled.clear()
    link = await rig.link()
    link.http(1)
    link.http(2)
    await asyncio.sleep(0.1)
    link.abort()
    await asyncio.sleep(0.1)
    assert sorted(cancelled) == ["id1", "id2"]
    assert rig.worker.admission.held == 0


@served(echo)
async def test_what_was_cancelled_or_expired_while_it_waited_never_starts(rig: Rig) -> None:
    link = await rig.link()
    hold = list(rig.plain.queued)
    assert hold == []
    put, rig.plain.put = rig.plain.put, hold.append  # type: ignore[method-assign]
    link.http(0)
    link.http(1, ms=1)
    await asyncio.sleep(0.01)
    link.frame(framing.CANCEL, 0)
    await asyncio.sleep(0.01)
    import time

    time.sleep(0.002)  # the deadline is on the real clock
    for work in hold:
        put(work)
    assert (await link.end(0))[:2] == (framing.ERROR, 499)
    assert (await link.end(1))[:2] == (framing.ERROR, 504)
    assert link.page[0] == link.page[1] == 0


@headgate.accept_batch
def sizes(requests: list[Any]) -> list[int]:
    return [len(requests)] * len(requests)


@served(sizes, max_batch_size=3, max_concurrent_queries=10)
async def test_what_arrives_together_is_batched_up_to_the_limit(rig: Rig) -> None:
    link = await rig.link()
    for slot in range(4):
        link.http(slot)
    answers = [(await link.end(slot))[2] for slot in range(4)]
    assert answers == [b"3", b"3", b"3", b"1"]


async def held_up(rig: Rig, requests: int) -> tuple[RouterEnd, Callable[[Any], None], list[Any]]:
    """A link with so many requests, how to let the plain thread go on, and what it is held up before."""
    link = await rig.link()
    hold: list[Any] = []
    put, rig.plain.put = rig.plain.put, hold.append  # type: ignore[method-assign]
    for slot in range(requests):
        link.http(slot)
    await asyncio.sleep(0.01)
    return link, put, hold


@served(sizes, max_batch_size=2, batch_wait_timeout_s=0.0, max_concurrent_queries=20)
async def test_a_full_batch_waits_at_the_thread_while_one_runs_and_no_other(rig: Rig) -> None:
    link, put, hold = await held_up(rig, requests=7)
    assert len(hold) == 2  # one that runs, and a full one
    for expected in (2, 1, 1):  # the last one is not full: it waits for company as long as another runs
        put(hold.pop(0))
        await asyncio.sleep(0.01)
        assert len(hold) == expected
    while hold:
        put(hold.pop(0))
        await asyncio.sleep(0.01)
    assert [(await link.end(slot))[2] for slot in range(7)] == [b"2"] * 6 + [b"1"]


@served(sizes, max_batch_size=2, batch_wait_timeout_s=0.0, max_concurrent_queries=20)
async def test_what_is_cancelled_at_the_thread_before_its_batch_begins_never_runs(rig: Rig) -> None:
    link, put, hold = await held_up(rig, requests=4)
    link.frame(framing.CANCEL, 3)
    await asyncio.sleep(0.01)
    for work in hold:
        put(work)
    assert (await link.end(3))[:2] == (framing.ERROR, 499)
    assert [(await link.end(slot))[2] for slot in range(3)] == [b"2", b"2", b"1"]
    assert link.page[3] == 0


@headgate.accept_batch
def wrong(requests: list[Any]) -> Any:
    what = requests[0].data
    return {"dict": {}, "short": [1], "set": {1, 2}}[what.decode()]


@served(wrong, max_batch_size=2)
async def test_a_wrong_batch_result_fails_its_batch_with_a_clear_text(rig: Rig) -> None:
    link = await rig.link()
    for slot, body in enumerate([b"dict", b"dict", b"short", b"short", b"set", b"set"]):
        link.http(slot, body)
    texts = [(await link.end(slot))[2].decode() for slot in range(6)]
    assert all("dict" in text for text in texts[:2])
    assert all("1 results for 2 requests" in text for text in texts[2:4])
    assert all("set" in text for text in texts[4:])


@headgate.accept_batch
async def one_fails(requests: list[Any]) -> list[Any]:
    return [ValueError("just me") if request.data == b"bad" else "good" for request in requests]


@served(one_fails, max_batch_size=4)
async def test_an_exception_in_a_batch_s_result_fails_one_request(rig: Rig) -> None:
    link = await rig.link()
    for slot, body in enumerate([b"ok", b"bad", b"ok"]):
        link.http(slot, body)
    assert [(await link.end(slot))[:2] for slot in range(3)] == [
        (framing.REPLY, 200),
        (framing.ERROR, 500),
        (framing.REPLY, 200),
    ]


class Spoils:
    """Cannot be decoded."""

    def __reduce__(self) -> Any:
        return (int, ("not a number",))


@headgate.accept_batch
def doubles(requests: list[Any]) -> list[Any]:
    return [request.data * 2 for request in requests]


@served(doubles, max_batch_size=3)
async def test_a_request_that_cannot_be_decoded_fails_alone_and_counts_as_started(rig: Rig) -> None:
    link = await rig.link()
    link.value(0, 1)
    link.value(1, Spoils())
    link.value(2, 2)
    assert [(await link.end(slot))[0] for slot in range(3)] == [framing.REPLY, framing.ERROR, framing.REPLY]
    assert [payload.decode((await link.end(slot))[2]) for slot in (0, 2)] == [2, 4]
    assert link.page[1] == 1


@served(echo)
async def test_a_request_has_started_before_its_value_is_decoded(rig: Rig) -> None:
    link = await rig.link()
    link.value(0, Spoils())
    assert (await link.end(0))[0] == framing.ERROR
    assert link.page[0] == 1


def count_to_three(request: Any) -> Iterator[str]:
    yield from ("one ", "two ", "three")


@served(count_to_three)
async def test_a_generator_streams_its_items(rig: Rig) -> None:
    link = await rig.link()
    link.http(0)
    assert (await link.end(0))[0] == framing.END
    assert link.stream(0) == b"one two three"
    start = link.got[0]
    assert start[0] == framing.REPLY
    assert start[1] & framing.MORE
    assert start[1] & framing.STREAM


def fails_midway(request: Any) -> Iterator[bytes]:
    yield b"some"
    raise ValueError("midway")


@served(fails_midway)
async def test_a_generator_that_raises_midway_ends_with_an_error(rig: Rig) -> None:
    link = await rig.link()
    link.http(0)
    assert (await link.end(0))[0] == framing.ERROR
    assert link.stream(0) == b"some"


async def endless(request: Any) -> AsyncIterator[bytes]:
    try:
        while True:
            yield b"x" * 10_000
    finally:
        cancelled.append("closed")


@served(endless)
async def test_a_stream_stops_at_its_window_and_goes_on_with_credit(rig: Rig) -> None:
    cancelled.clear()
    link = await rig.link()
    link.http(0)
    await asyncio.sleep(0.5)
    first = len(link.stream(0))
    assert WINDOW_BYTES <= first < WINDOW_BYTES + 10_000
    link.frame(framing.CREDIT, 0, 50_000)
    await asyncio.sleep(0.5)
    assert first + 40_000 <= len(link.stream(0)) <= first + 60_000
    link.frame(framing.CANCEL, 0)
    await link.end(0)
    assert cancelled == ["closed"]


def large(request: Any) -> bytes:
    return b"z" * 1_000_000


@served(large)
async def test_a_large_body_comes_in_parts_within_the_window(rig: Rig) -> None:
    link = await rig.link()
    link.http(0)
    await asyncio.sleep(0.1)
    assert len(link.stream(0)) <= WINDOW_BYTES + 65536
    for _ in range(10):
        link.frame(framing.CREDIT, 0, 200_000)
        await asyncio.sleep(0.05)
    assert (await link.end(0))[0] == framing.END
    assert link.stream(0) == b"z" * 1_000_000
    assert int.from_bytes(link.got[0][5], "little") == 1_000_000


def responses(request: Any) -> Any:
    if request.data == b"json":
        return JSONResponse({"a": 1}, status_code=201, headers={"x-mine": "yes"})

    async def parts() -> AsyncIterator[str]:
        yield "a"
        yield "b"

    return StreamingResponse(parts(), media_type="text/csv")


@served(responses)
async def test_starlette_responses_keep_status_and_headers(rig: Rig) -> None:
    link = await rig.link()
    link.http(0, b"json")
    assert await link.end(0) == (framing.REPLY, 201, b'{"a":1}')
    assert b"x-mine: yes\r\n" in link.got[0][4]
    link.http(1, b"stream")
    assert (await link.end(1))[0] == framing.END
    assert link.stream(1) == b"ab"


class Values:
    def __call__(self, request: Any) -> Any:
        if request.data == "kwargs":
            return request.query_params
        if request.data == "generator":
            return (number for number in range(3))
        if request.data == "raise":
            raise KeyError("nope")
        return request.data


@served(Values)
async def test_handles_get_python_values(rig: Rig) -> None:
    link = await rig.link()
    link.value(0, {"a": (1, 2)})
    link.value(1, "kwargs", x=1.5)
    link.value(2, "generator")
    assert payload.decode((await link.end(0))[2]) == {"a": (1, 2)}
    assert payload.decode((await link.end(1))[2]) == {"x": 1.5}
    assert payload.decode((await link.end(2))[2]) == [0, 1, 2]
    link.value(3, "raise")
    error = payload.decode_error((await link.end(3))[2])
    assert isinstance(error, KeyError)
    assert "in __call__" in error.remote_traceback  # type: ignore[attr-defined]


@served(slow_echo)
async def test_a_draining_worker_finishes_what_it_has_and_takes_nothing_new(rig: Rig) -> None:
    link = await rig.link()
    link.http(0, b"old")
    await asyncio.sleep(0.1)
    rig.worker.drain()
    link.http(1, b"new")
    assert (await link.end(1))[0] == framing.DRAINING
    assert not rig.drained
    assert await link.end(0) == (framing.REPLY, 200, b"old")
    await asyncio.sleep(0.01)
    assert rig.drained


@served(echo)
async def test_a_fenced_process_is_told_which_snapshot_it_lacks(rig: Rig) -> None:
    long = "a tag that is very long indeed, longer than a handshake can carry#0001"
    stale, fresh = await rig.link(wire_name(long)), await rig.link("fresh")
    rig.worker.fence({long: 12})
    stale.http(0)
    fresh.http(0, b"x")
    kind, needed, _ = await stale.end(0)
    assert (kind, needed) == (framing.DRAINING, 12)
    assert (await fresh.end(0))[0] == framing.REPLY
    rig.worker.fence({})
    stale.http(1, b"y")
    assert await stale.end(1) == (framing.REPLY, 200, b"y")


@served(echo)
async def test_what_a_process_sent_before_it_followed_is_refused_though_its_fence_is_lifted_first(rig: Rig) -> None:
    stale, other = await rig.link("stale"), await rig.link("other")
    for _ in range(20):
        rig.worker.fence({"stale": 12, "other": 11})
        stale.http(0)
        stale.flush()
        rig.worker.fence({"other": 11})
        assert await stale.end(0) == (framing.DRAINING, 12, b"")
        other.http(0)
        assert await other.end(0) == (framing.DRAINING, 11, b"")
        stale.http(1)
        assert (await stale.end(1))[0] == framing.REPLY
        stale.got.clear()
        other.got.clear()


@served(echo)
async def test_a_process_that_is_fenced_again_at_once_stays_out(rig: Rig) -> None:
    stale = await rig.link("stale")
    rig.worker.fence({"stale": 12})
    rig.worker.fence({})
    rig.worker.fence({"stale": 13})
    await asyncio.sleep(0.01)
    stale.http(0)
    assert await stale.end(0) == (framing.DRAINING, 13, b"")


@served(slow_echo, max_concurrent_queries=1)
async def test_new_limits_hold_at_once(rig: Rig) -> None:
    link = await rig.link()
    link.http(0)
    await asyncio.sleep(0.1)
    rig.worker.configure(Settings(max_concurrent_queries=2))
    link.http(1)
    await asyncio.sleep(0.1)
    assert rig.worker.admission.held == 2


@served(echo)
async def test_a_body_in_pieces_is_put_together(rig: Rig) -> None:
    link = await rig.link()
    meta = msgspec.msgpack.encode(["id", "e", None, [], "h", 1, ["h", 80, "http"], None])
    size = len(meta) + len(HEAD) + 8
    total = (200_000).to_bytes(8, "little")
    link.send(pack(size, framing.CALL, framing.MORE, len(meta), 0, len(HEAD) << 32) + meta + HEAD + total)
    for _ in range(4):
        link.frame(framing.DATA, 0, 0, b"p" * 50_000)
    link.frame(framing.END, 0)
    await asyncio.sleep(0.01)
    link.frame(framing.CREDIT, 0, 10**6)
    assert (await link.end(0))[0] == framing.END
    assert link.stream(0) == b"p" * 200_000


@served(notes_cancel)
async def test_a_cancel_that_comes_with_its_call_frees_the_slot_too(rig: Rig) -> None:
    link = await rig.link()
    link.http(3)
    link.frame(framing.CANCEL, 3)  # one read brings both: the handler's task has not begun
    assert (await link.end(3))[:2] == (framing.ERROR, 499)
    assert link.page[3] == 0
    assert rig.worker.admission.held == 0


async def swallows_cancel(request: Any) -> Any:
    try:
        await asyncio.sleep(100)
    except asyncio.CancelledError:
        pass

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.01)

    return StreamingResponse(endless()) if (await request.body()) == b"response" else endless()


@pytest.mark.parametrize("body", [b"response", b"generator"])
def test_an_endless_answer_to_a_request_that_was_cancelled_is_not_begun(body: bytes) -> None:
    @served(swallows_cancel)
    async def test(rig: Rig) -> None:
        link = await rig.link()
        link.http(0, body)
        await asyncio.sleep(0.1)
        link.frame(framing.CANCEL, 0)
        assert (await link.end(0))[:2] == (framing.ERROR, 499)
        assert rig.worker.admission.held == 0

    test()


async def large_despite_cancel(request: Any) -> bytes:
    try:
        await asyncio.sleep(100)
    except asyncio.CancelledError:
        pass
    return b"x" * 200_000


@served(large_despite_cancel)
async def test_a_large_answer_to_a_request_that_was_cancelled_ends_at_once(rig: Rig) -> None:
    link = await rig.link()
    link.http(0)
    await asyncio.sleep(0.1)
    link.frame(framing.CANCEL, 0)
    assert (await link.end(0))[0] == framing.END
    assert link.stream(0) == b""
    assert rig.worker.admission.held == 0


@served(echo)
async def test_it_says_whose_first_link_opens_and_whose_last_has_ended(rig: Rig) -> None:
    said: list[tuple[str, bool]] = []
    rig.worker._on_linked = lambda name, is_linked: said.append((name, is_linked))
    first, second = await rig.link("client"), await rig.link("client")  # of two loops
    await rig.link("other")
    assert said == [("client", True), ("other", True)]
    first.abort()
    await asyncio.sleep(0.01)
    assert said[2:] == []
    second.abort()
    await asyncio.sleep(0.01)
    assert said[2:] == [("client", False)]
