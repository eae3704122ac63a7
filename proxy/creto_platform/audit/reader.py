"""Reading a published log: entries and proofs from static files, without the writer's lock or any key."""

from __future__ import annotations

from pathlib import Path

from creto_platform.audit import merkle, record
from creto_platform.audit.note import unverified_checkpoint
from creto_platform.audit.port import Checkpoint, Entry, NoteInvalid
from creto_platform.audit.tiles import WIDTH, TileStore, TreeReader


class LogReader:
    """The log below ``directory`` as its current checkpoint describes it.

    Signatures are not checked here: whoever reads somebody else's log verifies it first (``verification``).
    """

    def __init__(self, directory: Path) -> None:
        self._store = TileStore(directory)
        self._directory = directory

    def note(self) -> bytes:
        """The signed checkpoint. Raises NoteInvalid when nothing was published."""
        data = self._store.checkpoint()
        if data is None:
            raise NoteInvalid(f"{self._directory}: there is no checkpoint")
        return data

    def checkpoint(self) -> Checkpoint:
        """The head, as the note says it."""
        return unverified_checkpoint(self.note())

    def tree(self, size: int) -> TreeReader:
        return TreeReader(self._store, size)

    def read(self, first: int, limit: int) -> list[Entry]:
        """Entries from ``first`` on, at most ``limit``; fewer at the end of the log. Raises LogTampered."""
        size = self.checkpoint().size
        entries: list[Entry] = []
        index = max(0, first)
        stop = min(size, index + max(0, limit))
        while index < stop:
            number, place = divmod(index, WIDTH)
            bundle = self._store.entries(number, min(WIDTH, size - number * WIDTH))
            for data in bundle[place : place + stop - index]:
                entries.append(Entry(index, data, record.decode(data)))
                index += 1
        return entries

    def tail(self, count: int) -> list[Entry]:
        """The last ``count`` entries, oldest first."""
        return self.read(self.checkpoint().size - count, min(count, self.checkpoint().size))

    def find(self, record_id: bytes) -> int | None:
        """Index of the record with that id, newest first, by looking at every entry: O(size)."""
        size = self.checkpoint().size
        for number in range((size - 1) // WIDTH, -1, -1):
            for entry in reversed(self.read(number * WIDTH, WIDTH)):
                if entry.record["id"] == record_id:
                    return entry.index
        return None

    def inclusion_proof(self, index: int, size: int | None = None) -> list[bytes]:
        size = self.checkpoint().size if size is None else size
        return merkle.inclusion_proof(self.tree(size).node, index, size)

    def consistency_proof(self, old: int, size: int | None = None) -> list[bytes]:
        size = self.checkpoint().size if size is None else size
        return merkle.consistency_proof(self.tree(size).node, old, size)
