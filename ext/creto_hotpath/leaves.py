"""The leaves of a Merkle log, many at a time: their hashes, their parents, and how they are stored."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._leaves_py import HASH_BYTES, bins, bundle, leaf_hashes, perfect_root
else:
    _impl = select("leaves")
    HASH_BYTES = _impl.HASH_BYTES
    bins = _impl.bins
    bundle = _impl.bundle
    leaf_hashes = _impl.leaf_hashes
    perfect_root = _impl.perfect_root

__all__ = ["HASH_BYTES", "bins", "bundle", "leaf_hashes", "perfect_root"]
