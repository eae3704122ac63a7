"""The side index in SQLite: record id -> index, source -> position. Derived: ids can be rebuilt from the tiles.

It never runs ahead of the published tree. Positions are also in the write-ahead log until they are committed here.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS ids (id BLOB PRIMARY KEY, entry INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS sources (source TEXT PRIMARY KEY, upto INTEGER NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS head (one INTEGER PRIMARY KEY CHECK (one = 1), size INTEGER NOT NULL) STRICT;
INSERT OR IGNORE INTO head VALUES (1, 0);
"""
# SQLite's default limit of variables is far higher; this keeps statements cacheable.
_BATCH = 500


class Index:
    """Used under the log's lock only. Raises sqlite3.Error."""

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._db = sqlite3.connect(path, timeout=10.0, check_same_thread=False, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            # FULL: the write-ahead log is dropped on the strength of what was committed here.
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
            # Whoever else commits to it moves the head of the log, upon which it is opened again.
            self._newest: bytes = self._db.execute("SELECT max(id) FROM ids").fetchone()[0] or b""
        except sqlite3.Error:
            self._db.close()
            raise

    def close(self) -> None:
        self._db.close()

    @property
    def size(self) -> int:
        """Entries whose ids are in."""
        return int(self._db.execute("SELECT size FROM head").fetchone()[0])

    def positions(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT source, upto FROM sources").fetchall())

    def find(self, ids: Sequence[bytes]) -> dict[bytes, int]:
        """Indices of those ids that are in."""
        found: dict[bytes, int] = {}
        # Ids begin with the time: what is newer than everything that is in need not be looked for.
        old = [record_id for record_id in ids if record_id <= self._newest]
        for at in range(0, len(old), _BATCH):
            part = old[at : at + _BATCH]
            marks = ",".join("?" * len(part))
            found.update(self._db.execute(f"SELECT id, entry FROM ids WHERE id IN ({marks})", part).fetchall())
        return found

    def commit(self, ids: Mapping[bytes, int], positions: Mapping[str, int], size: int) -> None:
        """Adds ids and positions and moves the head, in one durable transaction."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            # A bytearray is taken by the driver without looking for something that adapts its type.
            rows = [(bytearray(record_id), entry) for record_id, entry in ids.items()]
            self._db.executemany("INSERT OR IGNORE INTO ids VALUES (?, ?)", rows)
            self._db.executemany(
                "INSERT INTO sources VALUES (?, ?) ON CONFLICT (source) DO UPDATE SET upto = max(upto, excluded.upto)",
                positions.items(),
            )
            self._db.execute("UPDATE head SET size = max(size, ?)", (size,))
            self._db.execute("COMMIT")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._newest = max(self._newest, max(ids, default=b""))
