"""What a handler is given: a Starlette Request made from a raw head, or a ServeRequest from a handle.

Nothing is parsed before the handler asks for it: an `HTTPRequest` keeps the bytes it was made of,
and builds its `scope`, path parameters and body when they are first read. The proxy has checked
the head (core/http11.py), so lines are only split here.

A ServeRequest comes in two kinds. Handlers that can await get one whose `body()`, `json()` and
`form()` are awaited as on a Starlette Request; plain handlers get one where they simply return.

What a handler returns is replica/response.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any
from urllib.parse import unquote_to_bytes

from starlette.datastructures import Headers
from starlette.requests import Request, empty_send

from headgate.core.routes import compile_route, convert
from headgate.errors import ArgumentError, SerializationError

Address = tuple[str, int] | None

#: How often a coroutine that waits for `http.disconnect` looks whether the client has gone.
DISCONNECT_POLL_S = 0.05

_route = lru_cache(maxsize=4096)(compile_route)


class HTTPRequest(Request):
    """A Starlette Request that is read lazily, and whose body is there already.

    head        the request line and the header lines, as the proxy accepted them
    body        bytes, or a view of memory that is reused when the request is done
    template    the route that matched; "" if there are no path parameters
    parameters  the path parameters as they stand in the path
    is_gone     whether the client has gone; None: it never goes

    Beyond Starlette's: `data`, `view` and `request_id`. Pickles, body included, so that it can be
    passed to a handle.
    """

    # Attributes of Request.__init__, which is not run: 1 µs less for each request.
    _form = None
    _stream_consumed = False
    _is_disconnected = False
    _send = staticmethod(empty_send)
    _body_received = False

    def __init__(
        self,
        head: bytes,
        body: bytes | memoryview = b"",
        template: str = "",
        parameters: Sequence[str] = (),
        client: Address = None,
        server: Address = None,
        scheme: str = "http",
        request_id: str = "",
        is_gone: Callable[[], bool] | None = None,
    ) -> None:
        self._head = head
        self._raw_body = body
        self._template = template
        self._parameters = parameters
        self._client = client
        self._server = server
        self._scheme = scheme
        self._is_gone = is_gone
        self.request_id = request_id

    @cached_property
    def scope(self) -> dict[str, Any]:  # type: ignore[override]
        """The ASGI scope, as uvicorn would build it."""
        first, _, rest = self._head.rstrip(b"\r\n").partition(b"\r\n")
        method, target, version = first.decode("latin-1").split(" ")
        raw_path, _, query = _origin_form(target.encode("latin-1")).partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": version[5:],
            "method": method,
            "scheme": self._scheme,
            "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": _header_list(rest),
            "client": self._client,
            "server": self._server,
            "path_params": self._path_params,
            "state": {},
        }

    @cached_property
    def _path_params(self) -> dict[str, Any]:
        return convert(_route(self._template), self._parameters) if self._template else {}

    @cached_property
    def _body(self) -> bytes:  # type: ignore[override]
        """Where Starlette's body(), json(), form() and stream() look first."""
        self._raw_body = body = bytes(self._raw_body)
        return body

    @property
    def method(self) -> str:
        return self._head[: self._head.index(b" ")].decode("latin-1")

    @property
    def path_params(self) -> dict[str, Any]:
        return self._path_params

    @property
    def data(self) -> bytes:
        """The body, for handlers that cannot await; copied when it is first read."""
        return self._body

    @property
    def view(self) -> memoryview:
        """The body, read-only and not copied; valid until the handler returns."""
        return memoryview(self._raw_body).toreadonly()

    async def is_disconnected(self) -> bool:
        """Whether the client has gone (or closed its sending side)."""
        return self._is_gone is not None and self._is_gone()

    async def _receive(self) -> dict[str, Any]:
        """The ASGI messages of this request: its body in one piece, then the client's leaving."""
        if not self._body_received:
            self._body_received = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        while not await self.is_disconnected():
            await asyncio.sleep(DISCONNECT_POLL_S)
        return {"type": "http.disconnect"}

    def __reduce__(self) -> tuple[Any, ...]:
        known = (self._head, self._body, self._template, tuple(self._parameters), self._client, self._server)
        extra = {"_path_params": self._path_params} if "_path_params" in self.__dict__ else {}
        return HTTPRequest, (*known, self._scheme, self.request_id), extra


def portable(request: Request) -> HTTPRequest:
    """Another application's Request as one that pickles, to be passed to a handle.

    SerializationError if its body has not been read: that takes an `await`.
    """
    if isinstance(request, HTTPRequest):
        return request
    body = getattr(request, "_body", None)
    if body is None:
        raise SerializationError("a Request is passed on with its body: `await request.body()` first")
    scope = request.scope
    target = scope.get("raw_path") or request.url.path.encode()
    if scope.get("query_string"):
        target += b"?" + scope["query_string"]
    lines = [b"%b %b HTTP/%b" % (request.method.encode(), target, scope.get("http_version", "1.1").encode())]
    lines += [b"%b: %b" % header for header in scope["headers"]]
    client, server = scope.get("client"), scope.get("server")
    copy = HTTPRequest(b"\r\n".join(lines), body, "", (), client, server, scope.get("scheme", "http"))
    copy._path_params = dict(request.path_params)
    return copy


class ServeRequest:
    """A call of a handle, looking like a request.

    `data` is the object that was passed, `query_params` the keyword arguments, types kept;
    `headers` and `method` come from `handle.options(...)`.
    """

    def __init__(
        self,
        data: Any = None,
        query_params: dict[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        method: str = "GET",
        request_id: str = "",
    ) -> None:
        self.data = data
        self.query_params = query_params if query_params is not None else {}
        self.path_params: dict[str, Any] = {}
        self.method = method
        self.request_id = request_id
        self._given_headers = headers

    @cached_property
    def headers(self) -> Headers:
        return Headers(dict(self._given_headers or {}))

    def _dict(self, asked: str) -> dict[Any, Any]:
        if isinstance(self.data, dict):
            return self.data
        kind = type(self.data).__name__
        raise ArgumentError(
            f"request.{asked}() needs a dict as the handle's data, got {kind}; "
            "request.data is the object itself"
        )

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.method} data={type(self.data).__name__}>"


class AsyncServeRequest(ServeRequest):
    """For `async def` handlers: `await request.json()`."""

    async def body(self) -> Any:
        """The object itself."""
        return self.data

    async def json(self) -> dict[Any, Any]:
        """The object, which must be a dict; ArgumentError otherwise."""
        return self._dict("json")

    async def form(self) -> dict[Any, Any]:
        """As `json`."""
        return self._dict("form")


class PlainServeRequest(ServeRequest):
    """For plain handlers, who cannot await: `request.json()`."""

    def body(self) -> Any:
        """The object itself."""
        return self.data

    def json(self) -> dict[Any, Any]:
        """The object, which must be a dict; ArgumentError otherwise."""
        return self._dict("json")

    def form(self) -> dict[Any, Any]:
        """As `json`."""
        return self._dict("form")


def _origin_form(target: bytes) -> bytes:
    """Path and query of a target; only an absolute one ("http://host/path") does not begin with them."""
    if target[:1] == b"/" or b"://" not in target:
        return target
    rest = target.partition(b"://")[2]
    starts = [at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0]
    path = rest[min(starts) :] if starts else b""
    return path if path[:1] == b"/" else b"/" + path


def _header_list(lines: bytes) -> list[tuple[bytes, bytes]]:
    headers = []
    for line in lines.split(b"\r\n") if lines else ():
        name, _, value = line.partition(b":")
        headers.append((name.lower(), value.strip(b" \t")))
    return headers
