"""LitServe: uvicorn in front of worker processes. It takes POST only, and bodies as JSON or forms."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Iterator
from typing import Any

import litserve

from . import commandline, jobs


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        pass


class Json(Api):
    def predict(self, question: Any) -> dict[str, Any]:
        return jobs.ANSWER


class Model(Api):
    def setup(self, device: str) -> None:
        from . import model

        self.model = model

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # annotated, FastAPI would check each number
        return array("f", request).tobytes()

    def batch(self, inputs: list[bytes]) -> list[bytes]:
        return inputs

    def predict(self, rows: list[bytes]) -> list[dict[str, int]]:
        return self.model.predict(rows)

    def unbatch(self, output: list[dict[str, int]]) -> list[dict[str, int]]:
        return output


class Stream(Api):
    def predict(self, question: Any) -> Iterator[str]:
        for number in range(jobs.TOKENS):
            yield jobs.token(number)

    def encode_response(self, output: Iterator[str]) -> Iterator[str]:
        yield from output


class StreamAsync(Api):
    pause_s = 0.0

    async def decode_request(self, request):  # type: ignore[no-untyped-def]
        return request

    async def predict(self, question: Any) -> AsyncIterator[str]:
        for number in range(jobs.TOKENS):
            if self.pause_s:
                await asyncio.sleep(self.pause_s)
            yield jobs.token(number)

    async def encode_response(self, output: AsyncIterator[str]) -> AsyncIterator[str]:
        async for text in output:
            yield text


class StreamPaced(StreamAsync):
    pause_s = jobs.TOKEN_SECONDS


APIS: dict[str, type[litserve.LitAPI]] = {
    "json_post": Json,
    "model": Model,
    "stream": Stream,
    "stream_async": StreamAsync,
    "stream_paced": StreamPaced,
}


def main() -> None:
    asked = commandline.read()
    options: dict[str, Any] = {"api_path": jobs.JOBS[asked.job].request.path}
    if asked.job == "model":
        options |= {"max_batch_size": jobs.MAX_BATCH_SIZE, "batch_timeout": 0.001}
    if asked.job.startswith("stream"):
        options |= {"stream": True, "enable_async": asked.job != "stream"}
    server = litserve.LitServer(
        APIS[asked.job](**options), accelerator="cpu", workers_per_device=asked.replicas, timeout=60
    )
    server.run(
        host="127.0.0.1", port=asked.port, num_api_servers=1, log_level="warning", generate_client_file=False
    )


if __name__ == "__main__":
    main()
