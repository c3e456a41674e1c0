"""Large values of handles at the replica: read where the router wrote them, and written for it to read."""

from __future__ import annotations

import asyncio
import gc
import os
from typing import Any

import leftovers
import needs
from replica_rig import Rig, RouterEnd, served
from starlette.responses import Response

from headgate.core import framing
from headgate.wire import payload
from headgate.wire.borrowed import NAME, borrow, place_of
from headgate.wire.segments import Segment, Store

numpy = needs.module("numpy")

SIZE = 1_000_000
TAKEN, FREE, REPLY = framing.TAKEN, framing.FREE, framing.REPLY
MORE, SEGMENT = framing.MORE, framing.SEGMENT
HERE = os.getpid()


def total(request: Any) -> int:
    return int(request.data.sum())


async def total_later(request: Any) -> int:
    return int(request.data.sum())


async def ones(request: Any) -> Any:
    return numpy.ones(SIZE, numpy.uint8)


kept: list[Any] = []


def keep(request: Any) -> None:
    kept.append(request.data)


def array(value: int = 1) -> Any:
    return numpy.full(SIZE, value, numpy.uint8)


def written(store: Store, value: Any) -> Segment:
    segment = store.write(payload.encode(value))
    assert segment is not None
    return segment


def store_here() -> Store:
    loop = asyncio.get_running_loop()
    return Store(loop.call_later, loop.time)


def is_held(inode: int) -> bool:
    """Whether this process has a descriptor of that segment."""
    gc.collect()
    return any(NAME in target and os.fstat(fd).st_ino == inode for fd, target in leftovers.descriptors().items())


def said(router: RouterEnd, kind: int) -> list[tuple[int, int, int]]:
    """(flags, slot, argument) of each frame of that kind."""
    return [(flags, slot, arg) for each, flags, slot, arg, _, _ in router.got if each == kind]


async def until_said(router: RouterEnd, kind: int) -> tuple[int, int, int]:
    for _ in range(5000):
        if said(router, kind):
            return said(router, kind)[0]
        await asyncio.sleep(0.001)
    raise AssertionError(f"no frame of type {kind}")


async def reply(router: RouterEnd) -> tuple[int, tuple[int, int, int]]:
    """(slot, place) of the answer that is to be read."""
    await until_said(router, REPLY)
    _, flags, slot, _, _, body = next(each for each in router.got if each[0] == REPLY)
    assert flags == framing.VALUE | SEGMENT
    return slot, place_of(body, 0)


class Freed:
    def free(self, inode: int, spoiled: bool) -> None: ...


# --- requests ---


def read_and_freed(target: Any) -> None:
    @served(target)
    async def run(rig: Rig) -> None:
        router = await rig.link(pid=HERE)
        segment = written(store_here(), array(2))
        router.segment(0, segment)
        _, _, body = await router.end(0)
        assert payload.decode(body) == 2 * SIZE
        assert await until_said(router, FREE) == (SEGMENT, 0, segment.inode)
        await asyncio.sleep(0.1)
        assert len(said(router, FREE)) == 1
        assert not said(router, TAKEN)

    run()


def test_a_plain_handler_reads_its_argument_in_place_and_the_router_is_told_at_the_end() -> None:
    read_and_freed(total)


def test_an_async_handler_does_too() -> None:
    read_and_freed(total_later)


@served(keep)
async def test_a_value_that_the_handler_keeps_is_its_own_until_it_drops_it(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    segment = written(store_here(), array(2))
    router.segment(0, segment)
    await router.end(0)
    await asyncio.sleep(0.1)
    assert not said(router, FREE)
    kept[0][:5] = 9
    assert kept[0].sum() == 2 * SIZE + 35
    assert payload.decode(segment.view()).sum() == 2 * SIZE
    kept.clear()
    assert await until_said(router, FREE) == (SEGMENT, 0, segment.inode)


@served(total)
async def test_what_cannot_be_opened_comes_in_pieces_into_the_same_slot(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    segment = written(store_here(), array(2))
    fd, segment.fd = segment.fd, 0
    router.segment(3, segment)
    segment.fd = fd
    assert await until_said(router, TAKEN) == (MORE, 3, segment.inode)
    body = bytes(segment.view())
    for at in range(0, len(body), 60_000):
        router.frame(framing.DATA, 3, body=body[at : at + 60_000])
    router.frame(framing.END, 3)
    _, _, answer = await router.end(3)
    assert payload.decode(answer) == 2 * SIZE
    assert rig.worker.admission.held == 0
    assert not said(router, FREE)


@served(total, max_concurrent_queries=1)
async def test_one_that_is_cancelled_while_it_waits_for_pieces_frees_its_slot(rig: Rig) -> None:
    router = await rig.link()  # of another machine: nothing can be opened
    segment = written(store_here(), array(2))
    router.segment(0, segment)
    await until_said(router, TAKEN)
    router.frame(framing.CANCEL, 0)
    assert (await router.end(0))[0] == framing.ERROR
    assert rig.worker.admission.held == 0


@served(total, max_concurrent_queries=1)
async def test_a_request_that_is_refused_is_not_read(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    rig.worker.drain()
    router.segment(0, written(store_here(), array(2)))
    assert (await router.end(0))[0] == framing.DRAINING
    await asyncio.sleep(0.1)
    assert not said(router, FREE)
    assert not said(router, TAKEN)


@served(total)
async def test_one_that_is_cancelled_before_it_starts_is_freed(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    segment = written(store_here(), array(2))
    router.segment(0, segment)
    router.frame(framing.CANCEL, 0)
    assert (await router.end(0))[0] == framing.ERROR
    assert await until_said(router, FREE) == (SEGMENT, 0, segment.inode)


# --- answers ---


@served(ones)
async def test_an_answer_is_there_to_be_read_and_its_request_ends_when_it_is_taken(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    router.value(4, None)
    slot, place = await reply(router)
    freed = Freed()
    value = payload.decode(borrow(HERE, place, freed.free), own=True)
    assert slot == 4
    assert value.sum() == SIZE
    assert rig.worker.admission.held == 1
    router.flagged(TAKEN, 0, 4, place[1])
    await asyncio.sleep(0.1)
    assert rig.worker.admission.held == 0
    assert is_held(place[1])  # it is read still
    router.flagged(FREE, SEGMENT, 0, place[1])
    await asyncio.sleep(0.1)
    router.value(5, None)
    await asyncio.sleep(0.1)
    last = [body for kind, _, at, _, _, body in router.got if (kind, at) == (REPLY, 5)]
    assert place_of(last[0], 0)[1] == place[1]  # the same memory once more


@served(ones)
async def test_an_answer_that_the_router_cannot_open_goes_in_pieces(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    router.value(0, None)
    _, place = await reply(router)
    router.got.clear()
    router.flagged(TAKEN, MORE, 0, place[1])
    await until_said(router, REPLY)
    for _ in range(100):
        router.frame(framing.CREDIT, 0, 65536)
    assert (await router.end(0))[0] == framing.END
    assert payload.decode(router.stream(0)).sum() == SIZE
    assert rig.worker.admission.held == 0
    router.value(1, None)  # and so do the next ones
    await asyncio.sleep(0.1)
    assert all(not flags & SEGMENT for flags, _, _ in said(router, REPLY))


@served(ones)
async def test_an_answer_whose_caller_has_gone_frees_its_slot_and_its_memory(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    router.value(0, None)
    _, place = await reply(router)
    router.frame(framing.CANCEL, 0)
    await asyncio.sleep(0.1)
    assert rig.worker.admission.held == 0
    router.flagged(TAKEN, 0, 0, place[1])  # under way
    router.flagged(FREE, SEGMENT, 0, place[1])
    await asyncio.sleep(30.0)
    assert not is_held(place[1])


@served(ones)
async def test_an_answer_whose_link_ends_is_let_go(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    router.value(0, None)
    _, place = await reply(router)
    value = payload.decode(borrow(HERE, place, Freed().free), own=True)
    router.abort()
    await asyncio.sleep(0.1)
    assert rig.worker.admission.held == 0
    assert not is_held(place[1])
    assert value.sum() == SIZE


@served(ones)
async def test_a_link_of_another_machine_gets_pieces(rig: Rig) -> None:
    router = await rig.link()
    router.value(0, None)
    await until_said(router, REPLY)
    for _ in range(100):
        router.frame(framing.CREDIT, 0, 65536)
    await router.end(0)
    assert payload.decode(router.stream(0)).sum() == SIZE


@served(ones)
async def test_a_drained_replica_waits_until_its_answer_is_taken(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    router.value(0, None)
    _, place = await reply(router)
    rig.worker.drain()
    await asyncio.sleep(0.1)
    assert not rig.drained
    router.flagged(TAKEN, 0, 0, place[1])
    await asyncio.sleep(0.1)
    assert rig.drained


# --- HTTP answers ---


def image(request: Any) -> Any:
    return Response(b"x" * SIZE, 201, {"x-own": "y"})


@served(image)
async def test_a_large_http_answer_is_there_to_be_read_behind_its_header_lines(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    router.http(2)
    await until_said(router, REPLY)
    _, flags, slot, arg, _, body = next(each for each in router.got if each[0] == REPLY)
    assert (flags, slot, arg & 0xFFFF) == (SEGMENT | framing.HEAD, 2, 201)
    place, freed = place_of(body, 0), Freed()
    content = bytes(borrow(HERE, place, freed.free))
    assert content[: arg >> 32].endswith(b"x-own: y\r\n")
    assert content[arg >> 32 :] == b"x" * SIZE
    router.flagged(TAKEN, 0, 2, place[1])
    await asyncio.sleep(0.1)
    assert rig.worker.admission.held == 0
    router.flagged(FREE, SEGMENT, 0, place[1])
    await asyncio.sleep(30.0)
    assert not is_held(place[1])


@served(image)
async def test_a_large_http_answer_that_the_proxy_cannot_open_goes_in_pieces(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    router.http(0)
    await until_said(router, REPLY)
    place = place_of(next(each for each in router.got if each[0] == REPLY)[5], 0)
    router.got.clear()
    router.flagged(TAKEN, MORE, 0, place[1])
    await until_said(router, REPLY)
    (reply,) = [each for each in router.got if each[0] == REPLY]
    assert (reply[1], reply[3] & 0xFFFF) == (MORE | framing.HEAD, 201)
    assert reply[4].endswith(b"x-own: y\r\n")
    for _ in range(100):
        router.frame(framing.CREDIT, 0, 65536)
    assert (await router.end(0))[0] == framing.END
    assert router.stream(0) == b"x" * SIZE


@served(image, max_concurrent_queries=200)
async def test_clients_that_do_not_read_have_so_much_lent_and_no_more(rig: Rig) -> None:
    router = await rig.link(pid=HERE)
    for slot in range(100):
        router.http(slot)
    for slot in range(100):
        await until_answered(router, slot)
    lent = [slot for flags, slot, _ in said(router, REPLY) if flags & SEGMENT]
    assert lent == list(range(64))
    for _, flags, slot, _, _, body in list(router.got):
        if flags & SEGMENT:
            router.flagged(TAKEN, 0, slot, place_of(body, 0)[1])
    await asyncio.sleep(0.1)
    assert rig.worker.admission.held == 36  # those that go in pieces, as their clients take them


async def until_answered(router: RouterEnd, slot: int) -> None:
    for _ in range(5000):
        if any(each == slot for _, each, _ in said(router, REPLY)):
            return
        await asyncio.sleep(0.001)
    raise AssertionError(f"no answer in slot {slot}")
