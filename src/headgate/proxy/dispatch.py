"""The middle of an HTTP connection: a complete request finds its endpoint and goes to the router.

A request's meta is put together from pieces that are there already: one for each route, one for
each connection. Only a head with fields that concern the proxy itself is looked at closer
(fields.py). What no endpoint serves is answered here; with middlewares they get every request.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msgspec.msgpack import encode

from headgate.core import framing
from headgate.core.http11 import IDLE, RUNNING, Head
from headgate.proxy import fields
from headgate.proxy.admin import PREFIX
from headgate.proxy.answer import Answering

if TYPE_CHECKING:
    from headgate.core.state import Endpoint, Snapshot
    from headgate.proxy.asgi import Exchange
    from headgate.proxy.server import Server
    from headgate.proxy.upload import Upload


class Dispatching(Answering):
    """One connection's way to the router."""

    __slots__ = (
        "_after_id", "_routed", "_routed_by", "_special", "_tail", "_target", "client", "exchange", "facts",
        "local", "since", "state", "upload",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        super().__init__(server)
        self.state = IDLE
        self.since = server.now  # when the state began or last made progress
        self.facts: Head | None = None
        self.upload: Upload | None = None  # the request, if its body is in the arena
        self.exchange: Exchange | None = None  # the request, if it goes through middlewares
        self.client = self.local = ("", 0)
        self._tail = b""  # client and server, as a request's meta has them
        # Where the newest head leads, so that the same one again is not routed twice.
        self._routed_by: Snapshot | None = None
        self._target: Any = None
        self._after_id = b""  # with `_tail`
        self._routed = b""  # endpoint, template and parameters, as a request's meta has them
        self._special: fields.Fields | None = None

    def _look_closer(self, raw: bytes, head: Head) -> None:
        target = head.raw_path + (b"?" + head.query if head.query else b"")
        odd = not raw.startswith((target + b" ", target + b"? "), len(head.method) + 1)
        is_trusted = self.server.is_trusted
        self.untidy = True
        self._special = special = fields.read(raw, odd, is_trusted(self.client[0]), is_trusted)
        self.head = special.head
        if special.request_id is not None:
            self.request_id = special.request_id

    @property
    def scheme(self) -> str:
        """The scheme that the client used, as far as we know."""
        return (self._special and self._special.scheme) or self.server.scheme

    @property
    def origin(self) -> tuple[str, int]:
        """Who sent the request, as far as we know."""
        named = self._special and self._special.client
        return (named, 0) if named else self.client

    def _dispatch(self) -> None:
        """The request is complete: send it on its way."""
        self.state = RUNNING
        server = self.server
        if self._routed_by is not server.snapshot and not self._route():
            return
        special = self._special
        if special is None:
            self.meta = b"".join((b"\x98\xb4", self.request_id, self._after_id))
            key = None
        else:
            tail = self._tail
            if special.client or special.scheme or special.call_method is not None:
                tail = meta_tail(self.origin, self.local, self.scheme, special.call_method)
            self.flags = framing.HEAD if special.call_method is not None else 0
            self.meta = b"\x98%b%b%b" % (encode(self.request_id.decode()), self._routed, tail)
            key = special.shard_key
        if self.upload is None:
            server.router.submit(self._target, self, key)
        else:
            self._submit_upload(self.upload, self._target, key)

    def _route(self) -> bool:
        """Find the endpoint; False if none serves the request, or middlewares do it: then it is under way."""
        server, head = self.server, self.facts
        assert head is not None
        if server.app is not None:
            self.untidy = True
            self.exchange = server.app.serve(self, head)
            return False
        outcome = server.table.match(head.path, head.method)
        if outcome[0] != "match" or head.path.startswith(PREFIX):
            refusal = server.refusal(head, self.head, self.scheme, self.local)
            assert refusal is not None
            self.answer(refusal)
            return False
        target = server.targets[outcome[1]]
        self._target = target.endpoint
        self._routed = target.route + encode(outcome[2]) if outcome[2] else target.route_alone
        self._after_id = self._routed + self._tail
        self._routed_by = server.snapshot
        return True

    def _submit_upload(self, upload: Upload, endpoint: Endpoint, key: str | None) -> None:
        upload.meta, upload.head = self.meta, self.head
        upload.flags |= self.flags
        if endpoint.traffic.shadows:  # several replicas would read it, and each say when it is done
            upload.body = bytes(upload.view)
            upload.flags &= ~framing.ARENA
        self.server.router.submit(endpoint, upload, key)

    def allow(self, count: int) -> None:
        (self.upload or self).grant(count)


def meta_tail(client: tuple[str, int], local: tuple[str, int], scheme: str, call_method: str | None = None) -> bytes:
    """The end of a request's meta: client, server, and the method that the client names."""
    return encode((*client, (*local, scheme), call_method))[1:]
