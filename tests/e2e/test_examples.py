"""Each example as a user runs it: a process of its own, asked over HTTP, ended with Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import needs
import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SECONDS_TO_START = 30
SECONDS_TO_STOP = 10


class Example:
    """A running example. `get` asks it; `output` is what it printed."""

    def __init__(self, name: str, port: int, log: Path) -> None:
        self.address = f"http://127.0.0.1:{port}"
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(EXAMPLES / name)],
                env={**os.environ, "PORT": str(port)},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(self.address + path, timeout=10, **options)

    def wait_for(self, path: str) -> None:
        """Until `path` is answered with 200."""

        def answers() -> bool:
            try:
                return self.get(path).status_code == 200
            except httpx.TransportError:
                return False

        self.wait_until(answers, f"{path} to answer")

    def wait_until(self, reached: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + SECONDS_TO_START
        while not reached():
            assert self.process.poll() is None, f"ended while the test waited for {what}:\n{self.output}"
            assert time.monotonic() < deadline, f"waited in vain for {what}:\n{self.output}"
            time.sleep(0.02)

    def interrupt(self) -> int:
        """The exit code after Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(SECONDS_TO_STOP)


@pytest.fixture
def start(free_port: int, tmp_path: Path) -> Iterator[Callable[[str], Example]]:
    """start("hello.py") -> Example; whatever happens, it is dead at the end."""
    started: list[Example] = []

    def start(name: str) -> Example:
        started.append(Example(name, free_port, tmp_path / "output"))
        return started[-1]

    yield start
    for example in started:
        example.process.kill()
        example.process.wait()


def ended_well(example: Example) -> None:
    assert example.interrupt() == 0, example.output
    assert "Traceback" not in example.output


def test_hello_is_six_lines_and_says_hello(start: Callable[[str], Example]) -> None:
    assert len((EXAMPLES / "hello.py").read_text().splitlines()) <= 6
    example = start("hello.py")
    example.wait_for("/hello")
    answer = example.get("/hello", params={"name": "Ada"})
    assert answer.json() == {"hello": "Ada"}
    assert answer.headers["content-type"] == "application/json"
    ended_well(example)


def ask(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "ask.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_an_example_is_asked_and_ended_with_one_command() -> None:
    done = ask("hello.py", "/hello?name=Ada")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"hello": "Ada"}
    assert "Traceback" not in done.stderr


def test_asking_an_example_that_does_not_run_says_so() -> None:
    done = ask("nothing.py", "/")
    assert done.returncode == 1
    assert "nothing.py" in done.stderr
    assert "ended with status 2" in done.stderr
    assert "ask.py digits.py" in ask().stderr


def test_hello_ends_on_sigterm_too(start: Callable[[str], Example]) -> None:
    example = start("hello.py")
    example.wait_for("/hello")
    example.process.terminate()
    assert example.process.wait(SECONDS_TO_STOP) == 0, example.output


def test_routes_convert_their_parameters(start: Callable[[str], Example]) -> None:
    example = start("routes.py")
    example.wait_for("/api/1/1.5")
    assert example.get("/api/ada").json() == {"username": "ada"}
    answer = example.get("/api/123/3.14").json()
    assert answer == {"user_id": 123, "number": 3.14}
    assert isinstance(answer["user_id"], int)
    assert isinstance(answer["number"], float)
    assert example.get("/api/123/pi").status_code == 404
    assert example.get("/-/routes").json() == {
        "/api/{username}": ["user", ["GET"]],
        "/api/{user_id:int}/{number:float}": ["number", ["GET"]],
    }
    ended_well(example)


def test_digits_are_classified_for_curl_in_batches(start: Callable[[str], Example]) -> None:
    needs.program("curl")
    needs.module("sklearn")
    example = start("digits.py")
    example.wait_for("/digits/0")

    def curl(*arguments: str) -> str:
        command = ["curl", "--silent", "--show-error", "--fail-with-body", "--max-time", "10", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout

    assert json.loads(curl(f"{example.address}/digits/42")) == {"sample": 42, "digit": 1, "truth": 1}

    many = curl("--parallel", "--parallel-max", "32", f"{example.address}/digits/[1000-1099]")
    answers = [json.loads(line) for line in re.findall(r"\{[^}]*\}", many)]
    assert sorted(answer["sample"] for answer in answers) == list(range(1000, 1100))
    assert sum(answer["digit"] == answer["truth"] for answer in answers) > 90

    unknown = example.get("/digits/5000")
    assert "there is no sample 5000" in unknown.text
    ended_well(example)


def test_a_rollout_shadows_splits_and_promotes(start: Callable[[str], Example]) -> None:
    example = start("rollout.py")
    example.wait_until(lambda: "promoted:" in example.output, "the promotion")
    output = example.output
    assert "shadowed: {1: 50}" in output
    assert "version 2 saw 50 shadow requests" in output
    assert "each of 100 users always met the same version" in output
    assert "promoted: {2: 50}" in output
    split = re.search(r"split: \{1: (\d+), 2: (\d+)\}", output)
    assert split, output
    assert 15 <= int(split[2]) <= 100  # 500 fair draws at 0.1: outside once in 10^7
    assert example.get("/price", params={"km": 100}).json() == {"version": 2, "price": 115.0}
    ended_well(example)


def test_a_backend_is_composed_of_two_others(start: Callable[[str], Example]) -> None:
    example = start("composition.py")
    example.wait_for("/search?q=bread")
    answer = example.get("/search", params={"q": "bicycle repair"}).json()
    assert answer["query"] == "bicycle repair"
    assert answer["titles"][0] == "How to repair a bicycle"
    assert len(answer["titles"]) == 3
    ended_well(example)
