"""An HTTPRequest is a Starlette Request; a ServeRequest is like one."""

from __future__ import annotations

import asyncio
import pickle
import uuid

import pytest
from starlette.requests import Request

from headgate.errors import ArgumentError, SerializationError
from headgate.replica.request import (
    AsyncServeRequest,
    Copied,
    HTTPRequest,
    PlainServeRequest,
    ServeRequest,
    portable,
)  # fmt: skip

HEAD = (
    b"POST /api/7/a%20b?q=1&q=2&e=%C3%BC HTTP/1.1\r\nHost: example.org:81\r\nX-Two:  a\t\r\nx-two: b\r\n"
    b"Cookie: c=d\r\nContent-Type: application/json\r\n\r\n"
)


def request(head=HEAD, body=b'{"a": 1}', **more):
    received = Copied(head, body, client=("10.0.0.1", 5000), server=("127.0.0.1", 8000), request_id="r1", **more)
    return HTTPRequest(received)


def form(content_type: bytes, body: bytes):
    return request(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Type: " + content_type + b"\r\n\r\n", body)


def run(awaitable):
    return asyncio.run(awaitable)


def test_it_is_what_starlette_would_make_of_the_same_scope():
    mine = request(template="/api/{id:int}/{name}", parameters=("7", "a b"))
    theirs = Request(mine.scope)

    for name in ("method", "url", "base_url", "headers", "query_params", "path_params", "cookies", "client"):
        assert getattr(mine, name) == getattr(theirs, name), name
    assert isinstance(mine, Request)


def test_the_scope_says_what_the_head_says():
    scope = request().scope

    assert scope["type"] == "http"
    assert scope["method"] == "POST"
    assert scope["path"] == "/api/7/a b"
    assert scope["raw_path"] == b"/api/7/a%20b"
    assert scope["query_string"] == b"q=1&q=2&e=%C3%BC"
    assert scope["http_version"] == "1.1"
    assert scope["headers"][:3] == [(b"host", b"example.org:81"), (b"x-two", b"a"), (b"x-two", b"b")]
    assert scope["client"] == ("10.0.0.1", 5000)
    assert scope["server"] == ("127.0.0.1", 8000)
    assert (scope["root_path"], scope["state"], scope["path_params"]) == ("", {}, {})


def test_the_parts_read_as_in_starlette():
    mine = request(scheme="https")

    assert mine.method == "POST"
    assert str(mine.url) == "https://example.org:81/api/7/a b?q=1&q=2&e=%C3%BC"
    assert mine.query_params.getlist("q") == ["1", "2"]
    assert mine.query_params["e"] == "ü"
    assert mine.headers.getlist("X-TWO") == ["a", "b"]
    assert mine.cookies == {"c": "d"}
    assert mine.client.host == "10.0.0.1"
    assert mine["method"] == "POST"
    assert mine.request_id == "r1"
    mine.state.seen = True
    assert mine.state.seen


def test_path_parameters_are_converted():
    name = uuid.uuid4()
    mine = request(
        template="/a/{n:int}/{x:float}/{u:uuid}/{rest:path}", parameters=("7", "3.14", str(name), "b/c")
    )

    assert mine.path_params == {"n": 7, "x": 3.14, "u": name, "rest": "b/c"}
    assert mine.path_params is mine.scope["path_params"]


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [
        (b"/", "/", b""),
        (b"/a?", "/a", b""),
        (b"/?a?b", "/", b"a?b"),
        (b"/a%2Fb%zz%ff", "/a/b%zz\ufffd", b""),
        (b"//x", "//x", b""),
        (b"*", "*", b""),
        (b"http://h:1/a?b", "/a", b"b"),
        (b"http://h", "/", b""),
        (b"http://h?b=/c", "/", b"b=/c"),
        (b"/a?u=http://x/y", "/a", b"u=http://x/y"),
    ],
)
def test_every_form_of_target_has_its_path_and_query(target, path, query):
    scope = request(b"GET " + target + b" HTTP/1.0\r\n\r\n").scope

    assert (scope["path"], scope["query_string"], scope["headers"], scope["http_version"]) == (
        path,
        query,
        [],
        "1.0",
    )


def test_the_body_can_be_awaited_and_read_at_once():
    async def read(mine):
        return await mine.body(), await mine.json(), [part async for part in mine.stream()]

    mine = request()
    assert mine.data == b'{"a": 1}'
    assert run(read(mine)) == (b'{"a": 1}', {"a": 1}, [b'{"a": 1}', b""])


def test_a_view_is_read_only_and_no_copy():
    memory = bytearray(b"abc")
    mine = request(body=memoryview(memory))
    view = mine.view
    memory[0] = ord("x")

    assert view == b"xbc"
    assert view.readonly
    del view
    assert mine.data == b"xbc"
    memory[0] = ord("y")
    assert mine.data == mine.view == b"xbc"  # the copy is the request's own


def test_a_urlencoded_form_is_read():
    mine = form(b"application/x-www-form-urlencoded", b"a=1&a=2&b=%C3%BC")

    async def read():
        return await mine.form()

    assert run(read()).multi_items() == [("a", "1"), ("a", "2"), ("b", "ü")]


def test_a_multipart_form_is_read():
    body = (
        b'--X\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
        b'--X\r\nContent-Disposition: form-data; name="f"; filename="n.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\nhello\r\n--X--\r\n"
    )

    async def read():
        async with form(b"multipart/form-data; boundary=X", memoryview(body)).form() as data:
            return data["a"], data["f"].filename, await data["f"].read()

    assert run(read()) == ("1", "n.txt", b"hello")


def test_receive_gives_the_body_once_and_then_the_clients_leaving():
    class Leaving:
        """What was received from a client who leaves after the first look."""

        looks = iter([False, True, True])

        def __getattr__(self, name):
            return next(self.looks) if name == "is_gone" else getattr(request()._received, name)

    mine = HTTPRequest(Leaving())

    async def read():
        return [await mine.receive(), await mine.receive()], await mine.is_disconnected()

    assert run(read()) == (
        [{"type": "http.request", "body": b'{"a": 1}', "more_body": False}, {"type": "http.disconnect"}],
        True,
    )


def test_without_a_client_nobody_leaves():
    assert run(request().is_disconnected()) is False


@pytest.mark.parametrize("read_first", [False, True])
def test_a_request_pickles_with_its_body(read_first):
    mine = request(
        body=memoryview(b"abc"), template="/api/{id:int}/{name}", parameters=["7", "x"], is_gone=bool
    )
    if read_first:
        assert mine.path_params["id"] == 7
    back = pickle.loads(pickle.dumps(mine))

    assert back.data == b"abc"
    assert back.scope == mine.scope
    assert back.request_id == "r1"


def test_another_applications_request_is_made_portable_once_its_body_was_read():
    sent = iter([{"type": "http.request", "body": b"abc"}])

    async def receive():
        return next(sent)

    scope = {**request().scope, "path_params": {"id": 7}}
    theirs = Request(scope, receive)
    with pytest.raises(SerializationError, match=r"await request.body\(\)"):
        portable(theirs)
    run(theirs.body())
    copy = pickle.loads(pickle.dumps(portable(theirs)))

    assert copy.data == b"abc"
    assert copy.path_params == {"id": 7}
    assert copy.url == theirs.url
    assert copy.headers == theirs.headers
    assert portable(copy) is copy


def test_a_portable_request_keeps_a_bare_path():
    theirs = Request(request(b"GET /a HTTP/1.1\r\nHost: h\r\n\r\n", b"").scope)
    theirs._body = b""

    assert str(portable(theirs).url) == "http://h/a"


# -- Calls of a handle


def test_plain_and_async_handlers_read_a_call_each_in_their_way():
    data = {"a": [1]}

    async def read(call):
        return await call.body(), await call.json(), await call.form()

    plain = PlainServeRequest(data)
    assert (plain.body(), plain.json(), plain.form()) == (data, data, data)
    assert run(read(AsyncServeRequest(data))) == (data, data, data)
    assert plain.body() is plain.data is data
    assert isinstance(plain, ServeRequest)


@pytest.mark.parametrize("asked", ["json", "form"])
def test_json_of_anything_but_a_dict_is_refused_naming_the_type(asked):
    with pytest.raises(ArgumentError, match=rf"request.{asked}\(\) needs a dict.*got list"):
        getattr(PlainServeRequest([1]), asked)()
    with pytest.raises(ArgumentError, match="got NoneType"):
        run(getattr(AsyncServeRequest(), asked)())


def test_a_call_carries_keywords_headers_and_method():
    call = PlainServeRequest(1, {"n": 2, "x": None}, {"X-Key": "v"}, "POST", "r1")

    assert call.query_params == {"n": 2, "x": None}
    assert call.headers["x-key"] == "v"
    assert call.method == "POST"
    assert call.path_params == {}
    assert repr(call) == "<PlainServeRequest POST data=int>"


def test_a_call_without_options_is_a_get():
    call = PlainServeRequest()

    assert (call.data, call.query_params, call.method, dict(call.headers)) == (None, {}, "GET", {})
