"""HTTP/2 fields to HTTP/1.1 heads: what could smuggle is malformed, what passes says the same on the other side."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_hotpath.http1 import BadMessage, read_request, read_response
from creto_proxy.h2.message import (
    Malformed,
    NotServed,
    Pair,
    RequestFields,
    TooLarge,
    is_grpc,
    request_pairs,
    response_head,
    response_pairs,
    trailer_fields,
)

GET: list[Pair] = [(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"a.test"), (b":path", b"/x?y=1")]


def request(*fields: Pair, method: bytes = b"GET", path: bytes = b"/", scheme: bytes = b"http") -> list[Pair]:
    return [(b":method", method), (b":scheme", scheme), (b":authority", b"a.test"), (b":path", path), *fields]


MALFORMED: dict[str, list[Pair]] = {
    "uppercase name": request((b"X-Upper", b"1")),
    "empty name": request((b"", b"1")),
    "space in name": request((b"a b", b"1")),
    "colon in name": request((b"a:b", b"1")),
    "CRLF in name": request((b"a\r\nb", b"1")),
    "CRLF in value": request((b"a", b"1\r\nHost: evil")),
    "LF in value": request((b"a", b"1\nx: y")),
    "CR in value": request((b"a", b"1\rx")),
    "NUL in value": request((b"a", b"1\x00")),
    "space around value": request((b"a", b" 1")),
    "tab after value": request((b"a", b"1\t")),
    "connection": request((b"connection", b"x")),
    "keep-alive": request((b"keep-alive", b"x")),
    "proxy-connection": request((b"proxy-connection", b"x")),
    "transfer-encoding": request((b"transfer-encoding", b"chunked")),
    "upgrade": request((b"upgrade", b"h2c")),
    "te other than trailers": request((b"te", b"gzip")),
    "two lengths": request((b"content-length", b"1"), (b"content-length", b"1")),
    "signed length": request((b"content-length", b"+1")),
    "listed length": request((b"content-length", b"1, 1")),
    "huge length": request((b"content-length", b"9" * 19)),
    "host differs": request((b"host", b"b.test")),
    "two hosts": request((b"host", b"a.test"), (b"host", b"a.test")),
    "pseudo after field": [GET[0], GET[1], (b"a", b"b"), GET[2], GET[3]],
    "pseudo twice": [*GET, (b":path", b"/")],
    "unknown pseudo": [*GET, (b":proto", b"websocket")],
    "status in request": [*GET, (b":status", b"200")],
    "no method": GET[1:],
    "no path": GET[:3],
    "no scheme": [GET[0], *GET[2:]],
    "no authority": [GET[0], GET[1], GET[3]],
    "empty authority": [GET[0], GET[1], (b":authority", b""), GET[3]],
    "userinfo": [GET[0], GET[1], (b":authority", b"u@a.test"), GET[3]],
    "CRLF in authority": [GET[0], GET[1], (b":authority", b"a.test\r\nx: y"), GET[3]],
    "bad scheme": request(scheme=b"ftp"),
    "empty path": request(path=b""),
    "relative path": request(path=b"x"),
    "absolute path": request(path=b"http://b.test/"),
    "space in path": request(path=b"/ HTTP/1.1"),
    "CRLF in path": request(path=b"/\r\nx: y"),
    "fragment": request(path=b"/#a"),
    "octets in path": request(path=b"/\xff"),
    "asterisk for GET": request(path=b"*"),
    "method with space": request(method=b"GET /"),
    "empty method": request(method=b""),
    "CONNECT with path": request(method=b"CONNECT"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed(case: str) -> None:
    with pytest.raises(Malformed):
        RequestFields(MALFORMED[case])


def extended(protocol: bytes, *fields: Pair, method: bytes = b"CONNECT") -> list[Pair]:
    return [(b":method", method), *GET[1:], (b":protocol", protocol), *fields]


def test_extended_connect_for_a_websocket_is_the_upgrade_of_http1() -> None:
    asked = extended(b"websocket", (b"sec-websocket-version", b"13"), (b"sec-websocket-key", b"theirs"))
    heads = [read_request(RequestFields(asked).head(absolute=False, ended=True), 0) for _ in range(2)]
    assert all(head is not None and (head.method, head.upgrade) == ("GET", "websocket") for head in heads)
    keys = [head.headers.getall("sec-websocket-key") for head in heads if head is not None]
    assert len(keys[0]) == len(keys[1]) == 1 and keys[0] != keys[1]
    assert all(len(base64.b64decode(key)) == 16 for [key] in keys)


def test_extended_connect_for_anything_else_is_not_served() -> None:
    with pytest.raises(NotServed):
        RequestFields(extended(b"connect-ip"))
    for odd in (extended(b"websocket", method=b"GET"), extended(b"websocket", (b"content-length", b"0"))):
        with pytest.raises(Malformed, match="bad_connect"):
            RequestFields(odd)
    for absent in range(1, len(GET)):
        with pytest.raises(Malformed):
            RequestFields([each for n, each in enumerate(extended(b"websocket")) if n != absent])


def test_a_header_bomb_is_too_large() -> None:
    with pytest.raises(TooLarge):
        RequestFields(request(*[(b"a", b"x" * 4000)] * 17))
    with pytest.raises(TooLarge):
        RequestFields(request(*[(b"a%d" % n, b"") for n in range(129)]))


def test_a_request_becomes_the_same_request() -> None:
    pairs = [*GET, (b"cookie", b"a=1"), (b"x", b"1"), (b"cookie", b"b=2"), (b"te", b"trailers"), (b"host", b"A.test")]
    fields = RequestFields(pairs)
    head = read_request(fields.head(absolute=False, ended=True), 0)
    assert head is not None
    assert (head.method, head.target, head.headers.get("host")) == ("GET", "/x?y=1", "a.test")
    assert head.headers.getall("cookie") == ["a=1; b=2"] and head.headers.get("te") is None and not head.chunked
    assert fields.trailers and not fields.grpc


def test_a_body_of_unknown_length_is_chunked_and_an_absolute_target_names_its_scheme() -> None:
    fields = RequestFields(request(method=b"POST", path=b"/p", scheme=b"https"))
    head = read_request(fields.head(absolute=True, ended=False), 0)
    assert head is not None and head.chunked and head.target == "https://a.test/p"


NAMES = st.text("abcdefghijklmnopqrstuvwxyz-0123456789", min_size=1, max_size=12).map(str.encode)
BYTES = st.binary(max_size=24)


@given(st.lists(st.tuples(st.one_of(NAMES, BYTES), BYTES), max_size=8), st.one_of(st.just(b"/"), BYTES), st.booleans())
def test_whatever_passes_is_one_request_for_the_relay(fields: list[Pair], path: bytes, ended: bool) -> None:
    """Downgraded bytes hold exactly one head with exactly these fields, or the relay refuses them, too."""
    try:
        parsed = RequestFields(request(*fields, path=path))
    except (Malformed, TooLarge):
        return
    data = parsed.head(absolute=False, ended=ended)
    try:
        head = read_request(data, 0)
    except BadMessage:
        return
    assert head is not None and head.end == len(data)
    sent = {name.decode("latin-1"): value.decode("latin-1") for name, value in parsed.fields}
    framing = {"Host", "Transfer-Encoding"}
    assert {name: value for name, value in head.headers.items() if name not in framing} == sent


@given(st.lists(st.tuples(st.one_of(NAMES, BYTES), BYTES), max_size=8), st.booleans(), st.booleans())
def test_an_answer_is_one_head_or_malformed(fields: list[Pair], ended: bool, bodiless: bool) -> None:
    try:
        status, data, _ = response_head([(b":status", b"200"), *fields], ended=ended, bodiless=bodiless)
    except (Malformed, TooLarge):
        return
    try:
        head = read_response(data, 0, bodiless)
    except BadMessage:
        return
    assert head is not None and head.end == len(data) and head.status == status == 200


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [(b":status", b"20")],
        [(b":status", b"2000")],
        [(b":status", b"101")],
        [(b":status", b"200"), (b":status", b"200")],
        [(b":status", b"200"), (b":path", b"/")],
        [(b"a", b"b"), (b":status", b"200")],
        [(b":status", b"200"), (b"connection", b"close")],
        [(b":status", b"200"), (b"transfer-encoding", b"chunked")],
        [(b":status", b"200"), (b"a", b"1\r\nSet-Cookie: x")],
        [(b":status", b"200"), (b"content-length", b"1"), (b"content-length", b"2")],
    ],
)
def test_a_malformed_answer(pairs: list[Pair]) -> None:
    with pytest.raises(Malformed):
        response_head(pairs, ended=False, bodiless=False)


def test_heads_of_the_relay_come_over_without_what_belongs_to_a_connection() -> None:
    head = read_response(b"HTTP/1.1 200 OK\r\nX-A: 1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n", 0, False)
    assert head is not None
    assert response_pairs(head) == [(b":status", b"200"), (b"x-a", b"1")]
    asked = read_request(b"POST /p HTTP/1.1\r\nHost: a.test\r\nX-A: 1\r\nTransfer-Encoding: chunked\r\n\r\n", 0)
    assert asked is not None
    assert request_pairs(asked, b"https", trailers=True) == [
        (b":method", b"POST"), (b":scheme", b"https"), (b":authority", b"a.test"), (b":path", b"/p"), (b"x-a", b"1"),
        (b"te", b"trailers"),
    ]  # fmt: skip


def test_trailers_say_nothing_that_frames_or_routes() -> None:
    assert trailer_fields([(b"grpc-status", b"0"), (b"content-length", b"5"), (b"host", b"x")]) == [(b"grpc-status", b"0")]
    with pytest.raises(Malformed):
        trailer_fields([(b":status", b"200")])
    with pytest.raises(Malformed):
        trailer_fields([(b"a", b"b\r\nc: d")])


@pytest.mark.parametrize(
    ("content_type", "answer"),
    [
        (b"application/grpc", True),
        (b"application/grpc+proto", True),
        (b"Application/gRPC; charset=x", True),
        (b"application/grpc-web", False),
        (b"application/grpcx", False),
        (b"application/json", False),
    ],
)
def test_what_is_grpc(content_type: bytes, answer: bool) -> None:
    assert is_grpc(content_type) is answer
