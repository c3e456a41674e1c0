"""headgate's own loop."""

from __future__ import annotations

import asyncio

import pytest

from headgate import eventloop


def test_run_gives_the_result_and_is_on_uvloop() -> None:
    async def main() -> str:
        return type(asyncio.get_running_loop()).__module__

    assert eventloop.run(main()).startswith("uvloop")


def test_run_raises_what_was_raised() -> None:
    async def main() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        eventloop.run(main())
