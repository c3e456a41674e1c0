"""Proxies that die or stop: nobody is refused, and what they held is all that is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from http_load import Load, get, in_thread
from running import eventually, is_alive, slack
from under_load import address_of, proxy_pid, serve, under_load, worker

import headgate

START = {"http_options": {"port": 0}}


def test_a_killed_proxy_refuses_nobody_and_is_served_again_at_once(client: headgate.Client, tmp_path: Path) -> None:
    serve(client, worker(tmp_path / "log"), num_replicas=2, max_concurrent_queries=100)
    back: list[float] = []

    async def kill_some(running: Load) -> None:
        for _ in range(5):
            began = time.monotonic()
            os.kill(await in_thread(proxy_pid, client), signal.SIGKILL)
            while True:
                try:
                    assert (await get(address_of(client), "/it")).status == 200
                    break
                except (ConnectionResetError, EOFError):
                    pass
            back.append(time.monotonic() - began)
            await asyncio.sleep(0.2)

    running = under_load(client, kill_some)
    kinds = {answer.body for answer in running.failed.values()}
    assert b"ConnectionRefusedError" not in kinds
    assert kinds <= {b"ConnectionResetError", b"IncompleteReadError", b"BrokenPipeError"}
    assert max(back) < 1.0 * slack()
    assert len(running.failed) < 0.25 * running.sent


def test_a_stopped_proxy_is_replaced(client: headgate.Client) -> None:
    serve(client, lambda: "here")
    stopped = proxy_pid(client)
    os.kill(stopped, signal.SIGSTOP)
    began = time.monotonic()
    eventually(lambda: not is_alive(stopped), 15)
    eventually(lambda: asyncio.run(get(address_of(client), "/it")).text == "here")
    assert time.monotonic() - began < 10
