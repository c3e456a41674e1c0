"""wire/slots.py: which requests have started, known even of a process that was killed."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from headgate.wire.slots import SLOTS, SlotPage, make_memory, map_memory

STARTS_ONE_AND_DIES = """
import mmap, os, signal, sys
mmap.mmap(int(sys.argv[1]), 0)[int(sys.argv[2])] = 1
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def page() -> Iterator[SlotPage]:
    page = SlotPage()
    yield page
    page.close()


def test_each_request_gets_a_slot_of_its_own(page: SlotPage) -> None:
    assert [page.take() for _ in range(4)] == [0, 1, 2, 3]


def test_a_slot_that_was_used_last_is_used_first(page: SlotPage) -> None:
    for _ in range(4):
        page.take()
    page.free += [2, 0]

    assert [page.take() for _ in range(3)] == [0, 2, 4]


def test_what_the_replica_marks_has_started_and_nothing_else(page: SlotPage) -> None:
    assert page.fd is not None
    theirs = map_memory(os.dup(page.fd))
    slots = [page.take() for _ in range(3)]
    theirs[slots[1]] = 1

    assert [page.started(slot) for slot in slots] == [False, True, False]
    theirs.close()


def test_a_slot_that_is_taken_again_has_not_started(page: SlotPage) -> None:
    assert page.fd is not None
    theirs = map_memory(os.dup(page.fd))
    slot = page.take()
    theirs[slot] = 1
    page.free.append(slot)

    assert page.take() == slot
    assert not page.started(slot)
    theirs.close()


def test_a_mark_outlives_the_process_that_made_it(page: SlotPage) -> None:
    assert page.fd is not None
    slots = [page.take() for _ in range(3)]
    command = [sys.executable, "-S", "-c", STARTS_ONE_AND_DIES, str(page.fd), str(slots[1])]
    run = subprocess.run(command, pass_fds=[page.fd], timeout=20)

    assert run.returncode == -signal.SIGKILL
    assert [page.started(slot) for slot in slots] == [False, True, False]


def test_a_request_without_a_byte_counts_as_started(page: SlotPage) -> None:
    for _ in range(SLOTS):
        page.take()
    last, beyond = SLOTS - 1, page.take()

    assert beyond == SLOTS
    assert page.started(beyond)
    assert not page.started(last)


def test_once_it_was_passed_on_the_descriptor_is_closed_and_the_page_stays(page: SlotPage) -> None:
    fd = page.fd
    assert fd is not None
    page.passed()
    page.passed()

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    assert not page.started(page.take())


@pytest.mark.parametrize("size", [0, 4096, 8192 * 4])
def test_nobody_can_shrink_or_grow_the_memory_under_another(size: int) -> None:
    fd = make_memory("test", 8192)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, size)
    assert os.fstat(fd).st_size == 8192
    assert fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    os.close(fd)


def test_mapping_closes_the_descriptor_even_when_it_fails() -> None:
    fd = make_memory("test", 0)  # nothing can be mapped of nothing
    with pytest.raises(ValueError, match="cannot mmap an empty file"):
        map_memory(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
