"""MLServer: `model` and the streams as its protocol has them (v2.py), the rest as custom handlers in its workers.

No `from __future__ import annotations`: it looks the names of a custom handler's annotations up in a module of its own.
"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import uvloop
from fastapi import Body
from fastapi.responses import Response
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec, StringCodec
from mlserver.handlers import custom_handler
from mlserver.types import InferenceRequest, InferenceResponse

from . import commandline, jobs

UPLOAD = Body(media_type=jobs.BINARY)


class Handlers(MLModel):
    """Runs in the worker processes; MLServer pickles arguments and results."""

    @custom_handler(rest_path="/json", rest_method="GET")
    async def json_get(self) -> dict[str, Any]:
        return jobs.ANSWER

    @custom_handler(rest_path="/json", rest_method="POST")
    async def json_post(self, question: dict[str, list[float]]) -> dict[str, Any]:
        return jobs.ANSWER

    @custom_handler(rest_path="/length")
    async def length(self, data: bytes = UPLOAD) -> dict[str, int]:
        return {"length": len(data)}

    @custom_handler(rest_path="/echo")
    async def echo(self, data: bytes = UPLOAD) -> Response:
        return Response(data, media_type=jobs.BINARY)


class Model(MLModel):
    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        import numpy

        from . import model

        rows = NumpyCodec.decode_input(payload.inputs[0]).astype(numpy.float32)
        labels = [each["label"] for each in model.predict([row.tobytes() for row in rows])]
        output = NumpyCodec.encode_output("label", numpy.array(labels).reshape(-1, 1))
        return InferenceResponse(model_name=self.name, outputs=[output])


class Stream(MLModel):
    pause_s = 0.0

    async def predict_stream(self, payloads: AsyncIterator[InferenceRequest]) -> AsyncIterator[InferenceResponse]:
        async for _ in payloads:
            for number in range(jobs.TOKENS):
                await asyncio.sleep(self.pause_s)
                output = StringCodec.encode_output("token", [jobs.token(number)])
                yield InferenceResponse(model_name=self.name, outputs=[output])


class StreamPaced(Stream):
    pause_s = jobs.TOKEN_SECONDS


MODELS: dict[str, type[MLModel]] = {"model": Model, "stream": Stream, "stream_paced": StreamPaced}


async def main() -> None:
    from peers import mlserver_server  # under its name, not as __main__: workers import it

    asked = commandline.read()
    streams = asked.job.startswith("stream")
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        http_port=asked.port,
        grpc_port=0,
        metrics_endpoint=None,
        parallel_workers=0 if streams else asked.replicas,
        gzip_enabled=not streams,
    )
    model = ModelSettings(
        name="model",
        implementation=getattr(mlserver_server, MODELS.get(asked.job, Handlers).__name__),
        max_batch_size=jobs.MAX_BATCH_SIZE if asked.job == "model" else 0,
        max_batch_time=0.002 if asked.job == "model" else 0.0,
    )
    await MLServer(settings).start([model])


if __name__ == "__main__":
    uvloop.run(main())  # as its own program does
