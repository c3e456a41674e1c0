"""The head of an HTTP/1.1 reply, as one bytes-format from cached pieces.

The proxy alone decides how a reply is framed: content-length or chunked, connection, date and
x-request-id are written here and nowhere else. A header block that a reply brings along has
those fields taken out, and is refused if a value could end its line.

A status that has no body (RFC 9110 §6.4.1, §15: 1xx, 204, 304) gets neither content-length nor
transfer-encoding; whether the bytes of a body are to be written says `has_body`.

No clock: the caller passes the date, once a second `http_date(now)`. Requests: core/http11.py.
"""

from __future__ import annotations

import re

from headgate.errors import ConfigError

#: The content types of replies that bring no header block, by the code that travels in a REPLY frame.
CONTENT_TYPES = (
    b"text/plain",
    b"text/plain; charset=utf-8",
    b"application/json",
    b"application/octet-stream",
    b"application/x-ndjson",
)
#: The code of a reply that brings its own header block.
OWN_HEADERS = len(CONTENT_TYPES)
#: `content_length` of `reply_head_with`: send in chunks, or leave what the block itself says (HEAD, 304).
CHUNKED, AS_GIVEN = -1, -2
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LAST_CHUNK = b"0\r\n\r\n"

PHRASES = {
    200: "OK", 201: "Created", 202: "Accepted", 203: "Non-Authoritative Information", 204: "No Content",
    205: "Reset Content", 206: "Partial Content", 207: "Multi-Status",
    208: "Already Reported", 226: "IM Used",
    300: "Multiple Choices", 301: "Moved Permanently", 302: "Found", 303: "See Other", 304: "Not Modified",
    305: "Use Proxy", 307: "Temporary Redirect", 308: "Permanent Redirect",
    400: "Bad Request", 401: "Unauthorized", 402: "Payment Required", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 406: "Not Acceptable", 407: "Proxy Authentication Required",
    408: "Request Timeout", 409: "Conflict", 410: "Gone", 411: "Length Required", 412: "Precondition Failed",
    413: "Content Too Large", 414: "URI Too Long", 415: "Unsupported Media Type",
    416: "Range Not Satisfiable",
    417: "Expectation Failed", 418: "I'm a Teapot", 421: "Misdirected Request", 422: "Unprocessable Content",
    423: "Locked", 424: "Failed Dependency", 425: "Too Early", 426: "Upgrade Required",
    428: "Precondition Required", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    451: "Unavailable For Legal Reasons", 499: "Client Closed Request",
    500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway", 503: "Service Unavailable",
    504: "Gateway Timeout", 505: "HTTP Version Not Supported", 506: "Variant Also Negotiates",
    507: "Insufficient Storage", 508: "Loop Detected", 510: "Not Extended",
    511: "Network Authentication Required",
}  # fmt: skip

_CLOSE, _KEEP_ALIVE = b"connection: close\r\n", b"connection: keep-alive\r\n"
_BLOCK = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]++:[\t -~\x80-\xff]*+\r\n)*+").fullmatch
_OURS = re.compile(
    rb"^(?:content-length|transfer-encoding|connection|keep-alive|date|x-request-id):.*\n", re.I | re.M
).sub
_GIVEN_LENGTH = re.compile(rb"^content-length:[ \t]*([0-9]+)[ \t]*\r$", re.I | re.M).search
_starts: dict[tuple[int, int], bytes] = {}  # a cache: at most 800 statuses of 6 kinds


def has_body(status: int, method: str) -> bool:
    """Whether a final reply of that status, to that method, is followed by a body."""
    return method != "HEAD" and status not in (204, 205, 304)


def reply_head(
    status: int, content_type_code: int, content_length: int, request_id: bytes, date: bytes,
    close: bool, http10: bool,
) -> bytes:  # fmt: skip
    """The head of a reply that brings no header block of its own.

    content_length   of the body; to a HEAD request, of the body that GET would have brought
    close            whether the connection ends after this reply

    Raises ConfigError unless 200 <= status <= 999.
    """
    start = reply_start(status, content_type_code, content_length, date)
    return b"%b%b\r\n%b\r\n" % (start, request_id, _CLOSE if close else _KEEP_ALIVE if http10 else b"")


def reply_start(status: int, content_type_code: int, content_length: int, date: bytes) -> bytes:
    """What comes before the request's id in `reply_head`: the same for all such replies of a second.

    Between two requests of a client that keeps its connection, only an empty line comes after the id.
    """
    start = _starts.get((status, content_type_code)) or _start(status, content_type_code)
    if status in (204, 205, 304):
        return b"%b%bdate: %b\r\nx-request-id: " % (start, b"content-length: 0\r\n" if status == 205 else b"", date)
    return b"%bcontent-length: %d\r\ndate: %b\r\nx-request-id: " % (start, content_length, date)


def reply_head_with(
    status: int, header_block: bytes, content_length: int, request_id: bytes, date: bytes,
    close: bool, http10: bool,
) -> bytes:  # fmt: skip
    """The head of a reply that brings its own header fields, each with its CR LF.

    content_length   bytes of the body; CHUNKED; or AS_GIVEN: what the block says, if it says a number

    HTTP/1.0 knows no chunks: there CHUNKED means that the body follows bare and the caller closes
    the connection after it, whatever `close` says.

    Raises ConfigError for a status outside 200..999 or a block that is not a list of fields.
    """
    start = _starts.get((status, OWN_HEADERS)) or _start(status, OWN_HEADERS)
    if _BLOCK(header_block) is None:
        raise ConfigError(
            "a response header has a name or value that HTTP does not allow (CR, LF, NUL or another control"
            " character, or a name that is no token); remove or encode it where the response is made"
        )
    close = close or (http10 and content_length == CHUNKED)
    connection = _CLOSE if close else _KEEP_ALIVE if http10 else b""
    return b"%b%b%bdate: %b\r\nx-request-id: %b\r\n%b\r\n" % (
        start,
        _OURS(b"", header_block),
        _framing(status, content_length, header_block, http10),
        date,
        request_id,
        connection,
    )


def _framing(status: int, content_length: int, header_block: bytes, http10: bool) -> bytes:
    if status == 205:  # RFC 9110 §15.3.6: no content, and it must say so
        return b"content-length: 0\r\n"
    if status == 204:
        return b""
    if content_length == AS_GIVEN:
        given = _GIVEN_LENGTH(header_block)
        return b"content-length: %b\r\n" % given[1] if given else b""
    if status == 304:
        return b""
    if content_length == CHUNKED:
        return b"" if http10 else b"transfer-encoding: chunked\r\n"
    return b"content-length: %d\r\n" % content_length


def _start(status: int, content_type_code: int) -> bytes:
    """The status line and, where there is a body and a code for it, the content type."""
    if not 200 <= status <= 999:
        raise ConfigError(f"a response's status must be from 200 to 999, got {status}")
    start = b"HTTP/1.1 %d %b\r\n" % (status, PHRASES.get(status, "").encode())
    if content_type_code != OWN_HEADERS and status not in (204, 205, 304):
        start += b"content-type: %b\r\n" % CONTENT_TYPES[content_type_code]
    _starts[status, content_type_code] = start
    return start


_DAYS = (b"Mon", b"Tue", b"Wed", b"Thu", b"Fri", b"Sat", b"Sun")
_MONTHS = (
    b"Jan", b"Feb", b"Mar", b"Apr", b"May", b"Jun", b"Jul", b"Aug", b"Sep", b"Oct", b"Nov", b"Dec",
)  # fmt: skip


def http_date(seconds: int) -> bytes:
    """A Unix time as the Date field has it (RFC 9110 §5.6.7), whatever the locale.

    >>> http_date(784111777)
    b'Sun, 06 Nov 1994 08:49:37 GMT'
    """
    days, second = divmod(seconds, 86400)
    # Years that begin on 1 March, in eras of 400: the leap day comes last (Howard Hinnant, civil_from_days).
    era, day = divmod(days + 719468, 146097)
    year = (day - day // 1460 + day // 36524 - day // 146096) // 365
    day -= 365 * year + year // 4 - year // 100
    month = (5 * day + 2) // 153
    day -= (153 * month + 2) // 5
    year += 400 * era + (month >= 10)
    return b"%b, %02d %b %04d %02d:%02d:%02d GMT" % (
        _DAYS[(days + 3) % 7], day + 1, _MONTHS[(month + 2) % 12], year,
        second // 3600, second // 60 % 60, second % 60,
    )  # fmt: skip
