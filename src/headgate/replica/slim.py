"""Starlette's exceptions without http.client, for the supervisor to import ahead of Starlette's requests.

Starlette looks into http.client for the text of an HTTPException that has none, and http.client brings the whole of
`email`: a twentieth of a start. So while Starlette is imported something empty is in its place. Whoever
imports http.client afterwards imports it as ever; Starlette, which has `http` only, gets it when it first looks.

Rule: for a process with one thread, in which nobody else can import http.client meanwhile.
"""

from __future__ import annotations

import contextlib
import http
import sys
from importlib import import_module
from types import ModuleType


def _client(name: str) -> ModuleType:
    """`http.client`, which was not imported yet."""
    if name != "client":
        raise AttributeError(f"module 'http' has no attribute {name!r}")
    return import_module("http.client")


if "http.client" not in sys.modules:
    sys.modules["http.client"] = ModuleType("http.client")
    # A Starlette that wants more of it at once is imported as ever, by whoever wants it.
    with contextlib.suppress(ImportError, AttributeError):
        import starlette.exceptions  # noqa: F401
    del sys.modules["http.client"]
    http.__getattr__ = _client  # type: ignore[method-assign]
