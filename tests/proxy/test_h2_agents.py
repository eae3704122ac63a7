"""HTTP/2 of agents against a real gateway, framed by nghttp2 and by h2: what is served, and how each attack ends.

Every attack ends in one clear error on its own connection, leaves an outcome in the journal, and is not noticed by the
connection beside it.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from creto_proxy.h2.agents import Bounds
from creto_proxy.h2.guard import BURST
from creto_proxy.protect import Agents, Protection

from .h2_lab import Lab, framed_by, h2_lab, http1_origin, tls_client
from .h2_wire import (
    ACK,
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    ENHANCE_YOUR_CALM,
    FLOW_CONTROL_ERROR,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PROTOCOL_ERROR,
    RST,
    SETTINGS,
    WINDOW,
    Answer,
    Frame,
    Wire,
    frame,
)

BODY = bytes(range(256)) * 1024


@pytest.fixture(scope="module", params=["nghttp2", "h2"])
def lab(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    with framed_by(request.param), http1_origin(BODY) as (port, seen), h2_lab(tmp_path_factory.mktemp("lab"), port) as running:
        running.seen = seen
        yield running


def errors(lab: Lab) -> list[str]:
    return [outcome.error for outcome in lab.journal()]


def await_error(lab: Lab, reason: str) -> None:
    """Returns once there is a record with that error, which may come after what the agent is told."""
    waiting = threading.Event()
    for _ in range(6000):
        if any(error.endswith(reason) for error in errors(lab)):
            return
        waiting.wait(0.01)
    raise AssertionError(f"no {reason} in {errors(lab)}")


# -- what is served


def read_all(wire: Wire, stream: int = 1) -> Answer:
    """An answer larger than the default window, which is opened as it comes."""
    wire.send(frame(WINDOW, 0, 0, (1 << 20).to_bytes(4, "big")) + frame(WINDOW, 0, stream, (1 << 20).to_bytes(4, "big")))
    return wire.answer(stream)


def test_a_request_passes_and_is_recorded(lab: Lab) -> None:
    with Wire(lab.reverse) as wire:
        wire.request(1, (b"x-a", b"1"), path=b"/good/a?b=c")
        answer = read_all(wire)
    assert (answer.status, answer.body) == (200, BODY)
    assert b"connection" not in answer.headers and b"transfer-encoding" not in answer.headers
    assert lab.seen[-1].startswith(b"GET /a?b=c HTTP/1.1\r\nHost: good.test\r\nx-a: 1\r\n")
    outcome = lab.recorded()[-1]
    assert (outcome.status, outcome.target, outcome.decision, outcome.error) == (200, "/a", "allow", "")


def test_bodies_go_up_with_and_without_a_length(lab: Lab) -> None:
    with Wire(lab.reverse) as wire:
        wire.request(1, (b"content-length", b"5"), end=False, method=b"POST")
        wire.send(frame(DATA, 0, 1, b"he") + frame(DATA, END_STREAM, 1, b"llo"))
        assert read_all(wire).status == 200
        assert lab.seen[-1].endswith(b"Content-Length: 5\r\nVia: 2.0 creto\r\n\r\nhello")
        wire.request(3, end=False, method=b"POST")
        wire.send(frame(DATA, 0, 3, b"he") + frame(DATA, 0, 3, b"llo") + frame(DATA, END_STREAM, 3))
        assert read_all(wire, 3).status == 200
        assert lab.seen[-1].endswith(b"\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n")


def test_streams_are_answered_side_by_side_within_their_windows(lab: Lab) -> None:
    with Wire(lab.reverse, window=0) as wire:
        for stream in (1, 3):
            wire.request(stream)
        wire.send(frame(WINDOW, 0, 0, (1 << 20).to_bytes(4, "big")))
        wire.send(frame(WINDOW, 0, 3, (1 << 20).to_bytes(4, "big")))
        assert wire.answer(3).body == BODY, "the first stream may send nothing and holds nobody up"
        wire.send(frame(WINDOW, 0, 1, (1 << 20).to_bytes(4, "big")))
        rest = b"".join(got.payload for got in _until_end(wire, 1) if got.kind == DATA)
        assert rest == BODY


def _until_end(wire: Wire, stream: int) -> Iterator[Frame]:
    for got in wire.frames():
        if got.stream == stream:
            yield got
            if got.flags & END_STREAM and got.kind in (DATA, HEADERS):
                return


def test_head_and_a_refusal(lab: Lab) -> None:
    with Wire(lab.reverse) as wire:
        wire.request(1, method=b"HEAD")
        answer = wire.answer(1)
        assert (answer.status, answer.body, answer.headers[b"content-length"]) == (200, b"", b"%d" % len(BODY))
        wire.request(3, path=b"/denied/")
        answer = wire.answer(3)
        assert answer.status == 403 and b"policy_deny" in answer.body
        wire.request(5)
        assert read_all(wire, 5).status == 200, "a refusal costs nobody the connection"
    assert [outcome.decision for outcome in lab.journal()][-2:] == ["deny", "allow"]


def test_an_early_answer_ends_the_stream_without_its_request(lab: Lab) -> None:
    with Wire(lab.reverse) as wire:
        wire.request(1, path=b"/denied/", end=False, method=b"POST")
        assert wire.answer(1).status == 403
        assert next(got for got in wire.frames() if got.kind == RST).code == 0
        wire.send(frame(DATA, END_STREAM, 1, b"late"))
        wire.request(3)
        assert read_all(wire, 3).status == 200


def test_connect_is_for_http1(lab: Lab) -> None:
    with Wire(lab.explicit) as wire:
        block = wire.encoder.encode([(b":method", b"CONNECT"), (b":authority", b"good.test:80")])
        wire.send(frame(HEADERS, END_HEADERS, 1, block))
        assert wire.answer(1).status == 501


def test_explicit_proxying_takes_the_authority_as_destination(lab: Lab) -> None:
    with Wire(lab.explicit) as wire:
        wire.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, wire.block(authority=b"good.test", path=b"/q")))
        assert read_all(wire).status == 200
    assert lab.seen[-1].startswith(b"GET /q HTTP/1.1\r\nHost: good.test\r\n")


def test_an_agent_that_cancels_is_gone(lab: Lab) -> None:
    before = len(lab.journal())
    with Wire(lab.reverse, window=0) as wire:
        wire.request(1)
        assert next(got for got in wire.frames() if got.kind == HEADERS)
        wire.send(frame(RST, 0, 1, CANCEL.to_bytes(4, "big")))
        assert lab.recorded(before + 1)[-1].error == "client_gone"


def test_http1_still_comes_by_the_same_listener_in_any_pieces(lab: Lab) -> None:
    with Wire(lab.reverse, greet=False) as wire:
        for piece in (b"P", b"U", b"T /good/ HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n"):
            wire.send(piece)
        assert wire.sock.recv(12) == b"HTTP/1.1 200"
    with Wire(lab.reverse, greet=False) as wire:
        for byte in PREFACE:
            wire.send(bytes((byte,)))
        wire.send(frame(SETTINGS))
        wire.request(1)
        assert read_all(wire).status == 200


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(lab: Lab) -> None:
    command = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_version} %{http_code} %{size_download}"]
    plain = subprocess.run(
        [*command, "--http2-prior-knowledge", f"http://127.0.0.1:{lab.reverse}/good/"], capture_output=True, text=True, timeout=60
    )
    if plain.returncode == 1:
        pytest.skip("this curl was built without HTTP/2")
    assert plain.stdout == f"2 200 {len(BODY)}"


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load is not installed (nghttp2-client)")
def test_h2load_gets_every_answer(lab: Lab) -> None:
    done = subprocess.run(
        ["h2load", "-n", "300", "-c", "3", "-m", "20", f"http://127.0.0.1:{lab.reverse}/good/"], capture_output=True, text=True, timeout=60
    )
    assert "300 succeeded, 0 failed, 0 errored" in done.stdout, done.stdout


def test_tls_by_alpn(tmp_path: Path) -> None:
    """The refusal comes from creto itself, so no upstream is needed; the tunnel is the explicit proxy's."""
    with h2_lab(tmp_path, 1) as lab:
        with Wire(lab.tls, tls=tls_client(Path(lab.ca), "h2", "http/1.1"), greet=False) as wire:
            assert wire.sock.selected_alpn_protocol() == "h2"  # type: ignore[attr-defined]
        with Wire(lab.tls, tls=tls_client(Path(lab.ca), "http/1.1"), greet=False) as wire:
            assert wire.sock.selected_alpn_protocol() == "http/1.1"  # type: ignore[attr-defined]


@pytest.mark.parametrize("listener", ["reverse", "explicit"])
def test_a_connection_counts_once_among_its_agents(tmp_path: Path, listener: str) -> None:
    """As soon as it has asked for something: before that it is not known whose it is."""
    agents = Agents(0, 1)
    with http1_origin() as (port, _), h2_lab(tmp_path, port, protection=Protection(agents=agents)) as lab:
        address = getattr(lab, listener)

        def ask(wire: Wire, stream: int) -> None:
            block = wire.block(authority=b"good.test", path=b"/good/")
            wire.send(frame(HEADERS, END_HEADERS | END_STREAM, stream, block))

        with Wire(address) as first, Wire(address) as second:
            for stream in (1, 3):
                ask(first, stream)
                assert first.answer(stream).status == 200
            ask(second, 1)
            frames = list(second.frames())
            assert [got.code for got in frames if got.kind == GOAWAY] == [0, 0], "it is told to go away, and closed"
            heads = [list(second.decoder.decode(got.payload, raw=True)) for got in frames if got.kind == HEADERS]
            assert [tuple(head[0]) for head in heads] == [(b":status", b"429")]
            assert [connections for _, connections in agents.in_use().values()] == [1]
        for _ in range(2000):
            if [connections for _, connections in agents.in_use().values()] == [0]:
                break
            threading.Event().wait(0.005)
        with Wire(address) as third:
            ask(third, 1)
            assert third.answer(1).status == 200
    assert lab.journal()[2].error == "too_many_connections"


# -- attacks


@pytest.fixture
def bystander(lab: Lab) -> Iterator[None]:
    """A connection opened before the attack, which must be served after it."""
    with Wire(lab.reverse) as wire:
        wire.request(1)
        assert read_all(wire).status == 200
        yield
        wire.request(3)
        assert read_all(wire, 3).status == 200


def attack(lab: Lab, data: bytes, *codes: int, reason: str) -> None:
    """The connection ends with one of ``codes`` and a record that gives ``reason``."""
    with Wire(lab.reverse) as wire:
        wire.send(data)
        assert wire.fate() in [[code] for code in codes]
    await_error(lab, f"http2_{reason}")


@pytest.mark.usefixtures("bystander")
def test_reset_flood(lab: Lab) -> None:
    """CVE-2023-44487: requests that are reset as soon as they are sent."""
    wire = Wire(lab.reverse)
    cancel = [frame(HEADERS, 5, n, wire.block(path=b"/denied/")) + frame(RST, 0, n, bytes(3) + b"\x08") for n in range(1, 2 * BURST, 2)]
    with wire:
        for start in range(0, len(cancel), 50):
            wire.send(b"".join(cancel[start : start + 50]))
        wire.send(frame(RST, 0, 1, bytes(3) + b"\x08") * BURST)
        assert wire.fate() == [ENHANCE_YOUR_CALM]
    await_error(lab, "http2_reset_flood")


@pytest.mark.usefixtures("bystander")
def test_continuation_flood(lab: Lab) -> None:
    """CVE-2024-27316: a header block that never ends."""
    first = frame(HEADERS, END_STREAM, 1, b"\x82")
    attack(lab, first + frame(CONTINUATION, 0, 1, bytes(1)) * 50, ENHANCE_YOUR_CALM, reason="continuation_flood")


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    ("flood", "reason"),
    [
        (frame(SETTINGS), "settings_flood"),
        (frame(PING, 0, 0, bytes(8)), "ping_flood"),
        (frame(DATA, 0, 1), "empty_data_flood"),
    ],
)
def test_control_floods(lab: Lab, flood: bytes, reason: str) -> None:
    with Wire(lab.reverse) as wire:
        opened = frame(HEADERS, END_HEADERS, 1, wire.block(method=b"POST"))
    attack(lab, opened + flood * (BURST + 1), ENHANCE_YOUR_CALM, reason=reason)


@pytest.mark.usefixtures("bystander")
def test_hpack_bomb(lab: Lab) -> None:
    """One large field in the table, referred to again and again: a few KiB that decode to megabytes."""
    with Wire(lab.reverse) as wire:
        block = wire.block((b"x-bomb", b"a" * 3000)) + b"\xbe" * 8000
        wire.send(frame(HEADERS, 5, 1, block))
        assert wire.fate() == [ENHANCE_YOUR_CALM]
    await_error(lab, "http2_header_list_too_large")


@pytest.mark.usefixtures("bystander")
def test_a_field_section_beyond_the_limit_is_answered(lab: Lab) -> None:
    with Wire(lab.reverse) as wire:
        wire.request(1, *[(b"x-%d" % n, b"v") for n in range(140)])
        assert wire.answer(1).status == 431
        wire.request(3)
        assert read_all(wire, 3).status == 200
    await_error(lab, "http2_fields_too_large")


@pytest.mark.usefixtures("bystander")
def test_window_overflow(lab: Lab) -> None:
    overflow = frame(WINDOW, 0, 0, (0x7FFFFFFF).to_bytes(4, "big"))
    attack(lab, overflow * 2, FLOW_CONTROL_ERROR, reason="flow_control_error")


@pytest.mark.usefixtures("bystander")
def test_more_streams_than_allowed(lab: Lab) -> None:
    """Of 101 streams that stay open the last is refused, or the connection with it; the others are answered."""
    with Wire(lab.reverse, window=0) as wire:
        for number in range(101):
            wire.request(2 * number + 1)
        refusal = next(got for got in wire.frames() if got.kind in (RST, GOAWAY))
        assert refusal.kind == GOAWAY or refusal.stream == 201
        assert refusal.code in (7, PROTOCOL_ERROR)
        await_error(lab, "http2_too_many_streams")


MALFORMED = {
    "uppercase": ([(b"X-Upper", b"1")], "bad_field_name"),
    "connection": ([(b"connection", b"close")], "connection_field"),
    "transfer-encoding": ([(b"transfer-encoding", b"chunked")], "connection_field"),
    "te": ([(b"te", b"chunked")], "bad_te"),
    "host": ([(b"host", b"other.test")], "host_mismatch"),
    "pseudo": ([(b":path", b"/two")], "bad_pseudo_field"),
    "unknown pseudo": ([(b":x", b"y")], "bad_pseudo_field"),
    "crlf": ([(b"x", b"1\r\ny: 2")], "bad_field_value"),
    "nul": ([(b"x", b"1\x00")], "bad_field_value"),
    "space": ([(b"x", b" 1")], "bad_field_value"),
    "length": ([(b"content-length", b"5")], "content_length_mismatch"),
    "two lengths": ([(b"content-length", b"0"), (b"content-length", b"0")], "bad_content_length"),
    "odd length": ([(b"content-length", b"+0")], "bad_content_length"),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_requests_never_reach_the_upstream(lab: Lab, case: str) -> None:
    before, known = len(lab.seen), len(lab.journal())
    fields, reason = MALFORMED[case]
    with Wire(lab.reverse) as wire:
        wire.request(1, *fields)
        assert wire.answer(1).reset == PROTOCOL_ERROR
        assert len(lab.seen) == before
    assert [(each.decision, each.error) for each in lab.recorded(known + 1)[known:]] == [("deny", f"http2_{reason}")]


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("sent", [b"123", b"1234567"])
def test_a_body_that_is_not_as_long_as_it_said(lab: Lab, sent: bytes) -> None:
    known = len(lab.journal())
    with Wire(lab.reverse) as wire:
        wire.request(1, (b"content-length", b"5"), end=False, method=b"POST")
        wire.send(frame(DATA, END_STREAM, 1, sent))
        assert wire.answer(1).reset == PROTOCOL_ERROR
    assert [each.error for each in lab.recorded(known + 1)[known:]] == ["http2_content_length_mismatch"]


INCOMPLETE = {
    "no method": ([b":scheme", b":path", b":authority"], "bad_method"),
    "no path": ([b":method", b":scheme", b":authority"], "bad_path"),
    "no scheme": ([b":method", b":path", b":authority"], "bad_scheme"),
    "no authority": ([b":method", b":scheme", b":path"], "bad_authority"),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("case", INCOMPLETE)
def test_requests_that_do_not_say_what_they_want(lab: Lab, case: str) -> None:
    names, reason = INCOMPLETE[case]
    values = {b":method": b"GET", b":scheme": b"http", b":path": b"/good/", b":authority": b"h.test"}
    known = len(lab.journal())
    with Wire(lab.reverse) as wire:
        wire.send(frame(HEADERS, END_HEADERS | END_STREAM, 1, wire.encoder.encode([(name, values[name]) for name in names])))
        assert wire.answer(1).reset == PROTOCOL_ERROR
    assert [each.error for each in lab.recorded(known + 1)[known:]] == [f"http2_{reason}"]


def test_an_agent_that_says_that_it_leaves_leaves_no_other_record(lab: Lab) -> None:
    """As Node does, and Go: GOAWAY without an error before it closes."""
    known = len(lab.journal())
    with Wire(lab.reverse) as wire:
        wire.request(1)
        assert read_all(wire).status == 200
        wire.send(frame(GOAWAY, payload=bytes(8)))
        assert not any(wire.fate())
    with Wire(lab.reverse) as wire:
        wire.request(1, end=False, method=b"POST")
        wire.send(frame(GOAWAY, payload=bytes(8)) + frame(DATA, END_STREAM, 1, b"the rest"))
        wire.send(frame(WINDOW, 0, 0, (1 << 20).to_bytes(4, "big")) + frame(WINDOW, 0, 1, (1 << 20).to_bytes(4, "big")))
        answer = b"".join(got.payload for got in wire.frames() if got.kind == DATA)
        assert answer == BODY, "what is open is still answered, and then creto closes"
    assert [each.error for each in lab.recorded(known + 2)[known:]] == ["", ""]


@pytest.mark.usefixtures("bystander")
def test_other_protocols_than_websocket_are_declined(lab: Lab) -> None:
    """RFC 8441 section 4: who asks for one is told and recorded."""
    known = len(lab.journal())
    with Wire(lab.reverse) as wire:
        fields = [(b":method", b"CONNECT"), (b":protocol", b"connect-udp"), (b":scheme", b"http"), (b":path", b"/good/")]
        wire.send(frame(HEADERS, END_HEADERS, 1, wire.encoder.encode([*fields, (b":authority", b"h.test")])))
        assert wire.answer(1).status == 501
        wire.request(3)
        assert read_all(wire, 3).status == 200
    recorded = lab.recorded(known + 2)[known:]
    assert [(each.status, each.error) for each in recorded] == [(501, "http2_extended_connect"), (200, "")]


VIOLATIONS = {
    "data on an idle stream": (frame(DATA, 0, 1, b"x"), "protocol_error"),
    "settings on a stream": (frame(SETTINGS, 0, 1), "protocol_error"),
    "settings of an odd size": (frame(SETTINGS, 0, 0, b"x"), "frame_size_error"),
    "a window of nothing": (frame(WINDOW, 0, 0, bytes(4)), "protocol_error"),
    "a window too large": (frame(WINDOW, 0, 0, (0x7FFFFFFF).to_bytes(4, "big")) * 2, "flow_control_error"),
    "a ping of an odd size": (frame(PING, 0, 0, b"x"), "frame_size_error"),
    "compression that is none": (frame(HEADERS, END_HEADERS | END_STREAM, 1, b"\xff" * 20), "compression_error"),
    "a stream of the server's": (frame(HEADERS, END_HEADERS | END_STREAM, 2, b"\x82\x87\x84\x41\x01a"), "protocol_error"),
    "a continuation of nothing": (frame(CONTINUATION, END_HEADERS, 1, b"\x82"), "protocol_error"),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("case", VIOLATIONS)
def test_what_breaks_a_connection_has_one_name_in_both_framings(lab: Lab, case: str) -> None:
    data, reason = VIOLATIONS[case]
    known = len(lab.journal())
    with Wire(lab.reverse) as wire:
        wire.send(data)
        assert len(wire.fate()) == 1
    assert [each.error for each in lab.recorded(known + 1)[known:]] == [f"http2_{reason}"]


def test_a_preface_that_is_none(lab: Lab, tmp_path: Path) -> None:
    """By ALPN: elsewhere it would be read as HTTP/1.1."""
    known = len(lab.journal())
    with Wire(lab.tls, tls=tls_client(Path(lab.ca), "h2"), greet=False) as wire:
        wire.send(PREFACE[:-4] + b"XX\r\n" + frame(SETTINGS))
        assert wire.fate() in ([PROTOCOL_ERROR], [])
    assert [each.error for each in lab.recorded(known + 1)[known:]] == ["http2_bad_preface"]


def test_a_header_block_in_as_many_frames_as_are_allowed_in_any_pieces(lab: Lab) -> None:
    with Wire(lab.reverse) as wire:
        block = wire.block((b"x-long", b"a" * 200))
        pieces = [block[start : start + 16] for start in range(0, len(block), 16)][:15] + [block[240:]]
        frames = [frame(HEADERS, END_STREAM, 1, pieces[0])]
        frames += [frame(CONTINUATION, END_HEADERS if piece is pieces[-1] else 0, 1, piece) for piece in pieces[1:]]
        wire.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for byte in b"".join(frames):
            wire.send(bytes((byte,)))
        assert read_all(wire).status == 200


# -- time


@pytest.fixture(scope="module", params=["nghttp2", "h2"])
def hasty(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    bounds = Bounds(head_s=0.3, idle_s=0.3)
    with framed_by(request.param), http1_origin() as (port, _), h2_lab(tmp_path_factory.mktemp("lab"), port, bounds=bounds) as running:
        yield running


def test_an_idle_connection_is_told_and_closed(hasty: Lab) -> None:
    with Wire(hasty.reverse) as wire:
        wire.request(1)
        assert wire.answer().status == 200
        assert wire.fate() == [0]


def test_half_a_preface_is_not_waited_for_long(hasty: Lab) -> None:
    with Wire(hasty.reverse, greet=False) as wire:
        wire.send(PREFACE[:10])
        assert wire.sock.recv(100) == b""


def test_a_header_block_that_does_not_go_on(hasty: Lab) -> None:
    with Wire(hasty.reverse) as wire:
        wire.acknowledges = False  # nothing may stand inside a header block
        wire.send(frame(HEADERS, END_STREAM, 1, b"\x82"))
        assert wire.fate() == [PROTOCOL_ERROR]
    assert errors(hasty)[-1] == "http2_head_timeout"


def test_draining_says_so_and_finishes_what_is_open(tmp_path: Path) -> None:
    with http1_origin(BODY) as (port, _), h2_lab(tmp_path, port) as lab, Wire(lab.reverse, window=100) as wire:
        wire.request(1)
        assert next(got for got in wire.frames() if got.kind == HEADERS)
        lab.loop.call_soon_threadsafe(lab.gateway._http2.drain)  # type: ignore[union-attr]
        assert next(got for got in wire.frames() if got.kind == GOAWAY).code == 0
        wire.send(frame(WINDOW, 0, 0, (1 << 20).to_bytes(4, "big")) + frame(WINDOW, 0, 1, (1 << 20).to_bytes(4, "big")))
        body = b"".join(got.payload for got in wire.frames() if got.kind == DATA)
        assert len(body) >= len(BODY) - 100


def test_an_ack_nobody_asked_for_is_ignored(lab: Lab) -> None:
    with Wire(lab.reverse) as wire:
        wire.send(frame(PING, ACK, 0, bytes(8)))
        wire.request(1)
        assert read_all(wire).status == 200
