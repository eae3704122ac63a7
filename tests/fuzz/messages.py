"""HTTP/1.1: heads, bodies, authorities, and what is made of them for the next server."""

from __future__ import annotations

import ipaddress
from types import ModuleType
from typing import Any

from creto_hotpath import _http1_py as twin
from creto_hotpath._http1_py import BadMessage, split_authority

from .invariants import answer, cuts, forms, prefixes_agree, same
from .oracles import Seen, h11_request, h11_response, llhttp_requests, llhttp_responses

FORMS = forms("http1")
# What stands behind a complete message: a parser that sees anything else there was led astray.
NEXT_REQUEST = b"GET /next HTTP/1.1\r\nHost: next.test\r\n\r\n"
NEXT_RESPONSE = b"HTTP/1.1 418 Next\r\nContent-Length: 0\r\n\r\n"
# Fields that end at creto. What an agent says in them must not reach the next server.
HOP_BY_HOP = (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"upgrade", b"proxy-authorization")


def describe(head: Any) -> tuple[Any, ...]:
    """Everything a head says but its place."""
    facts = (head.items(), head.minor, head.content_length, head.chunked, head.keep_alive, head.upgrade, head.body)
    if hasattr(head, "status"):
        return (head.status, head.reason, *facts, head.size)
    line = (head.method, head.target, head.form, head.scheme, head.authority, head.path, head.query)
    more = (head.expect_continue, head.max_forwards, head.is_head, head.is_connect, head.via_names(b"creto"))
    return (*line, *more, *facts, head.size)


def request_answer(form: ModuleType, data: bytes, start: int = 0) -> Any:
    try:
        parsed = form.parse_request(data, start)
    except BadMessage as error:
        return (error.status, error.reason, error.offset)
    return None if parsed is None else (describe(parsed[0]), parsed[1] - start)


def response_answer(form: ModuleType, data: bytes, method: str, start: int = 0) -> Any:
    try:
        parsed = form.parse_response(data, method, start)
    except BadMessage as error:
        return (error.status, error.reason, error.offset)
    return None if parsed is None else (describe(parsed[0]), parsed[1] - start)


def check_request(data: bytes) -> None:
    """A request head is the same in both forms, for every cut and at every place, and so is what is forwarded."""
    said = same([request_answer(form, data) for form in FORMS])
    prefixes_agree(lambda piece: request_answer(FORMS[-1], piece), data)
    same([said, *(request_answer(form, b"GET /" + data, 5) for form in FORMS)])
    if said is not None and len(said) == 2:
        _check_forwarded_request(data)


def _check_forwarded_request(data: bytes) -> None:
    parsed = [form.read_request(data, 0) for form in FORMS]
    head = parsed[0]
    if head.is_connect:
        assert head.authority == split_authority(head.target) and head.body == twin.NONE
        return
    host = "h.test" if head.authority is None else None
    framing = twin.CHUNKED_FRAMING if head.chunked else head.content_length
    heads = [
        form.request_bytes(each, None, host, None, framing, True, False, b"creto", b"", 0, 0)
        for form, each in zip(FORMS, parsed, strict=True)
    ]
    start = same(heads)
    again = twin.read_request(start, 0)
    assert again is not None and again.end == len(start), start
    assert (again.method, again.target) == (head.method, head.origin_target)
    assert (again.chunked, again.content_length, again.body) == (head.chunked, head.content_length, head.body)
    assert host or again.authority == head.authority
    _check_end_to_end(head, again)
    passed, content, done = _body(head, data[head.end :], 400)
    stream = start + passed + (NEXT_REQUEST if done else b"")
    expected = Seen(again.method.encode(), again.target.encode(), _fields(again), content, done)
    _judge(h11_request(stream), expected, NEXT_REQUEST, start)
    messages = llhttp_requests(stream)
    if messages is None:
        return
    assert len(messages) == 1 + done, (messages, stream)
    messages[0].first = expected.first  # llhttp keeps the method to itself
    _judge((messages[0], NEXT_REQUEST if done else b""), expected, NEXT_REQUEST, start)
    assert not done or messages[1].values(b"host") == [b"next.test"]


def _check_end_to_end(head: Any, again: Any) -> None:
    """What must not be forwarded is not, and what must be is."""
    names = {name.lower().encode() for name, _ in again.items()}
    assert names.isdisjoint(HOP_BY_HOP), names
    for name, value in head.items():
        if name.lower().encode() in twin.PROTECTED:
            assert value in again.getall(name), name


def check_response(data: bytes) -> None:
    """As for requests. The first byte says which method was asked."""
    method = "HEAD" if data[:1] == b"H" else "GET"
    data = data[1:]
    said = same([response_answer(form, data, method) for form in FORMS])
    prefixes_agree(lambda piece: response_answer(FORMS[-1], piece, method), data)
    same([said, *(response_answer(form, b"HTTP/" + data, method, 5) for form in FORMS)])
    if said is not None and len(said) == 2:
        _check_forwarded_response(data, method)


def _check_forwarded_response(data: bytes, method: str) -> None:
    parsed = [form.read_response(data, 0, method == "HEAD") for form in FORMS]
    head = parsed[0]
    if head.status == 101:
        return
    framing = head.content_length
    if head.status < 200 or head.status == 204:
        framing = twin.NO_FRAMING
    elif head.chunked or head.body == twin.CLOSE:
        framing = twin.CHUNKED_FRAMING
    heads = [
        form.response_bytes(each, framing, twin.SILENT, b"creto", b"", 0, 0)
        for form, each in zip(FORMS, parsed, strict=True)
    ]
    start = same(heads)
    passed, content, done = _body(head, data[head.end :], 502)
    if head.body == twin.CLOSE:
        passed, done = (twin.chunk(content) if content else b"") + b"0\r\n\r\n", True
    stream = start + passed + (NEXT_RESPONSE if done else b"")
    again = twin.read_response(start, 0, method == "HEAD")
    assert again is not None and again.end == len(start) and again.status == head.status, start
    expected = Seen(b"%d" % head.status, b"", _fields(again), content, done)
    _judge(h11_response(stream, method.encode(), False), expected, NEXT_RESPONSE, start)
    if method == "HEAD":
        return  # httptools cannot be told
    messages = llhttp_responses(stream)
    assert len(messages) == 1 + done, (messages, stream)
    messages[0].first = expected.first
    _judge((messages[0], NEXT_RESPONSE if done else b""), expected, NEXT_RESPONSE, start)


def _judge(found: tuple[Seen, bytes] | None, expected: Seen, following: bytes, start: bytes) -> None:
    """The other parser must see this message, ended where creto ended it, with these fields."""
    assert found is not None, start
    seen, rest = found
    assert seen.complete == expected.complete, (seen, expected)
    assert (seen.first, seen.target, seen.body) == (expected.first, expected.target, expected.body), (seen, expected)
    assert not expected.complete or rest == following, rest
    for name in (b"host", b"content-length", b"transfer-encoding", b"connection", b"upgrade"):
        assert seen.values(name) == expected.values(name), (name, seen, expected)


def _fields(head: Any) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in head.items()]


def _body(head: Any, rest: bytes, status: int) -> tuple[bytes, bytes, bool]:
    """What of ``rest`` is forwarded, its content, and whether the body is complete; up to the first error."""
    framer, reader = (twin.BodyFramer(head.body, max(head.content_length, 0), status) for _ in range(2))
    passed = content = b""
    try:
        for at in range(len(rest)):
            byte = rest[at : at + 1]
            if reader.done:
                break
            content += reader.payload(byte)
            framer.feed(byte)
            passed += byte if framer.cleaned is None else framer.cleaned
    except BadMessage:
        return passed, content, False
    return passed, content, framer.done


def _follow(form: ModuleType, kind: int, length: int, parts: list[bytes], content: bool) -> Any:
    framer = form.BodyFramer(kind, length, 400)
    out = rest = b""
    try:
        for part in parts:
            if content:
                out += framer.payload(part, 0)
                end = framer.end
            else:
                end = framer.feed(part, 0)
                out += part[:end] if framer.cleaned is None else framer.cleaned
            rest += part[end:]
    except BadMessage as error:
        return (error.status, error.reason)
    return (out, framer.done, rest)


def check_chunked(data: bytes) -> None:
    """Chunks are the same in both forms and for every cut, and what is passed on holds the same content, cleanly."""
    results = {}
    for content in (False, True):
        answers = [_follow(form, twin.CHUNKED, -1, [data], content) for form in FORMS]
        answers.append(_follow(FORMS[0], twin.CHUNKED, -1, [data[:1], data[1:]], content))
        answers += [_follow(FORMS[-1], twin.CHUNKED, -1, parts, content) for parts in cuts(data)]
        results[content] = same(answers, content)
    passed, content = results[False], results[True]
    if len(passed) == 2:
        assert content == passed
        return
    assert passed[1:] == content[1:]
    framer = twin.BodyFramer(twin.CHUNKED)
    assert framer.payload(passed[0]) == content[0] and framer.done == passed[1]
    framer = twin.BodyFramer(twin.CHUNKED)
    framer.feed(passed[0])
    assert framer.cleaned is None, "what was cleaned is not clean"
    seen = h11_request(b"POST / HTTP/1.1\r\nHost: h.test\r\nTransfer-Encoding: chunked\r\n\r\n" + passed[0])
    assert seen is not None and (seen[0].body, seen[0].complete) == (content[0], passed[1]), (seen, content)


def check_counted(data: bytes) -> None:
    """A body of known length, and one that ends with the connection. The first two bytes are the length."""
    length, data = int.from_bytes(data[:2], "big"), data[2:]
    for content in (False, True):
        for kind in (twin.NONE, twin.LENGTH, twin.CLOSE):
            answers = [_follow(form, kind, length, [data], content) for form in FORMS]
            answers += [_follow(FORMS[-1], kind, length, parts, content) for parts in cuts(data)]
            out, done, rest = same(answers, kind, content)
            assert out + rest == data
            if kind == twin.LENGTH:
                assert len(out) == min(length, len(data)) and done == (len(data) >= length)


def check_authority(data: bytes) -> None:
    """An authority is split into a plain name or address and a port, or refused, and means the same in Host."""
    text = data.decode("latin-1")
    said = answer(split_authority, text, refusals=BadMessage)
    request = b"GET / HTTP/1.1\r\nHost: " + data + b"\r\n\r\n"
    head = same([request_answer(form, request) for form in FORMS])
    tunnel = same([request_answer(form, b"CONNECT " + data + b" HTTP/1.1\r\nHost: a\r\n\r\n") for form in FORMS])
    if isinstance(said, str):
        # What is no authority is none in a head either; there, blanks around it and line ends are somebody else's.
        assert data != data.strip(b" \t") or b"\n" in data or head is None or len(head) == 3, head
        return
    host, port = said
    assert port is None or 0 < port < 65536
    assert host == host.lower() and host.isascii() and not set(host) & set("/@?#%[]\\ \t\r\n\0,;'\"<>"), host
    shown = f"[{host}]" if ":" in host else host
    assert split_authority(shown if port is None else f"{shown}:{port}") == said
    if ":" in host:
        assert str(ipaddress.IPv6Address(host)) == host
    assert head[0][4] == said, head
    assert (len(tunnel) == 3) == (port is None) and (port is None or tunnel[0][4] == said), tunnel


def check_edits(data: bytes) -> None:
    """A field that a plugin sets is one field of the request, or refused. Name and value are parted by ``=``."""
    name, _, value = data.decode("utf-8", "replace").partition("=")
    base = b"POST /x HTTP/1.1\r\nHost: h.test\r\nX-A: 1\r\nAuthorization: old\r\nContent-Length: 3\r\n\r\n"
    outs = []
    for form in FORMS:
        head = form.read_request(base, 0)
        call = (head, "/y", None, {name: value}, 3, False, False, b"creto", b"", 0, 0)
        outs.append(answer(form.request_bytes, *call, refusals=ValueError))
    out = same(outs)
    if isinstance(out, str):
        return
    again = twin.read_request(out, 0)
    assert again is not None and again.end == len(out), out
    assert (again.target, again.authority, again.content_length) == ("/y", ("h.test", None), 3)
    assert again.getall(name) == [value.strip(" \t")], out
    known = {"host", "x-a", "authorization", "content-length", "via", name.lower()}
    assert {field.lower() for field, _ in again.items()} == known, out


