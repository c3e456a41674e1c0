"""The other side: Starlette on one uvicorn process, doing the same.

Its handlers are `async def`, the fastest that Starlette offers: a plain one would go through a
thread pool, which costs several times as much.
"""

from __future__ import annotations

import model
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route


async def json(request: Request) -> JSONResponse:
    return JSONResponse(model.ANSWER)


async def length(request: Request) -> JSONResponse:
    return JSONResponse({"length": len(await request.body())})


app = Starlette(
    routes=[
        Route("/json", json, methods=["GET", "POST"]),
        Route("/length", length, methods=["POST"]),
    ]
)
