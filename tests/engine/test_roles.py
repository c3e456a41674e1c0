"""What a supervisor imports before its first fork."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

from headgate.engine.roles import Role, preload

LOADED = """
import sys
from headgate.engine import roles

roles.preload(roles.ROLES.values())
before = set(sys.modules)
import headgate.controller.serving, headgate.proxy.server, headgate.replica.process
print(set(sys.modules) - before)
"""


def test_children_import_nothing() -> None:
    run = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, timeout=30, check=True)
    assert run.stdout.split() == ["set()"]


def test_what_cannot_be_imported_is_shown_and_the_rest_is_imported(capsys: pytest.CaptureFixture[str]) -> None:
    sys.modules.pop("this", None)
    try:
        preload([Role("a:b", "c", preload=("no_module_of_that_name", "this"))])
    finally:
        gc.unfreeze()
    assert "No module named 'no_module_of_that_name'" in capsys.readouterr().err
    assert "this" in sys.modules
