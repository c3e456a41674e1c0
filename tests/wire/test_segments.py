"""Segments: read where they lie, private to whoever reads, and never written while somebody may."""

from __future__ import annotations

import errno
import gc
import os
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import leftovers
import pytest

from headgate.core.lending import MOST_BYTES, SMALLEST_ANSWER_BYTES, SMALLEST_BYTES, lends_answer
from headgate.core.spares import MOST
from headgate.errors import ProtocolError
from headgate.wire import segments
from headgate.wire.borrowed import NAME, PLACE, Readings, borrow, place_of
from headgate.wire.segments import IDLE_S, MOST_LENT, Lent, Segment, Store
from headgate.wire.slots import make_memory

SIZE = 1_500_000
A, B = b"a" * SIZE, b"b" * SIZE


class Clock:
    """Time that stands, and what is to be done later."""

    def __init__(self) -> None:
        self.now = 0.0
        self.timers: list[tuple[float, Callable[[], object]]] = []

    def later(self, seconds: float, function: Callable[[], object]) -> None:
        self.timers.append((self.now + seconds, function))

    def go(self, seconds: float) -> None:
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        self.timers = [timer for timer in self.timers if timer[0] > self.now]
        for _, function in due:
            function()


class Reader:
    """A receiver in this process."""

    def __init__(self) -> None:
        self.freed: list[tuple[int, bool]] = []

    def free(self, inode: int, spoiled: bool) -> None:
        self.freed.append((inode, spoiled))

    def read(self, segment: Segment) -> memoryview:
        return borrow(os.getpid(), place_of(segment.place, 0), self.free)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store(clock: Clock) -> Iterator[Store]:
    before = held()
    store = Store(clock.later, lambda: clock.now)
    yield store
    store.close()
    clock.timers.clear()
    gc.collect()
    assert held() <= before


def held() -> int:
    """The segments' descriptors of this process."""
    return sum(NAME in target for target in leftovers.descriptors().values())


def written(store: Store, *parts: Any) -> Segment:
    segment = store.write(parts)
    assert segment is not None
    return segment


# --- reading ---


def test_a_value_is_read_where_it_was_written(store: Store) -> None:
    value = Reader().read(written(store, A, b"", b"tail"))
    assert value == A + b"tail"
    assert len(value) == SIZE + 4


def test_what_a_receiver_changes_is_its_own(store: Store) -> None:
    segment = written(store, A)
    one, other = Reader().read(segment), Reader().read(segment)
    one[0:5] = b"12345"
    assert bytes(other[:6]) == b"aaaaaa"
    assert bytes(segment.view()[:6]) == b"aaaaaa"


def test_a_receiver_keeps_no_descriptor_and_says_once_when_nothing_refers_to_the_value(store: Store) -> None:
    segment, reader = written(store, A), Reader()
    before = len(leftovers.descriptors())
    value = reader.read(segment)
    part = value[10:20]
    del value
    gc.collect()
    assert len(leftovers.descriptors()) == before
    assert not reader.freed
    del part
    assert reader.freed == [(segment.inode, False)]


def test_a_value_outlives_its_sender(store: Store) -> None:
    segment = written(store, A)
    value = Reader().read(segment)
    segment.close()
    assert value == A


def test_a_receiver_that_forked_says_that_its_copy_may_still_read(store: Store) -> None:
    segment, reader = written(store, A), Reader()
    value = reader.read(segment)
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    del value
    assert reader.freed == [(segment.inode, True)]


def test_a_fork_neither_says_free_nor_keeps_what_is_its_parents(store: Store) -> None:
    segment, spare = written(store, A), written(store, B)
    reader = Reader()
    value = reader.read(segment)
    spare.end()
    child = os.fork()
    if child == 0:
        try:
            del value
            os._exit(0 if not reader.freed and spare.fd < 0 and store.write([A]) else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert written(store, A) is spare


# --- what is not one ---


def refuse(fd: int, inode: int | None = None, size: int = SIZE) -> None:
    with pytest.raises(OSError, match=r"segment|No such file"):
        borrow(os.getpid(), (fd, os.fstat(fd).st_ino if inode is None else inode, size), Reader().free)


def test_only_a_segment_is_opened(store: Store, tmp_path: Any) -> None:
    ours = make_memory("other", SIZE)
    named = os.open(tmp_path / "memfd:headgate-segment", os.O_RDWR | os.O_CREAT)
    os.ftruncate(named, SIZE)
    ends = socket.socketpair()
    reading, writing = os.pipe()
    for fd in (ours, named, ends[0].fileno(), reading):
        refuse(fd)
    for fd in (ours, named, reading, writing):
        os.close(fd)
    for end in ends:
        end.close()


def test_only_the_segment_that_was_named_is_read(store: Store) -> None:
    segment = written(store, A)
    refuse(segment.fd, inode=segment.inode + 1)
    refuse(segment.fd, size=segment.capacity + 1)
    with pytest.raises(OSError, match="No such"):
        borrow(2**22 + 1, (segment.fd, segment.inode, SIZE), Reader().free)


def test_memory_that_its_sender_could_shrink_is_not_read() -> None:
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    refuse(fd)
    os.close(fd)


@pytest.mark.parametrize("body", [b"", b"x" * 19, PLACE.pack(3, 4, 5), PLACE.pack(3, 4, 2**63)])
def test_a_place_that_cannot_be_breaks_the_protocol(body: bytes) -> None:
    with pytest.raises(ProtocolError, match="segment"):
        place_of(body, 0)


class Proxy(Reader):
    """A receiver that reads again and again."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.readings = Readings()

    def free(self, inode: int, spoiled: bool) -> None:
        super().free(inode, spoiled)
        self.readings.ended(inode, self.clock.now)

    def read(self, segment: Segment) -> memoryview:
        return self.readings.view(os.getpid(), place_of(segment.place, 0), self.free)


def test_what_is_only_read_is_mapped_once_and_shows_what_was_written_since(store: Store, clock: Clock) -> None:
    segment, proxy = written(store, A), Proxy(clock)
    view = proxy.read(segment)
    assert view == A
    assert view.readonly
    part = view[5:9]
    del view
    assert not proxy.freed
    del part
    assert proxy.freed == [(segment.inode, False)]
    segment.end()
    again = written(store, B[:1_000_000])
    assert again is segment
    fd, segment.fd = segment.fd, -1
    place = PLACE.pack(0, segment.inode, segment.size)  # where there is none: it is not opened again
    assert proxy.readings.view(os.getpid(), place_of(place, 0), proxy.free) == B[:1_000_000]
    segment.fd = fd


def test_what_does_not_come_again_is_let_go(store: Store, clock: Clock) -> None:
    segment, proxy = written(store, A), Proxy(clock)
    proxy.read(segment)
    place = place_of(PLACE.pack(0, segment.inode, segment.size), 0)
    clock.now = 2.9
    proxy.readings.sweep(clock.now)
    proxy.readings.view(os.getpid(), place, proxy.free)
    clock.now = 6.0
    proxy.readings.sweep(clock.now)
    with pytest.raises(FileNotFoundError):
        proxy.readings.view(os.getpid(), place, proxy.free)


def test_a_view_outlives_the_segment_its_sender_and_what_was_mapped(store: Store, clock: Clock) -> None:
    segment, proxy = written(store, A), Proxy(clock)
    view = proxy.read(segment)
    segment.close()
    del proxy
    gc.collect()
    assert view == A


def test_a_value_that_is_larger_than_its_segment_is_not_read_though_it_was_before(store: Store, clock: Clock) -> None:
    segment, proxy = written(store, A), Proxy(clock)
    proxy.read(segment)
    place = place_of(PLACE.pack(segment.fd, segment.inode, segment.capacity + 1), 0)
    for _ in range(2):
        with pytest.raises(OSError):
            proxy.readings.view(os.getpid(), place, proxy.free)


# --- writing ---


def test_a_small_value_needs_no_segment(store: Store) -> None:
    assert store.write([b"x" * (SMALLEST_BYTES - 1)]) is None
    assert store.write([b"x" * (SMALLEST_BYTES - 1), b"y"]) is not None


def test_an_answer_needs_one_much_sooner_but_only_so_much_is_lent_at_a_time(clock: Clock) -> None:
    answers = Store(clock.later, lambda: clock.now, lends_answer)
    small = written(answers, b"x" * 100_000)
    large = written(answers, bytes(MOST_BYTES - 200_000))
    assert answers.write([b"x" * 100_001]) is None
    last = answers.write([b"x" * 100_000])
    assert last is not None
    reader = Reader()
    value, _ = reader.read(large), large.lend()
    large.end()  # it is read still
    assert answers.write([b"x" * 100_000]) is None
    large.give_back()
    del value
    assert answers.write([b"x" * 100_000]) is not None
    for segment in (small, last):
        segment.end()
    answers.close()


def test_a_small_answer_takes_the_memory_of_one_before(clock: Clock) -> None:
    answers = Store(clock.later, lambda: clock.now, lends_answer)
    first = written(answers, bytes(1 << 20))
    first.end()
    assert written(answers, b"x" * 65536) is first
    answers.close()


def test_a_value_of_many_parts_is_whole_and_in_order_also_in_memory_that_was_used(store: Store) -> None:
    for _ in range(3):
        parts = [os.urandom(500) for _ in range(3000)]
        segment = written(store, *parts)
        assert segment.view() == b"".join(parts)
        segment.end()
        gc.collect()


@pytest.mark.parametrize("said", [0, 3, 2 * SIZE])
def test_a_value_is_as_long_as_its_memory_whatever_its_class_says(store: Store, said: int) -> None:
    class Odd(bytes):
        def __len__(self) -> int:
            return said

    fresh = written(store, Odd(A), b"tail")
    assert Reader().read(fresh) == A + b"tail"
    fresh.end()
    used = written(store, b"head", Odd(B))
    assert (used.inode, Reader().read(used)) == (fresh.inode, b"head" + B)


def test_read_only_memory_can_be_sent_from(store: Store) -> None:
    for value in (A, memoryview(B), bytearray(A)):
        segment = written(store, value, memoryview(b"xy"))
        assert bytes(segment.view()) == bytes(value) + b"xy"
        segment.end()


def test_without_memory_or_a_descriptor_there_is_no_segment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(number: int) -> Callable[..., Any]:
        def failing(*args: Any) -> None:
            raise OSError(number, os.strerror(number))

        return failing

    with monkeypatch.context() as patched:
        patched.setattr(segments, "make_memory", fail(errno.EMFILE))
        assert store.write([A]) is None
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwritev", fail(errno.ENOSPC))
        assert store.write([A]) is None
    gc.collect()
    assert not held()


def test_a_view_is_a_reader_and_can_be_had_without_a_mapping(
    store: Store, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    segment = written(store, A)
    view = segment.view()
    segment.end()
    assert written(store, B) is not segment
    assert view == A
    del view
    clock.go(0.0)
    assert written(store, B) is segment

    def fail(*args: Any) -> None:
        raise OSError(errno.ENOMEM, "too many mappings")

    monkeypatch.setattr(segments, "map_memory", fail)
    assert segment.view() == B


def test_writing_lets_other_threads_run(store: Store) -> None:
    """Not one long hold of the interpreter: what would stop every other call of the process."""
    big = bytes(64 << 20)
    for _ in range(2):  # fresh memory, and used
        counted, stop = [0], threading.Event()

        def count(counted: list[int] = counted, stop: threading.Event = stop) -> None:
            while not stop.wait(0.0005):
                counted[0] += 1

        thread = threading.Thread(target=count)
        thread.start()
        segment = written(store, big)
        at_the_end = counted[0]
        stop.set()
        thread.join()
        segment.end()
        assert at_the_end >= 3


# --- when it is used again ---


def test_it_is_used_again_when_its_request_is_over_and_nobody_reads(store: Store) -> None:
    segment = written(store, A)
    assert written(store, A) is not segment
    segment.lend()
    segment.end()
    assert written(store, A) is not segment
    segment.give_back()
    assert written(store, B) is segment


def test_it_is_not_used_again_before_its_request_is_over(store: Store) -> None:
    segment = written(store, A)
    segment.lend()
    segment.give_back()
    assert written(store, B) is not segment
    assert segment.view() == A


def test_a_value_that_is_kept_is_never_written_over(store: Store) -> None:
    lent, reader = Lent(), Reader()
    first = written(store, A)
    lent.add(first)
    value = reader.read(first)
    first.end()
    for _ in range(3):
        written(store, B).end()
    assert value == A


def test_what_a_link_had_when_it_ended_is_let_go_and_can_still_be_read(store: Store) -> None:
    lent = Lent()
    segment = written(store, A)
    lent.add(segment)
    value = Reader().read(segment)
    segment.end()
    lent.end()
    assert segment.fd == -1
    assert written(store, B) is not segment
    assert value == A
    lent.back(segment.inode)  # a word that was under way


def test_a_request_that_goes_elsewhere_after_its_link_ended_has_its_value_still(store: Store) -> None:
    first, second = Lent(), Lent()
    segment = written(store, A)
    first.add(segment)
    first.end()
    second.add(segment)
    assert Reader().read(segment) == A
    segment.end()
    second.back(segment.inode)
    assert segment.fd == -1  # the first receiver may read it


def test_a_receiver_that_forked_keeps_it(store: Store) -> None:
    lent = Lent()
    segment = written(store, A)
    lent.add(segment)
    segment.end()
    lent.back(segment.inode, spoiled=True)
    assert segment.fd == -1


def test_a_receiver_that_cannot_open_segments_is_spared_them_for_a_while(store: Store) -> None:
    lent = Lent()
    segment = written(store, A)
    lent.add(segment)
    lent.refused(segment.inode, now=5.0)
    assert not lent.may(5.0 + segments.AGAIN_S - 0.1)
    assert lent.may(5.0 + segments.AGAIN_S)
    segment.end()
    assert written(store, B) is segment


def test_only_so_many_that_receivers_keep_are_waited_for(store: Store) -> None:
    lent = Lent()
    kept = []
    for _ in range(MOST_LENT + 3):
        segment = written(store, A)
        lent.add(segment)
        kept.append(Reader().read(segment))
        segment.end()
    assert held() == MOST_LENT
    assert all(value == A for value in kept)


# --- the memory comes back ---


def test_what_is_not_used_for_some_seconds_is_given_back(store: Store, clock: Clock) -> None:
    first, second = written(store, A), written(store, A)
    first.end()
    clock.go(IDLE_S / 2)
    second.end()
    clock.go(IDLE_S / 2)
    assert (first.fd, held()) == (-1, 1)
    clock.go(IDLE_S)
    assert held() == 0
    assert not clock.timers


def test_a_store_that_is_closed_keeps_nothing(store: Store) -> None:
    spare, lent, late = written(store, A), written(store, A), written(store, A)
    lent.lend()
    spare.end()
    lent.end()
    store.close()
    assert (spare.fd, lent.fd) == (-1, -1)
    late.end()
    assert late.fd == -1


def test_a_loop_that_has_ended_keeps_nothing() -> None:
    def over(seconds: float, function: Callable[[], object]) -> None:
        raise RuntimeError("the loop is closed")

    store = Store(over, lambda: 0.0)
    segment = written(store, A)
    view = segment.view()
    segment.end()
    del view
    other = written(store, A)
    other.end()
    assert other.fd == -1
    del segment, other, store
    gc.collect()
    assert not held()


def test_a_segment_that_was_forgotten_is_closed(store: Store) -> None:
    written(store, A)
    gc.collect()
    assert not held()


def test_no_more_is_lent_to_slow_readers_than_is_said() -> None:
    later: list[Any] = []
    store = Store(lambda seconds, function: later.append(function), lambda: 0.0, lends_answer, MOST)
    lent, read = Lent(), []
    for body, most in ((bytes(SMALLEST_ANSWER_BYTES), MOST), (bytes(4 << 20), MOST_BYTES >> 22)):
        for _ in range(most):
            segment = store.write((body,))
            assert segment is not None
            lent.add(segment)  # somebody reads it
            segment.end()  # and its request is over
            read.append(segment)
        assert store.write((body,)) is None
        for segment in read:
            lent.back(segment.inode)
        read.clear()
        kept = store.write((body,))
        assert kept is not None
        kept.end()
    store.close()
