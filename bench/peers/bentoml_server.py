"""BentoML: its production server with workers. It takes POST only; a body is JSON of the method's arguments."""

from __future__ import annotations

import asyncio
import os
import sys
from array import array
from collections.abc import AsyncGenerator, Generator
from typing import Any

import bentoml

from . import jobs

JOB, PORT, REPLICAS = os.environ.get("BENCH_ASKED", "json_post 0 1").split()


class Json:
    @bentoml.api(route="/json")
    def json(self, sepal: list[float], petal: list[float]) -> dict[str, Any]:
        return jobs.ANSWER


class Model:
    def __init__(self) -> None:
        from . import model

        self._predict = model.predict

    @bentoml.api(route="/model", batchable=True, max_batch_size=jobs.MAX_BATCH_SIZE, max_latency_ms=1000)
    def model(self, rows: list[list[float]]) -> list[dict[str, int]]:
        return self._predict([array("f", row).tobytes() for row in rows])


class Stream:
    @bentoml.api(route="/stream")
    def stream(self) -> Generator[str, None, None]:
        for number in range(jobs.TOKENS):
            yield jobs.token(number)


class StreamAsync:
    pause_s = 0.0

    @bentoml.api(route="/stream")
    async def stream(self) -> AsyncGenerator[str, None]:
        for number in range(jobs.TOKENS):
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            yield jobs.token(number)


class StreamPaced(StreamAsync):
    pause_s = jobs.TOKEN_SECONDS


SERVICES: dict[str, type] = {
    "json_post": Json,
    "model": Model,
    "stream": Stream,
    "stream_async": StreamAsync,
    "stream_paced": StreamPaced,
}

service = bentoml.service(
    SERVICES[JOB],
    workers=int(REPLICAS),
    traffic={"timeout": 60, "max_concurrency": 1000},
    logging={"access": {"enabled": False}},
    metrics={"enabled": True},
)


def main() -> None:
    """Become BentoML's own program, whose workers import this module."""
    job, port, replicas = sys.argv[1:4]
    os.environ["BENCH_ASKED"] = f"{job} {port} {replicas}"
    os.environ["BENTOML_DO_NOT_TRACK"] = "True"
    options = ["--host", "127.0.0.1", "--port", port, "--quiet"]
    os.execv(sys.executable, [sys.executable, "-m", "bentoml", "serve", "peers.bentoml_server:service", *options])


if __name__ == "__main__":
    main()
