"""The interpreter of each peer. Most share the one that runs this; those that conflict have one of their own.

An own environment is `.venv-bench-<name>` beside `.venv-bench`, made when its peer is first started:

    python -m peers.environments bentoml mlserver      makes them beforehand
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent

#: Name of an environment -> what pip installs into it, and below it why it stands alone.
OWN = {
    "bentoml": ("bentoml>=1.4", "numpy", "uvloop", "httptools"),  # OpenTelemetry older than Ray's
    "mlserver": ("mlserver>=1.7", "uvloop<0.22"),  # fastapi < 0.116; its workers fail on uvloop 0.22
}

PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check")


class NotInstalled(Exception):
    """An environment that could not be made, with the end of what pip said."""


@cache
def python(name: str = "") -> str:
    """The interpreter of the environment `name`, which is made if it is missing; "": this one."""
    if not name:
        return sys.executable
    home = ROOT / f".venv-bench-{name}"
    interpreter, stamp = home / "bin" / "python", home / ".installed"
    wanted = hashlib.sha256(f"{ROOT} {OWN[name]}".encode()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        if not interpreter.exists():
            run([sys.executable, "-m", "venv", str(home)])
        run([str(interpreter), *PIP, "--upgrade", "--upgrade-strategy", "eager", *OWN[name]])
        subprocess.run([str(interpreter), "-m", "compileall", "-qq", str(home / "lib")], capture_output=True)
        stamp.write_text(wanted)
    return str(interpreter)


def versions(name: str, distributions: tuple[str, ...]) -> dict[str, str]:
    """Distribution -> its version in the environment `name`."""
    program = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    return dict(zip(distributions, run([python(name), "-c", program, *distributions]).split(), strict=True))


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise NotInstalled(f"{' '.join(command)} failed:\n{last}")
    return done.stdout


def main() -> None:
    for name in sys.argv[1:] or OWN:
        began = time.monotonic()
        print(f"{name}: {python(name)} ({time.monotonic() - began:.0f} s)")


if __name__ == "__main__":
    main()
