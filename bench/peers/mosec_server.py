"""Mosec: an HTTP server in Rust, workers in processes that it talks to over a unix socket. It takes POST only."""

from __future__ import annotations

import os
import time
from typing import Any

from mosec import Server, SSEWorker, Worker

from . import commandline, jobs


class Json(Worker):
    """`deserialize` and `serialize` are its own: JSON."""

    def forward(self, data: Any) -> dict[str, Any]:
        return jobs.ANSWER


class Raw(Worker):
    """Bodies as bytes; answers are JSON."""

    def deserialize(self, data: bytes) -> bytes:
        return data


class Length(Raw):
    def forward(self, data: bytes) -> dict[str, int]:
        return {"length": len(data)}


class Echo(Raw):
    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: bytes) -> bytes:
        return data


class Model(Raw):
    def forward(self, data: list[bytes]) -> list[dict[str, int]]:
        from . import model

        return model.predict(data)


class Stream(SSEWorker):
    """A worker does one call at a time, so that streams that shall run side by side are a batch."""

    pause_s = 0.0

    def forward(self, data: list[Any]) -> list[Any]:
        for number in range(jobs.TOKENS):
            if self.pause_s:
                time.sleep(self.pause_s)
            text = jobs.token(number)
            for index in range(len(data)):
                self.send_stream_event(text, index=index)
        return data


class StreamPaced(Stream):
    pause_s = jobs.TOKEN_SECONDS


WORKERS: dict[str, type[Worker]] = {
    "json_post": Json,
    "model": Model,
    "length": Length,
    "echo": Echo,
    "stream": Stream,
    "stream_paced": StreamPaced,
}


def main() -> None:
    asked = commandline.read()
    os.environ.update(MOSEC_ADDRESS="127.0.0.1", MOSEC_PORT=str(asked.port), MOSEC_LOG_LEVEL="warning")
    os.environ["MOSEC_TIMEOUT"] = "60000"
    server = Server()
    server.append_worker(
        WORKERS[asked.job],
        num=asked.replicas,
        max_batch_size=jobs.MAX_BATCH_SIZE if asked.job in ("model", "stream", "stream_paced") else 1,
        max_wait_time=1,
        route=jobs.JOBS[asked.job].request.path,
    )
    server.run()


if __name__ == "__main__":
    main()
