"""Start each peer for each of its jobs, ask it, and see that it ends and leaves nothing.

    python -m peers.check                      all
    python -m peers.check mosec,floor json_post,model

`model` is asked for rows at the same time, each of which has an answer of its own. Prints a table and what went
wrong; exit code 1 if anything did.
"""

from __future__ import annotations

import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import processes
import servers

import peers

from . import environments, jobs

#: Rows of the model that are in flight at once.
ROWS = 40
#: Routes beside each other for `typed`.
ROUTES = 20


def check(name: str, job: str, replicas: int) -> str:
    """What is wrong, "" if nothing is."""
    before = set(processes.tree(os.getpid()))
    try:
        server = servers.spawn(name, job, replicas=replicas, routes=ROUTES)
    except servers.NoServer as error:
        return str(error)
    try:
        server.wait_until_it_answers()
        found = answers(server)
    except (servers.NoServer, OSError) as error:
        found = str(error)
    finally:
        took = server.stop()
    if server.left:
        found += f" {len(server.left)} processes had to be killed {took:.0f} s after SIGINT"
    if left := set(processes.tree(os.getpid())) - before:
        found += f" left behind: {sorted(left)}"
    if not found:
        print(f"    {name} {job}: first answer {server.first_answer_s:.2f} s, stop {took:.2f} s", flush=True)
    return found.strip()


def answers(server: servers.Server) -> str:
    """Asks more than once, as several connections would."""
    peer = peers.PEERS[server.name]
    rows = [jobs.row(number if server.job == "model" else 0) for number in range(ROWS if server.job == "model" else 3)]

    def one(features: bytes) -> str:
        status, body = servers.ask(server.port, peer.request(server.job, features))
        return server.wrong(body, features) if status == 200 else f"status {status}: {body[:200]!r}"

    with ThreadPoolExecutor(len(rows)) as threads:
        return next((why for why in threads.map(one, rows) if why), "")


def main() -> None:
    chosen = sys.argv[1].split(",") if len(sys.argv) > 1 else list(peers.PEERS)
    wanted = sys.argv[2].split(",") if len(sys.argv) > 2 else list(jobs.JOBS)
    replicas = int(sys.argv[3]) if len(sys.argv) > 3 else 1
    failures: dict[tuple[str, str], str] = {}
    lines = []
    began = time.monotonic()
    for name in chosen:
        peer = peers.PEERS[name]
        cells = []
        for job in wanted:
            if job in peer.cannot:
                cells.append("-")
            elif why := check(name, job, replicas):
                failures[name, job] = why
                print(f"FAILED {name} {job}: {why}", flush=True)
                cells.append("FAILED")
            else:
                cells.append("ok")
        lines.append(f"{name:22}" + "".join(f"{cell:>13}" for cell in cells))
        print(f"{name}: {environments.versions(peer.environment, peer.distributions)}", flush=True)
    print(f"\n{'':22}" + "".join(f"{job:>13}" for job in wanted))
    print("\n".join(lines))
    print(f"{len(failures)} failed, {time.monotonic() - began:.0f} s")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
