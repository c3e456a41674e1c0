"""A guard over the whole run: no proxy and no controller ever unpickles, but for the middlewares' one load.

`install` puts an audit hook into every Python process that the tests start, by a sitecustomize.py on
PYTHONPATH. The hook writes a line for each name that a pickle looks up in a process of headgate's:
"<title> <pid> <why> <module> <name>", where <why> is "middlewares" inside the load of those.
On Ray the controller is a thread of a worker of Ray's, which unpickles on its own threads what Ray brings:
there that thread counts, under the controller's title.
`problems` are the lines that may not be; at the end of the run one of them fails it (conftest.py).
Replicas unpickle users' code all the time: their lines show that the hook is at work.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

VARIABLE = "HEADGATE_TEST_PICKLES"
#: The name of the controller's thread in a worker of Ray's (headgate/actors.py).
THREAD = "headgate-controller"
#: The processes that never unpickle. The supervisor is what they are forked from.
STRICT = ("headgate-super", "headgate-ctl", "headgate-proxy", "headgate-agent")

HOOK = f"""
import os, sys

def title():
    with open("/proc/self/comm") as comm:
        found = comm.read().strip()
    if found.startswith("headgate-"):
        return found
    threading = sys.modules.get("threading")  # current_thread() would make one up where there is none
    running = threading and threading._active.get(threading.get_ident())
    return "headgate-ctl" if running and running.name == "{THREAD}" else None

def write_down(event, arguments, path=os.environ.get("{VARIABLE}")):
    if event != "pickle.find_class" or path is None:
        return
    who = title()
    if who is None:
        return
    why, frame = "-", sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "load" and frame.f_globals.get("__name__") == "headgate.proxy.asgi":
            why = "middlewares"
        frame = frame.f_back
    with open(path, "a") as log:
        print(who, os.getpid(), why, *arguments, file=log, flush=True)

sys.addaudithook(write_down)
"""

_folders: list[str] = []


def install() -> None:
    """From now on, in this process and those that it starts; once in a run."""
    folder = tempfile.mkdtemp(prefix="hg-pickles-")
    _folders.append(folder)
    Path(folder, "sitecustomize.py").write_text(HOOK)
    os.environ[VARIABLE] = os.path.join(folder, "log")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))


def lines() -> list[str]:
    """What was looked up so far."""
    path = Path(os.environ[VARIABLE])
    return path.read_text().splitlines() if path.exists() else []


def problems() -> list[str]:
    """What may not have been."""
    return [line for line in lines() if line.split()[0] in STRICT and line.split()[2] != "middlewares"]


def close() -> None:
    for folder in _folders:
        shutil.rmtree(folder, ignore_errors=True)
