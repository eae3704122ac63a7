"""Records of one caller on their way into the write-ahead log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from creto_platform.audit.port import AuditError


@dataclass(slots=True)
class Ticket:
    """One caller's records on their way to the disk. first: the answer, once done."""

    source: str
    upto: int
    entries: list[bytes]
    ids: list[bytes]
    first: int = -1
    error: AuditError | None = None
    done: bool = False

    def fresh(self, known: Mapping[bytes, int]) -> dict[bytes, bytes]:
        """The entries whose ids are not known, each id once: with the first entry that has it."""
        fresh = dict(zip(self.ids, self.entries, strict=True))
        if len(fresh) == len(self.ids) and fresh.keys().isdisjoint(known):
            return fresh
        fresh.clear()
        for record_id, entry in zip(self.ids, self.entries, strict=True):
            if record_id not in known:
                fresh.setdefault(record_id, entry)
        return fresh
