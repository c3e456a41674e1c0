"""The HTTP connection on a transport and a router in memory: bytes in, requests and bytes out."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest
from fakes import DATE, SNAPSHOT, Wire, get, post

from headgate.core.http11 import IDLE
from headgate.core.state import Traffic
from headgate.errors import BackendOverloaded, ReplicaDied

DATED = b"date: Sun, 06 Nov 1994 08:49:37 GMT\r\n"


@pytest.fixture
def wire() -> Wire:
    return Wire()


# --- one request ---


def test_a_request_goes_to_its_endpoint_and_the_answer_back(wire: Wire) -> None:
    wire.receive(get("/hello?a=b", "User-Agent: x"))

    request_id, endpoint, template, params, host, port, server, method = wire.meta()
    assert (endpoint, template, params, method) == ("hello", "/hello", [], None)
    assert (host, port, server) == ("127.0.0.1", 50000, ["127.0.0.1", 8000, "http"])
    assert wire.router.seen == [(get("/hello?a=b", "User-Agent: x"), b"")]

    wire.reply(b"ok")
    assert wire.output == (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/plain; charset=utf-8\r\ncontent-length: 2\r\n"
        + DATED
        + b"x-request-id: "
        + request_id.encode()
        + b"\r\n\r\nok"
    )
    assert not wire.transport.closing


def test_the_same_request_again_has_an_id_and_a_date_of_its_own(wire: Wire) -> None:
    wire.server.count = 0xFE  # ids carry over into their upper digits next
    for second in range(3):
        wire.server.sweep(float(second), DATE + second)
        wire.receive(get())
        wire.reply(b"a" * second)
    heads = wire.output.split(b"HTTP/1.1 200 OK\r\n")[1:]
    ids = [head.partition(b"x-request-id: ")[2][:20] for head in heads]
    assert [id[9:] for id in ids] == [b"000000000ff", b"00000000100", b"00000000101"]
    assert len({id[:9] for id in ids}) == 1
    assert wire.meta()[0].encode() == ids[-1]
    assert [b"08:49:3%d GMT" % (7 + second) in head for second, head in enumerate(heads)] == [True] * 3
    assert [b"content-length: %d\r\n" % second in head for second, head in enumerate(heads)] == [True] * 3


def test_the_starts_of_replies_that_are_kept_are_few(wire: Wire) -> None:
    for size in range(3000):
        wire.server.starts.make(200 | 1 << 16, size)
    assert len(wire.server.starts) <= 1024
    assert b"content-length: 2999\r\n" in wire.server.starts[200 | 1 << 16, 2999]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_the_same_request_again_goes_by_a_newer_snapshot_and_ends_with_the_server(wire: Wire, version: str) -> None:
    request = get("/hello", "Connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/" + version.encode())
    for leaving in (False, True):
        wire.receive(request)
        wire.receive(request)  # while the first one runs
        assert len(wire.router.callers) == 1 + 2 * leaving
        if leaving:
            wire.server.leave()
        wire.reply()
        if not leaving:
            wire.reply()
    assert wire.transport.closing or wire.transport.eof_written
    assert b"connection: close" in wire.output.rpartition(b"HTTP/1.1 ")[2]


def test_path_parameters_travel_raw(wire: Wire) -> None:
    wire.receive(get("/user/007/a%20b/c"))
    assert wire.meta()[1:4] == ["user", "/user/{id:int}/{rest:path}", ["007", "a b/c"]]


def test_a_snapshot_is_obeyed_by_the_next_request_and_costs_no_new_table_where_no_route_is_new(wire: Wire) -> None:
    wire.receive(get())
    wire.reply()
    table, targets = wire.server.table, wire.server.targets
    moved = Traffic((("other", 1.0),))
    first, *others = SNAPSHOT.endpoints
    wire.server.follow(
        msgspec.structs.replace(
            SNAPSHOT, version=2, endpoints=(msgspec.structs.replace(first, traffic=moved), *others)
        )
    )
    wire.receive(get())
    wire.reply()
    assert wire.router.callers[-1].endpoint.traffic == moved
    assert wire.server.table is table
    assert [name for name, one in wire.server.targets.items() if one is not targets[name]] == [first.name]

    wire.server.follow(msgspec.structs.replace(SNAPSHOT, version=3, endpoints=tuple(others)))
    wire.receive(get())
    assert wire.output.rpartition(b"HTTP/1.1 ")[2].startswith(b"404 ")


REQUESTS = {
    "get": get(),
    "post": post(b"0123456789"),
    "empty post": post(b""),
    "chunked": get("/hello", "Transfer-Encoding: chunked", method="POST")
    + b'4;a="b"\r\n0123\r\n6\r\n456789\r\n0\r\nx-trailer: y\r\n\r\n',
    "empty line first": b"\r\n" + get(),
    "special": get("/hello", "X-Request-ID: abc", "X-Serve-Call-Method: other"),
    "two": post(b"abc") + get("/user/1/x"),
}


def run(wire: Wire, *pieces: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """The requests (meta without ids, head, body) that come out, each answered as it does."""
    answered = 0
    for piece in pieces:
        wire.receive(piece)
        while len(wire.router.callers) > answered:
            answered += 1
            wire.reply(b"answer %d" % answered)
    return wire.router.seen


@pytest.mark.parametrize("name", REQUESTS)
def test_a_request_may_be_cut_anywhere(name: str) -> None:
    stream = REQUESTS[name]
    whole = run(Wire(), stream)
    assert whole
    for cut in range(1, len(stream)):
        wire = Wire()
        assert run(wire, stream[:cut], stream[cut:]) == whole
        assert len(wire.statuses()) == len(whole)
    single = Wire()
    assert run(single, *(stream[at : at + 1] for at in range(len(stream)))) == whole


@pytest.mark.parametrize("first", [b"", get()])
def test_one_empty_line_before_a_request_is_ignored_however_it_is_cut(first: bytes) -> None:
    stream = first + b"\r\n" + get()
    for cut in range(len(first), len(stream)):
        pieces = first, stream[len(first) : cut], stream[cut:]
        assert len(run(Wire(), *filter(None, pieces))) == 1 + bool(first)


def test_a_second_empty_line_is_refused_however_it_is_cut() -> None:
    stream = b"\r\n\r\n" + get()
    for cut in range(1, len(stream)):
        wire = Wire()
        assert not run(wire, stream[:cut], stream[cut:])
        assert wire.statuses() == [400]


def test_an_empty_line_begins_no_request(wire: Wire) -> None:
    wire.receive(get())
    wire.reply()
    wire.receive(b"\r")
    wire.receive(b"\n")
    wire.server.sweep(60.0, 0.0)
    assert wire.statuses() == [200]
    wire.server.sweep(76.0, 0.0)
    assert wire.transport.closing
    assert wire.statuses() == []


def test_a_chunked_body_arrives_whole(wire: Wire) -> None:
    wire.receive(REQUESTS["chunked"])
    assert wire.router.seen[0][1] == b"0123456789"


def test_head_gets_the_length_but_no_body(wire: Wire) -> None:
    wire.receive(get(method="HEAD"))
    wire.reply(b"four")
    output = wire.output
    assert b"content-length: 4\r\n" in output
    assert output.endswith(b"\r\n\r\n")


def test_a_reply_may_bring_its_own_header_fields(wire: Wire) -> None:
    wire.receive(get())
    wire.reply(b"{}", 201, 5, b"content-type: x/y\r\nset-cookie: a=b\r\nContent-Length: 99\r\n")
    output = wire.output
    assert output.startswith(b"HTTP/1.1 201 Created\r\ncontent-type: x/y\r\nset-cookie: a=b\r\n")
    assert output.count(b"ontent-") == 2
    assert b"content-length: 2\r\n" in output


def test_a_header_that_would_break_out_is_a_500(wire: Wire) -> None:
    wire.receive(get())
    wire.reply(b"x", 200, 5, b"a: b\nc: d\r\n")
    assert wire.statuses() == [500]


def test_a_status_without_a_body_gets_none(wire: Wire) -> None:
    wire.receive(get())
    wire.reply(b"ignored", 204, 5, b"x-a: b\r\n")
    assert b"ignored" not in wire.output


def test_an_error_frame_is_its_status_and_text(wire: Wire) -> None:
    wire.receive(get())
    wire.router.callers[-1].on_error(500, 0, 0, b"ValueError: no", 0, 14)
    output = wire.output
    assert output.startswith(b"HTTP/1.1 500 ")
    assert output.endswith(b"ValueError: no")


# --- between two requests ---


def test_pipelined_requests_are_served_one_at_a_time_and_in_order(wire: Wire) -> None:
    wire.receive(get("/hello?1") + get("/hello?2") + get("/hello?3"))
    for number in (1, 2, 3):
        assert len(wire.router.callers) == number
        wire.reply(b"answer %d" % number)
    output = wire.output
    assert [output.index(b"answer %d" % n) for n in (1, 2, 3)] == sorted(
        output.index(b"answer %d" % n) for n in (1, 2, 3)
    )


def test_what_is_answered_at_once_does_not_recurse(wire: Wire) -> None:
    wire.router.fails = BackendOverloaded("full")
    wire.receive(get("/nope") * 2000 + get("/hello") * 1000)
    statuses = wire.statuses()
    assert statuses.count(404) == 2000
    assert statuses.count(503) == 1000


def test_a_client_that_sends_too_far_ahead_is_not_read_on(wire: Wire) -> None:
    wire.receive(get())
    wire.receive(get("/nope") * 3000)
    assert wire.transport.reading_paused
    wire.reply()
    assert not wire.transport.reading_paused
    assert wire.statuses() == [200] + [404] * 3000


def test_a_client_that_does_not_read_is_sent_no_further_answers(wire: Wire) -> None:
    wire.connection.pause_writing()
    wire.receive(get("/nope"))
    assert wire.output == b""
    wire.connection.resume_writing()
    assert wire.statuses() == [404]


def test_connection_close_is_obeyed(wire: Wire) -> None:
    wire.receive(get("/hello", "Connection: close"))
    wire.reply()
    assert b"connection: close\r\n" in wire.output
    assert wire.transport.closing


def test_http10_closes_unless_asked(wire: Wire) -> None:
    wire.receive(get(version="1.0"))
    wire.reply()
    assert wire.transport.closing

    wire = Wire()
    wire.receive(get("/hello", "Connection: keep-alive", version="1.0"))
    wire.reply()
    assert b"connection: keep-alive\r\n" in wire.output
    assert not wire.transport.closing


def test_one_connections_note_of_a_request_does_not_reach_the_next(wire: Wire) -> None:
    wire.receive(get("/hello", "X-Request-ID: mine", "X-Serve-Call-Method: other", "X-Serve-Shard-Key: k"))
    wire.connection.deadline = 5.0
    assert wire.meta()[7] == "other"
    assert wire.router.shard_keys == ["k"]
    wire.reply()
    assert b"x-request-id: mine\r\n" in wire.output
    wire.receive(get())
    assert wire.meta()[7] is None
    assert wire.meta()[0] != "mine"
    caller = wire.router.callers[-1]
    assert (caller.flags, caller.deadline) == (0, float("inf"))
    assert wire.router.shard_keys == ["k", None]


# --- clients that go ---


def test_the_end_of_the_clients_stream_cancels_its_request(wire: Wire) -> None:
    wire.receive(get())
    wire.connection.eof_received()
    assert wire.router.cancelled == [wire.connection]
    wire.reply()
    assert wire.output == b""


def test_the_loss_of_the_connection_cancels_its_request_once(wire: Wire) -> None:
    wire.receive(get())
    wire.connection.eof_received()
    wire.connection.connection_lost(None)
    assert len(wire.router.cancelled) == 1
    assert not wire.server.connections


def test_a_client_that_goes_between_requests_cancels_nothing(wire: Wire) -> None:
    wire.receive(get())
    wire.reply()
    wire.connection.connection_lost(None)
    assert not wire.router.cancelled


# --- limits and time-outs ---

BAD = {
    b"GET /hello HTTP/1.1\r\n\r\n": 400,
    b"GET /hello HTTP/1.1\nHost: x\n\n": 400,
    get("/hello", "Host: y"): 400,
    get("/hello", "Content-Length: 1", "Transfer-Encoding: chunked"): 400,
    get("/hello", "Content-Length: 1", "Content-Length: 1"): 400,
    get("/hello", "Transfer-Encoding: gzip, chunked"): 400,
    get("/hello", "a : b"): 400,
    get("/hello", "a: b", " c"): 400,
    get("/%00"): 400,
    get("/" + "x" * 9000): 414,
    get("/hello", *(f"a{n}: b" for n in range(101))): 431,
    get("/hello", "a: " + "x" * 33000): 431,
    get("/hello", "Content-Length: 104857601", method="POST"): 413,
    get("/hello", "Transfer-Encoding: chunked", method="POST") + b"fffffffff\r\n": 413,
    get("/hello", "Transfer-Encoding: chunked", method="POST") + b"2\r\nabc\r\n": 400,
    get("/hello", "Transfer-Encoding: chunked", method="POST") + b"2\nab\r\n": 400,
    get("/hello", "Transfer-Encoding: chunked", method="POST") + b"0x2\r\nab\r\n": 400,
    get("/hello", "Transfer-Encoding: chunked", method="POST") + b"-2\r\nab\r\n": 400,
    get("/hello", "Transfer-Encoding: chunked", method="POST") + b"0\r\nbad trailer\r\n\r\n": 400,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03": 400,
}


@pytest.mark.parametrize("data", BAD)
def test_what_is_no_request_is_refused_and_nothing_after_it_is_read(data: bytes) -> None:
    wire = Wire()
    wire.receive(data + get("/hello?smuggled"))
    assert wire.statuses() == [BAD[data]]
    assert wire.transport.eof_written
    assert not wire.router.callers
    wire.receive(get())
    assert not wire.router.callers


@pytest.mark.parametrize("data", [data for data in BAD if len(data) < 200])
def test_what_is_no_request_is_refused_however_it_is_cut(data: bytes) -> None:
    for cut in range(1, len(data)):
        wire = Wire()
        wire.receive(data[:cut])
        if not wire.transport.eof_written:
            wire.receive(data[cut:])
        assert wire.statuses() == [BAD[data]]
        assert not wire.router.callers


def test_a_body_for_nobody_is_not_received(wire: Wire) -> None:
    wire.receive(get("/nope", "Content-Length: 1000000", method="POST") + b"x")
    assert wire.statuses() == [404]
    wire.receive(b"x" * 1000)
    assert wire.output == b""
    wire.server.sweep(2.0, 0.0)
    assert wire.transport.closing


def test_expect_continue_is_answered_when_the_body_is_wanted(wire: Wire) -> None:
    wire.receive(get("/hello", "Content-Length: 3", "Expect: 100-continue", method="POST"))
    assert wire.output == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.receive(b"abc")
    assert wire.router.seen[0][1] == b"abc"


def test_expect_continue_is_not_answered_when_it_is_not(wire: Wire) -> None:
    wire.receive(get("/nope", "Content-Length: 3", "Expect: 100-continue", method="POST"))
    assert wire.statuses() == [404]


def test_a_slow_head_is_answered_with_408(wire: Wire) -> None:
    wire.receive(b"GET / HT")
    wire.server.sweep(9.0, 0.0)
    wire.receive(b"TP/1.1\r\n")
    wire.server.sweep(10.1, 0.0)
    assert wire.output == b""
    wire.server.sweep(11.0, 0.0)
    assert wire.statuses() == [408]


def test_a_body_that_makes_no_progress_is_answered_with_408(wire: Wire) -> None:
    wire.receive(post(b"x" * 100_000)[:-50_000])
    wire.server.sweep(25.0, 0.0)
    wire.receive(b"x" * 10_000)
    wire.server.sweep(50.0, 0.0)
    assert wire.output == b""
    wire.server.sweep(56.0, 0.0)
    assert wire.statuses() == [408]


@pytest.mark.parametrize("kind", ["length", "chunks"])
def test_a_body_that_drips_is_answered_with_408(wire: Wire, kind: str) -> None:
    length = "Content-Length: 100000" if kind == "length" else "Transfer-Encoding: chunked"
    wire.receive(get("/hello", length, method="POST"))
    for second in range(1, 33):
        wire.server.sweep(float(second), 0.0)
        if not wire.transport.eof_written:
            wire.receive(b"x" if kind == "length" else b"1\r\nx\r\n")
    assert wire.statuses() == [408]


def test_a_body_that_comes_at_a_fair_speed_has_all_the_time(wire: Wire) -> None:
    wire.receive(post(b"x" * 100_000)[:-100_000])
    for second in range(1, 101):
        wire.server.sweep(float(second), 0.0)
        wire.receive(b"x" * 1000)
    assert len(wire.router.seen[0][1]) == 100_000


def test_a_running_request_has_all_the_time(wire: Wire) -> None:
    wire.receive(get())
    wire.server.sweep(100_000.0, 0.0)
    wire.reply()
    assert wire.statuses() == [200]


def test_an_idle_connection_is_closed_in_the_end(wire: Wire) -> None:
    wire.receive(get())
    wire.reply()
    wire.server.sweep(74.0, 0.0)
    assert not wire.transport.closing
    wire.server.sweep(76.0, 0.0)
    assert wire.transport.closing


def test_a_client_that_does_not_take_its_answer_is_cut_off(wire: Wire) -> None:
    wire.receive(get())
    wire.start()
    wire.connection.pause_writing()
    for now, untaken in ((0.0, 100_000), (29.0, 90_000), (58.0, 80_000), (87.0, 80_000)):
        wire.transport.untaken = untaken
        wire.server.sweep(now, 0.0)
        assert not wire.transport.aborted
    wire.server.sweep(88.0, 0.0)
    assert wire.transport.aborted
    assert wire.router.cancelled == [wire.connection]


def test_a_client_that_takes_its_answer_drop_by_drop_is_cut_off(wire: Wire) -> None:
    wire.receive(get())
    wire.start()
    wire.connection.pause_writing()
    for second in range(33):
        assert wire.transport.aborted == (second > 31)
        wire.transport.untaken = 100_000 - second
        wire.server.sweep(float(second), 0.0)


def test_an_answer_that_grows_while_its_client_takes_nothing_is_no_progress(wire: Wire) -> None:
    wire.receive(get())
    wire.start()
    wire.connection.pause_writing()
    for second in range(33):
        assert wire.transport.aborted == (second > 30)
        wire.transport.untaken = 100_000 + second
        wire.server.sweep(float(second), 0.0)


def test_more_connections_than_the_limit_get_503() -> None:
    wire = Wire(max_connections=1)
    _, transport = wire.connect()
    assert transport.output.startswith(b"HTTP/1.1 503 ")
    assert transport.eof_written
    wire.receive(get())
    wire.reply()
    assert wire.statuses() == [200]


def test_a_body_beyond_the_budget_is_not_read_until_there_is_room() -> None:
    wire = Wire(max_buffered_bytes=100)
    second, transport = wire.connect()
    wire.receive(post(b"x" * 90)[:-1])
    wire.receive(b"x")
    wire.receive(post(b"y" * 90)[:-10], second)
    assert transport.reading_paused
    wire.reply()
    assert not transport.reading_paused
    wire.receive(b"y" * 10, second)
    assert [body for _, body in wire.router.seen] == [b"x" * 90, b"y" * 90]
    wire.reply()
    assert wire.server.budget.held == 0


# --- answers in parts ---


def test_an_answer_of_unknown_length_goes_in_chunks(wire: Wire) -> None:
    wire.receive(get())
    wire.start()
    wire.part(b"abc")
    wire.part(b"")
    wire.router.callers[-1].on_reply_end()
    output = wire.output
    assert b"transfer-encoding: chunked\r\n" in output
    assert output.endswith(b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n")
    assert wire.connection.state == IDLE


def test_an_answer_of_known_length_goes_without_chunks(wire: Wire) -> None:
    wire.receive(get())
    wire.start(total=6)
    wire.part(b"abc")
    wire.part(b"def")
    wire.router.callers[-1].on_reply_end()
    output = wire.output
    assert b"content-length: 6\r\n" in output
    assert output.endswith(b"\r\n\r\nabcdef")


@pytest.mark.parametrize("sent", [b"abc", b"abcdefg"])
def test_an_answer_of_another_length_than_announced_ends_the_connection(wire: Wire, sent: bytes) -> None:
    wire.receive(get())
    wire.start(total=6)
    wire.part(sent)
    wire.router.callers[-1].on_reply_end()
    assert wire.transport.closing


def test_http10_gets_a_stream_until_the_connection_ends(wire: Wire) -> None:
    wire.receive(get("/hello", "Connection: keep-alive", version="1.0"))
    wire.start()
    wire.part(b"abc")
    wire.router.callers[-1].on_reply_end()
    assert wire.output.endswith(b"\r\n\r\nabc")
    assert wire.transport.closing


def test_a_stream_that_breaks_has_no_last_chunk(wire: Wire) -> None:
    wire.receive(get())
    wire.start()
    wire.part(b"abc")
    wire.router.callers[-1].on_failure(ReplicaDied("gone"))
    assert wire.output.endswith(b"\r\nabc\r\n")
    assert wire.transport.closing


def test_head_of_a_stream_cancels_it(wire: Wire) -> None:
    wire.receive(get(method="HEAD"))
    wire.start()
    assert wire.router.cancelled == [wire.connection]
    assert wire.output.endswith(b"\r\n\r\n")
    wire.receive(get())
    assert len(wire.router.callers) == 2


def test_credit_is_granted_as_the_client_takes_the_answer(wire: Wire, monkeypatch: pytest.MonkeyPatch) -> None:
    granted: list[int] = []
    wire.connection.grant = granted.append  # type: ignore[method-assign]
    wire.receive(get())
    wire.start()
    for _ in range(2):
        wire.part(b"x" * 40_000)
    assert sum(granted) == 80_000
    wire.connection.pause_writing()
    for _ in range(4):
        wire.part(b"x" * 40_000)
    assert sum(granted) == 80_000
    wire.connection.resume_writing()
    assert sum(granted) == 240_000


# --- failures ---


def test_overload_says_when_to_come_again(wire: Wire) -> None:
    error = BackendOverloaded("full")
    error.retry_after_s = 7
    wire.router.fails = error
    wire.receive(get())
    output = wire.output
    assert output.startswith(b"HTTP/1.1 503 ")
    assert b"retry-after: 7\r\n" in output


@pytest.mark.parametrize("started", [True, False])
def test_a_dead_replica_is_a_502_that_says_whether_it_had_started(wire: Wire, started: bool) -> None:
    wire.receive(get())
    error = ReplicaDied("gone")
    error.started = started
    wire.router.callers[-1].on_failure(error)
    output = wire.output
    assert output.startswith(b"HTTP/1.1 502 ")
    assert (b"x-headgate-started: 1\r\n" in output) == started
    assert b"REPLICA_DIED" in output


# --- leaving ---


def test_a_server_that_leaves_closes_idle_connections_and_finishes_the_others(wire: Wire) -> None:
    _, idle_transport = wire.connect()
    wire.receive(get())
    wire.server.leave()
    assert not idle_transport.closing  # a request may be on its way
    wire.server.close_idle()
    assert idle_transport.closing
    assert not wire.transport.closing
    wire.reply()
    assert b"connection: close\r\n" in wire.output
    assert wire.transport.closing


def test_a_request_that_comes_while_the_server_leaves_is_its_connection_s_last(wire: Wire) -> None:
    wire.server.leave()
    wire.receive(get())
    wire.server.close_idle()
    wire.reply()
    assert b"connection: close\r\n" in wire.output
    assert wire.transport.closing


@pytest.fixture
def sockets(wire: Wire) -> Iterator[tuple[socket.socket, socket.socket]]:
    """The client's end and the server's, which is what the fake transport has below it."""
    client, server = socket.socketpair()
    with client, server:
        wire.transport.socket = server
        yield client, server


def test_a_connection_with_bytes_that_were_not_read_yet_is_not_idle(
    wire: Wire, sockets: tuple[socket.socket, socket.socket]
) -> None:
    client, server = sockets
    wire.server.leave()
    client.send(get())
    wire.server.close_idle()
    wire.server.sweep(100.0, DATE)
    assert not wire.transport.closing
    wire.receive(server.recv(1000))
    wire.reply()
    assert b"connection: close\r\n" in wire.output
    assert wire.transport.closing


def test_the_client_of_an_idle_connection_hears_at_once_that_it_is_closed(
    wire: Wire, sockets: tuple[socket.socket, socket.socket]
) -> None:
    client, _ = sockets
    wire.server.leave()
    wire.server.close_idle()
    assert client.recv(1) == b""


# --- who asks ---


def test_forwarded_fields_of_a_stranger_are_taken_out() -> None:
    wire = Wire(peer="10.0.0.9")
    wire.receive(get("/hello", "X-Forwarded-For: 1.2.3.4", "X-Forwarded-Proto: https", "A: b"))
    assert wire.router.seen[0][0] == get("/hello", "A: b")
    assert wire.meta()[4:7] == ["10.0.0.9", 50000, ["127.0.0.1", 8000, "http"]]


def test_forwarded_fields_of_a_trusted_proxy_are_believed(wire: Wire) -> None:
    fields = ("X-Forwarded-For: 6.6.6.6, 1.2.3.4", "X-Forwarded-Proto: https")
    wire.receive(get("/hello", *fields))
    assert wire.router.seen[0][0] == get("/hello", *fields)
    assert wire.meta()[4:7] == ["1.2.3.4", 0, ["127.0.0.1", 8000, "https"]]


def test_headgates_own_fields_are_not_taken_from_clients(wire: Wire) -> None:
    wire.receive(get("/hello", "X-Headgate-Started: 1", "x-headgate-model: m", "X-Headgate-Timing: t"))
    assert wire.router.seen[0][0] == get("/hello", "x-headgate-model: m", "X-Headgate-Timing: t")


def test_an_invalid_request_id_is_replaced(wire: Wire) -> None:
    wire.receive(get("/hello", "X-Request-ID: " + "x" * 129))
    wire.reply()
    assert b"x" * 129 not in wire.output


@pytest.mark.parametrize("target", ["http://x/hello?a", "/hello?a#b", "http://x/hello?a#b/c?d"])
def test_a_target_reaches_the_replica_in_origin_form(wire: Wire, target: str) -> None:
    wire.receive(get(target))
    assert wire.router.seen[0][0] == get("/hello?a")


@pytest.mark.parametrize("target", ["/hello", "/hello?", "/hello?a?b", "/%68ello"])
def test_a_target_in_origin_form_stays_as_it_is(wire: Wire, target: str) -> None:
    wire.receive(get(target, "X-A: b"))
    assert wire.router.seen[0][0] == get(target, "X-A: b")


@pytest.mark.parametrize("method", ["PURGE", "get", "M-SEARCH"])
def test_a_method_that_nobody_knows_is_routed_like_any_other(wire: Wire, method: str) -> None:
    wire.receive(get(method=method))
    assert wire.statuses() == [405]


def test_an_upgrade_is_not_taken_up(wire: Wire) -> None:
    wire.receive(get("/hello", "Connection: upgrade", "Upgrade: websocket") + get("/hello?2"))
    wire.reply()
    assert len(wire.router.callers) == 2
