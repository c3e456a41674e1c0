"""The guard against unpickling (pickles.py): whose lookups it writes down, and which of them fail the run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pickles

ROOT = Path(__file__).parent.parent

#: Unpickles on a thread of that name, in a process whose title is the second argument.
UNPICKLES = """
import pickle, sys, threading
with open("/proc/self/comm", "w") as comm:
    comm.write(sys.argv[2])
data = pickle.dumps(threading.Event)
thread = threading.Thread(target=pickle.loads, args=(data,), name=sys.argv[1])
thread.start()
thread.join()
"""


def lines_of(thread: str, title: str, folder: Path) -> list[str]:
    """What is written down of a program with that thread and title."""
    (folder / "sitecustomize.py").write_text(pickles.HOOK)
    environment = {**os.environ, pickles.VARIABLE: str(folder / "log"), "PYTHONPATH": str(folder)}
    subprocess.run([sys.executable, "-c", UNPICKLES, thread, title], env=environment, timeout=30, check=True)
    log = folder / "log"
    return [line.partition(" ")[0] for line in log.read_text().splitlines()] if log.exists() else []


def test_what_a_process_of_headgates_looks_up_is_written_down(tmp_path: Path) -> None:
    assert lines_of("any", "headgate-proxy", tmp_path) == ["headgate-proxy"]


def test_in_a_worker_of_ray_s_the_controllers_thread_counts(tmp_path: Path) -> None:
    assert lines_of("any", "ray::Controller", tmp_path) == []
    assert lines_of(pickles.THREAD, "ray::Controller", tmp_path) == ["headgate-ctl"]
    assert "headgate-ctl" in pickles.STRICT


def test_the_controllers_thread_on_ray_has_that_name() -> None:
    source = (ROOT / "src" / "headgate" / "actors.py").read_text()
    assert f'target=self._run, name="{pickles.THREAD}"' in source
