"""Quotas shared by processes: reserve on every level and meter or on none, commit what was used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._quota_types import (
    CALENDAR,
    CONCURRENCY,
    FIXED,
    GCRA,
    MAX_AMOUNT,
    MAX_METERS,
    MAX_PAIRS,
    NO_HOLD,
    TOTAL,
    QuotaBusy,
    QuotaFull,
    QuotaState,
    QuotaTableError,
)
from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._quota_py import QuotaPath, QuotaTable
else:
    _impl = select("quota")
    QuotaPath = _impl.QuotaPath
    QuotaTable = _impl.QuotaTable

__all__ = [
    "CALENDAR",
    "CONCURRENCY",
    "FIXED",
    "GCRA",
    "MAX_AMOUNT",
    "MAX_METERS",
    "MAX_PAIRS",
    "NO_HOLD",
    "TOTAL",
    "QuotaBusy",
    "QuotaFull",
    "QuotaPath",
    "QuotaState",
    "QuotaTable",
    "QuotaTableError",
]
