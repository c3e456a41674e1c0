"""A second parser's opinion on each head: llhttp must read it as we do.

core/http11.py decides; llhttp (by way of httptools) was written by others and fuzzed for years,
so a head about which the two differ is a head that somebody else would read differently too.
Asked only after check_head accepted it, and only about framing: where the request ends.
"""

from __future__ import annotations

import re

import httptools

from headgate.core.http11 import Head, Reject

#: Methods that llhttp is asked about under their own names; it knows no others than its own list.
_KNOWN = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"))
#: The field that makes llhttp stop before the body; another name makes it read on, as we do.
_without_upgrade = re.compile(rb"\r\nupgrade:", re.IGNORECASE).sub


class SecondOpinion:
    """One for all connections: each head is whole, so that nothing is left over between two."""

    def __init__(self) -> None:
        self._ends = 0
        self._parser = httptools.HttpRequestParser(self)

    def on_message_complete(self) -> None:
        """llhttp's call-back: the request ends here."""
        self._ends += 1

    def check(self, raw: bytes, head: Head) -> None:
        """Raises Reject if llhttp refuses the head `raw` or disagrees about whether a body follows."""
        if head.method not in _KNOWN:
            raw = b"POST" + raw[raw.index(b" ") :]
        body = head.chunked or head.content_length > 0
        self._ends = 0
        try:
            self._parser.feed_data(raw)
        except httptools.HttpParserUpgrade:  # it takes what follows for another protocol; we do not switch
            self._renew()
            self.check(_without_upgrade(b"\r\nx-upgrade:", raw), head)
            return
        except httptools.HttpParserError:
            self._renew()
            raise Reject(400, "the head is ambiguous") from None
        ends = self._ends
        if body or not head.keep_alive or ends != 1:
            self._renew()
        if ends != (not body):
            raise Reject(400, "the head is ambiguous: parsers differ about where the request ends")

    def _renew(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
