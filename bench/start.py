"""The first run of an example: time to the first answer, processes, memory, time to stop.

Starts `python examples/hello.py` afresh each time and takes medians. The clock for the first
answer starts before the interpreter is spawned; the one for the stop at SIGINT.

    scripts/bench-start --runs 20
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import processes
import run
import servers

EXAMPLE = Path(__file__).parent.parent / "examples" / "hello.py"
REQUEST = b"GET /hello HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
POLL_S = 0.0005
SETTLE_S = 0.5
GOALS = {"first_answer_s": 0.20, "processes": 5, "pss_mb": 50.0, "stop_s": 0.1}


def answered(port: int) -> bool:
    """Whether a request is answered with 200 now."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(REQUEST)
            return connection.recv(4096).startswith(b"HTTP/1.1 200 ")
    except OSError:
        return False


def measure() -> dict[str, Any]:
    """One start and stop of the example."""
    port = servers.free_port()
    environment = {**os.environ, "PORT": str(port)}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(EXAMPLE)], env=environment)
    try:
        while not answered(port):
            if process.poll() is not None or time.perf_counter() - began > servers.SECONDS_TO_START:
                sys.exit(f"{EXAMPLE.name} gave no answer (exit code {process.poll()})")
            time.sleep(POLL_S)
        first = time.perf_counter() - began
        time.sleep(SETTLE_S)
        sizes = processes.pss_mb(process.pid)
        stopped = time.perf_counter()
        process.send_signal(signal.SIGINT)
        process.wait(servers.SECONDS_TO_STOP)
        stop = time.perf_counter() - stopped
    finally:
        process.kill()
        process.wait()
    return {
        "first_answer_s": first,
        "processes": len(sizes),
        "pss_mb": sum(sizes.values()),
        "stop_s": stop,
        "exit_code": process.returncode,
        "left": [pid for pid, _ in sizes if Path(f"/proc/{pid}").exists()],
        "each_mb": {f"{name} {pid}": size for (pid, name), size in sizes.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--runs", type=int, default=10, help="starts to take the medians of (10)")
    runs = [measure() for _ in range(parser.parse_args().runs)]
    medians = {name: median(each[name] for each in runs) for name in GOALS}
    print(f"python examples/{EXAMPLE.name}, medians of {len(runs)}")
    for name, goal in GOALS.items():
        spread = f"{min(each[name] for each in runs):.3g} to {max(each[name] for each in runs):.3g}"
        met = "met" if medians[name] <= goal else "missed"
        print(f"  {name:15} {medians[name]:8.3f}   ({spread})   goal <= {goal:g}: {met}")
    for name, size in runs[-1]["each_mb"].items():
        print(f"    {name:24} {size:5.1f} MB")
    odd = [each for each in runs if each["exit_code"] or each["left"]]
    for each in odd:
        print(f"  exit code {each['exit_code']}, processes left behind: {each['left']}")
    path = run.store("start", {"machine": run.machine(), "medians": medians, "runs": runs})
    print(f"stored in {path}")
    sys.exit(1 if odd else 0)


if __name__ == "__main__":
    main()
