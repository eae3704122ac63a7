"""A bloom filter that answers in one cache line. Plain-Python form, bit for bit the compiled one."""

from __future__ import annotations

from array import array
from typing import Final

_MASK: Final = (1 << 64) - 1

# Odd multipliers, one per word of a block: splitmix64 from state 0, made odd.
SALT: Final = (
    0xE220A8397B1DCDAF,
    0x6E789E6AA1B965F5,
    0x06C45D188009454F,
    0xF88BB8A8724C81ED,
    0x1B39896A51A8749B,
    0x53CB9F0C747EA2EB,
    0x2C829ABE1F4532E1,
    0xC584133AC916AB3D,
)
BLOCK_BITS: Final = 512
WORDS_PER_BLOCK: Final = 8


def blocks_for(capacity: int, bits_per_key: int) -> int:
    """Number of 512-bit blocks, a power of two, that gives ``capacity`` keys at least ``bits_per_key`` bits each."""
    wanted = max(1, -(-capacity * bits_per_key // BLOCK_BITS))
    return 1 << (wanted - 1).bit_length()


def key_words(key: bytes) -> tuple[int, int]:
    """The two unsigned little-endian words of a 16-byte key. Raises ValueError for another length."""
    if not isinstance(key, bytes):
        raise TypeError(f"key must be bytes, not {type(key).__name__}")
    if len(key) != 16:
        raise ValueError(f"key must be 16 bytes, got {len(key)}")
    return int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")


def key_bits(b: int) -> tuple[int, ...]:
    """The bit that the second key word sets in each of the eight words of its block."""
    return tuple(1 << ((b * salt & _MASK) >> 58) for salt in SALT)


class Bloom:
    """Keys that may have been added. "No" is exact; "yes" is wrong for about 0.1 % of absent keys at 16 bits per key.

    capacity: keys it is sized for; more only raise the share of wrong yeses. Memory is ``size_bytes``, a power of two
    of 64-byte blocks; a query or an addition touches one of them. Keys are 16 bytes of a keyed hash and cannot be
    taken out again: build a new filter instead.

    Source: split-block filter of Putze, Sanders and Singler, "Cache-, hash- and space-efficient bloom filters" (2007).
    """

    __slots__ = ("_mask", "_words", "size_bytes")

    def __init__(self, capacity: int, bits_per_key: int = 16) -> None:
        if capacity < 1 or bits_per_key < 1:
            raise ValueError(f"capacity and bits_per_key must be positive, got {capacity} and {bits_per_key}")
        blocks = blocks_for(capacity, bits_per_key)
        self._mask = blocks - 1
        self._words = array("Q", bytes(blocks * WORDS_PER_BLOCK * 8))
        self.size_bytes = blocks * WORDS_PER_BLOCK * 8

    def add(self, key: bytes) -> None:
        """Adds a 16-byte key."""
        a, b = key_words(key)
        at = (a & self._mask) * WORDS_PER_BLOCK
        for word, bit in enumerate(key_bits(b), at):
            self._words[word] |= bit

    def may_contain(self, key: bytes) -> bool:
        """False: ``key`` was never added. True: it probably was."""
        a, b = key_words(key)
        at = (a & self._mask) * WORDS_PER_BLOCK
        return all(self._words[word] & bit for word, bit in enumerate(key_bits(b), at))
