"""Proxies that die or stop: nobody is refused, and what they held is all that is lost."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from http_load import Load, get, in_thread
from promises import Promise
from running import eventually, is_alive
from under_load import address_of, proxy_pid, serve, starts, under_both_loads, worker

import headgate

START = {"http_options": {"port": 0}}


def check_losses(loads: tuple[Load, ...], ends: list[float]) -> int:
    """Only what a proxy held when it ended is lost; how many that were."""
    count = 0
    for running in loads:
        assert running.unconnected == []
        assert all(any(one.connection.used <= end <= one.seen for end in ends) for one in running.closed)
        for one in running.asked:
            assert one.answer.status in (0, 200), one.answer.text
            if one.is_lost:
                assert one.answer.text in ("ConnectionResetError", "IncompleteReadError", "BrokenPipeError")
                assert any(one.connection.begun <= end <= one.ended for end in ends), one
                count += 1
    return count


def first_answer(loads: tuple[Load, ...], since: float) -> float:
    """How long after `since` the first answer came on a connection that was begun later."""
    return min(one.ended for running in loads for one in running.asked if one.connection.begun > since) - since


async def other_proxy(client: headgate.Client, old: int) -> int:
    """The pid of the proxy that has come in the place of `old`."""

    def find() -> int:
        return next((one.pid for one in client.status().proxies if one.pid != old and one.state == "ready"), 0)

    found: int = await in_thread(eventually, find, 15.0)
    return found


@pytest.mark.local("one proxy, whose supervisor replaces it")
@pytest.mark.promise("proxy kill -9: 0 refused connects, only what it held is lost, replaced in 0.1 s")
def test_a_killed_proxy_refuses_nobody_and_is_replaced_at_once(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    kills: list[float] = []

    async def kill_some() -> None:
        for _ in range(promise.size(20, 4)):
            old = await in_thread(proxy_pid, client)
            await asyncio.sleep(promise.random.uniform(0.2, 0.25))
            os.kill(old, signal.SIGKILL)
            kills.append(time.monotonic())
            await asyncio.sleep(0.1)  # nobody asks the controller meanwhile
            await other_proxy(client, old)

    loads = under_both_loads(client, kill_some, fresh_per_s=300, proxy_dies=True)
    lost = check_losses(loads, kills)
    sent = sum(running.sent for running in loads)
    assert max(starts(tmp_path / "log").values()) == 1
    backs = sorted(first_answer(loads, kill) for kill in kills)
    promise.none_of(sum(running.connects for running in loads), "connects refused")
    promise.says(f"{lost} of {sent:,} requests lost, each on a connection that the proxy held")
    promise.says(f"an answer on a new connection after {backs[len(backs) // 2]:.3f} s (median)")
    promise.within(backs[-1], 0.1, "the slowest")


@pytest.mark.local("one proxy, whose supervisor replaces it")
@pytest.mark.promise("proxy kill -9: what it had sent ends once, and its slots are free again")
@pytest.mark.parametrize("kind", ["async", "plain"])
def test_what_a_killed_proxy_had_sent_ends_and_frees_its_slots(
    client: headgate.Client, tmp_path: Path, promise: Promise, kind: str
) -> None:
    log, slots = tmp_path / "log", 4

    def note(what: str) -> None:
        with log.open("a") as file:
            file.write(f"{what}\n")

    async def hold(request: Any) -> str:
        id = request.query_params["id"]
        note(f"started-{id}")
        try:
            await asyncio.sleep(float(request.query_params.get("s", 30)))
        except asyncio.CancelledError:
            note(f"cancelled-{id}")
            raise
        return "done"

    def plain(request: Any) -> str:
        note(f"started-{request.query_params['id']}")
        time.sleep(0.1)
        note(f"finished-{request.query_params['id']}")
        return "done"

    log.touch()
    serve(client, hold if kind == "async" else plain, max_concurrent_queries=slots)

    async def ask(id: str) -> None:
        with contextlib.suppress(OSError, EOFError):
            await get(address_of(client), f"/it?id={id}")

    async def once(number: int) -> None:
        ids = [f"{number}.{each}" for each in range(slots + 2)]  # two more than there is room for
        asking = [asyncio.create_task(ask(id)) for id in ids]
        wanted = slots if kind == "async" else 1

        def begun(what: str) -> list[str]:
            return [line for line in log.read_text().split() if line.startswith(f"{what}-{number}.")]

        await in_thread(eventually, lambda: len(begun("started")) >= wanted)
        old = await in_thread(proxy_pid, client)
        os.kill(old, signal.SIGKILL)
        await asyncio.gather(*asking)
        ended = time.monotonic()
        over = "cancelled" if kind == "async" else "finished"
        await in_thread(eventually, lambda: len(begun(over)) == len(begun("started")))
        await other_proxy(client, old)
        # all slots at once: each of these has one only if those of before are free
        free = (get(address_of(client), f"/it?id=free.{number}.{each}&s=0.05") for each in range(slots))
        assert {answer.status for answer in await asyncio.gather(*free)} == {200}
        frees.append(time.monotonic() - ended)
        assert len(begun("started")) <= slots

    async def main() -> None:
        for number in range(promise.size(10, 2)):
            await once(number)

    frees: list[float] = []
    asyncio.run(main())
    assert max(starts(log).values()) == 1
    promise.within(max(frees), 2.0, "all slots used again")


@pytest.mark.local("one proxy, whose supervisor replaces it")
@pytest.mark.promise("proxy SIGSTOP: heartbeat missed 2 s -> replaced; those who connect wait and are answered")
def test_a_stopped_proxy_is_replaced_and_those_who_connect_are_answered(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    stops: list[float] = []

    async def stop_some() -> None:
        for _ in range(promise.size(5, 1)):
            old = await in_thread(proxy_pid, client)
            pidfd = os.pidfd_open(old)
            await asyncio.sleep(promise.random.uniform(0.0, 1.0))
            os.kill(old, signal.SIGSTOP)
            stops.append(time.monotonic())
            new = await other_proxy(client, old)
            with pytest.raises(ProcessLookupError):  # it does not wake up any more
                signal.pidfd_send_signal(pidfd, signal.SIGCONT)
            os.close(pidfd)
            assert is_alive(new)

    loads = under_both_loads(client, stop_some, fresh_per_s=100, proxy_dies=True)
    lost = check_losses(loads, stops)
    assert max(starts(tmp_path / "log").values()) == 1
    promise.none_of(sum(running.connects for running in loads), "connects refused")
    promise.says(f"{lost} requests lost, each on a connection that the proxy held when it was stopped")
    # A ping goes out once a second: two of them are missed 2 to 3 s after the stop.
    promise.within(max(first_answer(loads, stop) for stop in stops), 3.2, "an answer on a new connection, slowest")


@pytest.mark.local("one proxy, whose supervisor replaces it")
@pytest.mark.promise("proxy SIGSTOP: one that goes on within a second is left alone, nothing is lost")
def test_a_proxy_that_goes_on_in_time_is_left_alone(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    pid = proxy_pid(client)

    async def stop_some() -> None:
        for _ in range(promise.size(5, 1)):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.9)
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.6)

    loads = under_both_loads(client, stop_some, fresh_per_s=100)
    assert [one for running in loads for one in running.asked if one.answer.status != 200] == []
    assert proxy_pid(client) == pid
    promise.none_of(sum(running.sent for running in loads), "requests lost")


@pytest.mark.local("one proxy, whose supervisor replaces it")
@pytest.mark.promise("a proxy that does not acknowledge a snapshot in 2 s is restarted, the change is in force then")
def test_a_change_waits_for_a_stopped_proxy_no_longer_than_two_seconds(
    client: headgate.Client, promise: Promise
) -> None:
    for tag in ("a", "b"):
        client.create_backend(tag, lambda request, tag=tag: tag)
    client.create_endpoint("it", backend="a", route="/it")
    took = []
    for number in range(promise.size(5, 1)):
        stopped, tag = proxy_pid(client), "ba"[number % 2]
        os.kill(stopped, signal.SIGSTOP)
        began = time.monotonic()
        client.set_traffic("it", {tag: 1.0})
        took.append(time.monotonic() - began)
        assert asyncio.run(get(address_of(client), "/it")).text == tag  # whoever asks now, old or new
        eventually(lambda: not is_alive(stopped))  # noqa: B023
    promise.within(max(took), 2.2, "set_traffic returned")
