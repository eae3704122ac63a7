"""Token usage of model answers, and the outermost members of request bodies; compiled unless the twin is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._usage_fields import Dialect, Framing
from creto_hotpath._usage_py import MAX_CAPTURE, MAX_DEPTH, MAX_HELD

if TYPE_CHECKING:
    from creto_hotpath._usage_py import UsageScanner, object_members
else:
    from creto_hotpath._select import select

    _usage = select("usage")
    UsageScanner = _usage.UsageScanner
    object_members = _usage.object_members

__all__ = ["MAX_CAPTURE", "MAX_DEPTH", "MAX_HELD", "Dialect", "Framing", "UsageScanner", "object_members"]
