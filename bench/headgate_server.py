"""headgate's side: one backend with one replica, until SIGINT. Arguments: the job and the port."""

from __future__ import annotations

import sys
from typing import Any

import model

import headgate


def json(request: Any) -> dict[str, Any]:
    return model.ANSWER


async def json_async(request: Any) -> dict[str, Any]:
    return model.ANSWER


@headgate.accept_batch
def batch(requests: list[Any]) -> list[float]:
    return model.predict([request.data for request in requests])


def length(request: Any) -> dict[str, int]:
    return {"length": len(request.data)}


def length_view(request: Any) -> dict[str, int]:
    return {"length": request.view.nbytes}


JOBS: dict[str, tuple[Any, dict[str, Any]]] = {
    "json": (json, {"max_concurrent_queries": 100}),
    "json_async": (json_async, {"max_concurrent_queries": 100}),
    "batch": (batch, {"max_batch_size": 32}),
    "length": (length, {"max_concurrent_queries": 100}),
    "length_view": (length_view, {"max_concurrent_queries": 100}),
}


def main() -> None:
    job, port = sys.argv[1], int(sys.argv[2])
    handler, config = JOBS[job]
    client = headgate.start(http_options={"port": port})
    client.create_backend(job, handler, config=config)
    client.create_endpoint(job, backend=job, route=f"/{job}", methods=["GET", "POST"])
    client.wait()


if __name__ == "__main__":
    main()
