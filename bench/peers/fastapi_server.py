"""FastAPI on uvicorn with uvloop and httptools: handlers as its tutorial writes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response, StreamingResponse

from . import commandline, jobs
from .starlette_server import serve, tokens, tokens_async, tokens_paced


def json_plain() -> dict[str, Any]:
    return jobs.ANSWER


async def json_async() -> dict[str, Any]:
    return jobs.ANSWER


async def json_post(question: dict[str, list[float]]) -> dict[str, Any]:
    return jobs.ANSWER


async def length(request: Request) -> dict[str, int]:
    return {"length": len(await request.body())}


async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type=jobs.BINARY)


async def typed(user_id: int, number: float) -> dict[str, Any]:
    return {"user_id": user_id, "number": number}


async def stream() -> StreamingResponse:
    return StreamingResponse(tokens())


async def stream_async() -> StreamingResponse:
    return StreamingResponse(tokens_async())


async def stream_paced() -> StreamingResponse:
    return StreamingResponse(tokens_paced())


HANDLERS: dict[str, Callable[..., Any]] = {
    "json": json_plain,
    "json_async": json_async,
    "json_post": json_post,
    "length": length,
    "echo": echo,
    "typed": typed,
    "stream": stream,
    "stream_async": stream_async,
    "stream_paced": stream_paced,
}


def app() -> FastAPI:
    asked = commandline.read()
    method, path, *_ = jobs.JOBS[asked.job].request
    paths = [path]
    if asked.job == "typed":
        paths = commandline.patterns("/api/{user_id}/{number}", asked.routes)
    application = FastAPI()
    for each in paths:
        application.add_api_route(each, HANDLERS[asked.job], methods=[method])
    return application


if __name__ == "__main__":
    serve("peers.fastapi_server:app")
