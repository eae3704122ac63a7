"""RFC 6962 Merkle trees with SHA-256: hashes, proofs and their verification.

Sources: RFC 6962 section 2.1 (tree, paths), RFC 9162 sections 2.1.3.2 and 2.1.4.2 (verification, iterative).
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Sequence
from typing import TypeAlias

from creto_hotpath.leaves import leaf_hashes, perfect_root
from creto_platform.audit.port import ProofInvalid

__all__ = [
    "EMPTY_ROOT",
    "Node",
    "consistency_proof",
    "inclusion_proof",
    "leaf_hash",
    "leaf_hashes",
    "node_hash",
    "perfect_root",
    "root",
    "subtree",
    "verify_consistency",
    "verify_inclusion",
]

# (level, index) -> hash of the perfect subtree of 2**level leaves that starts at leaf index * 2**level.
Node: TypeAlias = Callable[[int, int], bytes]

EMPTY_ROOT = hashlib.sha256(b"").digest()


def leaf_hash(entry: bytes) -> bytes:
    """SHA-256(0x00 || entry)."""
    return hashlib.sha256(b"\x00" + entry).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """SHA-256(0x01 || left || right): no node can be presented as a leaf."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def subtree(node: Node, low: int, high: int) -> bytes:
    """MTH(D[low:high]); ``low`` is a multiple of the largest power of two below high - low. O(log) nodes are read."""
    width = high - low
    if width & (width - 1) == 0 and low % width == 0:
        return node(width.bit_length() - 1, low // width)
    split = _split(width)
    return node_hash(subtree(node, low, low + split), subtree(node, low + split, high))


def root(node: Node, size: int) -> bytes:
    """Root of the tree over the first ``size`` leaves."""
    return subtree(node, 0, size) if size else EMPTY_ROOT


def inclusion_proof(node: Node, index: int, size: int) -> list[bytes]:
    """PATH(index, D[size]), from the leaf's sibling up. Raises ProofInvalid unless 0 <= index < size."""
    if not 0 <= index < size:
        raise ProofInvalid(f"entry {index} is not in a tree of {size}")
    low, high, path = 0, size, []
    while high - low > 1:
        split = low + _split(high - low)
        if index < split:
            path.append(subtree(node, split, high))
            high = split
        else:
            path.append(subtree(node, low, split))
            low = split
    return path[::-1]


def consistency_proof(node: Node, old: int, size: int) -> list[bytes]:
    """PROOF(old, D[size]). Raises ProofInvalid unless 0 < old <= size."""
    if not 0 < old <= size:
        raise ProofInvalid(f"no consistency proof from {old} to {size}")
    low, high, whole, path = 0, size, True, []
    while old != high:
        split = low + _split(high - low)
        if old <= split:
            path.append(subtree(node, split, high))
            high = split
        else:
            path.append(subtree(node, low, split))
            low, whole = split, False
    if not whole:
        path.append(subtree(node, low, high))
    return path[::-1]


def verify_inclusion(leaf: bytes, index: int, size: int, proof: Sequence[bytes], expected: bytes) -> None:
    """Raises ProofInvalid unless ``proof`` leads from ``leaf`` (a leaf hash) at ``index`` to the root."""
    _check_hashes([leaf, expected, *proof])
    if not 0 <= index < size:
        raise ProofInvalid(f"entry {index} is not in a tree of {size}")
    place, last, computed = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            raise ProofInvalid("the inclusion proof is too long")
        if place & 1 or place == last:
            computed = node_hash(sibling, computed)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            computed = node_hash(computed, sibling)
        place, last = place >> 1, last >> 1
    if last:
        raise ProofInvalid("the inclusion proof is too short")
    _check_root(computed, expected)


def verify_consistency(old: int, size: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> None:
    """Raises ProofInvalid unless the tree of ``size`` extends the tree of ``old`` (> 0) entries."""
    _check_hashes([old_root, new_root, *proof])
    if not 0 < old <= size:
        raise ProofInvalid(f"no consistency proof from {old} to {size}")
    if old == size:
        if proof:
            raise ProofInvalid("the consistency proof is too long")
        _check_root(old_root, new_root)
        return
    path = list(proof)
    if old & (old - 1) == 0:
        # The old tree is a subtree of the new one: its root is the first node and is not sent.
        path.insert(0, old_root)
    if not path:
        raise ProofInvalid("the consistency proof is too short")
    place, last = old - 1, size - 1
    while place & 1:
        place, last = place >> 1, last >> 1
    from_old = from_new = path[0]
    for sibling in path[1:]:
        if last == 0:
            raise ProofInvalid("the consistency proof is too long")
        if place & 1 or place == last:
            from_old, from_new = node_hash(sibling, from_old), node_hash(sibling, from_new)
            while not place & 1 and place:
                place, last = place >> 1, last >> 1
        else:
            from_new = node_hash(from_new, sibling)
        place, last = place >> 1, last >> 1
    if last:
        raise ProofInvalid("the consistency proof is too short")
    _check_root(from_old, old_root)
    _check_root(from_new, new_root)


def _split(width: int) -> int:
    """The largest power of two smaller than ``width`` (>= 2)."""
    return 1 << ((width - 1).bit_length() - 1)


def _check_hashes(hashes: Sequence[bytes]) -> None:
    if any(len(item) != 32 for item in hashes):
        raise ProofInvalid("a hash has 32 bytes")


def _check_root(computed: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(computed, expected):
        raise ProofInvalid("the proof does not lead to the root")
