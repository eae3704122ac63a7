"""Frames to messages without I/O: the same bytes, cut anywhere, give the same; nothing but judged messages gets out."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import Frame, FrameProtocol, Opcode

from creto_proxy.deadline import Guard
from creto_proxy.hookspecs import Direction, MessageKind
from creto_proxy.model import Decision, Verdict
from creto_proxy.testing import make_request
from creto_proxy.websocket import Broken, Conversation, Watch, Watchers

from .websocket_lab import frame

LIMIT = 1000


class Seeing:
    def __init__(self) -> None:
        self.seen: list[tuple[Direction, MessageKind, bytes]] = []

    def message(self, direction: Direction, kind: MessageKind, data: bytes) -> bytes | Decision:
        self.seen.append((direction, kind, data))
        return data


def nothing() -> list[bytes | bytearray]:
    return []


def conversation(watch: Seeing | None = None) -> Conversation:
    return Conversation(Watch([("seeing", watch or Seeing())], Guard(1.0), LIMIT))


def received(data: bytes, *, client: bool) -> list[Frame]:
    """What an endpoint makes of ``data``, fragments of a frame included."""
    protocol = FrameProtocol(client=client, extensions=[])
    protocol.receive_bytes(data)
    return list(protocol.received_frames())


def pass_up(pieces: Sequence[bytes]) -> tuple[bytes, tuple[int, str] | None, Seeing]:
    """(what the upstream gets, unmasked into frames, how it broke, what the watch saw)."""
    seeing = Seeing()
    relay = conversation(seeing)
    out = nothing()
    broken = None
    for piece in pieces:
        try:
            relay.up(piece, out)
        except Broken as error:
            broken = (error.code, error.reason)
            break
    return b"".join(out), broken, seeing


def test_a_message_in_fragments_goes_on_whole_and_pings_between_them_at_once() -> None:
    relay, out = conversation(seeing := Seeing()), nothing()
    relay.up(frame(1, b"he", fin=False), out)
    assert out == [] and seeing.seen == []
    relay.up(frame(9, b"?"), out)
    assert [(f.opcode, f.payload) for f in received(b"".join(out), client=False)] == [(Opcode.PING, b"?")]
    relay.up(frame(0, b"llo"), out)
    assert seeing.seen == [("up", "text", b"hello")]
    assert [(f.opcode, f.payload) for f in received(b"".join(out), client=False)][1:] == [(Opcode.TEXT, "hello")]


def test_what_goes_up_is_masked_afresh_and_what_goes_down_is_not() -> None:
    relay, up, down = conversation(), nothing(), nothing()
    relay.up(frame(2, b"x" * 20, mask=b"\x00\x00\x00\x00") * 2, up)
    relay.down(frame(2, b"x" * 20, mask=None), down)
    keys = {bytes(each[2:6]) for each in up}
    assert len(keys) == 2 and b"\x00\x00\x00\x00" not in keys
    assert bytes(down[0]) == b"\x82\x14" + b"x" * 20


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(frame(1, b"x", mask=None), 1002, id="unmasked"),
        pytest.param(frame(1, b"x", rsv=4), 1002, id="compressed though nothing was agreed"),
        pytest.param(frame(3), 1002, id="reserved opcode"),
        pytest.param(frame(9, b"x", fin=False), 1002, id="fragmented ping"),
        pytest.param(b"\x89\xfe\x00\x7e" + bytes(4) + bytes(126), 1002, id="long ping"),
        pytest.param(frame(0, b"x"), 1002, id="continuation of nothing"),
        pytest.param(frame(1, b"x", fin=False) + frame(1, b"y"), 1002, id="message in a message"),
        pytest.param(b"\x82\xfe\x00\x05" + bytes(9), 1002, id="length not minimal"),
        pytest.param(b"\x82\xff" + b"\xff" * 8 + bytes(4), 1002, id="length with the high bit"),
        pytest.param(frame(8, b"\x03"), 1002, id="half a close code"),
        pytest.param(frame(8, struct.pack("!H", 1005)), 1002, id="a close code that is never sent"),
        pytest.param(frame(8, struct.pack("!H", 1000) + b"\xff"), 1007, id="close reason not text"),
        pytest.param(frame(1, b"\xff"), 1007, id="not UTF-8"),
        pytest.param(frame(1, b"ok \xe2\x82"), 1007, id="cut off within a character"),
        pytest.param(frame(1, b"\xed\xa0\x80", fin=False), 1007, id="surrogate, seen before the message is complete"),
        pytest.param(frame(2, bytes(LIMIT + 1)), 1009, id="too large"),
        pytest.param(frame(2, bytes(LIMIT), fin=False) + frame(0, b"x"), 1009, id="too large in fragments"),
    ],
)  # fmt: skip
def test_what_is_malformed_ends_the_connection_and_is_never_judged(data: bytes, code: int) -> None:
    out, broken, seeing = pass_up([data])
    assert broken is not None and broken[0] == code
    assert seeing.seen == [] and out == b""


def test_a_message_of_the_largest_size_passes() -> None:
    _, broken, seeing = pass_up([frame(2, bytes(LIMIT))])
    assert broken is None and seeing.seen == [("up", "binary", bytes(LIMIT))]


def test_a_huge_frame_is_refused_by_what_has_come_of_it_not_kept_until_it_is_complete() -> None:
    relay, out = conversation(), nothing()
    relay.up(b"\x82\xff" + struct.pack("!Q", 1 << 40) + bytes(4), out)
    with pytest.raises(Broken) as caught:
        for _ in range(LIMIT):
            relay.up(bytes(100), out)
    assert caught.value.code == 1009


def test_frames_beyond_those_wanted_now_are_met_by_the_next_call() -> None:
    relay, out = conversation(seeing := Seeing()), nothing()
    assert relay.up(frame(1, b"a") + frame(1, b"b") + frame(1, b"c"), out, 2)
    assert len(seeing.seen) == 2
    assert not relay.up(b"", out, 2)
    assert [data for _, _, data in seeing.seen] == [b"a", b"b", b"c"]


def test_nothing_counts_after_a_close() -> None:
    out, broken, seeing = pass_up([frame(8, struct.pack("!H", 4000) + b"bye") + frame(1, b"x"), frame(3), b"\xff" * 99])
    assert broken is None and seeing.seen == []
    assert [f.payload for f in received(out, client=False)] == [(4000, "bye")]


def test_a_close_without_a_code_stays_one() -> None:
    out, _, _ = pass_up([frame(8)])
    assert out[:2] == b"\x88\x80"


def test_the_last_close_goes_to_who_has_not_had_one() -> None:
    relay, out = conversation(), nothing()
    relay.up(frame(8, struct.pack("!H", 1000)), out)
    up, down = relay.end(Broken(1008, "no_secrets", "Ask the owner."))
    assert up == b""
    assert [f.payload for f in received(down, client=True)] == [(1008, "no_secrets: Ask the owner.")]


def test_a_reason_too_long_for_a_close_frame_is_cut_between_characters() -> None:
    _, down = conversation().end(Broken(1008, "reason", "ä" * 200))
    [last] = received(down, client=True)
    assert isinstance(last.payload, tuple)
    assert last.payload[1].startswith("reason: ää") and 120 <= len(last.payload[1].encode()) <= 123


MESSAGES = st.lists(
    st.one_of(
        st.tuples(st.just(1), st.text(max_size=60).map(str.encode)),
        st.tuples(st.just(2), st.binary(max_size=60)),
        st.tuples(st.just(9), st.binary(max_size=9)),
        st.tuples(st.just(10), st.binary(max_size=9)),
    ),
    max_size=6,
)


@given(MESSAGES, st.data())
def test_the_same_messages_arrive_however_they_are_fragmented_and_cut(
    messages: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    wire = b""
    for opcode, payload in messages:
        cuts = sorted(data.draw(st.lists(st.integers(0, len(payload)), max_size=3))) if opcode < 8 else []
        parts = [payload[a:b] for a, b in zip([0, *cuts], [*cuts, len(payload)], strict=True)]
        for at, part in enumerate(parts):
            wire += frame(
                opcode if at == 0 else 0,
                part,
                fin=at == len(parts) - 1,
                mask=data.draw(st.binary(min_size=4, max_size=4)),
            )
    out, broken, seeing = pass_up(cut(wire, data))
    assert broken is None
    kinds = {1: "text", 2: "binary"}
    assert seeing.seen == [("up", kinds[opcode], payload) for opcode, payload in messages if opcode < 8]
    arrived = [
        (int(f.opcode), f.payload.encode() if isinstance(f.payload, str) else f.payload)
        for f in received(out, client=False)
    ]
    assert arrived == messages


@given(st.binary(max_size=200), st.data())
def test_garbage_parses_or_breaks_and_does_the_same_whole_or_in_pieces(junk: bytes, data: st.DataObject) -> None:
    out, broken, seeing = pass_up([junk])
    cut_out, cut_broken, cut_seeing = pass_up(cut(junk, data))
    assert (cut_broken, cut_seeing.seen) == (broken, seeing.seen)
    assert received(cut_out, client=False) == received(out, client=False)


def cut(wire: bytes, data: st.DataObject) -> list[bytes]:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=8)))
    return [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]


# -- the stage


class Answering:
    def __init__(self, answer: object) -> None:
        self.answer = answer

    def open(self, request: object) -> Answering | None:
        return self if self.answer is not None else None

    def message(self, direction: Direction, kind: MessageKind, data: bytes) -> bytes | Decision:
        return self.answer(data) if callable(self.answer) else self.answer  # type: ignore[return-value]


def judged(kind: MessageKind, *answers: object) -> bytes:
    watch = Watchers([(f"p{n}", Answering(answer)) for n, answer in enumerate(answers)], Guard(1.0)).open(
        make_request(), "websocket"
    )
    assert watch is not None
    relay, out = Conversation(watch), nothing()
    relay.up(frame(1 if kind == "text" else 2, b"abc"), out)
    [arrived] = received(b"".join(out), client=False)
    return arrived.payload.encode() if isinstance(arrived.payload, str) else bytes(arrived.payload)  # type: ignore[arg-type]


def test_each_plugin_sees_what_those_before_it_made_of_a_message() -> None:
    assert judged("text", lambda data: data + b"d", Decision(Verdict.ALLOW, "fine"), lambda data: data[::-1]) == b"dcba"


@pytest.mark.parametrize(
    ("answer", "code", "reason"),
    [
        (Decision(Verdict.DENY, "no_secrets", "Not that."), 1008, "no_secrets"),
        (Decision(Verdict.ESCALATE, "ask_somebody"), 1008, "ask_somebody"),
        (lambda data: 1 / 0, 1011, "stage_failed"),
        (False, 1011, "stage_failed"),
        ("abc", 1011, "stage_failed"),
        (b"\xff", 1011, "stage_failed"),
    ],
)
def test_whatever_is_no_yes_ends_the_connection(answer: object, code: int, reason: str) -> None:
    with pytest.raises(Broken) as caught:
        judged("text", answer, lambda data: pytest.fail("asked after a no"))
    assert (caught.value.code, caught.value.reason) == (code, reason)


def test_binary_may_become_anything() -> None:
    assert judged("binary", b"\xff") == b"\xff"


def test_none_is_not_a_yes() -> None:
    with pytest.raises(Broken) as caught:
        judged("text", lambda data: None)
    assert caught.value.code == 1011


def test_nobody_watches_what_is_no_websocket_and_a_version_does_not_hide_one() -> None:
    watchers = Watchers([("p", Answering(b""))], Guard(1.0))
    assert watchers.open(make_request(), "tls/1.0") is None
    assert watchers.open(make_request(), "WebSocket/13") is not None
    assert Watchers([("p", Answering(None))], Guard(1.0)).open(make_request(), "websocket") is None
