"""What http11 accepts and refuses. Cases are made from RFC 9110 and RFC 9112, section by section."""

from __future__ import annotations

import math
import string
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headgate.core import http11
from headgate.core.http11 import Head, Limits, Reject, check_head, check_start, header_values, rebuild

LIMITS = Limits()
SMALL = Limits(max_head_bytes=120, max_header_fields=3, max_target_bytes=20, max_body_bytes=1000)


def head_of(*fields: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes | None = b"Host: a") -> bytes:
    """A head in which only what a case is about differs from a plain one."""
    return b"\r\n".join([line, *([host] if host is not None else []), *fields, b"", b""])


def refused(head: bytes, limits: Limits = LIMITS) -> int:
    with pytest.raises(Reject) as caught:
        check_head(head, limits)
    assert caught.value.reason
    assert caught.value.http_status == caught.value.status
    return caught.value.status


def test_the_plainest_head():
    assert check_head(b"GET /api HTTP/1.1\r\nHost: 127.0.0.1:8000\r\n\r\n", LIMITS) == Head(
        method="GET", path="/api", raw_path=b"/api", query=b"", http10=False, keep_alive=True,
        content_length=0, chunked=False, expect_continue=False, special=False,
    )  # fmt: skip


ACCEPTED = {
    "any token as method": head_of(line=b"M-SEARCH!#$%&'*+.^_`|~9z / HTTP/1.1"),
    "an empty Host": head_of(host=b"Host:"),
    "Host without a space": head_of(host=b"Host:a"),
    "Host with tabs around": head_of(host=b"hOST:\t a:8000 \t"),
    "Host last": head_of(b"A: b", b"Host: a", host=None),
    "an IPv6 host": head_of(host=b"Host: [::1]:8000"),
    "an IPvFuture host": head_of(host=b"Host: [v1.a:b]"),
    "a host with sub-delimiters and percent": head_of(host=b"Host: a_b!$&'()*+,;=%41~:"),
    "HTTP/1.0 without Host": head_of(line=b"GET / HTTP/1.0", host=None),
    "HTTP/1.0 without Host, with fields": head_of(b"A: b", line=b"GET / HTTP/1.0", host=None),
    "an empty value": head_of(b"A:", b"B: ", b"C:\t"),
    "obs-text in a value": head_of(b"A: \x80\xff"),
    "a tab inside a value": head_of(b"A: b\tc"),
    "colons in a value": head_of(b"A::: b:c"),
    "odd names": head_of(b"!#$%&'*+-.^_`|~09az: 1"),
    "the same field twice": head_of(b"A: 1", b"A: 2"),
    "names that only begin like framing": head_of(b"Content-Length-A: a", b"Hosts: b", b"Expected: c"),
    "framing names inside values": head_of(b"A: Transfer-Encoding: gzip", b"B: Content-Length: 1, 2"),
    "two slashes and dots": head_of(line=b"GET //a/../b/./c HTTP/1.1"),
    "clients' unescaped characters": head_of(line=b"GET /{a}|\"b\"^`<c>\\[1]?{q}|\" HTTP/1.1"),
    "question marks in a query": head_of(line=b"GET /?a?b/c HTTP/1.1"),
    "an upgrade that is ignored": head_of(b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c"),
    "TE is not Transfer-Encoding": head_of(b"TE: trailers, gzip;q=0.5", b"Connection: TE"),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_valid_heads_are_accepted(case):
    assert not check_head(ACCEPTED[case], LIMITS).special


REFUSED = {
    # RFC 9112 §3: the request line
    "no request line": b"\r\n\r\n",
    "a blank line first": b"\r\n" + head_of(),
    "HTTP/0.9": b"GET /\r\n\r\n",
    "no target": head_of(line=b"GET HTTP/1.1"),
    "two spaces": head_of(line=b"GET  / HTTP/1.1"),
    "two spaces before the version": head_of(line=b"GET /  HTTP/1.1"),
    "a tab as separator": head_of(line=b"GET\t/ HTTP/1.1"),
    "space at the end of the line": head_of(line=b"GET / HTTP/1.1 "),
    "space at the start of the line": head_of(line=b" GET / HTTP/1.1"),
    "a space in the target": head_of(line=b"GET /a b HTTP/1.1"),
    "a method that is no token": head_of(line=b"G(T / HTTP/1.1"),
    "a method with a colon": head_of(line=b"GET: / HTTP/1.1"),
    "lower-case http": head_of(line=b"GET / http/1.1"),
    "another protocol": head_of(line=b"GET / ICE/1.1"),
    "HTTP/1.2": head_of(line=b"GET / HTTP/1.2"),
    "HTTP/2.0": b"PRI * HTTP/2.0\r\n\r\n",
    "HTTP/0.1": head_of(line=b"GET / HTTP/0.1"),
    "HTTP/1": head_of(line=b"GET / HTTP/1"),
    "HTTP/1.": head_of(line=b"GET / HTTP/1."),
    "HTTP/1.10": head_of(line=b"GET / HTTP/1.10"),
    "HTTP/11.1": head_of(line=b"GET / HTTP/11.1"),
    "HTTP/01.1": head_of(line=b"GET / HTTP/01.1"),
    "an obs-text byte in the target": head_of(line=b"GET /\xc3\xa9 HTTP/1.1"),
    "DEL in the target": head_of(line=b"GET /\x7f HTTP/1.1"),
    # §3.2: forms of the target
    "a relative target": head_of(line=b"GET a HTTP/1.1"),
    "a relative target in HTTP/1.0": b"GET a HTTP/1.0\r\n\r\n",
    "a bare query": head_of(line=b"GET ?a HTTP/1.1"),
    "authority form": head_of(line=b"GET a:80 HTTP/1.1"),
    "CONNECT": head_of(line=b"CONNECT a:80 HTTP/1.1"),
    "CONNECT to a path": head_of(line=b"CONNECT / HTTP/1.1"),
    "CONNECT to a URL": head_of(line=b"CONNECT http://a/ HTTP/1.1"),
    "asterisk for another method": head_of(line=b"GET * HTTP/1.1"),
    "asterisk and more": head_of(line=b"OPTIONS *a HTTP/1.1"),
    "a URL of another host": head_of(line=b"GET http://b/ HTTP/1.1"),
    "a URL of another port": head_of(line=b"GET http://a:81/ HTTP/1.1"),
    "a URL with the other scheme's port": head_of(line=b"GET http://a:443/ HTTP/1.1"),
    "a URL with user info": head_of(line=b"GET http://u@a/ HTTP/1.1"),
    "a URL without a host": head_of(line=b"GET http:/// HTTP/1.1", host=b"Host:"),
    "a URL with only a port": head_of(line=b"GET http://:80/ HTTP/1.1", host=b"Host: :80"),
    "a URL of another scheme": head_of(line=b"GET ftp://a/ HTTP/1.1"),
    "a URL and no Host": head_of(line=b"GET http://a/ HTTP/1.1", host=None),
    "an encoded NUL": head_of(line=b"GET /a%00b HTTP/1.1"),
    # §3.2, RFC 9110 §7.2: Host
    "no Host": head_of(host=None),
    "no Host, other fields": head_of(b"A: b", host=None),
    "two Hosts": head_of(b"Host: a"),
    "two Hosts, apart": head_of(b"A: b", b"hOsT: b"),
    "two Hosts in HTTP/1.0": head_of(b"Host: b", line=b"GET / HTTP/1.0"),
    "two Hosts, the first odd": head_of(b"Host: a", host=b"Host:a"),
    "a list of hosts": head_of(host=b"Host: a, b"),
    "a host with user info": head_of(host=b"Host: u@a"),
    "a host with a path": head_of(host=b"Host: a/b"),
    "a host with a query": head_of(host=b"Host: a?b"),
    "a host with two ports": head_of(host=b"Host: a:1:2"),
    "a host with a named port": head_of(host=b"Host: a:http"),
    "a host with obs-text": head_of(host=b"Host: \xe4"),
    "a host with a bad percent": head_of(host=b"Host: a%4"),
    "an IPv6 host without brackets": head_of(host=b"Host: ::1"),
    "an open bracket": head_of(host=b"Host: [::1"),
    "empty brackets": head_of(host=b"Host: []"),
    # §5: fields
    "space before the colon": head_of(b"A : b"),
    "tab before the colon": head_of(b"A\t: b"),
    "space before Host's colon": head_of(host=b"Host : a"),
    "space before Content-Length's colon": head_of(b"Content-Length : 1"),
    "obs-fold": head_of(b"A: b", b" c"),
    "obs-fold by tab": head_of(b"A: b", b"\tc: d"),
    "obs-fold right after the request line": head_of(b"A: b", host=b" Host: a"),
    "obs-fold of nothing": head_of(b"A: b", b" "),
    "no colon": head_of(b"A"),
    "no name": head_of(b": b"),
    "a space in a name": head_of(b"A b: c"),
    "a name that is no token": head_of(b"A(b): c"),
    "obs-text in a name": head_of(b"A\xe4: c"),
    "NUL in a name": head_of(b"A\0: c"),
    "NUL in a value": head_of(b"A: b\0c"),
    "a control character in a value": head_of(b"A: b\x0bc"),
    "DEL in a value": head_of(b"A: b\x7fc"),
    "bare CR": head_of(b"A: b\rC: d"),
    "bare LF": head_of(b"A: b\nC: d"),
    "bare LF after the request line": b"GET / HTTP/1.1\nHost: a\r\n\r\n",
    "CR CR LF": head_of(b"A: b\r"),
    "a blank line inside": head_of(b"A: b") + head_of(),
    "something after the blank line": head_of() + b"x",
    "no blank line": head_of()[:-2],
    # §6.1 - 6.3: framing
    "Content-Length and Transfer-Encoding": head_of(b"Content-Length: 1", b"Transfer-Encoding: chunked"),
    "Transfer-Encoding and Content-Length": head_of(b"Transfer-Encoding: chunked", b"Content-Length: 0"),
    "Content-Length twice": head_of(b"Content-Length: 1", b"Content-Length: 2"),
    "Content-Length twice, the same": head_of(b"Content-Length: 1", b"content-length: 1"),
    "Content-Length twice, zero": head_of(b"Content-Length: 0", b"content-length: 0"),
    "Content-Length as a list": head_of(b"Content-Length: 1, 1"),
    "Content-Length empty": head_of(b"Content-Length:"),
    "Content-Length with a sign": head_of(b"Content-Length: +1"),
    "Content-Length negative": head_of(b"Content-Length: -1"),
    "Content-Length hexadecimal": head_of(b"Content-Length: 0x1"),
    "Content-Length with an underscore": head_of(b"Content-Length: 1_0"),
    "Content-Length with a space": head_of(b"Content-Length: 1 0"),
    "Content-Length in obs-text digits": head_of(b"Content-Length: \xb2"),
    "Content-Length with a fraction": head_of(b"Content-Length: 1.0"),
    "Transfer-Encoding twice": head_of(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"),
    "Transfer-Encoding as a list": head_of(b"Transfer-Encoding: gzip, chunked"),
    "chunked twice in a list": head_of(b"Transfer-Encoding: chunked, chunked"),
    "chunked and an empty member": head_of(b"Transfer-Encoding: chunked,"),
    "chunked with a parameter": head_of(b"Transfer-Encoding: chunked;a=b"),
    "identity": head_of(b"Transfer-Encoding: identity"),
    "an unknown coding": head_of(b"Transfer-Encoding: xchunked"),
    "Transfer-Encoding empty": head_of(b"Transfer-Encoding:"),
    "chunked in quotes": head_of(b'Transfer-Encoding: "chunked"'),
    "chunked after a vertical tab": head_of(b"Transfer-Encoding: \x0bchunked"),
    "chunked with obs-text": head_of(b"Transfer-Encoding: chunked\xa0"),
    "chunked in HTTP/1.0": head_of(b"Transfer-Encoding: chunked", line=b"POST / HTTP/1.0"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_readers_could_read_differently_is_refused(case):
    assert refused(REFUSED[case]) == 400


@pytest.mark.parametrize(
    ("head", "reason"),
    [
        (head_of(b"A: b", b" c"), "header line 3: it continues the line before"),
        (head_of(b"A : b"), "header line 2: white space before the colon"),
        (head_of(b"A: s\0cret"), "header line 2: a control character in the value"),
        (head_of(b"A"), "header line 2: not of the form 'name: value'"),
        (b"GET a HTTP/1.0\r\n\r\n", "the target must be a path"),
        (head_of(line=b"GET /a b HTTP/1.1"), "malformed request line"),
        (head_of(line=b"GET / HTTP/1.2"), "this server speaks HTTP/1.1 and HTTP/1.0"),
        (head_of(host=None), "no Host field"),
        (head_of(b"Host: a"), "more than one Host field"),
    ],
)
def test_a_refusal_says_what_is_wrong(head, reason):
    with pytest.raises(Reject, match=reason):
        check_head(head, LIMITS)


@pytest.mark.parametrize(
    ("target", "path", "query", "special"),
    [
        (b"/a%20b", "/a b", b"", False),
        (b"/a%2520b", "/a%20b", b"", False),  # once, not twice
        (b"/%2e%2E/x", "/../x", b"", False),
        (b"/a%2Fb?c=%00", "/a/b", b"c=%00", False),
        (b"/%c0%80", "/\ufffd\ufffd", b"", False),  # an overlong NUL is no NUL
        (b"/%zz%4", "/%zz%4", b"", False),
        (b"/%C3%A9", "/é", b"", False),
        (b"/?", "/", b"", False),
        (b"/a?b#c?d", "/a", b"b", True),
        (b"/a#b", "/a", b"", True),
        (b"http://a/b?c", "/b", b"c", True),
        (b"HTTP://A:80/b", "/b", b"", True),
        (b"https://a:443", "/", b"", True),
        (b"http://a?c", "/", b"c", True),
        (b"http://a:#f", "/", b"", True),
    ],
)
def test_forms_of_the_target(target, path, query, special):
    head = check_head(head_of(line=b"GET %b HTTP/1.1" % target), LIMITS)

    assert (head.path, head.query, head.special) == (path, query, special)
    assert unquote(head.raw_path.decode()) == path


def test_a_url_needs_no_host_in_http10():
    assert check_head(head_of(line=b"GET http://a/b HTTP/1.0", host=None), LIMITS).path == "/b"


def test_options_asterisk_has_the_path_asterisk():
    head = check_head(head_of(b"X-A: b", line=b"OPTIONS * HTTP/1.1"), LIMITS)

    assert (head.method, head.path, head.raw_path, head.special) == ("OPTIONS", "*", b"*", True)


@pytest.mark.parametrize(
    ("version", "connection", "keep_alive"),
    [
        (b"1.1", [], True),
        (b"1.1", [b"close"], False),
        (b"1.1", [b"foo, CLOSE ,bar"], False),
        (b"1.1", [b"keep-alive"], True),
        (b"1.1", [b"keep-alive", b"close"], False),
        (b"1.1", [b"closed"], True),
        (b"1.0", [], False),
        (b"1.0", [b"Keep-Alive "], True),
        (b"1.0", [b"keep-alive, close"], False),
    ],
)
def test_keep_alive(version, connection, keep_alive):
    fields = [b"Connection: " + value for value in connection]
    head = check_head(head_of(*fields, line=b"GET / HTTP/" + version), LIMITS)

    assert head.keep_alive is keep_alive
    assert head.http10 is (version == b"1.0")


@pytest.mark.parametrize(
    ("fields", "length", "chunked", "expects"),
    [
        ([b"Content-Length: 12"], 12, False, False),
        ([b"content-LENGTH:\t012 \t"], 12, False, False),
        ([b"Content-Length: " + b"0" * 5000], 0, False, False),
        ([b"Content-Length: " + b"0" * 5000 + b"7"], 7, False, False),
        ([b"Transfer-Encoding: chunked"], 0, True, False),
        ([b"transfer-encoding:\tCHUNKED \t"], 0, True, False),
        ([b"Expect: 100-Continue ", b"Content-Length: 1"], 1, False, True),
        ([b"Expect: something"], 0, False, False),
    ],
)
def test_framing(fields, length, chunked, expects):
    head = check_head(head_of(*fields, line=b"POST / HTTP/1.1"), LIMITS)

    assert (head.content_length, head.chunked, head.expect_continue) == (length, chunked, expects)


def test_http10_expects_nothing():
    assert not check_head(head_of(b"Expect: 100-continue", line=b"GET / HTTP/1.0"), LIMITS).expect_continue


@pytest.mark.parametrize("field", [b"X-A: b", b"x-: c", b"Forwarded: for=a", b"ForwardedX: a"])
def test_fields_that_make_a_head_special(field):
    assert check_head(head_of(field), LIMITS).special


def test_limits():
    assert check_head(head_of(b"A: b", b"C: d"), SMALL)
    assert refused(head_of(b"A: b", b"C: d", b"E: f"), SMALL) == 431
    assert check_head(head_of(b"A: " + b"b" * (120 - 32)), SMALL)
    assert refused(head_of(b"A: " + b"b" * (120 - 31)), SMALL) == 431
    assert check_head(head_of(line=b"GET /%b HTTP/1.1" % (b"a" * 19)), SMALL)
    assert refused(head_of(line=b"GET /%b HTTP/1.1" % (b"a" * 20)), SMALL) == 414
    assert refused(head_of(line=b"GET /%b HTTP/1.1" % (b"a" * 500)), SMALL) == 414
    assert check_head(head_of(b"Content-Length: 1000"), SMALL)
    assert refused(head_of(b"Content-Length: 1001"), SMALL) == 413
    assert refused(head_of(b"Content-Length: " + b"9" * 5000)) == 413
    assert refused(head_of(*[b"A:"] * 100)) == 431


@pytest.mark.parametrize(
    ("part", "status"),
    [
        (b"\x16\x03\x01\x02\x00\x01", 400),
        (b"(", 400),
        (b"GET / HTTP/1.1\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\rC", 400),
        (b"GET / HTTP/1.1\r\nA: b\0", 400),
        (b"GET /" + b"a" * 20, 414),
        (b"A" * 121, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 4, 431),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * 120, 431),
    ],
)
def test_what_cannot_become_a_head_is_refused_at_once(part, status):
    with pytest.raises(Reject) as caught:
        check_start(part, SMALL)
    assert caught.value.status == status


@pytest.mark.parametrize("case", ACCEPTED)
def test_a_valid_head_may_come_in_pieces(case):
    head = ACCEPTED[case]
    for cut in range(head.index(b"\r\n\r\n") + 4):
        check_start(head[:cut], LIMITS)


def test_as_many_fields_as_allowed_may_come_in_pieces():
    head = head_of(b"A: b", b"C: d")
    for cut in range(len(head)):
        check_start(head[:cut], SMALL)


def test_header_values_are_found_in_order_whatever_their_case():
    head = head_of(b"X-A: 1", b"x-a:\t2 ", b"X-AB: 3", b"B: x-a: 4", b"X-A:")

    assert header_values(head, b"X-a") == [b"1", b"2", b""]
    assert header_values(head, b"x-none") == []


def test_rebuild_drops_names_and_prefixes():
    internal = (b"X-Headgate-Secret: 1", b"x-headgate-model: iris", b"Forwarded: for=b")
    head = head_of(*internal, b"X-Own: 2", b"A:")

    assert rebuild(head, {b"x-headgate-", b"forwarded"}, {b"x-headgate-model"}) == head_of(
        b"x-headgate-model: iris", b"X-Own: 2", b"A:"
    )


@pytest.mark.parametrize(
    ("target", "rebuilt"),
    [(b"http://a/b?c#d", b"/b?c"), (b"http://a", b"/"), (b"/b#d", b"/b"), (b"*", b"*")],
)
def test_rebuild_gives_origin_form(target, rebuilt):
    head = rebuild(head_of(line=b"OPTIONS %b HTTP/1.1" % target), ())

    assert head == head_of(line=b"OPTIONS %b HTTP/1.1" % rebuilt)


def test_request_ids():
    assert http11.request_id(b"a" * 128) == b"a" * 128
    for raw in (None, b"", b"a" * 129, b"a b", b"a\r\n", b"\xff", b"a\n"):
        assert http11.request_id(raw) is None


def test_each_state_has_its_time_out():
    limits = Limits(head_timeout_s=1, body_timeout_s=2, write_timeout_s=3, keep_alive_timeout_s=4)
    states = (http11.HEAD, http11.BODY, http11.WRITE, http11.IDLE, http11.RUNNING)

    assert [http11.next_deadline(state, 10.0, limits) for state in states] == [11, 12, 13, 14, math.inf]


@pytest.mark.parametrize(
    ("count", "since"),
    [(0, 5.0), (240, 6.0), (24, 5.1), (1200, 10.0), (10**9, 10.0)],
)
def test_progress_earns_a_second_for_every_240_bytes(count, since):
    assert http11.progressed(5.0, 10.0, count) == since


# Properties. A head is made of parts that RFC 9110 and 9112 allow.

TCHAR = string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~"
KNOWN = {"host", "connection", "content-length", "transfer-encoding", "expect"}
tokens = st.text(TCHAR, min_size=1, max_size=12)
names = tokens.filter(lambda name: name.lower() not in KNOWN)
values = st.text([chr(c) for c in (9, *range(32, 127), *range(128, 256))], max_size=20)
targets = st.text(string.ascii_letters + string.digits + "-._~!$&'()*+,;=:@/%", max_size=20).map("/".__add__)
queries = st.none() | st.text(string.ascii_letters + string.digits + "-._~!$&'()*+,;=:@/?%", max_size=20)
hosts = st.from_regex(r"([a-z0-9.\-_]{0,20}|\[[0-9a-f:.]{1,20}\])(:[0-9]{0,5})?", fullmatch=True)
fields = st.lists(st.tuples(names, values), max_size=8)


@st.composite
def heads(draw):
    """(head, method, target, query, fields) with the Host field at any place."""
    method = draw(tokens.filter(lambda method: method != "CONNECT"))
    target, query = draw(targets.filter(lambda target: "%00" not in target)), draw(queries)
    lines = draw(fields)
    lines.insert(draw(st.integers(0, len(lines))), ("Host", draw(hosts)))
    line = f"{method} {target}{'' if query is None else '?' + query} HTTP/1.1"
    gap = draw(st.sampled_from(["", " ", "\t "]))
    text = "\r\n".join([line, *(f"{name}:{gap}{value}" for name, value in lines), "", ""])
    return text.encode("latin-1"), method, target, query or "", lines


@given(heads())
def test_a_head_of_valid_parts_is_accepted_and_its_fields_come_back(made):
    head, method, target, query, lines = made
    checked = check_head(head, LIMITS)

    assert (checked.method, checked.raw_path, checked.query) == (method, target.encode(), query.encode())
    assert checked.path == unquote(target)
    assert (checked.keep_alive, checked.content_length, checked.chunked) == (True, 0, False)
    assert checked.special == any(name.lower().startswith(("x-", "forwarded")) for name, _ in lines)
    for name in {name.lower() for name, _ in lines}:
        expected = [value.strip(" \t").encode("latin-1") for other, value in lines if other.lower() == name]
        assert header_values(head, name.encode()) == expected
    assert rebuild(head, ()) == head


CONTROLS = st.sampled_from([bytes((c,)) for c in (*range(9), *range(10, 32), 127)])


@given(heads(), CONTROLS, st.floats(0, 1), st.booleans())
def test_any_single_control_character_is_refused(made, control, place, replace):
    head = made[0]
    at = min(int(place * len(head)), len(head) - 1)
    mutated = head[:at] + control + head[at + replace :]

    if mutated != head:
        assert refused(mutated) == 400


@given(heads(), st.floats(0, 1))
def test_a_head_without_one_of_its_line_ends_bytes_is_refused(made, place):
    head = made[0]
    ends = [at for at, byte in enumerate(head) if byte in b"\r\n"]
    at = ends[min(int(place * len(ends)), len(ends) - 1)]

    assert refused(head[:at] + head[at + 1 :]) == 400


@given(st.binary(max_size=60))
def test_any_bytes_are_accepted_or_refused_and_nothing_else(raw):
    for head in (raw, head_of(line=b"GET " + raw + b" HTTP/1.1"), head_of(raw), head_of(host=b"Host:" + raw)):
        try:
            status = 200 if check_head(head, LIMITS) else 500
        except Reject as refusal:
            status = refusal.status
        assert 200 <= status < 500
