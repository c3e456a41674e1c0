"""What the proxy answers by itself: pages under `/-/`, redirects, 404, 405, and errors as text or JSON.

Pages here show state and never change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec.json import encode

from headgate.core.http11 import header_values
from headgate.core.replies import CONTENT_TYPES, PHRASES
from headgate.core.routes import near
from headgate.errors import BackendOverloaded, HeadgateError, ReplicaDied

if TYPE_CHECKING:
    from headgate.core.routes import Outcome
    from headgate.core.state import Snapshot

PREFIX = "/-/"
_TEXT, _JSON = CONTENT_TYPES[1], CONTENT_TYPES[2]
_MAX_SHOWN = 200


class Local(NamedTuple):
    """An answer of the proxy's own: header lines, each with its CR LF, and a body."""

    status: int
    block: bytes
    body: bytes = b""


def page(path: str, method: str, snapshot: Snapshot, leaving: bool) -> Local:
    """The answer under `/-/`."""
    pages = {"/-/routes": _routes, "/-/healthz": _health}
    if path not in pages:
        return error(404, f"there is no page {_shown(path)}; there are {' and '.join(pages)}")
    if method not in ("GET", "HEAD"):
        return error(405, f"{path} can only be read", b"allow: GET, HEAD\r\n")
    return pages[path](snapshot, leaving)


def _routes(snapshot: Snapshot, leaving: bool) -> Local:
    table = {each.route or each.name: (each.name, each.methods) for each in snapshot.endpoints}
    return Local(200, b"content-type: %b\r\n" % _JSON, encode(table))


def _health(snapshot: Snapshot, leaving: bool) -> Local:
    ready = snapshot.ready and not leaving
    text = b"ok" if ready else b"draining" if leaving or snapshot.version else b"starting"
    return Local(200 if ready else 503, b"content-type: %b\r\n" % _TEXT, text)


def unrouted(
    outcome: Outcome, path: str, method: str, templates: Sequence[str], base: str, query: bytes
) -> Local:
    """The answer to a request that no endpoint serves.

    base    scheme and host for a redirect's Location: "http://localhost:8000"
    """
    if outcome[0] == "redirect":
        from urllib.parse import quote  # 4 ms that only a redirect needs

        target = base.encode() + quote(outcome[1]).encode() + (b"?" + query if query else b"")
        return Local(307, b"location: %b\r\n" % target)
    if outcome[0] == "method_not_allowed":
        allowed = ", ".join(outcome[1])
        text = f"{_shown(path)} does not take {method[:30]}, only {allowed}"
        return error(405, text, b"allow: %b\r\n" % allowed.encode())
    close = near(templates, path)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return error(404, f"no endpoint is routed at {_shown(path)}{hint} The routes are listed at /-/routes")


def _shown(path: str) -> str:
    return repr(path if len(path) <= _MAX_SHOWN else path[:_MAX_SHOWN] + "…")


def error(status: int, text: str, block: bytes = b"") -> Local:
    """An error in plain text."""
    return Local(status, b"content-type: %b\r\n%b" % (_TEXT, block), text.encode("utf-8", "replace"))


def failure(problem: HeadgateError) -> Local:
    """The answer to a request that failed on headgate's side: status, code, and when to try again."""
    block = b"x-headgate-code: %b\r\n" % problem.code.encode()
    if isinstance(problem, BackendOverloaded):
        block += b"retry-after: %d\r\n" % problem.retry_after_s
    elif isinstance(problem, ReplicaDied) and problem.started:
        block += b"x-headgate-started: 1\r\n"
    return error(problem.http_status, f"{problem.code}: {problem}", block)


def wants_json(head: bytes) -> bool:
    """Whether the client's Accept names JSON."""
    return any(b"json" in value.lower() for value in header_values(head, b"accept"))


def as_problem(local: Local, code: str = "") -> Local:
    """The same error as application/problem+json (RFC 9457)."""
    found = [line for line in local.block.split(b"\r\n") if line]
    codes = [line[16:].strip().decode() for line in found if line.startswith(b"x-headgate-code:")]
    problem = {
        "type": "about:blank",
        "title": PHRASES.get(local.status, "Error"),
        "status": local.status,
        "detail": local.body.decode("utf-8", "replace"),
    }
    if codes or code:
        problem["code"] = codes[0] if codes else code
    kept = b"".join(line + b"\r\n" for line in found if not line.startswith(b"content-type:"))
    return Local(local.status, b"content-type: application/problem+json\r\n" + kept, encode(problem))
