"""How full the quota table is, read from its file without joining those who use it."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from pathlib import Path

from creto_hotpath import _quota_file as layout


@dataclass(frozen=True, slots=True)
class Occupancy:
    """share: of the slots that are in use; the table refuses new budgets at 0.75. reservations: in flight."""

    share: float
    reservations: int


def occupancy(path: Path) -> Occupancy | None:
    """None when there is no quota table of this version."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        size = os.fstat(fd).st_size
        if size < layout.HEADER_WORDS * layout.WORD:
            return None
        with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            with view[: size - size % layout.WORD].cast("q") as words:
                return _read(words)
    finally:
        os.close(fd)


def _read(words: memoryview) -> Occupancy | None:
    if words[layout.H_MAGIC] != layout.MAGIC or words[layout.H_VERSION] != layout.VERSION:
        return None
    slots, records, high = words[layout.H_SLOTS], words[layout.H_RECORDS], words[layout.H_HIGH]
    if not 1 <= slots <= 1 << 26 or not 0 <= high <= records <= 1 << layout.INDEX_BITS:
        return None
    start = layout.Geometry(slots, records).records_at + layout.R_ID
    end = start + high * layout.RECORD_WORDS
    if end > len(words) + layout.RECORD_WORDS:
        return None
    with words[start : end : layout.RECORD_WORDS] as ids:
        live = sum(1 for each in ids if each)
    return Occupancy(words[layout.H_USED_SLOTS] / slots, live)
