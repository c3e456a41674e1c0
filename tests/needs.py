"""What a test needs besides headgate: skipped where it is missing, but failed in CI.

    numpy = needs.module("numpy")            # a module: at the top of a file, or in a test
    needs.program("curl")                    # a program, in a test
    needs.root()                             # the rights to make network namespaces

CI is known by the environment variable CI. A skip there would be a test that nobody runs.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
from typing import Any

import pytest


def module(name: str) -> Any:
    """The imported module."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        return _missing(f"the Python module {name!r} is missing ({error}); scripts/install brings it")


def program(name: str) -> str:
    """The path of the program."""
    return shutil.which(name) or _missing(f"the program {name!r} is missing; install it")


def root() -> None:
    """The right to administer the machine's network."""
    if os.geteuid() != 0:
        _missing("this needs root, for network namespaces")
    name = f"hgprobe{os.getpid()}"
    probe = subprocess.run([program("ip"), "netns", "add", name], capture_output=True, text=True)
    if probe.returncode != 0:
        _missing(f"this root may not make network namespaces ({probe.stderr.strip()})")
    subprocess.run([program("ip"), "netns", "del", name], check=True)


def mounts() -> None:
    """The right to mount file systems."""
    if os.geteuid() != 0:
        _missing("this needs root, for small disks")
    probe = subprocess.run([program("unshare"), "--mount", "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        _missing(f"this root may not mount file systems ({probe.stderr.strip()})")


def _missing(what: str) -> Any:
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{what}, for in CI nothing is skipped", pytrace=False)
    pytest.skip(what, allow_module_level=True)
