"""A backend that is held up until the test lets it go on, and that says which requests have started."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from under_load import serve

import headgate


class Blocking:
    """Plain; notes the id of each request that starts, and returns once the file is there."""

    def __init__(self, log: Path, release: Path) -> None:
        self.log, self.release = log, release

    def __call__(self, request: Any) -> str:
        with self.log.open("a") as file:
            file.write(request.query_params["id"] + "\n")
        while not self.release.exists():
            time.sleep(0.005)
        return "done"


class Block:
    """The backend and endpoint "it", held up until `release`; takes one request at a time if `config` says nothing."""

    def __init__(self, client: headgate.Client, folder: Path, **config: Any) -> None:
        self._log, self._release = folder / "log", folder / "release"
        self._log.touch()
        config = {"max_concurrent_queries": 1, **config}
        self.handle = serve(client, Blocking, self._log, self._release, **config)

    def release(self) -> None:
        self._release.touch()

    @property
    def started(self) -> list[str]:
        """The ids of the requests that started, in order."""
        return self._log.read_text().split()
