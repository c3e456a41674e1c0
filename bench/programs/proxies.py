"""headgate with several proxies on its listener, and W1's handler. Arguments: how many, port. Ends with its stdin.

No option asks for more than one proxy on a machine: the supervisor that is started here is told otherwise.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections import Counter
from typing import Any, NoReturn

from peers.jobs import ANSWER

import headgate

PROXIES = "HEADGATE_BENCH_PROXIES"
SECONDS_TO_START = 20.0


def answer(request: Any) -> dict[str, Any]:
    return ANSWER


def supervisor_main(boot_fd: int) -> NoReturn:
    """headgate's own, whose controller starts proxies until there are enough."""
    from headgate import processes
    from headgate.controller.proxies import Proxies

    many = int(os.environ[PROXIES])

    def missing(self: Any, wanted: tuple[str, ...]) -> list[str]:
        there = Counter(proxy.node for proxy in self._running.values())
        return [node for node in wanted if there[node] < many and not self._of(node).starting]

    Proxies._missing = missing  # type: ignore[method-assign]
    processes.supervisor_main(boot_fd)


def main() -> None:
    many, port = int(sys.argv[1]), int(sys.argv[2])
    if many > 1:
        from headgate import starting
        from headgate.engine import ignition

        os.environ[PROXIES] = str(many)
        starting.strike = functools.partial(ignition.strike, "programs.proxies:supervisor_main")
    with headgate.start(engine="local", http_options={"port": port}) as client:
        client.create_backend("json", answer, config={"max_concurrent_queries": 100})
        client.create_endpoint("json", backend="json", route="/json")
        end = time.monotonic() + SECONDS_TO_START
        while len(client.status().proxies) < many and time.monotonic() < end:
            time.sleep(0.05)
        assert len(client.status().proxies) == many, client.status().proxies
        print("{}", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
