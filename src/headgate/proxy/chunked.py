"""Take the chunks out of a chunked body (RFC 9112 §7.1), however the stream was cut.

Strict: what two parsers could read differently is refused. Extensions and trailers are checked
and thrown away. Limits hold for the body, for each line, and for all trailers together.

No sockets here. Bodies of known length are body.py's.
"""

from __future__ import annotations

import re

from headgate.core.http11 import Limits, Reject

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*+"'
_EXTENSION = (
    rb"[ \t]*+;[ \t]*+" + _TOKEN + rb"(?:[ \t]*+=[ \t]*+(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?+"
)
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:" + _EXTENSION + rb")*+").fullmatch
_TRAILER = re.compile(_TOKEN + rb":[\t -~\x80-\xff]*+").fullmatch
#: RFC 9110 §6.5.1: never in a trailer. Who merges trailers into the head would frame the request anew.
_FRAMING = re.compile(rb"(?:content-length|transfer-encoding|host):", re.IGNORECASE).match
_MAX_LINE_BYTES = 1024
#: Bytes of framing a client may spend: 16 for each byte of its body, and so many more.
_WASTE_RATIO, _WASTE_BYTES = 16, 64 * 1024

_SIZE, _DATA, _DATA_END, _TRAILERS, _DONE = range(5)


class Chunked:
    """Collects the body in `body`.

    >>> chunked = Chunked(Limits())
    >>> chunked.take(b"3\\r\\nabc\\r\\n0\\r\\n\\r\\nGET"), bytes(chunked.body)
    (13, b'abc')
    >>> chunked.done
    True
    """

    filling = None  # nothing can be received straight into its place

    def __init__(self, limits: Limits) -> None:
        self.body = bytearray()
        self.done = False
        self._limits = limits
        self._state = _SIZE
        self._missing = 0  # bytes of the current chunk
        self._line = b""  # the beginning of a line that was cut
        self._waste = 0  # bytes that are no body
        self._trailer_bytes = 0

    def take(self, data: bytes) -> int:
        """How much of the data belongs to this body; all of it, unless it ends there.

        Raises Reject: 400 malformed, 413 the body, 431 the trailers too large.
        """
        position = 0
        while position < len(data) and not self.done:
            if self._state == _DATA:
                position = self._take_data(data, position)
            else:
                position = self._take_line(data, position)
        return position

    def _take_data(self, data: bytes, position: int) -> int:
        end = min(position + self._missing, len(data))
        self.body += memoryview(data)[position:end]
        self._missing -= end - position
        if not self._missing:
            self._state = _DATA_END
        return end

    def _take_line(self, data: bytes, position: int) -> int:
        found = data.find(b"\n", position)
        end = found + 1 or len(data)
        line = self._line + data[position:end]
        self._waste += end - position
        if len(line) > _MAX_LINE_BYTES and self._state != _TRAILERS:
            raise Reject(400, "a chunk's size line is too long")
        if self._state == _TRAILERS:
            self._check_trailers(end - position)
        if self._waste > len(self.body) * _WASTE_RATIO + _WASTE_BYTES:
            raise Reject(413, "the body's chunks are too small: more framing than data")
        if found < 0:
            self._line = line
            return end
        self._line = b""
        if not line.endswith(b"\r\n"):
            raise Reject(400, "a line of the chunked body ends with a bare LF")
        self._on_line(line[:-2])
        return end

    def _check_trailers(self, size: int) -> None:
        self._trailer_bytes += size
        if self._trailer_bytes > self._limits.max_head_bytes:
            raise Reject(431, f"the trailers are longer than {self._limits.max_head_bytes} bytes (max_head_bytes)")

    def _on_line(self, line: bytes) -> None:
        if self._state == _SIZE:
            self._on_size(line)
        elif self._state == _DATA_END:
            if line:
                raise Reject(400, "a chunk is longer than its size says")
            self._state = _SIZE
        elif not line:
            self._state = _DONE
            self.done = True
        elif _TRAILER(line) is None:
            raise Reject(400, "a trailer is not of the form 'name: value'")
        elif _FRAMING(line):
            raise Reject(400, "Content-Length, Transfer-Encoding and Host cannot be trailers")

    def _on_size(self, line: bytes) -> None:
        match = _SIZE_LINE(line)
        if match is None:
            raise Reject(400, "a chunk's size line is malformed")
        size = int(match[1], 16)
        if len(self.body) + size > self._limits.max_body_bytes:
            limit = self._limits.max_body_bytes
            raise Reject(413, f"the body has more than {limit} bytes (limit {limit}, max_body_bytes)")
        self._missing = size
        self._state = _DATA if size else _TRAILERS
