"""Calls that may wait without end: whoever waits for one goes on, and so does the process."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading

import pytest

from headgate.engine import aside


def test_what_it_raises_belongs_to_whoever_waits() -> None:
    def stop() -> None:
        raise SystemExit(3)

    assert aside.start(divmod, 7, 2, name="test").result(5) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        aside.start(divmod, 7, 0, name="test").result(5)
    with pytest.raises(SystemExit):
        aside.start(stop, name="test").result(5)


def test_whoever_does_not_wait_any_more_is_not_told() -> None:
    go_on = threading.Event()

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.wrap_future(waiting)

    waiting = aside.start(go_on.wait, 10, name="test-late")
    asyncio.run(main())
    (thread,) = [each for each in threading.enumerate() if each.name == "test-late"]
    go_on.set()
    thread.join(5)
    assert waiting.cancelled()


def test_what_waits_without_end_keeps_nobody_from_exiting() -> None:
    code = "import threading; from headgate.engine import aside; aside.start(threading.Event().wait, name='test')"
    subprocess.run([sys.executable, "-c", code], timeout=20, check=True)
