"""The loop that tests run on."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest
import virtual_time


def now() -> float:
    return asyncio.get_running_loop().time()


def test_the_clock_begins_at_zero_and_stands_still_while_there_is_work() -> None:
    async def main() -> list[float]:
        times = []
        for _ in range(100):
            times.append(now())
            await asyncio.sleep(0)
        return times

    assert set(virtual_time.run(main())) == {0.0}


def test_an_hour_passes_at_once() -> None:
    async def main() -> float:
        await asyncio.sleep(3600)
        return now()

    began = time.monotonic()
    assert virtual_time.run(main()) == 3600
    assert time.monotonic() - began < 1


def test_timers_fire_in_order_and_on_the_minute() -> None:
    async def main() -> list[tuple[str, float]]:
        seen: list[tuple[str, float]] = []

        async def note(name: str, delay: float) -> None:
            await asyncio.sleep(delay)
            seen.append((name, now()))

        await asyncio.gather(note("late", 90), note("early", 60), note("first", 0.5))
        return seen

    assert virtual_time.run(main()) == [("first", 0.5), ("early", 60), ("late", 90)]


def test_a_timeout_ends_a_wait() -> None:
    async def main() -> float:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(20):
                await asyncio.Event().wait()
        return now()

    assert virtual_time.run(main()) == 20


def test_a_deadlock_fails_and_names_the_tasks() -> None:
    async def main() -> None:
        waiter = asyncio.create_task(asyncio.Event().wait(), name="waiter")
        await waiter

    with pytest.raises(virtual_time.Deadlock) as caught:
        virtual_time.run(main())
    assert str(caught.value).startswith("deadlock: every task waits and no timer is set\n")
    assert "waiter waits in wait:" in str(caught.value)


def test_after_a_deadlock_every_task_was_cancelled() -> None:
    ended = []

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("main")

    with pytest.raises(virtual_time.Deadlock):
        virtual_time.run(main())
    assert ended == ["main"]


def test_timers_that_never_lead_anywhere_fail_too() -> None:
    async def main() -> None:
        while True:
            await asyncio.sleep(1)

    with pytest.raises(virtual_time.TooLate, match="still running after 100 s"):
        virtual_time.run(main(), limit_s=100)


def test_a_thread_is_waited_for() -> None:
    async def main() -> tuple[str, float]:
        answer = await asyncio.get_running_loop().run_in_executor(None, lambda: time.sleep(0.05) or "done")
        return answer, now()

    assert virtual_time.run(main()) == ("done", 0.0)


def test_bytes_come_before_the_clock_jumps() -> None:
    async def main() -> tuple[bytes, float]:
        left, right = socket.socketpair()
        reader, writer = await asyncio.open_connection(sock=left)
        right.sendall(b"hello")
        async with asyncio.timeout(5):
            data = await reader.readexactly(5)
        writer.close()
        await writer.wait_closed()
        right.close()
        return data, now()

    assert virtual_time.run(main()) == (b"hello", 0.0)


def test_an_error_of_the_test_is_passed_on() -> None:
    async def main() -> None:
        await asyncio.sleep(1)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        virtual_time.run(main())
