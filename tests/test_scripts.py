"""The scripts, with an environment whose Python only says what it was asked to run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """One whose python prints its arguments, on a machine with 16 cores."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("python", 'printf "%s\\n" "$@"'), ("pytest", "exit 1"), ("nproc", "echo 16")):
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("HEADGATE_TEST_ENGINE", "PYTEST_ADDOPTS")}
    return {**kept, "VIRTUAL_ENV": str(tmp_path), "PATH": f"{folder}:{os.environ['PATH']}"}


def run(environment: dict[str, str], *command: str) -> list[str]:
    """What its Python was asked to run."""
    script = str(ROOT / "scripts" / command[0])
    done = subprocess.run(
        [script, *command[1:]], env=environment, cwd="/", check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "variables", "processes"),
    [
        ("", {}, 8),
        ("--engine ray", {}, 2),
        ("--engine=ray tests/e2e", {}, 2),
        ("tests/ray --engine ray", {}, 2),
        ("", {"HEADGATE_TEST_ENGINE": "ray"}, 2),
        ("", {"PYTEST_ADDOPTS": "-q --engine=ray"}, 2),
        ("", {"PYTEST_ADDOPTS": "--engine ray"}, 2),
        ("-k ray", {}, 8),
        ("--engine local", {"HEADGATE_TEST_ENGINE": "ray"}, 8),
        ("--engine ray --engine=local", {}, 8),
    ],
)
def test_few_processes_run_tests_where_each_has_a_cluster(
    environment: dict[str, str], arguments: str, variables: dict[str, str], processes: int
) -> None:
    asked = run({**environment, **variables}, "test", *arguments.split())
    assert asked == ["-m", "pytest", "-n", str(processes), "--dist", "loadfile", *arguments.split()]


@pytest.mark.parametrize("name", ["fuzz", "http-corpora", "simulate", "soak"])
def test_a_script_runs_in_the_active_environment_from_anywhere(environment: dict[str, str], name: str) -> None:
    file, *arguments = run(environment, name, "--some", "a b")
    assert (ROOT / file).is_file()
    assert arguments == ["--some", "a b"]
