"""Log lines: for eyes on a terminal, for machines elsewhere."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import time
from collections.abc import Iterator

import pytest

from headgate import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def root_logger() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_for_machines_is_one_json_object() -> None:
    out = io.StringIO()
    logs.configure(backend="iris", replica="iris#0007", request_id=lambda: "r1", stream=out)
    logs.get("replica").info("started in %s ms", 12)

    line = json.loads(out.getvalue())
    assert abs(line.pop("ts") - time.time()) < 60
    assert line == {
        "level": "INFO",
        "logger": "headgate.replica",
        "msg": "started in 12 ms",
        "backend": "iris",
        "replica": "iris#0007",
        "request_id": "r1",
    }


def test_what_is_not_known_has_no_key() -> None:
    out = io.StringIO()
    logs.configure(stream=out)
    logs.get("controller").warning("two\nlines")
    assert out.getvalue().count("\n") == 1
    assert set(json.loads(out.getvalue())) == {"ts", "level", "logger", "msg"}


def test_a_record_s_own_request_id_goes_first() -> None:
    out = io.StringIO()
    logs.configure(request_id=lambda: "ambient", stream=out)
    logs.get("proxy").info("x", extra={"request_id": "own"})
    assert json.loads(out.getvalue())["request_id"] == "own"


def test_a_traceback_is_part_of_the_message() -> None:
    out = io.StringIO()
    logs.configure(stream=out)
    try:
        raise ValueError("the user's")
    except ValueError:
        logs.get("replica").exception("handler raised")
    text = json.loads(out.getvalue())["msg"]
    assert text.startswith("handler raised\nTraceback")
    assert text.endswith("ValueError: the user's")


def test_half_a_character_does_not_lose_the_line() -> None:
    out = io.StringIO()
    logs.configure(stream=out)
    logs.get("proxy").info("path \udcff")
    assert json.loads(out.getvalue())["msg"] == "path \\udcff"


def test_a_line_for_eyes_is_text() -> None:
    out = Terminal()
    logs.configure(replica="iris#0007", stream=out)
    logs.get("replica").info("ready")
    assert out.getvalue().endswith("INFO    headgate.replica: ready  replica=iris#0007\n")


def test_debug_is_silent_unless_asked_for() -> None:
    out = io.StringIO()
    logs.configure(stream=out)
    logs.get("proxy").debug("x")
    assert out.getvalue() == ""
    logs.configure(stream=out, level="DEBUG")
    logs.get("proxy").debug("x")
    assert out.getvalue() != ""


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_what_cannot_be_written_is_lost_without_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    stream = open(writer, "w", encoding="utf-8")  # noqa: SIM115 - closed below
    monkeypatch.setattr(sys, name, stream)
    logs.never_fail()
    lossy = getattr(sys, name)
    print("read", file=lossy)
    assert os.read(reader, 100) == b"read\n"
    os.close(reader)  # the next write would be EPIPE, as ENOSPC on a full disk
    print("lost", file=lossy)
    assert (lossy.fileno(), lossy.encoding) == (writer, "utf-8")
    lossy.close()
    stream.close()  # the descriptor is still the stream's
