"""Records taken as they stand: what comes out is what taking them apart gives, whatever the bytes."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from creto_hotpath._journal_py import crc32c

from .conftest import FORMS, Form

KINDS = "knsb(sm)ai"
WIDE = "s" * 14 + "(ii)" + "n"

texts = st.text(st.characters(codec="utf-8"), max_size=40) | st.text(st.sampled_from("aé"), min_size=250, max_size=300)
signed = st.integers(-(1 << 63), (1 << 63) - 1) | st.sampled_from(
    [(1 << bits) + more for bits in (5, 7, 8, 15, 16, 31, 32) for more in (-1, 0, 1)]
    + [-(1 << bits) + more for bits in (5, 7, 8, 15, 16, 31, 32) for more in (-1, 0, 1)]
)
usual = st.tuples(
    st.binary(min_size=16, max_size=16),
    signed.map(lambda number: number & (1 << 63) - 1),
    texts,
    st.binary(max_size=300),
    st.tuples(texts, st.dictionaries(texts | st.sampled_from(["a", "b"]), signed, max_size=15)),
    st.lists(texts, max_size=20).map(tuple),
    signed,
)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | texts | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=8) | st.dictionaries(texts, inner, max_size=18),
    max_leaves=20,
)
payloads = (
    usual.map(msgpack.packb)
    | usual.flatmap(lambda row: st.tuples(st.just(row), st.integers(0, 6), values).map(_with)).map(msgpack.packb)
    | values.map(msgpack.packb).filter(bool)
    | st.tuples(usual.map(msgpack.packb), st.integers(0, 4000), st.binary(min_size=1, max_size=3)).map(
        lambda of: of[0][: of[1] % len(of[0])] + of[2] + of[0][of[1] % len(of[0]) + 1 :]
    )
)


def _with(of: tuple[tuple[Any, ...], int, Any]) -> tuple[Any, ...]:
    row, at, value = of
    return (*row[:at], value, *row[at + 1 :])


def framed(payload: bytes) -> bytes:
    head = struct.pack("<I", len(payload))
    return head + struct.pack("<I", crc32c(head + payload)) + payload


def everything(form: Form, data: bytes, at: int = 0, limit: int = 1000) -> Any:
    """All that can be asked of the records in ``data``."""
    part = form("records")
    records = part.Records(part.Layout(KINDS), data, at, limit)
    columns = (
        0, 1, part.Made([2, 3], lambda text, other: (text, len(other)), width=2), 2, 3, 4, 5,
        part.Counts(5, ["a", "b"], None, lambda rest: sorted(rest.items())),
        part.Made([7], str, keep=False), 6, 7,
    )  # fmt: skip
    parts = (
        b"\x81", 0, 1, 2, (part.Made([4], lambda text: f"<{text}>".encode()), 2), 3, 5, 6, 7,
        part.Made([2, 7], lambda text, number: f"{text}{number}".encode()),
    )  # fmt: skip
    numbers = range(len(records))
    return (
        records.end, records.odd, [(records.payload(n), records.end_of(n)) for n in numbers],
        records.rows(columns), records.entries(parts), [records.column(field) for field in range(8)],
    )  # fmt: skip


@given(st.lists(payloads, max_size=6), st.binary(max_size=12))
@settings(deadline=None, max_examples=60)
@example([msgpack.packb((bytes(16), 1, "a", b"", ("", {}), ("x",) * 16, -1))] * 2, b"\0\0\0\0\0\0\0\0")
@example([b"\x97\xc4\x10" + bytes(16) + b"\x01\xa1a\xc4\x00\x92\xa0\x82\xa1a\x01\xa1a\x01\x90\x00"], b"")
def test_both_forms_say_the_same(found: list[bytes], tail: bytes) -> None:
    data = b"".join(map(framed, found)) + tail
    assert len({repr(everything(form, data)) for form in FORMS}) == 1


@given(st.lists(usual, min_size=1, max_size=4))
@settings(deadline=None, max_examples=40)
def test_what_is_usual_is_never_odd_and_comes_out_as_it_went_in(rows: list[Any]) -> None:
    packed = [msgpack.packb(row) for row in rows]
    for form in FORMS:
        part = form("records")
        records = part.Records(part.Layout(KINDS), b"".join(map(framed, packed)), 0, 10)
        assert records.odd == () and len(records) == len(rows)
        flat = [(*row[:4], *row[4], *row[5:]) for row in rows]
        assert records.rows(range(8)) == flat
        head, nested = b"\x97", b"\x92"
        assert records.entries((head, 0, 1, 2, 3, nested, 4, 5, 6, 7)) == packed


def test_reading_stops_at_what_is_no_whole_frame(form: Form) -> None:
    part = form("records")
    layout = part.Layout("s")
    one, two = framed(msgpack.packb(["one"])), framed(msgpack.packb(["two"]))
    damaged = two[:-1] + bytes((two[-1] ^ 1,))
    for tail in (two[:-1], damaged, b"", bytes(100), b"\xff" * 20):
        records = part.Records(layout, one + tail, 0, 10)
        assert (records.column(0), records.end) == (["one"], len(one))
    assert part.Records(layout, one + two, 0, 1).end == len(one)
    assert part.Records(layout, one + two, len(one), 9).column(0) == ["two"]
    with pytest.raises(ValueError, match="no byte"):
        part.Records(layout, one, len(one) + 1, 1)


def test_records_can_be_cut(form: Form) -> None:
    part = form("records")
    data = b"".join(framed(msgpack.packb([text])) for text in ("one", "two", "three"))
    records = part.Records(part.Layout("s"), data, 0, 9)
    end = records.end_of(1)
    records.cut(2)
    assert (len(records), records.column(0), records.end) == (2, ["one", "two"], end)
    for wrong in (records.payload, records.end_of):
        with pytest.raises(IndexError):
            wrong(2)
    with pytest.raises(IndexError):
        records.cut(3)


def test_a_function_is_asked_again_once_it_was_told_to_forget(form: Form) -> None:
    part = form("records")
    records = part.Records(part.Layout("s"), framed(msgpack.packb(["one"])), 0, 9)
    answers = iter("ab")
    made = part.Made([0], lambda _: next(answers))
    assert records.rows((made,)) == [("a",)]
    made.clear()
    assert records.rows((made,)) == [("b",)]


def test_what_a_function_raises_comes_out(form: Form) -> None:
    part = form("records")
    records = part.Records(part.Layout("s"), framed(msgpack.packb(["one"])), 0, 9)
    made = part.Made([0], int)
    asks: list[Callable[[], Any]] = [lambda: records.rows((made,)), lambda: records.entries((made,))]
    for ask in asks:
        with pytest.raises(ValueError, match="'one'"):
            ask()
    with pytest.raises(TypeError, match="gives bytes"):
        records.entries((part.Made([0], str),))
    with pytest.raises(TypeError, match="width 2"):
        records.rows((part.Made([0], str, width=2),))


def test_only_what_is_in_the_layout_can_be_asked_for(form: Form) -> None:
    part = form("records")
    records = part.Records(part.Layout("sn"), b"", 0, 1)
    asks: list[Callable[[], Any]] = [
        lambda: records.rows((2,)),
        lambda: records.column(-1),
        lambda: records.entries((part.Made([5], str),)),
        lambda: records.entries(((part.Made([0], str), 1),)),
        lambda: records.rows((part.Counts(0, ["a"], 0, len),)),
        lambda: part.Made([], str),
        lambda: part.Counts(0, ["x" * 32], 0, len),
    ]
    for ask in asks:
        with pytest.raises(ValueError):
            ask()


@pytest.mark.parametrize("kinds", ["", "x", "(", "s)", "()", "((s))", "s(s", "(" + "s" * 16 + ")", "s" * 65])
def test_a_layout_that_is_none_is_refused(form: Form, kinds: str) -> None:
    with pytest.raises(ValueError, match="layout"):
        form("records").Layout(kinds)


def test_a_record_of_many_fields_has_a_longer_head(form: Form) -> None:
    part = form("records")
    row = (*map(str, range(14)), (1, -2), 3)
    records = part.Records(part.Layout(WIDE), framed(msgpack.packb(row)), 0, 1)
    assert records.rows(range(17)) == [(*row[:14], 1, -2, 3)]


def short(at: int, *pieces: tuple[int, int, bytes]) -> bytes:
    """A payload that says how it differs from that of the frame at ``at``: (keep, drop, put in)."""
    return b"\xc1" + at.to_bytes(4, "little") + b"".join(bytes([k, d, len(add)]) + add for k, d, add in pieces)


def test_abbreviated_records_are_as_those_they_stand_for(form: Form) -> None:
    part = form("records")
    whole = msgpack.packb(["one", 7])
    before = framed(msgpack.packb(["zero", 7]))
    second = framed(short(1000, (2, 3, b"two"), (1, 0, b"")))
    third = framed(short(1000 - len(before), (2, 4, b"four"), (1, 0, b"")))
    data = framed(whole) + second + third
    records = part.Records(part.Layout("si"), data, 0, 9, 1000, lambda at: before[8:] if at == 1000 - len(before) else None)
    assert records.rows((0, 1)) == [("one", 7), ("two", 7), ("four", 7)]
    assert records.payload(1) == msgpack.packb(["two", 7]) and records.odd == ()
    assert records.end == records.end_of(2) == len(data) and records.end_of(0) == len(framed(whole))
    records.cut(2)
    assert (len(records), records.end) == (2, len(data) - len(third))


@pytest.mark.parametrize(
    "payload",
    [b"\xc1", b"\xc1abc", short(1000), short(1000, (9, 0, b"")), short(1001, (1, 0, b"")), short(1013, (1, 0, b"")),
     short(2000, (1, 0, b"")), short(990, (1, 0, b"")), short(0, (1, 0, b""))],
)  # fmt: skip
def test_an_abbreviation_of_what_is_not_there_is_no_record(form: Form, payload: bytes) -> None:
    part = form("records")
    first = framed(msgpack.packb(["a"]))
    records = part.Records(part.Layout("s"), first + framed(payload) + first, 0, 9, 1000, lambda at: None)
    assert (len(records), records.end) == (1, len(first))


@given(
    st.lists(
        st.tuples(st.integers(0, 90), st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.binary(max_size=9)))),
        max_size=6,
    )
)
def test_both_forms_read_abbreviations_alike(frames: list[tuple[int, list[tuple[int, int, bytes]]]]) -> None:
    first = framed(msgpack.packb(["some", "text", 5]))
    data = first + b"".join(framed(short(100 + at, *pieces)) for at, pieces in frames)
    seen = []
    for form in FORMS:
        part = form("records")
        records = part.Records(part.Layout("ssi"), data, 0, 9, 100, lambda at: None)
        seen.append((len(records), records.end, records.odd, [records.payload(n) for n in range(len(records))]))
    assert all(each == seen[0] for each in seen)
