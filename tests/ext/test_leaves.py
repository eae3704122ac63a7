"""Leaves of a Merkle log by the many: as RFC 6962 says, one by one."""

from __future__ import annotations

import hashlib

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import FORMS, Form


def test_hashes_of_every_length(form: Form) -> None:
    """Around every border of a block, and past the largest entry."""
    part = form("leaves")
    entries = [bytes(number % 251 for number in range(size)) for size in (*range(300), 65_535, 70_001)]
    assert part.leaf_hashes(entries) == [hashlib.sha256(b"\0" + entry).digest() for entry in entries]


def test_the_root_of_a_perfect_tree(form: Form) -> None:
    part = form("leaves")
    level = [hashlib.sha256(bytes((number,))).digest() for number in range(256)]
    for height in range(9):
        hashes = level[: 1 << height]
        while len(hashes) > 1:
            pairs = zip(hashes[::2], hashes[1::2], strict=True)
            hashes = [hashlib.sha256(b"\1" + left + right).digest() for left, right in pairs]
        assert part.perfect_root(level[: 1 << height]) == hashes[0]


@pytest.mark.parametrize("hashes", [[], [bytes(32)] * 3, [bytes(31)], [bytes(32), bytes(33)]])
def test_a_tree_that_is_not_perfect_is_refused(form: Form, hashes: list[bytes]) -> None:
    with pytest.raises(ValueError, match="perfect"):
        form("leaves").perfect_root(hashes)


@given(st.lists(st.binary(max_size=300), max_size=20))
@settings(deadline=None)
def test_entries_are_stored_after_their_lengths(entries: list[bytes]) -> None:
    for form in FORMS:
        part = form("leaves")
        assert part.bins(entries) == b"".join(map(msgpack.packb, entries))
        assert part.bundle(entries) == b"".join(len(entry).to_bytes(2, "big") + entry for entry in entries)


def test_large_entries_are_stored_or_refused(form: Form) -> None:
    part = form("leaves")
    large, larger = bytes(65_535), bytes(65_536)
    assert part.bundle([large]) == b"\xff\xff" + large
    assert part.bins([large, larger]) == msgpack.packb(large) + msgpack.packb(larger)
    with pytest.raises(ValueError, match="65535"):
        part.bundle([larger])
