"""Keyed 128-bit hashes of field lists: SipHash-2-4-128 in plain Python.

Source: Aumasson and Bernstein, "SipHash: a fast short-input PRF" (2012), with the 128-bit output of the reference.
"""

from __future__ import annotations

import os
from typing import Final

KEY_BYTES: Final = 16
_MASK: Final = (1 << 64) - 1


def _rotl(x: int, b: int) -> int:
    return ((x << b) | (x >> (64 - b))) & _MASK


def _rounds(v0: int, v1: int, v2: int, v3: int, count: int) -> tuple[int, int, int, int]:
    for _ in range(count):
        v0 = (v0 + v1) & _MASK
        v1 = _rotl(v1, 13) ^ v0
        v0 = _rotl(v0, 32)
        v2 = (v2 + v3) & _MASK
        v3 = _rotl(v3, 16) ^ v2
        v0 = (v0 + v3) & _MASK
        v3 = _rotl(v3, 21) ^ v0
        v2 = (v2 + v1) & _MASK
        v1 = _rotl(v1, 17) ^ v2
        v2 = _rotl(v2, 32)
    return v0, v1, v2, v3


def _checked(key: bytes) -> bytes:
    if not isinstance(key, bytes):
        raise TypeError(f"hash key must be bytes, not {type(key).__name__}")
    if len(key) != KEY_BYTES:
        raise ValueError(f"hash key must be {KEY_BYTES} bytes, got {len(key)}")
    return key


def siphash128(key: bytes, data: bytes) -> bytes:
    """SipHash-2-4-128 of ``data`` under a 16-byte ``key``: 16 bytes. Raises ValueError for another key length."""
    _checked(key)
    k0 = int.from_bytes(key[:8], "little")
    k1 = int.from_bytes(key[8:], "little")
    v0 = k0 ^ 0x736F6D6570736575
    v1 = k1 ^ 0x646F72616E646F6D ^ 0xEE
    v2 = k0 ^ 0x6C7967656E657261
    v3 = k1 ^ 0x7465646279746573
    whole = len(data) - len(data) % 8
    words = [int.from_bytes(data[at : at + 8], "little") for at in range(0, whole, 8)]
    words.append(int.from_bytes(data[whole:], "little") | (len(data) & 0xFF) << 56)
    for word in words:
        v3 ^= word
        v0, v1, v2, v3 = _rounds(v0, v1, v2, v3, 2)
        v0 ^= word
    v0, v1, v2, v3 = _rounds(v0, v1, v2 ^ 0xEE, v3, 4)
    first = v0 ^ v1 ^ v2 ^ v3
    v0, v1, v2, v3 = _rounds(v0, v1 ^ 0xDD, v2, v3, 4)
    return first.to_bytes(8, "little") + (v0 ^ v1 ^ v2 ^ v3).to_bytes(8, "little")


def _field(value: bytes | str) -> bytes:
    if isinstance(value, str):
        value = value.encode()
    elif not isinstance(value, bytes):
        raise TypeError(f"a hashed field must be bytes or str, not {type(value).__name__}")
    return len(value).to_bytes(8, "little") + value + b"\0" * (-len(value) % 8)


class Hasher:
    """``hasher(*fields)`` gives 16 bytes that name the list of fields; equal lists, equal names.

    Every field (bytes, or str as UTF-8) goes in as its length in 8 bytes, itself, and zeros up to a multiple of 8, so
    ``("ab", "c")`` and ``("a", "bc")`` differ and the compiled form reads whole words. The key keeps whoever chooses
    the fields from choosing the names.
    """

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        self._key = _checked(key)

    def __call__(self, *fields: bytes | str) -> bytes:
        return siphash128(self._key, b"".join(map(_field, fields)))

    def __repr__(self) -> str:
        return "Hasher(<key hidden>)"


_hasher = Hasher(os.urandom(KEY_BYTES))


def seed_hash(key: bytes) -> None:
    """Sets the process-wide key of ``hash128``; until then it is random, so its names do not outlive the process."""
    global _hasher
    _hasher = Hasher(key)


def hash128(*fields: bytes | str) -> bytes:
    """16 bytes naming the list of fields under the process-wide key. See ``Hasher`` and ``seed_hash``."""
    return _hasher(*fields)
