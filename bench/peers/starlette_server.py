"""Starlette on uvicorn with uvloop and httptools.

`json` is a plain `def`, which Starlette runs in its thread pool; `json_async` is the fastest that it offers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from . import commandline, jobs


def json_plain(request: Request) -> JSONResponse:
    return JSONResponse(jobs.ANSWER)


async def json_async(request: Request) -> JSONResponse:
    return JSONResponse(jobs.ANSWER)


async def json_post(request: Request) -> JSONResponse:
    await request.json()
    return JSONResponse(jobs.ANSWER)


async def length(request: Request) -> JSONResponse:
    return JSONResponse({"length": len(await request.body())})


async def echo(request: Request) -> Response:
    return Response(await request.body(), media_type=jobs.BINARY)


async def typed(request: Request) -> JSONResponse:
    return JSONResponse({"user_id": request.path_params["user_id"], "number": request.path_params["number"]})


def tokens() -> Iterator[str]:
    return (jobs.token(number) for number in range(jobs.TOKENS))


async def tokens_async() -> AsyncIterator[str]:
    for text in tokens():
        yield text


async def tokens_paced() -> AsyncIterator[str]:
    for text in tokens():
        await asyncio.sleep(jobs.TOKEN_SECONDS)
        yield text


async def stream(request: Request) -> StreamingResponse:
    return StreamingResponse(tokens())


async def stream_async(request: Request) -> StreamingResponse:
    return StreamingResponse(tokens_async())


async def stream_paced(request: Request) -> StreamingResponse:
    return StreamingResponse(tokens_paced())


HANDLERS: dict[str, Callable[[Request], Any]] = {
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


def app() -> Starlette:
    asked = commandline.read()
    method, path, *_ = jobs.JOBS[asked.job].request
    paths = [path]
    if asked.job == "typed":
        paths = commandline.patterns("/api/{user_id:int}/{number:float}", asked.routes)
    return Starlette(routes=[Route(path, HANDLERS[asked.job], methods=[method]) for path in paths])


def serve(factory: str) -> None:
    """uvicorn as a benchmark wants it: its fast loop and parser, no access log."""
    asked = commandline.read()
    uvicorn.run(
        factory,
        factory=True,
        port=asked.port,
        workers=asked.replicas,
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )


if __name__ == "__main__":
    serve("peers.starlette_server:app")
