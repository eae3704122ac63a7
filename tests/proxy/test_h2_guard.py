"""The frame guard: each flood ends in its own reason, ordinary traffic in none, wherever the network cut the bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_proxy.h2.guard import BURST, PER_S, PREFACE, Flood, Guard

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9


def frame(kind: int, flags: int = 0, stream: int = 1, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def verdict(data: bytes, cuts: list[int] | None = None, *, preface: int = 0) -> str:
    guard = Guard(lambda: 0.0, preface=preface)
    edges = [0, *sorted(cut % (len(data) + 1) for cut in cuts or ()), len(data)]
    try:
        for start, stop in itertools.pairwise(edges):
            guard.feed(data[start:stop])
    except Flood as flood:
        return flood.reason
    return ""


FLOODS = {
    "reset_flood": frame(RST, payload=bytes(4)) * (BURST + 1),
    "ping_flood": frame(PING, stream=0, payload=bytes(8)) * (BURST + 1),
    "settings_flood": frame(SETTINGS, stream=0) * (BURST + 1),
    "priority_flood": frame(PRIORITY, payload=bytes(5)) * (BURST + 1),
    "empty_data_flood": frame(DATA) * (BURST + 1),
    "continuation_flood": frame(HEADERS, payload=b"x") + frame(CONTINUATION) * 16,
}


@pytest.mark.parametrize("reason", FLOODS)
def test_a_flood_is_named(reason: str) -> None:
    assert verdict(FLOODS[reason]) == reason


def test_a_header_block_of_too_many_bytes_is_a_continuation_flood() -> None:
    piece = frame(CONTINUATION, payload=bytes(16000))
    assert verdict(frame(HEADERS, payload=bytes(16000)) + piece * 4) == "continuation_flood"
    assert verdict(frame(HEADERS, payload=bytes(16000)) + piece * 3) == ""


def test_a_frame_beyond_the_announced_size_is_refused_by_its_header() -> None:
    assert verdict(b"\x00\x40\x01" + bytes(6)) == "frame_too_large"
    assert verdict(frame(DATA, payload=bytes(16384))) == ""


def test_what_was_spent_comes_back_with_time() -> None:
    now = [0.0]
    guard = Guard(lambda: now[0])
    guard.feed(frame(PING, payload=bytes(8)) * BURST)
    now[0] = 2.0
    guard.feed(frame(PING, payload=bytes(8)) * int(2 * PER_S - 1))
    with pytest.raises(Flood):
        guard.feed(frame(PING, payload=bytes(8)) * 3)


def test_a_stream_that_was_passed_over_cannot_be_opened() -> None:
    opened = frame(HEADERS, 4, stream=5)
    assert verdict(PREFACE + opened + frame(HEADERS, 4, stream=3), preface=len(PREFACE)) == "stream_order"
    assert verdict(PREFACE + opened + frame(HEADERS, 5, stream=5), preface=len(PREFACE)) == ""
    assert verdict(opened + frame(HEADERS, 4, stream=3)) == "", "a server answers in any order"


ORDINARY = st.lists(
    st.one_of(
        st.builds(frame, st.just(DATA), st.just(0), st.integers(1, 9), st.binary(min_size=1, max_size=40)),
        st.builds(frame, st.just(DATA), st.just(1), st.integers(1, 9), st.just(b"")),
        st.builds(frame, st.just(WINDOW), st.just(0), st.integers(0, 9), st.just(bytes(4))),
        st.builds(frame, st.just(PING), st.just(0), st.just(0), st.just(bytes(8))),
        st.builds(lambda a, b: frame(HEADERS, 0, 1, a) + frame(CONTINUATION, 4, 1, b), st.binary(max_size=30), st.binary(max_size=30)),
    ),
    max_size=30,
)


@given(ORDINARY, st.lists(st.integers(0, 4000), max_size=12))
def test_ordinary_frames_pass_however_they_are_cut(frames: list[bytes], cuts: list[int]) -> None:
    assert verdict(b"".join(frames), cuts) == ""


@given(st.sampled_from(sorted(FLOODS)), st.lists(st.integers(0, 20000), max_size=12))
def test_a_flood_is_the_same_however_it_is_cut(reason: str, cuts: list[int]) -> None:
    assert verdict(FLOODS[reason], cuts) == reason


@given(st.binary(max_size=300), st.lists(st.integers(0, 300), max_size=12))
def test_anything_gives_the_same_verdict_whole_or_in_pieces(data: bytes, cuts: list[int]) -> None:
    assert verdict(data, cuts) == verdict(data) == verdict(data, list(range(len(data))))
