"""What runs over HTTP: HTTP/2 framing and fields, WebSocket messages, JSON-RPC bodies."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from wsproto.frame_protocol import FrameProtocol, ParseFailed

from creto_hotpath import _h2_py
from creto_hotpath import _h2_types as h2
from creto_hotpath import _http1_py as http1
from creto_hotpath._jsonrpc_types import MAX_DEPTH, NotJson, Scan
from creto_hotpath._select import extensions_wanted
from creto_proxy.deadline import Guard
from creto_proxy.h2.guard import Flood
from creto_proxy.h2.guard import Guard as FrameGuard
from creto_proxy.h2.message import Malformed, RequestFields, TooLarge, response_head
from creto_proxy.websocket.messages import Broken, Conversation
from creto_proxy.websocket.watch import Watch

from .invariants import answer, cuts, forms, same

JSONRPC = forms("jsonrpc")
# The framing of HTTP/2 is nghttp2's where that is installed and the h2 package's elsewhere: two libraries that need
# not refuse the same things, so each is only compared with itself.
_C = "creto_hotpath._h2_c"
H2: list[ModuleType] = [_h2_py]
if extensions_wanted() and find_spec(_C) is not None:
    H2.append(import_module(_C))
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
MOST_BYTES = 1000


def check_jsonrpc(data: bytes) -> None:
    """Both forms find the same messages, and a body without flaw is the JSON that Python's parser reads."""
    found = same([_scan(form, data) for form in JSONRPC])
    try:
        document = json.loads(data.decode())
    except (ValueError, RecursionError):
        assert isinstance(found, str), (data, found)
        return
    if isinstance(found, str):
        text = data.decode()
        assert data[:3] == b"\xef\xbb\xbf" or any(word in text for word in ("NaN", "Infinity")) or _deep(text), found
        return
    assert isinstance(found, Scan) and found.batch == isinstance(document, list)
    if found.flaw:
        return
    bodies = document if found.batch else [document]
    assert len(bodies) == len(found.messages)
    for body, message in zip(bodies, found.messages, strict=True):
        params = body.get("params")
        params = params if isinstance(params, dict) else {}
        _check_member(message.method, body, "method")
        _check_member(message.id, body, "id")
        _check_member(message.name, params, "name")
        _check_member(message.uri, params, "uri")


def _scan(form: ModuleType, data: bytes) -> Any:
    # Where and why it is not JSON may be said differently.
    try:
        return form.scan(data)
    except NotJson:
        return "not JSON"


def _deep(text: str) -> bool:
    return text.count("[") + text.count("{") > MAX_DEPTH


def _check_member(raw: bytes | None, body: dict[str, Any], name: str) -> None:
    if raw is None:
        assert name not in body
    elif raw in (b"{", b"["):
        assert isinstance(body[name], dict if raw == b"{" else list)
    else:
        assert json.loads(raw) == body[name]


def _some(data: bytes) -> list[list[bytes]]:
    """Whole, byte by byte and some of the other cuts: these two are slow."""
    return [parts for index, parts in enumerate(cuts(data)) if index < 2 or index % 16 == 0]


def _converse(upward: bool, parts: list[bytes]) -> tuple[Any, bytes]:
    """What the other side gets as (kind, content, whole) per frame, and how it ended."""
    talk = Conversation(Watch((), Guard(1.0), MOST_BYTES))
    out: list[bytes | bytearray] = []
    end = ""
    try:
        for part in parts:
            (talk.up if upward else talk.down)(part, out)
    except Broken as error:
        end = f"{error.code} {error.reason}"
        last = talk.end(error)
        assert len(last[0]) <= 131 and len(last[1]) <= 131
    return end, b"".join(bytes(piece) for piece in out)


def check_websocket(data: bytes) -> None:
    """Frames give messages or an end, the same for every cut, and what goes on is sound. The first byte: who sends."""
    upward, data = data[:1] != b"d", data[1:]
    ends, heard = [], []
    for parts in _some(data):
        end, sent = _converse(upward, parts)
        ends.append(end)
        heard.append(_frames(sent, client=not upward))
    same(ends)
    same(heard)


def _frames(sent: bytes, *, client: bool) -> list[Any]:
    reader = FrameProtocol(client=client, extensions=[])
    reader.receive_bytes(sent)
    try:
        return [(frame.opcode, frame.payload, frame.message_finished) for frame in reader.received_frames()]
    except ParseFailed as error:
        raise AssertionError(f"what was sent on is not WebSocket: {error}") from error


def _session(form: ModuleType, client: bool, parts: list[bytes]) -> Any:
    session = form.Session(client)
    if client:
        session.open([(b":method", b"GET"), (b":scheme", b"https"), (b":authority", b"a"), (b":path", b"/")], True)
    session.to_send()
    streams: dict[int, list[Any]] = {}
    ended = ""
    try:
        for part in parts:
            events = session.receive(part)
            session.to_send()
            for kind, stream, value, code in [*events, *session.take_events()]:
                seen = streams.setdefault(stream, [])
                if kind == h2.DATA and seen and seen[-1][0] == h2.DATA:
                    seen[-1] = (kind, seen[-1][1] + value, code)
                elif kind != h2.ENDED:
                    seen.append((kind, value, int(code)))
    except h2.SessionError as error:
        ended = error.reason
    # What came in the same segment before an error is lost with the connection, or with its stream, or not.
    whole = {stream: seen for stream, seen in streams.items() if all(k != h2.CLOSED or not code for k, _, code in seen)}
    return "failed" if ended or session.failed else whole


def check_h2(data: bytes) -> None:
    """Frames give events or end the connection, the same for every cut. The first byte: which side reads them."""
    client, data = data[:1] == b"c", data[1:]
    stream = data if client else PREFACE + data
    every = _some(stream)
    for form in H2:
        same([_session(form, client, parts) for parts in every], form.__name__)
    said = []
    for parts in ([stream], [stream[i : i + 1] for i in range(len(stream))]):
        guard = FrameGuard(lambda: 0.0, preface=0 if client else len(PREFACE))
        said.append(answer(_feed, guard, parts, refusals=Flood))
    same(said)


def _feed(guard: FrameGuard, parts: list[bytes]) -> bool:
    for part in parts:
        guard.feed(part)
    return guard.in_block


def _pairs(data: bytes) -> list[tuple[bytes, bytes]]:
    lines = [line.partition(b"=") for line in data.split(b"\n") if line]
    return [(name, value) for name, _, value in lines]


def check_h2_fields(data: bytes) -> None:
    """Fields of HTTP/2, one ``name=value`` a line, become one whole HTTP/1.1 head that says the same, or are refused."""
    pairs = _pairs(data)
    for ended in (False, True):
        _check_request_fields(pairs, ended)
        made = answer(lambda ended=ended: response_head(pairs, ended=ended, bodiless=False), refusals=(Malformed, TooLarge))
        if isinstance(made, str):
            continue
        status, raw, length = made
        try:
            head = http1.read_response(raw, 0, False)
        except http1.BadMessage:
            continue
        assert head is not None and head.end == len(raw) and head.status == status, raw
        assert length < 0 or head.content_length == length


def _check_request_fields(pairs: list[tuple[bytes, bytes]], ended: bool) -> None:
    fields = answer(RequestFields, pairs, refusals=(Malformed, TooLarge))
    if isinstance(fields, str):
        return
    for absolute in (False, True):
        raw = fields.head(absolute=absolute, ended=ended)
        try:
            head = http1.read_request(raw, 0)
        except http1.BadMessage:
            continue
        assert head is not None and head.end == len(raw), raw
        assert head.method.encode() == fields.method
        assert head.is_connect or head.origin_target.encode() == fields.path
        assert head.content_length == fields.length and head.chunked == (not ended and fields.length < 0), raw
        names = [name for name, _ in head.items()]
        assert names.count("Host") == 1 and len(names) == len(fields.fields) + 1 + head.chunked, raw
