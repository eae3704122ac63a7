"""The leaves of a Merkle log, many at a time: their hashes, their parents, and how they are stored. Plain-Python form.

Sources: RFC 6962 section 2.1 (hashes), c2sp.org/tlog-tiles (bundles), the msgpack specification (bin).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final

HASH_BYTES: Final = 32
_BUNDLED: Final = 0xFFFF


def leaf_hashes(entries: Sequence[bytes]) -> list[bytes]:
    """SHA-256(0x00 || entry) of each."""
    sha256 = hashlib.sha256
    return [sha256(b"\x00" + entry).digest() for entry in entries]


def perfect_root(hashes: Sequence[bytes]) -> bytes:
    """Root over 2**k hashes of 32 bytes, k >= 0: SHA-256(0x01 || left || right) upwards. Raises ValueError."""
    level = list(hashes)
    if not level or len(level) & (len(level) - 1) or any(len(each) != HASH_BYTES for each in level):
        raise ValueError("a perfect tree has 1, 2, 4, 8... hashes of 32 bytes")
    sha256 = hashlib.sha256
    while len(level) > 1:
        level = [sha256(b"\x01" + level[at] + level[at + 1]).digest() for at in range(0, len(level), 2)]
    return level[0]


def bundle(entries: Sequence[bytes]) -> bytes:
    """The entries, each after its length as big-endian uint16. Raises ValueError for one that is longer."""
    if any(len(entry) > _BUNDLED for entry in entries):
        raise ValueError(f"an entry has at most {_BUNDLED} bytes")
    return b"".join(part for entry in entries for part in (len(entry).to_bytes(2, "big"), entry))


def bins(entries: Sequence[bytes]) -> bytes:
    """The entries, each as a msgpack bin."""
    return b"".join(part for entry in entries for part in (_head(len(entry)), entry))


def _head(size: int) -> bytes:
    width = 1 if size < 0x100 else 2 if size < 0x10000 else 4
    return bytes((0xC4 + width.bit_length() - 1,)) + size.to_bytes(width, "big")
