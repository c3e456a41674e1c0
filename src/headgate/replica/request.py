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
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import unquote_to_bytes

from msgspec import Struct
from starlette.datastructures import Headers
from starlette.requests import Request, empty_send

from headgate.core.routes import compile_route, convert
from headgate.errors import ArgumentError, SerializationError

Address = tuple[str, int] | None
Value = TypeVar("Value")

#: How often a coroutine that waits for `http.disconnect` looks whether the client has gone.
DISCONNECT_POLL_S = 0.05


class Lazily(Generic[Value]):
    """As `functools.cached_property`, which takes a lock before Python 3.12: a microsecond for each value."""

    def __init__(self, find: Callable[[Any], Value]) -> None:
        self._find = find
        self._name = find.__name__
        self.__doc__ = find.__doc__

    def __get__(self, owner: Any, kind: type | None = None) -> Value:
        if owner is None:
            return self  # type: ignore[return-value]  # as a class's attribute it is itself
        owner.__dict__[self._name] = value = self._find(owner)
        return value


class Received(Protocol):
    """Where a request comes from: what a replica got over its link (job.py), or a copy of it.

    head        the request line and the header lines, as the proxy accepted them
    body        bytes, or a view of memory that is reused when the request is done
    template    the route that matched; "" if there are no path parameters
    parameters  the path parameters as they stand in the path
    """

    @property
    def head(self) -> bytes: ...
    @property
    def body(self) -> bytes | memoryview: ...
    @property
    def template(self) -> str: ...
    @property
    def parameters(self) -> Sequence[str]: ...
    @property
    def client(self) -> Address: ...
    @property
    def server(self) -> Address: ...
    @property
    def scheme(self) -> str: ...
    @property
    def request_id(self) -> str: ...
    @property
    def is_gone(self) -> bool: ...


class Copied(Struct, frozen=True):
    """A request that has left its link behind: it pickles, and its client never goes."""

    head: bytes
    body: bytes | memoryview = b""
    template: str = ""
    parameters: Sequence[str] = ()
    client: Address = None
    server: Address = None
    scheme: str = "http"
    request_id: str = ""
    is_gone: bool = False


class HTTPRequest(Request):
    """A Starlette Request that is read lazily, and whose body is there already.

    Beyond Starlette's: `data`, `view` and `request_id`. Pickles, body included, so that it can be
    passed to a handle.
    """

    # Attributes of Request.__init__, which is not run: 1 µs less for each request.
    _form = None
    _stream_consumed = False
    _is_disconnected = False
    _send = staticmethod(empty_send)
    _body_received = False

    def __init__(self, received: Received) -> None:
        self._received = received

    @Lazily
    def scope(self) -> dict[str, Any]:  # type: ignore[override]
        """The ASGI scope, as uvicorn would build it."""
        received = self._received
        first, _, rest = received.head.rstrip(b"\r\n").partition(b"\r\n")
        method, target, version = first.decode("latin-1").split(" ")
        raw_path, _, query = _origin_form(target.encode("latin-1")).partition(b"?")
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": version[5:],
            "method": method,
            "scheme": received.scheme,
            "path": unquote_to_bytes(raw_path).decode("utf-8", "replace"),
            "raw_path": raw_path,
            "query_string": query,
            "root_path": "",
            "headers": _header_list(rest),
            "client": received.client,
            "server": received.server,
            "path_params": self._path_params,
            "state": {},
        }

    @Lazily
    def _path_params(self) -> dict[str, Any]:
        received = self._received
        return convert(compile_route(received.template), received.parameters) if received.template else {}

    @Lazily
    def _raw_body(self) -> bytes | memoryview:
        return self._received.body

    @Lazily
    def _body(self) -> bytes:
        """Where Starlette's body(), json(), form() and stream() look first."""
        body = self._raw_body
        if type(body) is not bytes:
            self._raw_body = body = bytes(body)
        return body

    @property
    def request_id(self) -> str:
        """The id that the request has in the logs and in X-Request-ID."""
        return self._received.request_id

    @property
    def method(self) -> str:
        head = self._received.head
        return head[: head.index(b" ")].decode("latin-1")

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
        return self._received.is_gone

    async def _receive(self) -> dict[str, Any]:
        """The ASGI messages of this request: its body in one piece, then the client's leaving."""
        if not self._body_received:
            self._body_received = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        while not await self.is_disconnected():
            await asyncio.sleep(DISCONNECT_POLL_S)
        return {"type": "http.disconnect"}

    def __reduce__(self) -> tuple[Any, ...]:
        r = self._received
        fields = (r.head, self._body, r.template, tuple(r.parameters), r.client, r.server, r.scheme, r.request_id)
        extra = {"_path_params": self._path_params} if "_path_params" in self.__dict__ else {}
        return _copy, fields, extra


def _copy(*fields: Any) -> HTTPRequest:
    return HTTPRequest(Copied(*fields))


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
    copy = _copy(b"\r\n".join(lines), body, "", (), client, server, scope.get("scheme", "http"))
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

    @Lazily
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
