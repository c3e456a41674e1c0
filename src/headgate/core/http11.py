"""Decide whether the head of an HTTP/1.1 request is one, and what it says about framing.

A head is accepted only if every reader of it would agree where the request begins and ends
(RFC 9110, RFC 9112): what two parsers could read differently is refused, never repaired.
A refusal is a `Reject`: the server answers with its status and closes the connection.

The usual head passes one pattern over the bytes and one search for the few fields that matter
here; all else happens only where one of them is present, or to say what is wrong. Names and
values are not copied: the replica splits the lines of a head that was accepted.

No socket and no clock: proxy/intake.py finds the blank line and reads the body, proxy/server.py looks at deadlines.
What is answered is built in core/replies.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from typing import NamedTuple, NoReturn

from msgspec import Struct

from headgate.errors import ProtocolError


class Limits(Struct, frozen=True):
    """What a client may send and how long it may take; fields and defaults of HTTPOptions."""

    max_head_bytes: int = 32 * 1024
    max_header_fields: int = 100
    max_target_bytes: int = 8 * 1024
    max_body_bytes: int = 100 * 1024 * 1024
    head_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    keep_alive_timeout_s: float = 75.0


class Reject(ProtocolError):
    """A request that is not served: answer `status` with the text `reason`, then close the connection."""

    code = "BAD_REQUEST"

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = self.http_status = status
        self.reason = reason


class Head(NamedTuple):
    """What the proxy needs to know of an accepted head."""

    method: str
    path: str  # percent-decoded once, as routes match it; "*" for OPTIONS *
    raw_path: bytes
    query: bytes
    http10: bool
    keep_alive: bool  # whether the client lets the connection live on
    content_length: int  # 0 if it names none
    chunked: bool
    expect_continue: bool
    special: bool  # has x-… or forwarded… fields, or a target to be rewritten: `rebuild` may be due


_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_FIELD = _TOKEN + rb":[\t -~\x80-\xff]*+\r\n"
# Method, path, query, minor version, Host if it comes first (as RFC 9110 §7.2 recommends) and is plain
# (else it is among the rest and looked at there), all other fields.
_HEAD = re.compile(
    rb"(" + _TOKEN + rb") (/[!-\"$->@-~]*+)(?:\?([!-\"$-~]*+))?+ HTTP/1\.([01])"
    rb"(?:\r\n[Hh]ost: ([A-Za-z0-9\-._]++(?::[0-9]++)?+)(?=\r))?+(\r\n(?:" + _FIELD + rb")*+)\r\n"
).fullmatch
# The fields that matter here, in a head that _HEAD has accepted and that was lower-cased: (name, value)
# pairs, and ("", "") for a field that makes the head special.
_FIELDS = re.compile(
    rb"\r\n(?:(host|connection|content-length|transfer-encoding|expect):[ \t]*+([^\r]*+)|x-|forwarded)"
).findall
_HOST_VALUE = (
    rb"(?:\[(?:[0-9a-f:.]++|v[0-9a-f]++\.[a-z0-9\-._~!$&'()*+,;=:]++)\]"
    rb"|(?:[a-z0-9\-._~!$&'()*+,;=]++|%[0-9a-f]{2})*)(?::[0-9]*+)?+"
)
_HOST = re.compile(_HOST_VALUE + rb"[ \t]*+").fullmatch
_ABSOLUTE = re.compile(rb"(https?)://(" + _HOST_VALUE + rb")(?=[/?#]|\Z)", re.IGNORECASE).match
_PERCENT = re.compile(rb"%([0-9A-Fa-f]{2})").sub
_START = re.compile(_TOKEN + rb"(?: |\Z)").match
_REQUEST_ID = re.compile(rb"[!-~]{1,128}").fullmatch
_new = tuple.__new__


def check_head(head: bytes, limits: Limits) -> Head:
    """The facts of a head that is valid; `head` runs from the method to the blank line, both included.

    >>> head = check_head(b"GET /a%20b?c HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n", Limits())
    >>> head.method, head.path, head.query, head.keep_alive
    ('GET', '/a b', b'c', True)

    Raises Reject: 400 malformed or ambiguous, 413, 414, 431 beyond `limits`.
    """
    size = len(head)
    if (
        size > limits.max_target_bytes
        or size > limits.max_head_bytes
        or (size > 4 * limits.max_header_fields and head.count(b"\n") - 2 > limits.max_header_fields)
    ):
        _check_sizes(head, limits)
    match = _HEAD(head)
    if match is None:
        return _check_unusual(head, limits)
    method, raw_path, query, minor, host, rest = match.groups(b"")
    if method == b"CONNECT":
        raise Reject(400, "CONNECT asks for a tunnel; this server opens none")
    path = _decode_path(raw_path) if b"%" in raw_path else raw_path.decode()
    http10 = minor == b"0"
    found = _FIELDS(rest.lower())
    if host and not found:
        facts = (method.decode(), path, raw_path, query, http10, not http10, 0, False, False, False)
    else:
        framing = _framing(found, 1 if host else 0, http10, limits)
        facts = (method.decode(), path, raw_path, query, http10, *framing)
    return _new(Head, facts)


def _framing(
    found: list[tuple[bytes, bytes]], hosts: int, http10: bool, limits: Limits
) -> tuple[bool, int, bool, bool, bool]:
    """keep_alive, content_length, chunked, expect_continue, special (RFC 9112 §3.2, §6, §9.3)."""
    length = -1
    keep_alive = not http10
    close = chunked = expect = special = False
    for name, value in found:
        if not name:
            special = True
        elif name == b"host":
            hosts += 1
            if _HOST(value) is None:
                raise Reject(400, "the Host field is not a host name or address with an optional port")
        elif name == b"connection":
            options = (value,) if value == b"keep-alive" else [word.strip() for word in value.split(b",")]
            close = close or b"close" in options
            keep_alive = keep_alive or b"keep-alive" in options
        elif name == b"content-length":
            if length >= 0:
                raise Reject(400, "Content-Length appears twice; send it once")
            length = int(value) if value.isdigit() and len(value) < 16 else _odd_length(value.rstrip(b" \t"))
        elif name == b"expect":
            expect = expect or (not http10 and value.rstrip(b" \t") == b"100-continue")
        elif chunked or http10 or value.rstrip(b" \t") != b"chunked":
            raise Reject(400, "Transfer-Encoding must be 'chunked', alone, once, and in HTTP/1.1")
        else:
            chunked = True
    if hosts > 1 or not (hosts or http10):
        raise Reject(400, "more than one Host field" if hosts else "no Host field; HTTP/1.1 requires it")
    if length > limits.max_body_bytes:
        raise Reject(413, f"the body has {length} bytes (limit {limits.max_body_bytes}, max_body_bytes)")
    if chunked and length >= 0:
        raise Reject(400, "both Content-Length and Transfer-Encoding; send one of them")
    return keep_alive and not close, max(length, 0), chunked, expect, special


def _odd_length(digits: bytes) -> int:
    if not digits.isdigit():
        raise Reject(400, "Content-Length must be digits only")
    if len(digits.lstrip(b"0")) > 18:  # int() itself refuses 4,301 digits
        raise Reject(413, "Content-Length has more than 18 digits")
    return int(digits.lstrip(b"0") or b"0")


def _decode_path(raw: bytes) -> str:
    """Percent-decoded once; what is not UTF-8 becomes U+FFFD, a lone % stays."""
    decoded = _PERCENT(lambda match: bytes((int(match[1], 16),)), raw)
    if b"\0" in decoded:
        raise Reject(400, "the path contains an encoded NUL (%00)")
    return decoded.decode("utf-8", "replace")


def check_start(part: bytes, limits: Limits) -> None:
    """Refuse what can no longer become a valid head; `part` is what has come of it, without its blank line.

    To be called on each read that does not complete a head: it bounds what is kept, and answers
    at once those who end lines with a bare LF or speak another protocol.

    Raises Reject: 400, 414, 431.
    """
    _check_sizes(part, limits)
    lines = part.count(b"\r\n")
    if part.count(b"\n") > lines or part.count(b"\r") - part.endswith(b"\r") > lines:
        raise Reject(400, "a bare CR or LF; lines end with CR LF")
    if b"\0" in part or (part and _START(part) is None):
        raise Reject(400, "this is not HTTP/1.1" + (" but looks like TLS" if part[0] == 22 else ""))


def _check_sizes(head: bytes, limits: Limits) -> None:
    line = head[: head.find(b"\r\n")] if b"\r\n" in head else head
    target = line.partition(b" ")[2].partition(b" ")[0]
    if len(target) > limits.max_target_bytes:
        raise Reject(414, f"the target is longer than {limits.max_target_bytes} bytes (max_target_bytes)")
    if len(head) > limits.max_head_bytes:
        raise Reject(431, f"the head is longer than {limits.max_head_bytes} bytes (max_head_bytes)")
    # A complete head has two CR LF more than fields, a partial one at least one.
    fields = head.count(b"\r\n") - (2 if head.endswith(b"\r\n\r\n") else 1)
    if fields > limits.max_header_fields:
        raise Reject(431, f"more than {limits.max_header_fields} header fields (max_header_fields)")


def _check_unusual(head: bytes, limits: Limits) -> Head:
    """A head that is not plain origin form: checked as if it were, or refused with the reason."""
    line, _, fields = head.partition(b"\r\n")
    method, _, rest = line.partition(b" ")
    target, _, version = rest.partition(b" ")
    usual = _origin_form(target)
    as_usual = b"%b %b %b\r\n%b" % (method, usual or b"", version, fields)
    if as_usual == head or _HEAD(as_usual) is None:
        _refuse(line, fields)
    if target == b"*" and method != b"OPTIONS":
        raise Reject(400, "the target * is for OPTIONS only")
    checked = check_head(as_usual, limits)
    if target == b"*":
        return checked._replace(path="*", raw_path=b"*")
    absolute = _ABSOLUTE(target)
    hosts = header_values(head, b"host")
    if absolute and hosts and _authority(absolute[1], hosts[0]) != _authority(absolute[1], absolute[2]):
        raise Reject(400, "the target names another host than the Host field")
    return checked._replace(special=True)


def _origin_form(target: bytes) -> bytes | None:
    """The target as path and query: `*` as "/", no scheme and host, no fragment; None for any other form."""
    if target == b"*":
        return b"/"
    absolute = _ABSOLUTE(target)
    if absolute:
        if not absolute[2] or absolute[2].startswith(b":"):  # RFC 9110 §4.2.1: an empty host is invalid
            return None
        target = target[absolute.end() :]
        target = target if target.startswith(b"/") else b"/" + target
    return target.partition(b"#")[0] if target.startswith(b"/") else None


def _authority(scheme: bytes, host: bytes) -> bytes:
    """For comparison: lower case, without an empty or the scheme's usual port."""
    default = b":443" if scheme.lower() == b"https" else b":80"
    return host.lower().removesuffix(b":").removesuffix(default)


def _refuse(line: bytes, fields: bytes) -> NoReturn:
    """Say what is wrong with a head that the pattern refused; values are never repeated in the text."""
    if re.fullmatch(_TOKEN + rb" [!-~]++ HTTP/1\.[01]", line) is None:
        version = re.fullmatch(_TOKEN + rb" [!-~]++ HTTP/[0-9]\.[0-9]", line)
        raise Reject(400, "this server speaks HTTP/1.1 and HTTP/1.0" if version else "malformed request line")
    for number, field in enumerate(fields.removesuffix(b"\r\n").split(b"\r\n")[:-1], start=1):
        if re.fullmatch(_FIELD, field + b"\r\n") is None:
            raise Reject(400, f"header line {number}: {_what_is_wrong(field)}")
    raise Reject(400, "the target must be a path that starts with /, or http://host/path with the same Host")


def _what_is_wrong(field: bytes) -> str:
    name, colon, _ = field.partition(b":")
    if field[:1] in (b" ", b"\t"):
        return "it continues the line before, which HTTP/1.1 no longer allows"
    if colon and re.fullmatch(_TOKEN, name.rstrip(b" \t")):
        blank = name != name.rstrip(b" \t")
        return "white space before the colon" if blank else "a control character in the value"
    return "not of the form 'name: value'"


def header_values(head: bytes, name: bytes) -> list[bytes]:
    """The values of all fields of that name in an accepted head, in order, without the white space around."""
    needle = b"\r\n" + name.lower() + b":"
    low = head.lower()
    values = []
    at = low.find(needle)
    while at >= 0:
        end = head.index(b"\r\n", at + len(needle))
        values.append(head[at + len(needle) : end].strip(b" \t"))
        at = low.find(needle, end)
    return values


def rebuild(head: bytes, drop: Collection[bytes], keep: Collection[bytes] = ()) -> bytes:
    """An accepted head in origin form and without the fields to `drop`.

    drop   lower-case names; one that ends with "-" is a prefix
    keep   lower-case names that stay although a prefix in `drop` covers them
    """
    line, *fields = head[:-4].split(b"\r\n")
    method, target, version = line.split(b" ")
    if target != b"*":
        target = _origin_form(target) or target
    prefixes = tuple(name for name in drop if name.endswith(b"-"))
    lines = [b"%b %b %b" % (method, target, version)]
    for field in fields:
        name = field[: field.index(b":")].lower()
        if name in keep or not (name in drop or name.startswith(prefixes)):
            lines.append(field)
    return b"\r\n".join(lines) + b"\r\n\r\n"


def request_id(raw: bytes | None) -> bytes | None:
    """`raw` if it may serve as a request's id: 1 to 128 visible ASCII characters; else None."""
    return raw if raw is not None and _REQUEST_ID(raw) else None


# What a connection does, and so which time-out applies. `since` is when it began to, and moves with the
# progress of a body or a write (`progressed`); a head has its time as a whole. While the request runs none applies.
IDLE, HEAD, BODY, RUNNING, WRITE = range(5)
#: The states whose time-out is answered, with 408; in the others the connection is just closed.
ANSWERED = frozenset((HEAD, BODY))


#: A client that is slower than this, on average, makes no progress that counts (as much as Kestrel asks for).
MIN_BYTES_PER_S = 240


def progressed(since: float, now: float, count: int) -> float:
    """The new `since` of a body or a write of which `count` more bytes have come or gone: later by what that earned.

    A client that moves a byte now and then keeps its connection no longer than one that moves none.
    """
    return min(now, since + count / MIN_BYTES_PER_S)


def next_deadline(state: int, since: float, limits: Limits) -> float:
    """When a connection that has been in `state` since `since` is given up; inf for never."""
    if state == IDLE:
        return since + limits.keep_alive_timeout_s
    if state == HEAD:
        return since + limits.head_timeout_s
    if state == BODY:
        return since + limits.body_timeout_s
    return since + limits.write_timeout_s if state == WRITE else math.inf
