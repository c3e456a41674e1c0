"""headgate: one backend, all features on. The argument is max_concurrent_queries; HEADGATE_ENGINE picks the engine."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import headgate

from . import commandline, jobs


def json_plain(request: Any) -> dict[str, Any]:
    return jobs.ANSWER


async def json_async(request: Any) -> dict[str, Any]:
    return jobs.ANSWER


def json_post(request: Any) -> dict[str, Any]:
    json.loads(request.data)
    return jobs.ANSWER


@headgate.accept_batch
def model(requests: list[Any]) -> list[dict[str, int]]:
    from . import model

    return model.predict([request.data for request in requests])


def length(request: Any) -> dict[str, int]:
    return {"length": len(request.data)}


def length_view(request: Any) -> dict[str, int]:
    return {"length": request.view.nbytes}


def echo(request: Any) -> bytes:
    data: bytes = request.data
    return data


def typed(request: Any) -> dict[str, Any]:
    return {"user_id": request.path_params["user_id"], "number": request.path_params["number"]}


def stream(request: Any) -> Iterator[str]:
    return (jobs.token(number) for number in range(jobs.TOKENS))


async def stream_async(request: Any) -> AsyncIterator[str]:
    for number in range(jobs.TOKENS):
        yield jobs.token(number)


async def stream_paced(request: Any) -> AsyncIterator[str]:
    import asyncio  # by who serves it: a script of plain handlers has no use for it

    for number in range(jobs.TOKENS):
        await asyncio.sleep(jobs.TOKEN_SECONDS)
        yield jobs.token(number)


HANDLERS: dict[str, Callable[..., Any]] = {
    "json": json_plain,
    "json_async": json_async,
    "json_post": json_post,
    "model": model,
    "length": length,
    "length_view": length_view,
    "echo": echo,
    "typed": typed,
    "stream": stream,
    "stream_async": stream_async,
    "stream_paced": stream_paced,
}


def main() -> None:
    asked = commandline.read()
    config: dict[str, Any] = {"num_replicas": asked.replicas, "max_concurrent_queries": int(asked.rest[0])}
    if asked.job == "model":
        config["max_batch_size"] = jobs.MAX_BATCH_SIZE
    client = headgate.start(http_options={"host": "127.0.0.1", "port": asked.port})
    client.create_backend(asked.job, HANDLERS[asked.job], config=config)
    method, path, *_ = jobs.JOBS[asked.job].request
    if asked.job == "typed":
        asked_for = "/api/{user_id:int}/{number:float}"
        routes = commandline.patterns(asked_for, asked.routes)
        # The one that is asked for comes last: as soon as it answers all are there, and nothing is being made any more.
        for route in sorted(routes, key=asked_for.__eq__):
            client.create_endpoint(route, backend=asked.job, route=route)
    else:
        client.create_endpoint(asked.job, backend=asked.job, route=path, methods=[method])
    client.wait()


if __name__ == "__main__":
    main()
