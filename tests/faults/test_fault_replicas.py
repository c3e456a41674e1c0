"""Replicas that die, stop, are slow or do not start, under load: what is lost is what they had started."""

from __future__ import annotations

import asyncio
import os
import signal
import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from http_load import Load, get, in_thread
from promises import SLACK, Promise
from running import died, eventually, grown_controller, is_alive, key_of, on_ray
from under_load import address_of, described, replica_pids, serve, starts, under_load, worker

import headgate

START = {"http_options": {"port": 0}}


async def kill(client: headgate.Client, victim: int, count: int = 2) -> float:
    """Kill that replica; the seconds until as many as before are ready, all of them others."""
    began = time.monotonic()
    os.kill(victim, signal.SIGKILL)

    def are_back() -> bool:
        time.sleep(0.01)
        pids = replica_pids(client)
        return len(pids) == count and victim not in pids

    await in_thread(eventually, are_back, 20.0)
    return time.monotonic() - began


async def start_s(client: headgate.Client) -> float:
    """How long one more replica takes to be ready, under this load."""
    began = time.monotonic()
    await in_thread(client.update_backend_config, "it", {"num_replicas": 3})
    took = time.monotonic() - began
    await in_thread(client.update_backend_config, "it", {"num_replicas": 2})
    return took


def check_lost(running: Load, log: Path) -> None:
    """Each request ran at most once and was answered: 200, or 502 if it had started."""
    assert len(running.answers) == running.sent
    started = starts(log)
    assert max(started.values()) == 1, "a request ran twice"
    for id, answer in running.failed.items():
        assert answer.status == 502, (id, answer)
        assert answer.headers["x-headgate-started"] == "1"
    silent = set(running.answers) - set(started)  # killed between the mark and the handler's first line
    assert silent <= set(running.failed)


@pytest.mark.timeout(600)
@pytest.mark.promise("replica kill -9: only what it had started is lost, and answered 502")
def test_a_killed_replica_costs_at_most_what_it_had_started(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=2, max_concurrent_queries=100)
    kills = promise.size(full=50, small=5)
    took, starts_s = [], []

    async def kill_some(running: Load) -> None:
        for _ in range(kills):
            await asyncio.sleep(0.3)
            pids = await in_thread(replica_pids, client)
            took.append(await kill(client, promise.random.choice(pids)))
        starts_s.extend([await start_s(client) for _ in range(kills)])

    running = under_load(client, kill_some)
    check_lost(running, log)
    assert len(running.failed) < kills * 10
    promise.none_of(running.sent, "requests lost or run twice")
    promise.says(f"502 for {len(running.failed)} that had started")
    ordinary = statistics.median(starts_s)
    promise.within(max(took) - ordinary, 0.5, f"the slowest of {kills} back, beyond R")
    promise.says(f"R = {ordinary:.2f} s, the median of {kills} ordinary starts; the slowest {max(starts_s):.2f} s")
    promise.says(f"back after {statistics.median(took):.2f} s by the median, {max(took):.2f} s at most")


@pytest.mark.promise("idempotent=True: one more run, and no failure by one death")
def test_an_idempotent_request_is_run_once_more(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=2, max_concurrent_queries=100, idempotent=True)
    kills = promise.size(full=20, small=3)

    async def kill_some(running: Load) -> None:
        for _ in range(kills):
            await kill(client, (await in_thread(replica_pids, client))[0])
            await asyncio.sleep(0.1)

    running = under_load(client, kill_some)
    assert described(running.failed) == []
    assert max(starts(log).values()) <= 2
    promise.none_of(running.sent, "requests failed")
    promise.says(f"{sum(count == 2 for count in starts(log).values())} ran twice, 0 more often")


@pytest.mark.timeout(300)
@pytest.mark.promise("a poison request kills one replica at most, two if idempotent")
@pytest.mark.parametrize("idempotent", [False, True])
def test_a_request_that_kills_its_replica_kills_no_more(
    client: headgate.Client, tmp_path: Path, promise: Promise, idempotent: bool
) -> None:
    log = tmp_path / "log"
    note = worker(log, seconds=0.0)

    async def poison(request: Any) -> None:
        await note(request)
        if request.query_params["id"].startswith("poison"):
            os._exit(1)

    serve(client, poison, idempotent=idempotent, num_replicas=2)
    poisons = promise.size(full=20, small=2)
    for number in range(poisons):
        answer = asyncio.run(get(address_of(client), f"/it?id=poison{number}"))
        assert (answer.status, answer.headers.get("x-headgate-started")) == (502, "1")
        assert asyncio.run(get(address_of(client), f"/it?id=good{number}")).status == 200
        eventually(lambda: len(replica_pids(client)) == 2)
        time.sleep(0.3)  # else this is a crash loop, with its back-off
    each = {id: count for id, count in starts(log).items() if id.startswith("poison")}
    assert each == {f"poison{number}": 1 + idempotent for number in range(poisons)}
    promise.none_of(poisons, f"killed more than {1 + idempotent}")


@pytest.mark.local("a Ray ref is bound to its replica; requests over HTTP and handle.call are not, see above")
def test_what_had_not_started_is_run_elsewhere(client: headgate.Client, tmp_path: Path) -> None:
    """A plain replica dies in its first request; those behind it in the same process had not started."""

    def die_or_live(request: Any) -> str:
        with (tmp_path / "log").open("a") as file:
            file.write(request.query_params["id"] + "\n")
        if request.query_params["id"] == "fatal":
            time.sleep(0.5)
            os._exit(1)
        return "alive"

    handle = serve(client, die_or_live, max_concurrent_queries=200)
    fatal = handle.remote(id="fatal")
    refs = [handle.remote(id=str(number)) for number in range(100)]
    assert headgate.get(refs, timeout=10) == ["alive"] * 100
    with pytest.raises(died()):
        headgate.get(fatal, timeout=5)
    assert starts(tmp_path / "log") == {"fatal": 1, **{str(number): 1 for number in range(100)}}


# --- one that is stopped ---


#: A replica is asked once a second, and killed in the third round in a row in which it is found stopped with an
#: answer due: 3 s after the first ask that it cannot answer, which comes within 1 s. 0.2 s are for the kill itself.
KILLED_S = 3.0 + 1.0 + 0.2


@pytest.mark.timeout(600)
@pytest.mark.promise("replica SIGSTOP: killed after 3 s in T, the started answered 502, the others go elsewhere")
def test_a_stopped_replica_is_killed_and_replaced(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=2, max_concurrent_queries=100)
    killed_after = []

    async def stop(running: Load) -> None:
        for _ in range(promise.size(full=10, small=1)):
            stopped = promise.random.choice(await in_thread(replica_pids, client))
            began = time.monotonic()
            os.kill(stopped, signal.SIGSTOP)
            await in_thread(eventually, lambda: not is_alive(stopped), 20.0)  # noqa: B023
            killed_after.append(time.monotonic() - began)
            await in_thread(eventually, lambda: len(replica_pids(client)) == 2, 10.0)
            await asyncio.sleep(0.3)

    running = under_load(client, stop)
    check_lost(running, log)
    assert min(killed_after) > 2.8  # an ask was under way
    promise.none_of(running.sent, "requests lost or run twice")
    promise.within(max(killed_after), KILLED_S, "killed")
    assert max(killed_after) < 8.0
    promise.says(f"502 for {len(running.failed)} that had started")


@pytest.mark.timeout(600)
@pytest.mark.local("stops the controller, so that the replica is not killed meanwhile")
@pytest.mark.promise("replica SIGSTOP: nothing new after 3 s; if it goes on before it is killed, nothing is lost")
def test_a_stopped_replica_gets_nothing_new(client: headgate.Client, tmp_path: Path, promise: Promise) -> None:
    log = tmp_path / "log"
    serve(client, worker(log), num_replicas=2, max_concurrent_queries=100)
    before, late, held_up = sorted(replica_pids(client)), [], 0

    async def stop(running: Load) -> None:
        nonlocal held_up
        for _ in range(promise.size(full=10, small=1)):
            controller = await in_thread(grown_controller, key_of(client))
            stopped = promise.random.choice(before)
            os.kill(controller, signal.SIGSTOP)
            began = time.monotonic()
            os.kill(stopped, signal.SIGSTOP)
            await asyncio.sleep(5.0)
            goes_on = time.monotonic()
            os.kill(stopped, signal.SIGCONT)
            await asyncio.sleep(0.3)
            os.kill(controller, signal.SIGCONT)
            meanwhile = [one for one in running.asked if began < one.sent < goes_on]
            held_up += sum(one.ended > goes_on for one in meanwhile if one.sent < began + 3.0)
            window = [one for one in meanwhile if began + 3.0 < one.sent < goes_on - 0.5]
            assert len(window) > 100  # 200/s for 1.5 s
            assert [one for one in window if one.ended > goes_on] == []  # whoever was sent to it has waited
            late.extend(window)

    running = under_load(client, stop)
    assert described(running.failed) == []
    assert set(starts(log)) == set(running.answers)
    assert set(starts(log).values()) == {1}, "a request ran twice"
    assert held_up > 0, "the stopped replica had nothing to do"
    assert sorted(replica_pids(client)) == before
    promise.none_of(running.sent, "requests lost or run twice")
    promise.none_of(len(late), "sent to it after 3 s")
    promise.says(f"{held_up} before that waited until it went on")


# --- one that is slow ---


@pytest.mark.timeout(300)
@pytest.mark.promise("replica 20 times slower: the others' p99 grows < 1.5 times, it gets <= 15 % of two")
def test_a_slow_replica_gets_little_and_slows_nobody_down(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    slow = tmp_path / "slow"

    async def work(request: Any) -> str:
        tag = headgate.get_current_replica_tag()
        is_slow = slow.exists() and slow.read_text() == tag
        await asyncio.sleep(0.4 if is_slow else 0.02)
        return tag

    serve(client, work, num_replicas=2, max_concurrent_queries=100)
    each_s = promise.size(full=20, small=2)
    turn: list[float] = []

    async def slow_down(running: Load) -> None:
        await asyncio.sleep(each_s)
        turn.append(time.monotonic())
        slow.write_text(next(one.id for one in client.status().replicas if one.backend == "it"))
        await asyncio.sleep(each_s)

    running = under_load(client, slow_down)
    assert described(running.failed) == []
    before = [one.took_s for one in running.asked if one.sent < turn[0]]
    after = [one for one in running.asked if one.sent > turn[0] + 0.1]
    healthy = [one.took_s for one in after if one.answer.text != slow.read_text()]
    share = 1 - len(healthy) / len(after)
    was, now = (sorted(each)[len(each) * 99 // 100] for each in (before, healthy))
    promise.says(f"p99 of the healthy one {was * 1000:.1f} -> {now * 1000:.1f} ms; the slow one got {share:.1%}")
    assert share <= 0.15
    assert now < 1.5 * was * (1 if promise.full else SLACK)


# --- those that do not start ---


class Raises:
    def __init__(self) -> None:
        raise LookupError("the model is not there")

    def __call__(self, request: Any) -> None: ...


class Exits:
    def __init__(self) -> None:
        os._exit(3)

    def __call__(self, request: Any) -> None: ...


#: Code that does not start -> what the error says.
FAILING: dict[str, tuple[Any, str]] = {
    "constructor": (Raises, "LookupError: the model is not there"),
    "crash": (Exits, "its process ended unexpectedly" if on_ray() else "exit"),  # Ray does not say how
    "import": ("no_such_module_at_all:f", "ModuleNotFoundError"),
}


@pytest.mark.promise("constructor fails, process dies or import error: the call raises, the old version keeps 100 %")
@pytest.mark.parametrize("kind", FAILING)
def test_a_version_that_does_not_start_costs_no_request(
    client: headgate.Client, tmp_path: Path, promise: Promise, kind: str
) -> None:
    code, says = FAILING[kind]
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    took: list[float] = []

    def fails(change: Callable[..., Any], tag: str) -> None:
        began = time.monotonic()
        with pytest.raises(headgate.BackendStartError) as caught:
            change(tag, code)
        took.append(time.monotonic() - began)
        assert says in str(caught.value), caught.value
        if kind == "constructor":
            assert "in __init__" in str(caught.value)  # the user's traceback

    async def deploy(running: Load) -> None:
        for _ in range(promise.size(full=10, small=1)):
            await in_thread(fails, client.update_backend, "it")
            await in_thread(fails, client.create_backend, "other")

    running = under_load(client, deploy)
    assert described(running.failed) == []
    assert list(client.list_backends()) == ["it"]
    promise.none_of(running.sent, "requests failed")
    promise.within(max(took), 3.0, "the error came")


@pytest.mark.timeout(120)
@pytest.mark.promise("crash loop: back-off 0.1 s doubling to 10 s")
def test_a_backend_that_cannot_start_again_is_tried_with_a_back_off(
    client: headgate.Client, tmp_path: Path, promise: Promise
) -> None:
    bad, log = tmp_path / "bad", tmp_path / "log"

    class Moody:
        def __init__(self) -> None:
            with log.open("a") as file:
                file.write(f"{time.monotonic()}\n")
            if bad.exists():
                raise LookupError("no")

        def __call__(self, request: Any) -> int:
            return os.getpid()

    handle = serve(client, Moody)
    bad.touch()
    tries = promise.size(full=10, small=4)
    os.kill(handle.call(), signal.SIGKILL)
    eventually(lambda: len(log.read_text().split()) > tries, 60.0)
    status = client.status()
    assert any("LookupError: no" in sentence and "failures in a row" in sentence for sentence in status.waiting)
    bad.unlink()
    began = time.monotonic()
    assert handle.options(timeout_s=30).call() > 0
    times = [float(line) for line in log.read_text().split()][1 : tries + 1]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    backoffs = [min(10.0, 0.2 * 2.0**number) for number in range(len(gaps))]  # the death was the first failure
    over = [gap - backoff for gap, backoff in zip(gaps, backoffs, strict=True)]
    assert min(over) >= 0.0, gaps
    promise.within(max(over), 1.0, "the longest start beyond its back-off")
    promise.says(f"{len(gaps) + 1} tries, {', '.join(f'{gap:.2f}' for gap in gaps)} s apart")
    promise.says(f"served again {time.monotonic() - began:.1f} s after it was mended")
