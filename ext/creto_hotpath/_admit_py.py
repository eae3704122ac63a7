"""Policy and quota in one call: a cached decision, then the charge. Plain-Python form."""

from __future__ import annotations

import operator
from typing import Final

from creto_hotpath._bloom_py import key_words
from creto_hotpath._quota_py import QuotaPath, QuotaTable
from creto_hotpath._quota_types import MAX_TIME

WAYS: Final = 4
MAX_CODE: Final = 0xFFFF
MAX_EPOCH: Final = (1 << 47) - 1

UNCHARGED: Final = 0x8000
"""Codes with this bit are answers that charge nothing: refusals and whatever a person must look at first."""

MISS: Final = (0, 0)
_EMPTY: Final = (0, 0, 0, 0)


def _bounded(name: str, value: int, low: int, high: int) -> int:
    value = operator.index(value)
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high}, got {value}")
    return value


class DecisionTable:
    """Answers of the policy engine, kept until they expire or the policies change.

    entries: how many answers it holds, rounded up to a power of two; 32 bytes each, in sets of four that share two
    cache lines. A full set drops an answer of another epoch first, then the one that expires soonest; what is dropped
    is only asked again. Keys are 16 bytes of a keyed hash over everything the answer depends on.

    epoch: of the policies in force, set by whoever puts; what was concluded from answers of another one is void.

    An answer is a code from 1 to 65535 that means something to the caller, usually an index into a list of decisions.
    """

    __slots__ = ("_entries", "_mask", "epoch")

    def __init__(self, entries: int = 65536) -> None:
        if not 1 <= entries <= 1 << 26:
            raise ValueError(f"entries must be between 1 and {1 << 26}, got {entries}")
        sets = 1 << (-(-entries // WAYS) - 1).bit_length()
        self._mask = sets - 1
        self.epoch = 0
        # each: first key word, second key word, expires_ns (0: empty), epoch << 16 | code
        self._entries: list[tuple[int, int, int, int]] = [_EMPTY] * (sets * WAYS)

    @property
    def entries(self) -> int:
        """Answers it can hold."""
        return len(self._entries)

    def put(self, key: bytes, epoch: int, code: int, expires_ns: int) -> None:
        """Keeps ``code`` for ``key`` while the epoch is ``epoch`` and the time before ``expires_ns``.

        Raises ValueError for a code outside 1..65535, an epoch outside 0..2**47-1 or a time out of bounds.
        """
        a, b = key_words(key)
        epoch = _bounded("epoch", epoch, 0, MAX_EPOCH)
        code = _bounded("code", code, 1, MAX_CODE)
        expires_ns = _bounded("expires_ns", expires_ns, 1, MAX_TIME)
        self._entries[self._victim(a, b, epoch)] = (a, b, expires_ns, epoch << 16 | code)

    def _victim(self, a: int, b: int, epoch: int) -> int:
        at = (b & self._mask) * WAYS
        ways = range(at, at + WAYS)
        entries = self._entries
        for way in ways:
            if entries[way][2] and entries[way][:2] == (a, b):
                return way
        for way in ways:
            if not entries[way][2]:
                return way
        for way in ways:
            if entries[way][3] >> 16 != epoch:
                return way
        return min(ways, key=lambda way: entries[way][2])

    def get(self, key: bytes, epoch: int, now_ns: int) -> int:
        """The code kept for ``key``; 0 when there is none of this epoch that has not expired."""
        a, b = key_words(key)
        epoch = _bounded("epoch", epoch, 0, MAX_EPOCH)
        now_ns = _bounded("time", now_ns, 0, MAX_TIME)
        at = (b & self._mask) * WAYS
        for first, second, expires_ns, value in self._entries[at : at + WAYS]:
            if expires_ns and first == a and second == b:
                return value & MAX_CODE if value >> 16 == epoch and expires_ns > now_ns else 0
        return 0

    @property
    def used(self) -> int:
        """Places that are taken, by answers that may have expired too. Looks at all of them."""
        return sum(1 for entry in self._entries if entry[2])

    def clear(self) -> None:
        """Forgets every answer."""
        self._entries = [_EMPTY] * len(self._entries)


class Admission:
    """A decision table and a quota table behind one call."""

    __slots__ = ("_decisions", "_quota")

    def __init__(self, decisions: DecisionTable, quota: QuotaTable) -> None:
        self._decisions = decisions
        self._quota = quota

    def admit(
        self, key: bytes, epoch: int, path: QuotaPath | None, amounts: tuple[int, ...], now_ns: int, ttl_ns: int
    ) -> tuple[int, int]:
        """``(code, reservation)``: what policy said and what the quotas made of it.

        ``(0, 0)``: no answer is kept for ``key`` at ``epoch``; ask the policy engine, nothing was charged.
        ``(code, 0)`` with the bit ``UNCHARGED`` in the code: a refusal, nothing was charged.
        ``(code, rid)``, rid > 0: permitted and held on every quota of ``path``; settle ``rid`` (see
        ``QuotaTable.reserve``; it is ``NO_HOLD`` when ``path`` is None or has no quota).
        ``(code, -(1 + index))``: permitted by policy, refused by that quota of the path; nothing was charged.
        ``(code, 0)`` without that bit: a calendar window has ended; roll it and call again.
        """
        code = self._decisions.get(key, epoch, now_ns)
        if code == 0:
            return MISS
        if code & UNCHARGED:
            return code, 0
        if path is None:
            return code, 1
        return code, self._quota.reserve(path, amounts, now_ns, ttl_ns)
