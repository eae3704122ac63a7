"""Names for lists of fields: 16 bytes, keyed, unambiguous."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._hash_py import KEY_BYTES, Hasher, hash128, seed_hash, siphash128
else:
    _impl = select("hash")
    KEY_BYTES = _impl.KEY_BYTES
    Hasher = _impl.Hasher
    hash128 = _impl.hash128
    seed_hash = _impl.seed_hash
    siphash128 = _impl.siphash128

__all__ = ["KEY_BYTES", "Hasher", "hash128", "seed_hash", "siphash128"]
