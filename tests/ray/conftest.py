"""Fixtures of the tests with several Ray nodes: a cluster for each module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from running import Script


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Callable[..., Script]]:
    """script("print(1)") runs that text as a file, as another driver of the cluster."""
    started: list[Script] = []

    def start(text: str, **environment: str) -> Script:
        path = tmp_path / f"script{len(started)}.py"
        path.write_text(text)
        started.append(Script([str(path)], None, tmp_path, **environment))
        return started[-1]

    yield start
    for each in started:
        each.process.kill()
        each.process.wait()
        assert each.process.stdout
        each.process.stdout.close()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    for item in items:
        if item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.timeout(120))
