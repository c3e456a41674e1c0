"""headgate's handles, on the local engine. Argument: seconds per case. Prints {contender: {case: figures}}."""

from __future__ import annotations

import json
import sys
from typing import Any

import headgate

from . import calling


async def echo(request: Any) -> Any:
    return request.data


def nbytes(request: Any) -> int:
    return int(request.data.nbytes)


class Giver:
    def __init__(self) -> None:
        self.array = calling.array()

    def __call__(self, request: Any) -> Any:
        return self.array


def measure(client: Any, seconds: float) -> dict[str, dict[str, Any]]:
    handle = client.get_handle("echo")
    called = calling.sync_cases(handle.call, seconds)
    remote = calling.sync_cases(lambda number: handle.remote(number).result(), seconds)
    waited = calling.async_cases(lambda: client.get_handle("echo", sync=False).call, seconds)
    arrays = calling.array_cases(
        client.get_handle("nbytes").call, lambda: client.get_handle("give").call(None), handle.call
    )
    return {"handle.call()": {**called, **waited, **arrays}, "handle.remote().result()": remote}


def main() -> None:
    with headgate.start(engine="local", http_options={"location": "NoServer"}) as client:
        backends: dict[str, Any] = {"echo": echo, "nbytes": nbytes, "give": Giver}
        for name, code in backends.items():
            client.create_backend(name, code, config={"max_concurrent_queries": 100})
            client.create_endpoint(name, backend=name)
        print(json.dumps(measure(client, float(sys.argv[1]))))


if __name__ == "__main__":
    main()
