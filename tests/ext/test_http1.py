"""HTTP/1.1 heads and bodies: both forms, every way the network can cut them, and what must be refused."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_hotpath import _http1_py as twin
from creto_hotpath._http1_py import BadMessage, split_authority

FORMS = [twin]
if os.environ.get("CRETO_NO_EXTENSIONS", "") in ("", "0"):
    from creto_hotpath import _http1_c as compiled

    FORMS.insert(0, compiled)

Cases = list[dict[str, Any]]


@pytest.fixture(params=FORMS, ids=lambda module: module.__name__[-1:] == "c" and "compiled" or "twin")
def http1(request: pytest.FixtureRequest) -> Any:
    return request.param


def cases() -> Cases:
    default = Path(__file__).resolve().parent.parent / "cases"
    folder = Path(os.environ.get("CRETO_CASES_DIR", default))
    return list(json.loads((folder / "http.json").read_text())["cases"])


def raw(text: str) -> bytes:
    text = re.sub(r"\{\{(.*?)\*(\d+)\}\}", lambda match: match[1] * int(match[2]), text, flags=re.S)
    return text.encode("latin-1")


def describe(head: Any) -> tuple[Any, ...]:
    """Everything a head says, for comparison."""
    shared = (head.items(), head.minor, head.content_length, head.chunked, head.keep_alive, head.upgrade, head.body)
    place = (head.end, head.size)
    if hasattr(head, "status"):
        return (head.status, head.reason, *shared, *place)
    line = (head.method, head.target, head.form, head.scheme, head.authority, head.path, head.query)
    facts = (head.expect_continue, head.max_forwards, head.is_head, head.is_connect, head.via_names(b"creto"))
    return (*line, *facts, *shared, *place)


def request_answer(http1: Any, data: bytes) -> Any:
    try:
        parsed = http1.parse_request(data)
    except BadMessage as error:
        return (error.status, error.reason, error.offset)
    return None if parsed is None else (describe(parsed[0]), parsed[1])


def response_answer(http1: Any, data: bytes, method: str = "GET") -> Any:
    try:
        parsed = http1.parse_response(data, method)
    except BadMessage as error:
        return (error.status, error.reason, error.offset)
    return None if parsed is None else (describe(parsed[0]), parsed[1])


def refused(http1: Any, data: bytes) -> tuple[int, str]:
    with pytest.raises(BadMessage) as caught:
        http1.parse_request(data)
    return caught.value.status, caught.value.reason


def lines(*fields: str, first: str = "GET / HTTP/1.1") -> bytes:
    return "\r\n".join([first, *fields, "", ""]).encode("latin-1")


def test_head_is_read_without_copying_its_meaning(http1: Any) -> None:
    data = b"POST /a/b?x=1 HTTP/1.1\r\nHost: API.Example.com:8443\r\nX-A: one\r\nx-a:two\t\r\nContent-Length: 5\r\n\r\nhello"
    head, end = http1.parse_request(data)
    assert (head.method, head.target, head.minor) == ("POST", "/a/b?x=1", 1)
    assert (head.path, head.query, head.form) == ("/a/b", "x=1", "origin")
    assert head.authority == ("api.example.com", 8443)
    assert head.headers.get("x-A") == "one"
    assert head.headers.getall("X-A") == ["one", "two"]
    assert head.headers.get("absent") is None
    assert head.content_length == 5 and not head.chunked and head.keep_alive
    assert data[end:] == b"hello"


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", (400, "missing_host")),
        (lines("Host: a", "Host: a"), (400, "duplicate_host")),
        (lines("Host: a@b"), (400, "bad_host")),
        (lines("Host: a b"), (400, "bad_host")),
        (lines("Host: a:x"), (400, "bad_host")),
        (lines("Host: a:0"), (400, "bad_host")),
        (lines("Host: a:65536"), (400, "bad_host")),
        (lines("Host: a:"), (400, "bad_host")),
        (lines("Host:"), (400, "bad_host")),
        (lines("Host: .a"), (400, "bad_host")),
        (lines("Host: a..b"), (400, "bad_host")),
        (lines("Host: a%2e"), (400, "bad_host")),
        (lines("Host: [::1"), (400, "bad_host")),
        (lines("Host: [::g]"), (400, "bad_host")),
        (lines("Host: [fe80::1%25eth0]"), (400, "bad_host")),
        (lines("Host: a\x00b"), (400, "bad_field_value")),
        (lines("Host: a", "X-Agent-Id: 1", "x_agent_id: 2"), (400, "duplicate_identity")),
        (lines("Host: a", "X-Agent-Id: 1", "X-Agent-Id: 1"), (400, "duplicate_identity")),
        (lines("Host: a", "Content_Length: 1"), (400, "underscored_framing")),
        (lines("Host: a", "Transfer_Encoding: chunked"), (400, "underscored_framing")),
        (lines("Host: a", "Content-Length: 1", "Content-Length: 1"), (400, "duplicate_content_length")),
        (lines("Host: a", "Content-Length: 1, 1"), (400, "bad_content_length")),
        (lines("Host: a", "Content-Length:"), (400, "bad_content_length")),
        (lines("Host: a", "Content-Length: 1", "Transfer-Encoding: chunked"), (400, "length_and_chunked")),
        (lines("Host: a", "Transfer-Encoding: gzip, chunked"), (501, "unsupported_transfer_encoding")),
        (lines("Host: a", "Transfer-Encoding: identity"), (501, "unsupported_transfer_encoding")),
        (
            lines("Host: a", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
            (400, "duplicate_transfer_encoding"),
        ),
        (lines("Transfer-Encoding: chunked", first="POST / HTTP/1.0"), (400, "chunked_in_http10")),
        (lines("Host: a", "Expect: 200-ok"), (417, "unsupported_expectation")),
        (lines("Host: a", " folded"), (400, "obs_fold")),
        (lines("Host: a", "X : b"), (400, "bad_field_name")),
        (lines("Host: a", ": b"), (400, "bad_field_name")),
        (lines("Host: a", "nocolon"), (400, "bad_field_name")),
        (lines("Host: a", "X: a\rb"), (400, "bare_carriage_return")),
        # Nothing that may follow puts these right.
        (b"GET / HTTP/1.1\rHost: a", (400, "bare_carriage_return")),
        (b"GET / HTTP/1.1\r\nHost: a\r\r", (400, "bare_carriage_return")),
        (b"GET / HTTP/1.1\r\nHost: a\rX: b\n", (400, "bare_carriage_return")),
        (lines("Host: a", "Content-Length: 5", first="TRACE / HTTP/1.1"), (400, "trace_with_body")),
        (lines("Host: a", "Max-Forwards: 3", "Max-Forwards: 0", first="TRACE / HTTP/1.1"), (400, "duplicate_max_forwards")),
        (lines("Host: a", "Max-Forwards: 3", "Max-Forwards: 3", first="OPTIONS / HTTP/1.1"), (400, "duplicate_max_forwards")),
        (b"GET / HTTP/1.1\nHost: a\r\n\r\n", (400, "bare_line_feed")),
        (b"GET / HTTP/1.1\r\nHost: a\n\r\n", (400, "bare_line_feed")),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\n", (400, "bare_line_feed")),
        (lines("Host: a", first="GET / HTTP/2.0"), (505, "unsupported_version")),
        (lines("Host: a", first="GET / HTTP/1.2"), (505, "unsupported_version")),
        (lines("Host: a", first="GET / HTTP/1.1 "), (400, "bad_version")),
        (lines("Host: a", first="GET / http/1.1"), (400, "bad_version")),
        (lines("Host: a", first="GET /"), (400, "bad_target")),
        (lines("Host: a", first="GET  / HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="GET /#f HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="GET * HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="GET x HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="GET ftp://a/ HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="GET http:///x HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="GET http://u@a/ HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="CONNECT a HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", first="CONNECT a:443/ HTTP/1.1"), (400, "bad_target")),
        (lines("Host: a", "Content-Length: 3", first="CONNECT a:443 HTTP/1.1"), (400, "connect_with_body")),
        (lines("Host: a", "Max-Forwards: x", first="OPTIONS / HTTP/1.1"), (400, "bad_max_forwards")),
        (b"\x16\x03\x01\x02\x00\x01", (400, "bad_method")),
        (b"GE(T / HTTP/1.1\r\n", (400, "bad_method")),
        (b"A" * 33 + b" / HTTP/1.1\r\n", (501, "method_too_long")),
        (b"GET /" + b"a" * 65536, (414, "target_too_long")),
        (lines("Host: a", "X: " + "a" * 65536), (431, "head_too_long")),
        (lines("Host: a", *["X: y"] * 128), (431, "too_many_fields")),
    ],
)
def test_request_is_refused(http1: Any, message: bytes, answer: tuple[int, str]) -> None:
    assert refused(http1, message) == answer


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"HTTP/1.1 2000 OK\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 099 X\r\n\r\n", "bad_status_line"),
        (b"HTTP/2 200 OK\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 200OK\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 200 O\x00K\r\n\r\n", "bad_status_line"),
        (b"SSH-2.0-OpenSSH_9.2\r\n\r\n", "bad_status_line"),
        (b"HTTP/1.1 200 OK\r\nX : b\r\n\r\n", "bad_field_name"),
        (b"HTTP/1.1 200 OK\r\nX: a\rb\r\n\r\n", "bare_carriage_return"),
        (b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n", "obs_fold"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n", "duplicate_content_length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n", "length_and_chunked"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "unsupported_transfer_encoding"),
        (b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", "chunked_in_http10"),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 129, "too_many_fields"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 65536, "head_too_long"),
    ],
)
def test_response_is_refused_with_502(http1: Any, message: bytes, reason: str) -> None:
    with pytest.raises(BadMessage) as caught:
        http1.parse_response(message, "GET")
    assert (caught.value.status, caught.value.reason) == (502, reason)


@pytest.mark.parametrize(
    ("head", "method", "body", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "GET", twin.LENGTH, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "GET", twin.NONE, True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n", "HEAD", twin.NONE, True),
        (b"HTTP/1.1 204 No\r\nContent-Length: 3\r\n\r\n", "GET", twin.NONE, True),
        (b"HTTP/1.1 304 No\r\nContent-Length: 3\r\n\r\n", "GET", twin.NONE, True),
        (b"HTTP/1.1 100\r\n\r\n", "GET", twin.NONE, True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: Chunked\r\n\r\n", "GET", twin.CHUNKED, True),
        (b"HTTP/1.1 200 OK\r\n\r\n", "GET", twin.CLOSE, False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 3\r\n\r\n", "GET", twin.LENGTH, False),
        (b"HTTP/1.0 200 OK\r\nConnection: Keep-Alive\r\nContent-Length: 3\r\n\r\n", "GET", twin.LENGTH, True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\n", "GET", twin.LENGTH, False),
    ],
)
def test_response_body_is_delimited_as_rfc_9112_says(
    http1: Any, head: bytes, method: str, body: int, keep_alive: bool
) -> None:
    parsed, end = http1.parse_response(head + b"abc", method)
    assert (parsed.body, parsed.keep_alive, end) == (body, keep_alive, len(head))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Example.COM", ("example.com", None)),
        ("example.com.", ("example.com", None)),
        ("example.com:443", ("example.com", 443)),
        ("127.0.0.1:80", ("127.0.0.1", 80)),
        ("0x7f.1", ("0x7f.1", None)),
        ("2130706433:80", ("2130706433", 80)),
        ("0177.0.0.1", ("0177.0.0.1", None)),
        ("[::0001]:8080", ("::1", 8080)),
        ("[2001:DB8::1]", ("2001:db8::1", None)),
        ("_dmarc.example.com", ("_dmarc.example.com", None)),
    ],
)
def test_authority_is_split_and_normalised(text: str, answer: tuple[str, int | None]) -> None:
    assert split_authority(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "a..b",
        "u@a",
        "a:b:1",
        "a:",
        "a:0",
        "a:99999",
        "a:-1",
        "a b",
        "bücher.de",
        "[::1]x",
        "::1",
        "a\x00",
        "x" * 64,
    ],
)
def test_authority_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(BadMessage) as caught:
        split_authority(text)
    assert (caught.value.status, caught.value.reason) == (400, "bad_authority")


@pytest.mark.parametrize(
    ("first", "form", "authority", "origin"),
    [
        ("GET http://Up.test/x?y HTTP/1.1", "absolute", ("up.test", None), "/x?y"),
        ("GET https://up.test:8443 HTTP/1.1", "absolute", ("up.test", 8443), "/"),
        ("GET http://up.test?q HTTP/1.1", "absolute", ("up.test", None), "/?q"),
        ("OPTIONS http://up.test HTTP/1.1", "absolute", ("up.test", None), "*"),
        ("OPTIONS * HTTP/1.1", "asterisk", ("other.test", None), "*"),
        ("GET //up.test/x HTTP/1.1", "origin", ("other.test", None), "//up.test/x"),
    ],
)
def test_target_names_the_authority(
    http1: Any, first: str, form: str, authority: tuple[str, int | None], origin: str
) -> None:
    head, _ = http1.parse_request(lines("Host: other.test", first=first))
    assert (head.form, head.authority, head.origin_target) == (form, authority, origin)


def test_connect_names_its_tunnel(http1: Any) -> None:
    head, _ = http1.parse_request(lines("Host: ignored", first="CONNECT [::1]:8443 HTTP/1.1"))
    assert (head.form, head.authority, head.path, head.is_connect) == ("authority", ("::1", 8443), "", True)


def rewritten(http1: Any, data: bytes, **changes: Any) -> bytes:
    head, end = http1.parse_request(data)
    framing = changes.get("framing", head.content_length if not head.chunked else twin.CHUNKED_FRAMING)
    answer = http1.request_bytes(
        head,
        changes.get("target"),
        changes.get("host"),
        changes.get("edits"),
        framing,
        changes.get("expect", False),
        changes.get("upgrade", False),
        b"creto",
        data,
        end,
        len(data),
    )
    assert isinstance(answer, bytes)
    return answer


def test_request_is_rewritten_canonically(http1: Any) -> None:
    data = (
        b"POST http://up.test/x HTTP/1.1\r\nHost: other.test\r\nConnection: keep-alive, X-Hop, authorization, host\r\n"
        b"X-Hop: 1\r\nKeep-Alive: 9\r\nTE: trailers\r\nTrailer: X\r\nUpgrade: foo\r\nProxy-Authorization: b\r\n"
        b"Proxy-Connection: x\r\nAuthorization: Bearer s\r\nX-A:  spaced \r\nVia: 1.1 first\r\nContent-Length: 002\r\n\r\nhi"
    )
    assert rewritten(http1, data) == (
        b"POST /x HTTP/1.1\r\nHost: up.test\r\nAuthorization: Bearer s\r\nX-A: spaced\r\nVia: 1.1 first\r\n"
        b"Content-Length: 2\r\nVia: 1.1 creto\r\n\r\nhi"
    )


def test_edits_set_replace_and_remove_fields(http1: Any) -> None:
    data = lines("Host: a", "Authorization: old", "Accept-Encoding: gzip", "accept-encoding: br")
    edits = {"authorization": "Bearer new", "Accept-Encoding": "identity", "X-Absent": None}
    out = rewritten(http1, data, edits=edits, target="/v2", host="b.test")
    assert out == (
        b"GET /v2 HTTP/1.1\r\nHost: b.test\r\nauthorization: Bearer new\r\nAccept-Encoding: identity\r\nVia: 1.1 creto\r\n\r\n"
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"edits": {"Content-Length": "3"}},
        {"edits": {"host": "x"}},
        {"edits": {"Transfer-Encoding": None}},
        {"edits": {"X": "a\r\nEvil: 1"}},
        {"edits": {"X Y": "a"}},
        {"edits": {"X": "\u20ac"}},
        {"target": "/a b"},
        {"target": ""},
        {"host": "a\r\nX: y"},
    ],
)
def test_edits_cannot_break_out_of_their_field(http1: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        rewritten(http1, lines("Host: a"), **changes)


def test_http10_request_gains_a_host_or_is_an_error(http1: Any) -> None:
    data = b"GET / HTTP/1.0\r\n\r\n"
    assert rewritten(http1, data, host="a") == b"GET / HTTP/1.1\r\nHost: a\r\nVia: 1.0 creto\r\n\r\n"
    with pytest.raises(ValueError, match="host is needed"):
        rewritten(http1, data)


def test_max_forwards_is_counted_down(http1: Any) -> None:
    out = rewritten(http1, lines("Host: a", "Max-Forwards: 3", first="OPTIONS / HTTP/1.1"))
    assert b"Max-Forwards: 2\r\n" in out
    out = rewritten(http1, lines("Host: a", "Max-Forwards: 3"))
    assert b"Max-Forwards: 3\r\n" in out


def test_upgrade_and_expect_go_on_only_when_kept(http1: Any) -> None:
    fields = ("Host: a", "Connection: Upgrade", "Upgrade: websocket", "Expect: 100-continue", "Content-Length: 1")
    assert b"pgrade" not in rewritten(http1, lines(*fields))
    kept = rewritten(http1, lines(*fields), upgrade=True, expect=True)
    assert b"Connection: upgrade\r\nUpgrade: websocket\r\n" in kept and b"Expect: 100-continue\r\n" in kept


@pytest.mark.parametrize("value", ["websocket, h2c", "a b", ""])
def test_only_one_protocol_can_be_upgraded_to(http1: Any, value: str) -> None:
    head, _ = http1.parse_request(lines("Host: a", "Connection: upgrade", f"Upgrade: {value}"))
    assert head.upgrade is None


def test_response_is_rewritten_canonically(http1: Any) -> None:
    data = (
        b"HTTP/1.0 200 Fine\r\nConnection: X-Hop, set-cookie\r\nX-Hop: 1\r\nSet-Cookie: a\r\nKeep-Alive: 5\r\n"
        b"Content-Length: 5\r\nX-B:b\r\n\r\nhello"
    )
    head, end = http1.parse_response(data, "GET")
    out = http1.response_bytes(head, 5, twin.CLOSING, b"creto", data, end, len(data))
    assert out == (
        b"HTTP/1.1 200 Fine\r\nSet-Cookie: a\r\nX-B: b\r\nContent-Length: 5\r\nConnection: close\r\nVia: 1.0 creto\r\n\r\nhello"
    )


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        ("1.1 creto", True),
        ("1.0 fred, 1.1 Creto (x)", True),
        ("HTTP/1.1\tcreto", True),
        ("1.1 notcreto", False),
        ("creto", False),
    ],
)
def test_own_name_in_via_is_found(http1: Any, value: str, answer: bool) -> None:
    head, _ = http1.parse_request(lines("Host: a", f"Via: {value}"))
    assert head.via_names(b"creto") is answer


def test_plain_response_is_framed_and_cannot_be_split() -> None:
    out = twin.plain_response(403, [("Content-Type", "text/plain")], b"no", twin.CLOSING)
    head, end = twin.parse_response(out, "GET") or pytest.fail("incomplete")
    assert (head.status, head.content_length, head.keep_alive, out[end:]) == (403, 2, False, b"no")
    assert head.get("date") is not None
    assert twin.plain_response(200, [], b"no", head_only=True).endswith(b"Content-Length: 2\r\n\r\n")
    assert b"Content-Length" not in twin.plain_response(204, [], b"")
    with pytest.raises(ValueError, match="control character"):
        twin.plain_response(200, [("X", "a\r\nSet-Cookie: b")], b"")


def follow(http1: Any, kind: int, length: int, pieces: list[bytes], content: bool) -> Any:
    """(output, done, bytes left over), or the reason of the refusal."""
    framer = http1.BodyFramer(kind, length, 400)
    out = b""
    rest = b""
    try:
        for piece in pieces:
            if content:
                out += framer.payload(piece, 0)
                end = framer.end
            else:
                end = framer.feed(piece, 0)
                out += piece[:end] if framer.cleaned is None else framer.cleaned
            rest += piece[end:]
    except BadMessage as error:
        return (error.status, error.reason)
    return (out, framer.done, rest)


CHUNKED_BODY = b'5;a=b;c ; d="x\\"y"\r\nhello\r\n0003\r\nabc\r\n0;z\r\nX-T: 1\r\nY:\r\n\r\nGET'


def test_chunked_body_is_cleaned_and_decoded(http1: Any) -> None:
    clean = b"5\r\nhello\r\n0003\r\nabc\r\n0\r\n\r\n"
    assert follow(http1, twin.CHUNKED, -1, [CHUNKED_BODY], False) == (clean, True, b"GET")
    assert follow(http1, twin.CHUNKED, -1, [CHUNKED_BODY], True) == (b"helloabc", True, b"GET")


def test_clean_chunks_are_forwarded_as_they_are(http1: Any) -> None:
    framer = http1.BodyFramer(twin.CHUNKED)
    data = b"5\r\nhello\r\n0\r\n\r\n"
    assert framer.feed(data) == len(data)
    assert framer.cleaned is None and framer.done


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b"-1\r\n", "bad_chunk_size"),
        (b"0_5\r\n", "bad_chunk_size"),
        (b"0x5\r\n", "bad_chunk_size"),
        (b"\r\n", "bad_chunk_size"),
        (b"5\n", "bad_chunk_size"),
        (b"5\r\r", "bad_chunk_size"),
        (b"1234567890abcdef\r\n", "bad_chunk_size"),
        (b"5 \r\n", "bad_chunk_extension"),
        (b"5;\r\n", "bad_chunk_extension"),
        (b"5;a=\r\n", "bad_chunk_extension"),
        (b"5;a b\r\n", "bad_chunk_extension"),
        (b"5;a\n", "bad_chunk_extension"),
        (b'5;a="\r\n', "bad_chunk_extension"),
        (b"5;a \r\n", "bad_chunk_extension"),
        (b"1\r\naX", "bad_chunk_end"),
        (b"1\r\na\rX", "bad_chunk_end"),
        (b"1\r\na\n", "bad_chunk_end"),
        (b"0\r\n\rX", "bad_chunk_end"),
        (b"0\r\n X: y\r\n", "bad_trailer"),
        (b"0\r\nX : y\r\n", "bad_trailer"),
        (b"0\r\nX: y\n", "bad_trailer"),
        (b"0\r\nX: \x00\r\n", "bad_trailer"),
        (b"0;" + b"a" * 70000, "chunk_overhead"),
    ],
)
def test_bad_chunked_framing_is_refused(http1: Any, body: bytes, reason: str) -> None:
    assert follow(http1, twin.CHUNKED, -1, [body], False) == (400, reason)
    assert follow(http1, twin.CHUNKED, -1, [body], True) == (400, reason)


def test_body_of_known_length_ends_there(http1: Any) -> None:
    assert follow(http1, twin.LENGTH, 5, [b"hel", b"loGET"], False) == (b"hello", True, b"GET")
    assert follow(http1, twin.LENGTH, 5, [b"hel", b"loGET"], True) == (b"hello", True, b"GET")
    assert follow(http1, twin.NONE, 0, [b"GET"], False) == (b"", True, b"GET")
    assert follow(http1, twin.CLOSE, 0, [b"a", b"b"], True) == (b"ab", False, b"")


def test_chunk_is_framed(http1: Any) -> None:
    assert http1.chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


def splits(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    for at in range(1, len(data)):
        yield data[:at], data[at:]


@pytest.mark.parametrize("case", [case for case in cases() if case["raw"]], ids=lambda case: str(case["id"]))
def test_cutting_a_request_never_changes_the_answer(http1: Any, case: dict[str, Any]) -> None:
    data = raw(case["raw"])
    whole = request_answer(http1, data)
    assert whole == request_answer(twin, data)
    if len(data) > 2000:
        return
    for first, second in splits(data):
        early = request_answer(http1, first)
        # Either nothing can be said yet, or exactly what will be said in the end.
        assert early is None or early == whole or early[1] == whole[1]
        assert request_answer(http1, first + second) == whole


@pytest.mark.parametrize(
    "case", [case for case in cases() if case.get("upstream_response")], ids=lambda case: str(case["id"])
)
def test_cutting_a_response_never_changes_the_answer(http1: Any, case: dict[str, Any]) -> None:
    data = raw(re.sub(r"<.*?>", "", case["upstream_response"]))
    whole = response_answer(http1, data)
    assert whole == response_answer(twin, data)
    for first, _ in splits(data):
        early = response_answer(http1, first)
        assert early is None or early == whole or early[1] == whole[1]


def test_cutting_a_chunked_body_never_changes_what_comes_out(http1: Any) -> None:
    for content in (False, True):
        whole = follow(http1, twin.CHUNKED, -1, [CHUNKED_BODY], content)
        for first, second in splits(CHUNKED_BODY):
            assert follow(http1, twin.CHUNKED, -1, [first, second], content) == whole
        single = [CHUNKED_BODY[i : i + 1] for i in range(len(CHUNKED_BODY))]
        assert follow(http1, twin.CHUNKED, -1, single, content) == whole


PIECES = st.sampled_from(
    [
        b"GET",
        b"POST",
        b"CONNECT",
        b"OPTIONS",
        b" ",
        b"/",
        b"*",
        b"http://",
        b"a.test",
        b":443",
        b"@",
        b"[::1]",
        b"?q",
        b" HTTP/1.1",
        b" HTTP/1.0",
        b"\r\n",
        b"\n",
        b"\r",
        b"Host: a\r\n",
        b"Content-Length: 3\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close, x-a\r\n",
        b"X-A: 1\r\n",
        b"X_Agent_Id: 1\r\n",
        b"Expect: 100-continue\r\n",
        b"Upgrade: websocket\r\nConnection: upgrade\r\n",
        b"Via: 1.1 creto\r\n",
        b"\x00",
        b"\xff",
        b"\t",
        b"HTTP/1.1 200 OK\r\n",
        b"5\r\nhello\r\n",
        b"5;a=b\r\nhello\r\n",
        b"0\r\n\r\n",
        b"0\r\n",
    ]
)
MESSAGES = st.one_of(st.binary(max_size=200), st.lists(PIECES, max_size=16).map(b"".join))
# A well-formed start, so that the later rules are reached as well.
REQUESTS = st.one_of(MESSAGES, MESSAGES.map(lambda tail: b"POST /x HTTP/1.1\r\nHost: a\r\n" + tail))
RESPONSES = st.one_of(MESSAGES, MESSAGES.map(lambda tail: b"HTTP/1.1 200 OK\r\n" + tail))


def byte_by_byte(answer: Any, data: bytes) -> Any:
    """The first definite answer when ``data`` comes one byte at a time."""
    for size in range(len(data) + 1):
        said = answer(data[:size])
        if said is not None:
            return said
    return None


@settings(max_examples=100, deadline=None)
@given(REQUESTS)
def test_any_request_bytes_parse_or_are_refused_alike(data: bytes) -> None:
    answers = [request_answer(form, data) for form in FORMS]
    assert all(answer == answers[0] for answer in answers)
    for form in FORMS:
        slow = byte_by_byte(lambda piece, form=form: request_answer(form, piece), data)
        assert slow == answers[0]


@settings(max_examples=100, deadline=None)
@given(RESPONSES, st.sampled_from(["GET", "HEAD"]))
def test_any_response_bytes_parse_or_are_refused_alike(data: bytes, method: str) -> None:
    answers = [response_answer(form, data, method) for form in FORMS]
    assert all(answer == answers[0] for answer in answers)
    for form in FORMS:
        slow = byte_by_byte(lambda piece, form=form: response_answer(form, piece, method), data)
        assert slow == answers[0]


@settings(max_examples=100, deadline=None)
@given(MESSAGES, st.integers(0, 200), st.booleans())
def test_any_chunked_bytes_come_out_alike(data: bytes, at: int, content: bool) -> None:
    whole = [follow(form, twin.CHUNKED, -1, [data], content) for form in FORMS]
    cut = [follow(form, twin.CHUNKED, -1, [data[:at], data[at:]], content) for form in FORMS]
    single = [follow(form, twin.CHUNKED, -1, [data[i : i + 1] for i in range(len(data))], content) for form in FORMS]
    assert all(answer == whole[0] for answer in [*whole, *cut, *single])


@settings(max_examples=100, deadline=None)
@given(REQUESTS)
def test_what_is_forwarded_parses_again_without_hop_by_hop_fields(data: bytes) -> None:
    outs = []
    for form in FORMS:
        try:
            parsed = form.parse_request(data)
        except BadMessage:
            return
        if parsed is None or parsed[0].is_connect:
            return
        head, _ = parsed
        framing = twin.CHUNKED_FRAMING if head.chunked else head.content_length
        outs.append(form.request_bytes(head, None, "h.test", {"X-New": "1"}, framing, True, False, b"creto", b"", 0, 0))
    assert all(out == outs[0] for out in outs)
    again, end = twin.parse_request(outs[0]) or pytest.fail("what was forwarded is incomplete")
    assert end == len(outs[0])
    assert again.authority == ("h.test", None) and again.get("x-new") == "1" and again.get("connection") is None
    assert (again.chunked, again.content_length) == (head.chunked, head.content_length)
