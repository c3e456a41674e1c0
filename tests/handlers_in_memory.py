"""Endpoints of an instance in memory, and handles of them: for the tests of handles."""

from __future__ import annotations

import asyncio
from typing import Any

from memory import HELD, MemoryInstance, Received
from starlette.requests import Request

from headgate.handle import AsyncServeHandle, ServeHandle, make_handle


class Sour(ValueError):
    """An error of the user's."""


def echo(request: Received) -> Any:
    return request.data


def fail(request: Received) -> Any:
    raise Sour(f"no {request.data}")


def hold(request: Received) -> Any:
    return HELD


def describe(request: Received) -> dict[str, Any]:
    return {
        "method_name": request.method_name, "http_method": request.http_method, "headers": request.headers,
        "shard_key": request.shard_key, "data": request.data, "kwargs": request.kwargs,
    }  # fmt: skip


HANDLERS = {"echo": echo, "fail": fail, "hold": hold, "describe": describe}


def sync_handle(instance: MemoryInstance, endpoint: str, **options: Any) -> ServeHandle:
    handle = make_handle(instance, endpoint, **options)  # type: ignore[arg-type]
    assert isinstance(handle, ServeHandle)
    return handle


def async_handle(instance: MemoryInstance, endpoint: str, missing_ok: bool = False) -> AsyncServeHandle:
    handle = make_handle(instance, endpoint, missing_ok, sync=False)  # type: ignore[arg-type]
    assert isinstance(handle, AsyncServeHandle)
    return handle


def posted() -> Request:
    """A Starlette Request whose body was not read yet."""
    scope = {
        "type": "http", "method": "POST", "path": "/a", "raw_path": b"/a", "query_string": b"", "headers": [],
        "server": ("h", 80), "scheme": "http",
    }  # fmt: skip

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"body", "more_body": False}

    return Request(scope, receive)


async def turns(number: int = 3) -> None:
    for _ in range(number):
        await asyncio.sleep(0)
