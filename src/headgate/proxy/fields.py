"""The header fields that concern the proxy itself, for heads that have any `x-` or `forwarded` field.

- X-Request-ID is taken over if it is valid, X-Serve-Call-Method and X-Serve-Shard-Key are read.
- X-Headgate-* are headgate's own and never accepted from a client, but for -Model and -Timing.
- X-Forwarded-* and Forwarded are believed when they come from a trusted address, and then say who
  the client is and which scheme it used; from anybody else they are taken out.

The head comes from core/http11.check_head, so its lines are what they seem.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from headgate.core.http11 import header_values, rebuild, request_id

log = logging.getLogger("headgate.proxy")

_INTERNAL = (b"x-headgate-",)
_FORWARDED = (b"x-forwarded-", b"forwarded")
_ALLOWED = (b"x-headgate-model", b"x-headgate-timing")
_SCHEMES = (b"http", b"https")


class Fields(NamedTuple):
    """What the special fields of one head say; `head` is without those that a client may not send."""

    head: bytes
    request_id: bytes | None
    call_method: str | None
    shard_key: str | None
    client: str | None  # None: whoever the connection comes from
    scheme: str | None


def read(head: bytes, odd: bool, trusted: bool, is_trusted: Callable[[str], bool]) -> Fields:
    """Look at the special fields of an accepted head.

    odd          the target is not in origin form, or has a fragment, and has to be rewritten
    trusted      whether the peer may say who it speaks for
    is_trusted   whether an address in X-Forwarded-For may
    """
    low = head.lower()
    has_forwarded = b"\r\nx-forwarded-" in low or b"\r\nforwarded:" in low
    client = scheme = None
    drop: tuple[bytes, ...] = ()
    if has_forwarded and trusted:
        client = _client(header_values(head, b"x-forwarded-for"), is_trusted)
        given = header_values(head, b"x-forwarded-proto")
        scheme = given[-1].lower().decode("latin-1") if given and given[-1].lower() in _SCHEMES else None
    elif has_forwarded:
        drop = _FORWARDED
    if b"\r\nx-headgate-" in low:
        drop += _INTERNAL
    return Fields(
        rebuild(head, drop, _ALLOWED) if drop or odd else head,
        request_id(header_values(head, b"x-request-id")[0]) if b"\r\nx-request-id:" in low else None,
        _text(head, b"x-serve-call-method") if b"\r\nx-serve-call-method:" in low else None,
        _text(head, b"x-serve-shard-key") if b"\r\nx-serve-shard-key:" in low else None,
        client,
        scheme,
    )


def _text(head: bytes, name: bytes) -> str:
    return header_values(head, name)[0].decode("utf-8", "replace")


def _client(values: list[bytes], is_trusted: Callable[[str], bool]) -> str | None:
    """The last address in the chain that is not one of our own proxies; the first if all are."""
    chain = [part.strip().decode("latin-1") for value in values for part in value.split(b",")]
    chain = [address for address in map(_address, chain) if address]
    return next((address for address in reversed(chain) if not is_trusted(address)), chain[0] if chain else None)


def _address(text: str) -> str:
    """Without the port that some proxies add: "[::1]:80" and "10.0.0.1:80"."""
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def trust(allowed: str) -> Callable[[str], bool]:
    """Whether an address is in `allowed`: addresses and networks separated by commas, or "*".

    >>> is_trusted = trust("127.0.0.1, 10.0.0.0/8")
    >>> is_trusted("10.1.2.3"), is_trusted("192.168.0.1")
    (True, False)
    """
    names = {part.strip() for part in allowed.split(",") if part.strip()}
    if "*" in names:
        return lambda address: True
    if not any("/" in name for name in names):
        return names.__contains__
    import ipaddress  # 5 ms that only networks cost

    networks = []
    for name in names:
        try:
            networks.append(ipaddress.ip_network(name, strict=False))
        except ValueError:
            log.warning("forwarded_allow_ips: %r is neither an address nor a network; it trusts nobody", name)

    def is_trusted(address: str) -> bool:
        try:
            parsed = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(parsed in network for network in networks)

    return is_trusted
