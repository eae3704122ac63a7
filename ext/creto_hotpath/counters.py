"""Numbers of one process that others can read, for the cost of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._counters_file import (
    BUCKETS,
    CELLS,
    HISTOGRAM_CELLS,
    CountersFull,
    CountersInvalid,
    Entry,
    Reading,
    bucket_end,
    bucket_of,
    read_counters,
)
from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._counters_py import Counters
else:
    Counters = select("counters").Counters

__all__ = [
    "BUCKETS",
    "CELLS",
    "HISTOGRAM_CELLS",
    "Counters",
    "CountersFull",
    "CountersInvalid",
    "Entry",
    "Reading",
    "bucket_end",
    "bucket_of",
    "read_counters",
]
