"""headgate with replicas of 8 slots, whose handler takes 5 ms. Arguments: how many, port. Ends with its stdin."""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import headgate

SLOTS = 8
HANDLER_S = 0.005


async def wait(request: Any) -> str:
    await asyncio.sleep(HANDLER_S)
    return "done"


def main() -> None:
    replicas, port = int(sys.argv[1]), int(sys.argv[2])
    with headgate.start(engine="local", http_options={"port": port}) as client:
        client.create_backend("wait", wait, config={"num_replicas": replicas, "max_concurrent_queries": SLOTS})
        client.create_endpoint("wait", backend="wait", route="/wait")
        print("{}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
