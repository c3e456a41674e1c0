"""Ray Serve on a Ray of its own. What its throughput mode needs are environment variables, in the registry."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import fastapi
import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from . import commandline, jobs

#: Ports that every Ray Serve of a machine takes, unless each is told others.
PORTS = (
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
)


class Json:
    def __call__(self, request: Request) -> dict[str, Any]:
        return jobs.ANSWER


class JsonAsync:
    async def __call__(self, request: Request) -> dict[str, Any]:
        return jobs.ANSWER


class JsonPost:
    async def __call__(self, request: Request) -> dict[str, Any]:
        await request.json()
        return jobs.ANSWER


class Model:
    def __init__(self) -> None:
        from . import model

        self._predict = model.predict

    @serve.batch(max_batch_size=jobs.MAX_BATCH_SIZE, batch_wait_timeout_s=0.001)
    async def predict(self, rows: list[bytes]) -> list[dict[str, int]]:
        return await asyncio.get_running_loop().run_in_executor(None, self._predict, rows)

    async def __call__(self, request: Request) -> Any:
        return await self.predict(await request.body())


class Length:
    async def __call__(self, request: Request) -> dict[str, int]:
        return {"length": len(await request.body())}


class Echo:
    async def __call__(self, request: Request) -> Response:
        return Response(await request.body(), media_type=jobs.BINARY)


class Stream:
    def __call__(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self.tokens())

    def tokens(self) -> Iterator[str]:
        return (jobs.token(number) for number in range(jobs.TOKENS))


class StreamAsync:
    pause_s = 0.0

    async def __call__(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self.tokens())

    async def tokens(self) -> AsyncIterator[str]:
        for number in range(jobs.TOKENS):
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            yield jobs.token(number)


class StreamPaced(StreamAsync):
    pause_s = jobs.TOKEN_SECONDS


DEPLOYMENTS: dict[str, type] = {
    "json": Json,
    "json_async": JsonAsync,
    "json_post": JsonPost,
    "model": Model,
    "length": Length,
    "echo": Echo,
    "stream": Stream,
    "stream_async": StreamAsync,
    "stream_paced": StreamPaced,
}


def typed(routes: int) -> type:
    """Routes in Ray Serve are FastAPI's."""
    application = fastapi.FastAPI()

    async def handler(user_id: int, number: float) -> dict[str, Any]:
        return {"user_id": user_id, "number": number}

    for path in commandline.patterns("/api/{user_id}/{number}", routes):
        application.add_api_route(path, handler)

    @serve.ingress(application)
    class Typed:
        pass

    return Typed


def take_ports() -> None:
    """So that several run side by side; its actors read them from the environment that they inherit."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in PORTS]
    for name, probe in zip(PORTS, probes, strict=True):
        os.environ[name] = str(probe.getsockname()[1])
        probe.close()


def main() -> None:
    asked = commandline.read()
    take_ports()
    stop = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, stop)
    ray.init(address="local", include_dashboard=False, logging_level="WARNING", log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": asked.port})
    target = typed(asked.routes) if asked.job == "typed" else DEPLOYMENTS[asked.job]
    deployment = serve.deployment(target, name=asked.job, num_replicas=asked.replicas, max_ongoing_requests=100)
    prefix = "/" if asked.job == "typed" else jobs.JOBS[asked.job].request.path
    serve.run(deployment.options(ray_actor_options={"num_cpus": 0}).bind(), route_prefix=prefix)
    signal.sigwait(stop)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
