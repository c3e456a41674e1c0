"""The router and values that lie in memory of their own: lent to one replica at a time, and given back."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable
from typing import Any

from test_router import Asked, ReplicaEnd, Rig, dead_process, folder, lose, routed, settle, until

from headgate.core import framing
from headgate.core.state import Traffic
from headgate.wire.borrowed import borrow, place_of
from headgate.wire.link import PIECE_BYTES
from headgate.wire.segments import Segment, Store

__all__ = ["folder"]

BODY = os.urandom(1_000_000)
OTHER = os.urandom(1_000_000)
HERE = os.getpid()
TAKEN, FREE, SEGMENT, MORE = framing.TAKEN, framing.FREE, framing.SEGMENT, framing.MORE


class Large(Asked):
    """A request whose body is a segment, ended as a handle's call is."""

    def __init__(self, store: Store, body: bytes = BODY) -> None:
        segment = store.write([body])
        assert segment is not None
        super().__init__(segment.place)
        self.segment: Segment | None = segment
        self.kept = segment
        self.flags = SEGMENT | framing.VALUE

    def _end(self, what: Any) -> None:
        super()._end(what)
        segment, self.segment = self.segment, None
        assert segment is not None
        segment.end()


class Freed:
    def __init__(self) -> None:
        self.inodes: list[int] = []

    def free(self, inode: int, spoiled: bool) -> None:
        self.inodes.append(inode)


def store_here() -> Store:
    loop = asyncio.get_running_loop()
    return Store(loop.call_later, loop.time)


def again(store: Store) -> Segment:
    segment = store.write([OTHER])
    assert segment is not None
    return segment


def read(place: bytes) -> bytes:
    return bytes(borrow(HERE, place_of(place, 0), Freed().free))


def frees(link: ReplicaEnd, place: bytes) -> None:
    link.answer(FREE, 0, place_of(place, 0)[1], flags=SEGMENT)


def echo_read(link: ReplicaEnd, slot: int, place: bytes) -> None:
    """A replica that reads its argument in place and says how it ends."""
    end = read(place)[-3:]
    link.answer(framing.REPLY, slot, 200, end)
    frees(link, place)


def pieces(link: ReplicaEnd, slot: int) -> bytes:
    return b"".join(body for kind, at, _, body in link.replica.heard if (kind, at) == (framing.DATA, slot))


def inodes(rig: Rig, kind: int) -> list[int]:
    return [arg for each, _, arg, _ in rig.replicas[0].heard if each == kind]


# --- requests ---


@routed
async def test_a_replica_reads_the_body_in_place_and_the_memory_is_used_again(rig: Rig) -> None:
    replica = rig.replica("r1")
    replica.on_call = echo_read
    endpoint = rig.publish({"b": [replica]})
    store = store_here()
    caller = Large(store)
    rig.router.submit(endpoint, caller)
    assert await caller.result() == ("reply", 200, BODY[-3:])
    await settle()
    assert again(store) is caller.kept


@routed
async def test_memory_is_not_used_again_while_the_replica_reads(rig: Rig) -> None:
    replica = rig.replica("r1").echo()  # and says nothing of FREE
    endpoint = rig.publish({"b": [replica]})
    store = store_here()
    caller = Large(store)
    rig.router.submit(endpoint, caller)
    await caller.result()
    await settle()
    assert again(store) is not caller.kept
    frees(replica.links[0], replica.calls[0][2])
    await settle()
    assert again(store) is caller.kept


@routed
async def test_what_a_replica_cannot_open_it_gets_in_pieces_and_the_next_ones_at_once(rig: Rig) -> None:
    replica = rig.replica("r1")

    def refuse(link: ReplicaEnd, slot: int, place: bytes) -> None:
        link.answer(TAKEN, slot, place_of(place, 0)[1], flags=MORE)

    replica.on_call = refuse
    endpoint = rig.publish({"b": [replica]})
    store = store_here()
    caller = Large(store)
    rig.router.submit(endpoint, caller)
    await until(lambda: any(kind == framing.END for kind, *_ in replica.heard))
    link, slot, _ = replica.calls[0]
    assert pieces(link, slot) == BODY
    assert max(len(body) for kind, _, _, body in replica.heard if kind == framing.DATA) == PIECE_BYTES
    link.answer(framing.REPLY, slot, 200, b"ok")
    assert (await caller.result())[2] == b"ok"
    await asyncio.sleep(0.01)
    assert again(store) is caller.kept
    replica.heard.clear()
    following = Large(store, OTHER)
    rig.router.submit(endpoint, following)
    await until(lambda: any(kind == framing.END for kind, *_ in replica.heard))
    assert pieces(link, slot) == OTHER
    assert replica.calls[-1][2] == len(OTHER).to_bytes(8, "little")
    assert (following.flags, following.body) == (SEGMENT | framing.VALUE, following.kept.place)  # for another replica


@routed
async def test_a_replica_of_another_node_gets_pieces(rig: Rig) -> None:
    replica = rig.replica("r1", node="other")
    endpoint = rig.publish({"b": [replica]})
    caller = Large(store_here())
    rig.router.submit(endpoint, caller)
    await until(lambda: any(kind == framing.END for kind, *_ in replica.heard))
    assert pieces(*replica.calls[0][:2]) == BODY


@routed
async def test_a_refused_request_is_lent_anew(rig: Rig) -> None:
    replica = rig.replica("r1").refuse_with(framing.BUSY)
    endpoint = rig.publish({"b": [replica]})
    store = store_here()
    caller = Large(store)
    rig.router.submit(endpoint, caller)
    await until(lambda: replica.calls)
    await settle()
    assert caller.kept.readers == 0
    replica.on_call = echo_read
    replica.links[0].answer(framing.ROOM, 0, 1)
    assert await caller.result() == ("reply", 200, BODY[-3:])
    await settle()
    assert again(store) is caller.kept


@routed
async def test_a_request_whose_replica_died_goes_elsewhere_whole_and_its_memory_is_let_go(rig: Rig) -> None:
    dying = rig.replica("r1")
    endpoint = rig.publish({"b": [dying]})
    store = store_here()
    caller = Large(store)
    await settle()
    rig.router.submit(endpoint, caller)
    await until(lambda: dying.calls)
    kept = borrow(HERE, place_of(dying.calls[0][2], 0), Freed().free)
    other = rig.replica("r2")
    other.on_call = echo_read
    dead = dead_process()
    rig.publish({"b": [other]})
    await lose(rig, dying, dead)
    assert await caller.result() == ("reply", 200, BODY[-3:])
    await settle()
    assert caller.kept.fd == -1
    again(store)
    assert kept == BODY
    os.waitpid(dead, 0)


@routed
async def test_a_cancelled_request_is_lent_until_the_replica_says_so(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]})
    store = store_here()
    caller = Large(store)
    rig.router.submit(endpoint, caller)
    await until(lambda: replica.calls)
    rig.router.cancel(caller)
    caller.kept.end()
    assert again(store) is not caller.kept
    frees(replica.links[0], replica.calls[0][2])
    await settle()
    assert again(store) is caller.kept


@routed
async def test_a_cancelled_request_that_cannot_be_opened_is_not_sent_in_pieces(rig: Rig) -> None:
    replica = rig.replica("r1")
    endpoint = rig.publish({"b": [replica]})
    caller = Large(store_here())
    rig.router.submit(endpoint, caller)
    await until(lambda: replica.calls)
    rig.router.cancel(caller)
    link, slot, place = replica.calls[0]
    link.answer(TAKEN, slot, place_of(place, 0)[1], flags=MORE)
    link.answer(framing.ERROR, slot, 499)
    await settle()
    assert not any(kind in (framing.DATA, framing.END) for kind, *_ in replica.heard)
    assert caller.kept.readers == 0
    assert rig.router.backends["b"].replicas.idle("r1")


@routed
async def test_a_shadow_has_the_same_bytes(rig: Rig) -> None:
    main, shadow = rig.replica("r1"), rig.replica("r2")
    main.on_call = echo_read
    traffic = Traffic(weights=(("main", 1.0),), shadows=(("shadow", 1.0),))
    endpoint = rig.publish({"main": [main], "shadow": [shadow]}, traffic)
    await settle()
    store = store_here()
    caller = Large(store)
    rig.router.submit(endpoint, caller)
    assert await caller.result() == ("reply", 200, BODY[-3:])
    assert again(store) is not caller.kept  # the shadow is still being sent
    await until(lambda: any(kind == framing.END for kind, *_ in shadow.heard))
    link, slot, _ = shadow.calls[0]
    assert pieces(link, slot) == BODY
    link.answer(framing.REPLY, slot, 200)
    await asyncio.sleep(0.01)
    assert again(store) is caller.kept


# --- answers ---


def answers_with(segment: Callable[[], Segment]) -> Callable[[ReplicaEnd, int, bytes], None]:
    def answer(link: ReplicaEnd, slot: int, body: bytes) -> None:
        link.answer(framing.REPLY, slot, 200, segment().place, flags=SEGMENT | framing.VALUE)

    return answer


@routed
async def test_an_answer_is_read_in_place_and_given_back_with_its_last_reference(rig: Rig) -> None:
    replica = rig.replica("r1")
    segment = again(store_here())
    replica.on_call = answers_with(lambda: segment)
    endpoint = rig.publish({"b": [replica]})
    caller, kept = Asked(b"x"), []
    caller.on_reply = lambda arg, flags, meta_len, source, start, end: (  # type: ignore[method-assign]
        kept.append(source[start + meta_len : end]),
        caller.ended.set(),
    )
    rig.router.submit(endpoint, caller)
    await caller.ended.wait()
    assert kept == [OTHER]
    await until(lambda: inodes(rig, TAKEN))
    assert inodes(rig, TAKEN) == [segment.inode]
    await asyncio.sleep(0.1)
    assert not inodes(rig, FREE)
    assert rig.router.backends["b"].replicas.idle("r1")
    kept.clear()
    await until(lambda: inodes(rig, FREE))
    assert inodes(rig, FREE) == [segment.inode]


@routed
async def test_an_answer_that_cannot_be_opened_is_asked_for_in_pieces(rig: Rig) -> None:
    replica = rig.replica("r1")
    segment = again(store_here())
    fd, segment.fd = segment.fd, 0
    replica.on_call = answers_with(lambda: segment)
    endpoint = rig.publish({"b": [replica]})
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    await until(lambda: inodes(rig, TAKEN))
    segment.fd = fd
    assert not rig.router.backends["b"].replicas.idle("r1")
    link, slot, _ = replica.calls[0]
    link.answer(framing.REPLY, slot, 200, (3).to_bytes(8, "little"), flags=MORE)
    link.answer(framing.DATA, slot, 0, b"abc")
    link.answer(framing.END, slot)
    await caller.result()
    assert caller.got == [("start", 200), ("data", b"abc"), ("end",)]


@routed
async def test_an_answer_that_nobody_waits_for_is_given_back_unread(rig: Rig) -> None:
    replica = rig.replica("r1")
    segment = again(store_here())
    endpoint = rig.publish({"b": [replica]})
    caller = Asked(b"x")
    rig.router.submit(endpoint, caller)
    await until(lambda: replica.calls)
    rig.router.cancel(caller)
    replica.links[0].answer(framing.REPLY, replica.calls[0][1], 200, segment.place, flags=SEGMENT | framing.VALUE)
    await until(lambda: inodes(rig, TAKEN))
    assert inodes(rig, FREE) == [segment.inode]
    assert rig.router.backends["b"].replicas.idle("r1")


@routed
async def test_an_answer_is_kept_when_its_replica_is_gone(rig: Rig) -> None:
    replica = rig.replica("r1")
    segment = again(store_here())
    replica.on_call = answers_with(lambda: segment)
    endpoint = rig.publish({"b": [replica]})
    kept: list[Any] = []
    caller = Asked(b"x")
    caller.on_reply = lambda arg, flags, meta_len, source, start, end: kept.append(source)  # type: ignore[method-assign]
    rig.router.submit(endpoint, caller)
    await until(lambda: kept)
    replica.close()
    segment.close()
    await settle()
    gc.collect()
    assert kept == [OTHER]


# --- HTTP answers ---


class Read(Asked):
    """A caller that keeps its answer where it lies."""

    value: Any = None
    meta_len = 0

    def on_reply(self, arg: int, flags: int, meta_len: int, source: Any, start: int, end: int) -> None:
        self.value, self.meta_len = source[start:end], meta_len
        self._end(("reply", arg))


def page(segment: Segment, link: ReplicaEnd, slot: int, head: int = 0) -> None:
    link.answer(framing.REPLY, slot, 200 | 2 << 16 | head << 32, segment.place, flags=SEGMENT)


@routed
async def test_an_http_answer_can_only_be_read_and_its_memory_is_opened_once(rig: Rig) -> None:
    replica = rig.replica("r1")
    store = store_here()
    endpoint = rig.publish({"b": [replica]})
    opened = 0
    for body in (BODY, OTHER, BODY[:70_000] * 9):
        segment = store.write([b"a: b\r\n", body])
        assert segment is not None
        fd = segment.fd
        if opened:
            assert segment.inode == opened
            segment.fd = 0  # not opened again: this would be something else
        opened = segment.inode
        replica.on_call = lambda link, slot, _, segment=segment: page(segment, link, slot, head=6)
        caller = Read(b"x")
        rig.router.submit(endpoint, caller)
        assert await caller.result() == ("reply", 200 | 2 << 16)
        segment.fd = fd
        assert caller.value.readonly
        assert (caller.meta_len, caller.value) == (6, b"a: b\r\n" + body)
        await asyncio.sleep(0.05)
        assert inodes(rig, TAKEN)
        assert not inodes(rig, FREE)
        caller.value = None
        await until(lambda: inodes(rig, FREE))
        rig.replicas[0].heard.clear()
        segment.end()


@routed
async def test_memory_that_is_not_read_any_more_is_let_go(rig: Rig) -> None:
    replica = rig.replica("r1")
    segment = again(store_here())
    replica.on_call = lambda link, slot, _: page(segment, link, slot)
    endpoint = rig.publish({"b": [replica]})
    caller = Read(b"x")
    rig.router.submit(endpoint, caller)
    await caller.result()
    caller.value = None
    await asyncio.sleep(0.05)
    link = rig.router.backends["b"].links["r1"]
    assert segment.inode in link._readings._mapped
    await asyncio.sleep(6.0)  # pings come once a second
    assert not link._readings._mapped


@routed
async def test_an_answer_that_says_its_head_is_longer_than_all_of_it_ends_the_link(rig: Rig) -> None:
    replica = rig.replica("r1")
    segment = again(store_here())
    replica.on_call = lambda link, slot, _: page(segment, link, slot, head=len(OTHER) + 1)
    endpoint = rig.publish({"b": [replica]})
    caller = Read(b"x")
    rig.router.submit(endpoint, caller)
    assert type(await caller.result()).__name__ == "ReplicaDied"
