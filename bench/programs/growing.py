"""headgate that gets ever more backends and endpoints, as its stdin says. Arguments: port.

One JSON object per line in, one out:

    {"backends": 100}          create as many as are missing, some at a time; each a replica, which is a process
    {"endpoints": 1000}        the same of endpoints, each on the backend `answer`
    {"publish_for": 2.0}       change the traffic of one endpoint again and again, ten times a second

This process has a handle, so that it follows each publish, as the proxy and the replicas do.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median
from typing import Any

import msgspec

import headgate

PAUSE_S = 0.1
#: What one costs is what the last ones took, one after another; before them backends are created some at a time.
LAST, TOGETHER = 10, 16


async def answer(request: Any) -> str:
    return "done"


class Growing:
    """An instance, and how much there is of it."""

    def __init__(self, client: headgate.Client) -> None:
        self._client = client
        self._backends = self._endpoints = 0
        client.create_backend("answer", answer, config={"max_concurrent_queries": 100})
        client.create_backend("other", answer)
        client.create_endpoint("answer", backend="answer", route="/answer")
        client.get_handle("answer").call(None)

    def backends(self, wanted: int) -> dict[str, Any]:
        def create(number: int) -> None:
            self._client.create_backend(f"backend{number}", answer)

        last = max(self._backends, wanted - LAST)
        began = time.perf_counter()
        with ThreadPoolExecutor(TOGETHER) as pool:
            list(pool.map(create, range(self._backends, last)))
        found = timed(create, range(last, wanted))
        found["all_s"] = time.perf_counter() - began
        self._backends = wanted
        return {**found, **self._snapshot()}

    def endpoints(self, wanted: int) -> dict[str, Any]:
        def create(number: int) -> None:
            route = f"/area{number}/{{user_id:int}}/{{number:float}}"
            self._client.create_endpoint(f"endpoint{number}", backend="answer", route=route)

        found = timed(create, range(self._endpoints, wanted))
        self._endpoints = wanted
        return {**found, **self._snapshot()}

    def publish_for(self, seconds: float) -> dict[str, Any]:
        times: list[float] = []
        end = time.monotonic() + seconds
        weights = [{"answer": 1.0}, {"answer": 0.9, "other": 0.1}]
        while time.monotonic() < end:
            began = time.perf_counter()
            self._client.set_traffic("answer", weights[len(times) % 2])
            times.append((time.perf_counter() - began) * 1e3)
            time.sleep(PAUSE_S)
        return {"publish_ms": median(times), "publish_max_ms": max(times), "publishes": len(times)}

    def _snapshot(self) -> dict[str, Any]:
        """What is sent to every process at each change."""
        return {"snapshot_kb": len(msgspec.msgpack.encode(self._client._instance.snapshot)) / 1e3}


def timed(create: Callable[[int], None], numbers: range) -> dict[str, Any]:
    """All of them, and the median of the last ten: what one costs at that size."""
    times = []
    began = time.perf_counter()
    for number in numbers:
        start = time.perf_counter()
        create(number)
        times.append((time.perf_counter() - start) * 1e3)
    return {"all_s": time.perf_counter() - began, "create_ms": median(times[-LAST:])}


def main() -> None:
    with headgate.start(engine="local", http_options={"port": int(sys.argv[1])}) as client:
        growing = Growing(client)
        print("{}", flush=True)
        for line in sys.stdin:
            ((name, value),) = json.loads(line).items()
            print(json.dumps(getattr(growing, name)(value)), flush=True)


if __name__ == "__main__":
    main()
