"""How headgate's own processes log: a readable line on a terminal, one JSON object a line elsewhere.

A line has the keys ts (seconds since 1970), level, logger, msg, and where known backend, replica
and request_id; a traceback is part of msg. Query strings, credentials and bodies are never logged;
nothing is logged per request at INFO.

Rule: only processes that headgate started call `configure` and `never_fail`. In a user's process headgate logs to
the logger "headgate" and leaves handlers and levels to the user.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
from collections.abc import Callable
from typing import Any, TextIO


def get(name: str) -> logging.Logger:
    """The logger "headgate.<name>"."""
    return logging.getLogger(f"headgate.{name}")


def configure(
    *,
    backend: str = "",
    replica: str = "",
    request_id: Callable[[], str] | None = None,
    level: str = "INFO",
    stream: TextIO | None = None,
) -> None:
    """Send everything this process logs to `stream` (stderr), with its backend and replica on each line.

    request_id   called for each line: the id of the request that is being served, or "". A
                 record's own `extra={"request_id": ...}` goes before it.
    """
    out = stream or sys.stderr
    kind = TextFormatter if out.isatty() else JsonFormatter
    handler = logging.StreamHandler(out)
    handler.setFormatter(kind(backend, replica, request_id or _no_request))
    logging.basicConfig(handlers=[handler], level=level, force=True)


def never_fail() -> None:
    """From now on what this process prints or logs is lost where it cannot be written, and nobody gets an error.

    A full disk or a pipe that nobody reads would otherwise fail each request whose handler prints.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            with contextlib.suppress(OSError):
                stream.flush()
            raw = _Lossy(stream.fileno(), "wb", closefd=False)
            lossy = io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, stream.errors, line_buffering=True)
            setattr(sys, name, lossy)


class _Lossy(io.FileIO):
    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _no_request() -> str:
    return ""


class JsonFormatter(logging.Formatter):
    """One JSON object a line: {"ts": 1700000000.123, "level": "INFO", "logger": ..., "msg": ...}."""

    def __init__(self, backend: str, replica: str, request_id: Callable[[], str]) -> None:
        super().__init__()
        self._where = {"backend": backend, "replica": replica}
        self._request_id = request_id

    def _fields(self, record: logging.LogRecord) -> dict[str, str]:
        fields = {**self._where, "request_id": self._request_id()}
        fields.update({key: str(getattr(record, key)) for key in fields if getattr(record, key, "")})
        return {key: value for key, value in fields.items() if value}

    def format(self, record: logging.LogRecord) -> str:
        from msgspec.json import encode

        line: dict[str, object] = {
            "ts": round(record.created, 3),
            "level": record.levelname,
            "logger": record.name,
            "msg": super().format(record),
            **self._fields(record),
        }
        try:
            return encode(line).decode()
        except UnicodeEncodeError:  # half a surrogate pair, from a path or a header
            clean = {
                key: value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
                for key, value in line.items()
            }
            return encode(clean).decode()


class TextFormatter(JsonFormatter):
    """One line for eyes: `12:00:01.123 INFO  headgate.controller: started  replica=iris#0007`."""

    default_time_format = "%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        fields = "".join(f"  {key}={value}" for key, value in self._fields(record).items())
        text = logging.Formatter.format(self, record)
        return f"{self.formatTime(record)} {record.levelname:<7} {record.name}: {text}{fields}"
