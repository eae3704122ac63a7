"""Policy and quota in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._admit_py import MAX_CODE, UNCHARGED, Admission, DecisionTable
else:
    _impl = select("admit")
    MAX_CODE = _impl.MAX_CODE
    UNCHARGED = _impl.UNCHARGED
    Admission = _impl.Admission
    DecisionTable = _impl.DecisionTable

__all__ = ["MAX_CODE", "UNCHARGED", "Admission", "DecisionTable"]
