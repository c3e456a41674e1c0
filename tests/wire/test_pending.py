"""Calls of a controller that answers late, or gives no sign of life; on virtual time."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest
import virtual_time

from headgate.errors import ArgumentError, ConfigError, ControllerUnavailable
from headgate.wire.messages import Response
from headgate.wire.pending import Pending


def answer_to(id: int, value: Any) -> Response:
    return Response(id, msgspec.Raw(msgspec.msgpack.encode(value)))


def test_a_call_is_answered_once() -> None:
    async def main() -> None:
        pending = Pending()
        request = pending.add("method", {"a": 1})
        assert msgspec.msgpack.decode(request.params) == {"a": 1}
        assert list(pending) == [request]
        pending.answered(answer_to(request.id, [2]))
        pending.answered(answer_to(request.id, [3]))
        pending.answered(answer_to(request.id + 1, [4]))
        assert await pending.answer(request) == [2]
        assert list(pending) == []

    virtual_time.run(main())


def test_an_error_of_the_controller_is_raised() -> None:
    async def main() -> None:
        pending = Pending()
        request = pending.add("method", {})
        pending.answered(Response(request.id, error=("ConfigError", "no")))
        with pytest.raises(ConfigError, match="no"):
            await pending.answer(request)

    virtual_time.run(main())


def test_what_cannot_travel_is_an_error_that_names_the_call() -> None:
    async def main() -> None:
        pending = Pending()
        for value in (print, 2**70, "\ud800"):
            with pytest.raises(ArgumentError, match="method"):
                pending.add("method", {"a": value})
        assert list(pending) == []

    virtual_time.run(main())


def test_no_call_is_like_another_process_s() -> None:
    async def main() -> None:
        assert len({pending.add("method", {}).call for pending in (Pending(), Pending()) for _ in "ab"}) == 4

    virtual_time.run(main())


def test_silence_fails_every_call_that_waits_and_says_what_that_means() -> None:
    async def main() -> None:
        pending = Pending(5.0)
        first = asyncio.ensure_future(pending.answer(pending.add("first", {})))
        await asyncio.sleep(3.0)
        second = asyncio.ensure_future(pending.answer(pending.add("second", {})))
        with pytest.raises(ControllerUnavailable, match=r"^first: .* for 5 s.*may or may not.*safe to repeat"):
            await first
        with pytest.raises(ControllerUnavailable, match=r"^second: "):
            await second
        assert asyncio.get_running_loop().time() == pytest.approx(5.0, abs=0.3)

    virtual_time.run(main())


def test_a_sign_of_life_is_enough_for_a_call_to_go_on() -> None:
    async def main() -> None:
        pending = Pending(5.0)
        request = pending.add("long", {})
        waiting = asyncio.ensure_future(pending.answer(request))
        for _ in range(20):
            await asyncio.sleep(4.0)
            pending.heard()
        pending.answered(answer_to(request.id, "done"))
        assert await waiting == "done"

    virtual_time.run(main())


def test_silence_before_a_call_does_not_count() -> None:
    async def main() -> None:
        pending = Pending(5.0)
        for _ in range(2):
            request = pending.add("method", {})
            await asyncio.sleep(4.0)
            pending.answered(answer_to(request.id, 1))
            assert await pending.answer(request) == 1
            await asyncio.sleep(100.0)

    virtual_time.run(main())
