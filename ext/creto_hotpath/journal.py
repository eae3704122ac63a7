"""An append-only log of records that survives a killed process, and how it is read back."""

from __future__ import annotations

from typing import TYPE_CHECKING

from creto_hotpath._journal_file import (
    MAX_PAYLOAD,
    JournalBusy,
    JournalCorrupt,
    JournalFull,
    segments,
)
from creto_hotpath._select import select

if TYPE_CHECKING:
    from creto_hotpath._journal_py import Journal, crc32c, payload_at, read_frames, recover
else:
    _impl = select("journal")
    Journal = _impl.Journal
    crc32c = _impl.crc32c
    payload_at = _impl.payload_at
    read_frames = _impl.read_frames
    recover = _impl.recover

__all__ = [
    "MAX_PAYLOAD",
    "Journal",
    "JournalBusy",
    "JournalCorrupt",
    "JournalFull",
    "crc32c",
    "payload_at",
    "read_frames",
    "recover",
    "segments",
]
