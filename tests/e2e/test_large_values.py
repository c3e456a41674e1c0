"""Arrays of up to 100 MB by handles: right, at once, kept, and without a trace when they are dropped."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import leftovers
import needs
import pytest
from running import on_ray

import headgate
from headgate.wire.borrowed import NAME
from headgate.wire.segments import IDLE_S

numpy = needs.module("numpy")

MB = 1_000_000


@pytest.fixture
def client() -> Iterator[headgate.Client]:
    with headgate.start(http_options={"location": "NoServer"}) as started:
        yield started


def serve(client: headgate.Client, code: Any, name: str = "it", **config: Any) -> Any:
    client.create_backend(name, code, config=config)
    client.create_endpoint(name, backend=name)
    return client.get_handle(name)


def until(reached: Callable[[], bool], seconds: float = 3 * IDLE_S + 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def array(size: int, seed: int = 0) -> Any:
    return numpy.random.default_rng(seed).integers(0, 255, size, numpy.uint8)


def segments(pid: int | str = "self") -> int:
    gc.collect()
    return sum(NAME in target for target in leftovers.descriptors(pid).values())


def mapped(pid: int | str = "self") -> int:
    gc.collect()
    return Path(f"/proc/{pid}/maps").read_text().count(NAME)


def plain(request: Any) -> Any:
    return (os.getpid(), request.data, int(request.data.sum())) if request.data is not None else os.getpid()


async def later(request: Any) -> Any:
    return (os.getpid(), request.data, int(request.data.sum())) if request.data is not None else os.getpid()


@pytest.mark.parametrize("code", [plain, later])
@pytest.mark.parametrize("megabytes", [1, 10, 100])
def test_an_array_goes_there_and_back_and_may_be_written_to(
    client: headgate.Client, code: Any, megabytes: int
) -> None:
    handle = serve(client, code)
    sent = array(megabytes * MB)
    for _ in range(3):
        _, back, total = handle.call(sent)
        assert total == int(sent.sum())
        assert numpy.array_equal(back, sent)
        back += 1  # its own
        assert numpy.array_equal(handle.call(sent)[1], sent)

    async def use() -> None:
        mine = client.get_handle("it", sync=False)
        assert numpy.array_equal((await mine.call(sent))[1], sent)

    asyncio.run(use())


def test_what_is_sent_is_what_it_was_when_it_was_sent(client: headgate.Client) -> None:
    handle = serve(client, plain)
    sent = array(10 * MB)
    total = int(sent.sum())
    refs = []
    for _ in range(5):
        refs.append(handle.remote(sent))
        sent[:] = 0
        sent = array(10 * MB)
    assert [headgate.get(ref)[2] for ref in refs] == [total] * 5


def test_a_handler_may_change_its_argument(client: headgate.Client) -> None:
    def double(request: Any) -> Any:
        request.data["a"] *= 2
        return request.data["a"], request.query_params["b"]

    handle = serve(client, double)
    ones = numpy.ones(MB)
    for _ in range(3):
        a, b = handle.call({"a": ones}, b=ones.copy())
        assert (a.min(), a.max(), b.max(), ones.max()) == (2.0, 2.0, 1.0, 1.0)


def test_several_threads_send_and_get_at_once(client: headgate.Client) -> None:
    handle = serve(client, later, num_replicas=2, max_concurrent_queries=8)

    def exchange(seed: int) -> bool:
        sent = array((1 + seed * 13 % 40) * MB, seed)
        return all(numpy.array_equal(handle.call(sent)[1], sent) for _ in range(4))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(exchange, range(16)))

    async def use() -> Any:
        mine = client.get_handle("it", sync=False)
        sent = [array(20 * MB, seed) for seed in range(6)]
        answers = await asyncio.gather(*map(mine.call, sent))
        return all(numpy.array_equal(answer[1], one) for answer, one in zip(answers, sent, strict=True))

    assert asyncio.run(use())


def test_arrays_that_are_kept_stay_as_they_are_on_both_sides(client: headgate.Client) -> None:
    class Keeper:
        def __init__(self) -> None:
            self.kept: list[Any] = []

        def __call__(self, request: Any) -> Any:
            if request.data is None:
                return [int(each.sum()) for each in self.kept]
            self.kept.append(request.data)
            return request.data

    handle = serve(client, Keeper)
    sent = [array(3 * MB, seed) for seed in range(40)]  # more than are waited for
    kept = [handle.call(one) for one in sent]
    assert handle.call() == [int(one.sum()) for one in sent]
    assert all(numpy.array_equal(one, other) for one, other in zip(sent, kept, strict=True))

    async def ask() -> Any:
        return await client.get_handle("it", sync=False).call(sent[0])

    last = asyncio.run(ask())  # its link has ended
    for one in sent[1:5]:
        handle.call(one)
    assert numpy.array_equal(last, sent[0])
    client.shutdown()
    assert all(numpy.array_equal(one, other) for one, other in zip(sent, kept, strict=True))


def test_refs_pass_arrays_from_call_to_call(client: headgate.Client) -> None:
    def add(request: Any) -> Any:
        return request.data + 1

    handle = serve(client, add, num_replicas=2)
    first = handle.remote(numpy.zeros(MB))
    second = [handle.remote(first) for _ in range(4)]
    assert [headgate.get(ref).max() for ref in second] == [2.0] * 4
    if not on_ray():  # where what `get` gives cannot be written to
        headgate.get(first)[:] = 7.0
    assert headgate.get(handle.remote(first)).max() == (2.0 if on_ray() else 8.0)


@pytest.mark.local("counts descriptors of the replica's process")
def test_nothing_is_left_when_the_values_are_dropped(client: headgate.Client) -> None:
    handle = serve(client, later)
    pid = handle.call()
    before = len(leftovers.descriptors()), len(leftovers.descriptors(pid))
    kept = [handle.call(array(20 * MB, seed))[1] for seed in range(5)]
    assert segments(pid) >= 5
    assert mapped() >= 5
    del kept
    until(lambda: segments() == segments(pid) == mapped() == mapped(pid) == 0)
    until(lambda: (len(leftovers.descriptors()), len(leftovers.descriptors(pid))) == before)


@pytest.mark.local("kills the replica's process")
def test_a_replica_that_is_killed_while_it_reads_leaves_nothing(client: headgate.Client, tmp_path: Path) -> None:
    def read(request: Any) -> Any:
        if request.data is None:
            return os.getpid()
        (tmp_path / "begun").touch()
        while not (tmp_path / "end").exists():
            request.data.sum()
        return request.data

    handle = serve(client, read, max_concurrent_queries=4)
    pid = handle.call()
    sent = [array(30 * MB, seed) for seed in range(3)]
    outcomes: list[Any] = [None] * 3

    def call(index: int) -> None:
        try:
            outcomes[index] = handle.call(sent[index])
        except headgate.ReplicaDied as error:
            outcomes[index] = error

    threads = [threading.Thread(target=call, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    until((tmp_path / "begun").exists)
    time.sleep(0.3)  # all are there
    (tmp_path / "begun").unlink()
    os.kill(pid, signal.SIGKILL)
    until((tmp_path / "begun").exists)  # another replica has what had not started
    (tmp_path / "end").touch()
    for thread in threads:
        thread.join(60)
    died = [outcome for outcome in outcomes if isinstance(outcome, headgate.ReplicaDied)]
    assert len(died) == 1
    assert died[0].started
    for outcome, one in zip(outcomes, sent, strict=True):
        assert outcome is died[0] or numpy.array_equal(outcome, one)
    pid = handle.call()
    outcomes.clear()
    outcome = None
    until(lambda: segments() == segments(pid) == mapped() == mapped(pid) == 0)


def test_values_of_a_cancelled_and_of_a_late_call_are_given_back(client: headgate.Client, tmp_path: Path) -> None:
    async def wait(request: Any) -> Any:
        if request.data is None:
            return os.getpid()
        await asyncio.sleep(1.0)
        return request.data

    handle = serve(client, wait)
    pid = handle.call()
    ref = handle.options(timeout_s=0.3).remote(array(10 * MB))
    with pytest.raises(headgate.RequestTimeout):
        headgate.get(ref) if not on_ray() else handle.options(timeout_s=0.3).call(array(10 * MB))

    async def cancel() -> None:
        task = asyncio.ensure_future(client.get_handle("it", sync=False).call(array(10 * MB)))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    del ref
    until(lambda: segments() == segments(pid) == 0)


def test_without_descriptors_and_where_the_peer_is_not_seen_values_go_in_pieces(
    client: headgate.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blind:
        """A replica that may not open what others lend it, and then has no descriptor for its own."""

        def __call__(self, request: Any) -> Any:
            from headgate.wire import segments

            if isinstance(request.data, str):
                import errno

                def fail(*args: Any) -> Any:
                    raise OSError(errno.EACCES, "no")

                setattr(segments if request.data == "make_memory" else os, request.data, fail)
                return None
            return request.data

    handle = serve(client, Blind)
    sent = array(5 * MB)
    assert numpy.array_equal(handle.call(sent), sent)
    for name in ("readlink", "make_memory"):  # what it cannot read; what it cannot send
        handle.call(name)
        with ThreadPoolExecutor(4) as pool:
            assert all(numpy.array_equal(back, sent) for back in pool.map(handle.call, [sent] * 8))

    def fail(*args: Any) -> Any:
        raise PermissionError(13, "no")

    client.create_backend("seen", plain)
    client.create_endpoint("seen", backend="seen")
    handle = client.get_handle("seen")
    handle.call(sent)
    with monkeypatch.context() as patched:  # this process cannot read
        patched.setattr(os, "readlink", fail)
        for _ in range(3):
            assert numpy.array_equal(handle.call(sent)[1], sent)


@pytest.mark.local("counts descriptors")
def test_at_the_limit_of_open_files_calls_go_on(client: headgate.Client) -> None:
    handle = serve(client, plain)
    sent = array(5 * MB)
    handle.call(sent)
    until(lambda: segments() == 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.open("/dev/null", os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, leftovers.descriptors())) + 1, hard))
    try:
        while True:
            try:
                taken.append(os.dup(taken[0]))
            except OSError:
                break
        refs = [handle.remote(sent) for _ in range(3)]
        assert headgate.wait(refs, num_returns=3, timeout=30)[1] == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in taken:
            os.close(fd)
    assert all(numpy.array_equal(headgate.get(ref)[1], sent) for ref in refs)
