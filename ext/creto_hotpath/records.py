"""Journal records that are copied on without being taken apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._records_py import Column, Counts, Layout, Made, Part, Records
else:
    _impl = select("records")
    Counts = _impl.Counts
    Layout = _impl.Layout
    Made = _impl.Made
    Records = _impl.Records
    Column = int | Made | Counts
    Part = bytes | int | Made | tuple[Made, int]

__all__ = ["Column", "Counts", "Layout", "Made", "Part", "Records"]
