"""Reserved slots: granted over the link, claimed with Python objects, answered in a future."""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from replica_rig import HEAD, Rig, RouterEnd, served

import headgate
from headgate.core import framing
from headgate.errors import (
    BackendError,
    EndpointNotFound,
    HeadgateError,
    RequestCancelled,
    RequestError,
    RequestTimeout,
)
from headgate.replica import reservation
from headgate.replica.request import Copied, HTTPRequest
from headgate.wire import payload

Error = tuple[int, type[HeadgateError]]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")


async def result(future: concurrent.futures.Future[Any]) -> Any:
    return await asyncio.wrap_future(future)


async def reserved(link: RouterEnd, slot: int, **how: Any) -> int:
    link.reserve(slot, **how)
    return await link.token(slot)


async def refused(link: RouterEnd, slot: int) -> Error:
    kind, status, body = await link.end(slot)
    assert kind == framing.ERROR
    return status, type(payload.decode_error(body))


class Echo:
    def __call__(self, request: Any) -> Any:
        return request.data

    def query(self, request: Any) -> Any:
        return request.query_params, request.request_id

    def same(self, request: Any) -> Any:
        return request

    def numbers(self, request: Any) -> Iterator[int]:
        yield from range(request.data)

    def later(self, request: Any) -> AsyncIterator[int]:
        return count(request.data)


async def count(limit: int) -> AsyncIterator[int]:
    for number in range(limit):
        yield number


@served(Echo)
async def test_a_claim_gets_the_very_object_that_the_handler_returned(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 3)
    assert rig.worker.admission.held == 1
    assert link.page[3] == 0
    value = object()
    assert await result(rig.claim(token, value)) is value
    assert await link.end(3) == (framing.END, 0, b"")
    assert link.page[3] == 1
    assert rig.worker.admission.held == 0


@served(Echo)
async def test_each_token_is_another_one(rig: Rig) -> None:
    link = await rig.link()
    tokens = []
    for slot in range(3):
        tokens.append(await reserved(link, slot))
        link.frame(framing.CANCEL, slot)
        await link.end(slot)
    assert len(set(tokens)) == 3


@served(Echo, max_concurrent_queries=10)
async def test_methods_arguments_and_requests_are_as_in_any_call(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0, method="query")
    assert await result(rig.claim(token, 1, a=2)) == ({"a": 2}, "id0")
    request = HTTPRequest(Copied(HEAD, b"body"))
    assert await result(rig.claim(await reserved(link, 1, method="same"), request)) is request
    assert await result(rig.claim(await reserved(link, 2, method="numbers"), 3)) == [0, 1, 2]
    assert await result(rig.claim(await reserved(link, 3, method="later"), 2)) == [0, 1]
    with pytest.raises(EndpointNotFound):
        await result(rig.claim(await reserved(link, 4, method="_hidden")))
    assert await refused(link, 4) == (404, EndpointNotFound)


async def counts(request: Any) -> Any:
    return count(await request.body())


@served(counts)
async def test_an_async_generator_becomes_a_list(rig: Rig) -> None:
    link = await rig.link()
    assert await result(rig.claim(await reserved(link, 0), 4)) == [0, 1, 2, 3]


async def slow(request: Any) -> Any:
    await asyncio.sleep(1.0)
    return request.data


@served(slow, max_concurrent_queries=2)
async def test_reservations_count_against_the_limit(rig: Rig) -> None:
    link = await rig.link()
    first, _ = await reserved(link, 0), await reserved(link, 1)
    link.reserve(2)
    assert (await link.end(2))[0] == framing.BUSY
    link.value(3, "over the wire")
    assert (await link.end(3))[0] == framing.BUSY
    await result(rig.claim(first))
    await link.end(0)
    await asyncio.sleep(0.01)
    assert framing.ROOM in [kind for kind, *_ in link.got]
    assert rig.worker.admission.reserved == 1


@served(slow)
async def test_an_unclaimed_reservation_outlives_its_link_for_a_while(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    link.abort()
    await asyncio.sleep(reservation.RESERVATION_S - 0.5)
    assert rig.worker.admission.held == 1
    await asyncio.sleep(1.0)
    assert rig.worker.admission.held == 0
    with pytest.raises(RequestError, match="expired"):
        await result(rig.claim(token))


@served(slow)
async def test_an_unclaimed_reservation_waits_as_long_as_its_link_is_there(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    await asyncio.sleep(10 * reservation.RESERVATION_S)
    assert await result(rig.claim(token, "late")) == "late"


@served(slow, max_concurrent_queries=2)
async def test_a_claim_does_not_need_the_link(rig: Rig) -> None:
    link = await rig.link()
    tokens = [await reserved(link, slot) for slot in range(2)]
    before = rig.claim(tokens[0], "before")
    await asyncio.sleep(0.1)
    link.abort()
    await asyncio.sleep(0.1)
    after = rig.claim(tokens[1], "after")
    assert (await result(before), await result(after)) == ("before", "after")
    await asyncio.sleep(2 * reservation.RESERVATION_S)
    assert rig.worker.admission.held == 0


@served(Echo)
async def test_a_token_is_good_once(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    await result(rig.claim(token))
    for wrong in (token, token + 1):
        with pytest.raises(RequestError, match="expired"):
            await result(rig.claim(wrong))


@served(Echo)
async def test_a_cancel_before_the_claim_frees_the_slot(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    link.frame(framing.CANCEL, 0)
    assert await refused(link, 0) == (499, RequestCancelled)
    assert rig.worker.admission.held == 0
    with pytest.raises(RequestCancelled):
        await result(rig.claim(token))
    token = await reserved(link, 1)
    link.frame(framing.CANCEL, 1, 1)
    assert await refused(link, 1) == (504, RequestTimeout)
    with pytest.raises(RequestTimeout):
        await result(rig.claim(token))


@served(Echo)
async def test_only_the_reservations_cancelled_last_are_remembered(rig: Rig) -> None:
    link = await rig.link()
    tokens = []
    for _ in range(reservation._MISSED + 1):
        link.got.clear()
        tokens.append(await reserved(link, 0))
        link.frame(framing.CANCEL, 0)
        await link.end(0)
    with pytest.raises(RequestError, match="expired"):
        await result(rig.claim(tokens[0]))
    with pytest.raises(RequestCancelled):
        await result(rig.claim(tokens[1]))


ended: list[str] = []


async def notes_its_end(request: Any) -> None:
    try:
        await asyncio.sleep(100)
    finally:
        ended.append(request.request_id)


@pytest.mark.parametrize(("timed_out", "status", "kind"), [(0, 499, RequestCancelled), (1, 504, RequestTimeout)])
def test_a_cancel_after_the_claim_reaches_the_handler(timed_out: int, status: int, kind: type[HeadgateError]) -> None:
    @served(notes_its_end)
    async def test(rig: Rig) -> None:
        ended.clear()
        link = await rig.link()
        future = rig.claim(await reserved(link, 7))
        await asyncio.sleep(0.1)
        link.frame(framing.CANCEL, 7, timed_out)
        with pytest.raises(kind):
            await result(future)
        assert await refused(link, 7) == (status, kind)
        assert ended == ["id7"]
        assert rig.worker.admission.held == 0

    test()


@served(notes_its_end)
async def test_whoever_claimed_it_may_give_it_up(rig: Rig) -> None:
    ended.clear()
    link = await rig.link()
    token = await reserved(link, 7)
    future = rig.claim(token)
    await asyncio.sleep(0.1)
    rig.worker.reservations.give_up(token)
    with pytest.raises(RequestCancelled):
        await result(future)
    assert await refused(link, 7) == (499, RequestCancelled)
    assert ended == ["id7"]
    rig.worker.reservations.give_up(token)  # too late: nothing


@served(Echo)
async def test_what_waits_for_the_plain_thread_is_dropped(rig: Rig) -> None:
    link = await rig.link()
    hold: list[Any] = []
    put, rig.plain.put = rig.plain.put, hold.append  # type: ignore[method-assign]
    token = await reserved(link, 0)
    future = rig.claim(token)
    rig.worker.reservations.give_up(token)
    with pytest.raises(RequestCancelled):
        await result(future)
    assert rig.worker.admission.held == 1
    put(hold[0])
    assert await refused(link, 0) == (499, RequestCancelled)
    assert link.page[0] == 0


@served(Echo)
async def test_a_deadline_that_passed_before_the_start_is_a_timeout(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0, ms=1)
    time.sleep(0.002)  # the deadline is on the real clock
    with pytest.raises(RequestTimeout):
        await result(rig.claim(token))
    assert await refused(link, 0) == (504, RequestTimeout)
    assert link.page[0] == 0


held_up: list[Any] = []


def runs_long(request: Any) -> str:
    held_up.pop()()
    return "too late"


@served(runs_long)
async def test_a_deadline_while_plain_code_runs_is_answered_at_once(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    future = rig.claim(token)
    states: list[bool] = []

    def deadline() -> None:  # in the midst of the handler
        (job,) = next(iter(rig.worker.links)).jobs.values()
        job.timed_out = True
        rig.worker.cancel(job)
        states.append(future.done())
        states.append(rig.worker.admission.held == 1)

    held_up.append(deadline)
    with pytest.raises(RequestTimeout):
        await result(future)
    assert await refused(link, 0) == (504, RequestTimeout)
    assert states == [True, True]
    assert rig.worker.admission.held == 0


class Own(Exception):
    pass


def raises(request: Any) -> Any:
    raise request.data


@served(raises)
async def test_a_user_s_exception_is_that_object_with_its_traceback(rig: Rig) -> None:
    link = await rig.link()
    error = Own("mine")
    with pytest.raises(Own) as caught:
        await result(rig.claim(await reserved(link, 0), error))
    assert caught.value is error
    assert "raise request.data" in "".join(traceback.format_exception(caught.value))
    assert (await link.end(0))[0] == framing.END


@pytest.mark.parametrize(
    "error",
    [
        SystemExit(3),
        KeyboardInterrupt(),
        StopIteration(),
        asyncio.CancelledError(),
        concurrent.futures.CancelledError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_would_stop_the_consumer_is_a_backend_error(error: BaseException) -> None:
    @served(raises)
    async def test(rig: Rig) -> None:
        link = await rig.link()
        with pytest.raises(BackendError, match=type(error).__name__) as caught:
            await result(rig.claim(await reserved(link, 0), error))
        assert "raise request.data" in caught.value.remote_traceback
        assert (await link.end(0))[0] == framing.END

    test()


@served(raises)
async def test_another_backend_s_failure_is_its_user_s_exception(rig: Rig) -> None:
    link = await rig.link()
    cause = Own("there")
    error = BackendError.wrap(cause, "Traceback ...")
    error.__cause__ = cause
    with pytest.raises(Own) as caught:
        await result(rig.claim(await reserved(link, 0), error))
    assert caught.value is cause


@headgate.accept_batch
def sizes(requests: list[Any]) -> list[Any]:
    return [ValueError("just me") if request.data == "bad" else (request.data, len(requests)) for request in requests]


@served(sizes, max_batch_size=4, batch_wait_timeout_s=0.0, max_concurrent_queries=10)
async def test_a_batch_mixes_reserved_requests_with_others_in_the_order_of_their_claims(rig: Rig) -> None:
    link = await rig.link()
    tokens = [await reserved(link, slot) for slot in range(3)]
    hold: list[Any] = []
    put, rig.plain.put = rig.plain.put, hold.append  # type: ignore[method-assign]
    link.value(8, "first")  # alone: it is there already
    await asyncio.sleep(0.01)
    two = rig.claim(tokens[2], "two")
    link.value(9, "wire")
    await asyncio.sleep(0.01)
    bad, zero = rig.claim(tokens[1], "bad"), rig.claim(tokens[0], "zero")
    rig.plain.put = put  # type: ignore[method-assign]
    for work in hold:
        put(work)
    assert payload.decode((await link.end(8))[2]) == ("first", 1)
    assert payload.decode((await link.end(9))[2]) == ("wire", 4)
    assert (await result(two), await result(zero)) == (("two", 4), ("zero", 4))
    with pytest.raises(ValueError, match="just me"):
        await result(bad)
    assert [(await link.end(slot))[0] for slot in range(3)] == [framing.END] * 3


@served(sizes, max_batch_size=2, batch_wait_timeout_s=5.0, max_concurrent_queries=10)
async def test_one_that_waits_for_its_batch_can_be_given_up(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    future = rig.claim(token)
    rig.worker.reservations.give_up(token)
    with pytest.raises(RequestCancelled):
        await result(future)
    assert await refused(link, 0) == (499, RequestCancelled)


@headgate.accept_batch
def fails(requests: list[Any]) -> list[Any]:
    raise Own(f"all {len(requests)}")


@served(fails, max_batch_size=2, batch_wait_timeout_s=1.0, max_concurrent_queries=2)
async def test_a_batch_that_raises_fails_all_of_it(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    link.value(1, "wire")
    await asyncio.sleep(0.01)
    with pytest.raises(Own, match="all 2"):
        await result(rig.claim(token))
    assert isinstance(payload.decode_error((await link.end(1))[2]), Own)


# --- drains ---


@served(slow, max_concurrent_queries=2)
async def test_a_drain_waits_for_claims_and_until_their_answers_have_left(rig: Rig) -> None:
    link = await rig.link()
    early, late = await reserved(link, 0), await reserved(link, 1)
    answer = rig.claim(early, "early")
    rig.worker.drain()
    link.reserve(2)
    assert (await link.end(2))[0] == framing.DRAINING
    assert await result(answer) == "early"
    rig.worker.reservations.answered(early)
    await asyncio.sleep(1.0)
    assert not rig.drained
    assert await result(rig.claim(late, "late")) == "late"
    await asyncio.sleep(5.0)
    assert not rig.drained
    rig.worker.reservations.answered(late)
    await asyncio.sleep(reservation.HANDOVER_S * 0.9)
    assert not rig.drained
    await asyncio.sleep(reservation.HANDOVER_S)
    assert rig.drained


@served(slow)
async def test_a_drain_waits_for_a_reservation_until_it_is_cancelled(rig: Rig) -> None:
    link = await rig.link()
    await reserved(link, 0)
    rig.worker.drain()
    await asyncio.sleep(60.0)
    assert not rig.drained
    link.frame(framing.CANCEL, 0)
    await link.end(0)
    await asyncio.sleep(0.01)
    assert rig.drained


@served(slow)
async def test_a_drain_waits_for_a_reservation_until_it_expires(rig: Rig) -> None:
    link = await rig.link()
    await reserved(link, 0)
    rig.worker.drain()
    link.abort()
    await asyncio.sleep(reservation.RESERVATION_S - 0.1)
    assert not rig.drained
    await asyncio.sleep(0.2)
    assert rig.drained


@served(Echo)
async def test_a_drain_waits_for_each_consumer_of_a_token(rig: Rig) -> None:
    link = await rig.link()
    token = await reserved(link, 0)
    first, again = rig.claim(token), rig.claim(token)
    await result(first)
    assert isinstance(again.exception(), RequestError)
    rig.worker.drain()
    rig.worker.reservations.answered(token)
    await asyncio.sleep(1.0)
    assert not rig.drained
    rig.worker.reservations.answered(token)
    rig.worker.reservations.answered(token)  # one too many: nothing
    await asyncio.sleep(0.1)
    assert rig.drained
