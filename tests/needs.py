"""What a test needs besides headgate: skipped where it is missing, but failed in CI.

    numpy = needs.module("numpy")            # a module: at the top of a file, or in a test
    needs.program("curl")                    # a program, in a test

CI is known by the environment variable CI. A skip there would be a test that nobody runs.
"""

from __future__ import annotations

import importlib
import os
import shutil
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


def _missing(what: str) -> Any:
    if os.environ.get("CI", "").lower() not in ("", "0", "false"):
        pytest.fail(f"{what}, for in CI nothing is skipped", pytrace=False)
    pytest.skip(what, allow_module_level=True)
