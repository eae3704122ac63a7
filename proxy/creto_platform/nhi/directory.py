"""The trust domain's own memory: anchors, agents, issued tokens and revocations, in one SQLite file.

Several processes share it (WAL, busy timeout). Private keys are not in it.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from creto_platform.nhi.port import AgentKey, Anchor, IssuedToken, NhiError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS anchors (
    kid BLOB PRIMARY KEY, principal TEXT NOT NULL, public BLOB NOT NULL, kind TEXT NOT NULL, created REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS agents (
    name TEXT PRIMARY KEY, id TEXT NOT NULL, owner TEXT NOT NULL, kid BLOB NOT NULL, key TEXT NOT NULL,
    created REAL NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS tokens (
    id BLOB PRIMARY KEY, issuer TEXT NOT NULL, subject TEXT NOT NULL, subject_kid BLOB NOT NULL,
    depth INTEGER NOT NULL, not_before INTEGER NOT NULL, expires INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS revocations (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, kind TEXT NOT NULL, value TEXT NOT NULL, entry BLOB NOT NULL,
    UNIQUE (kind, value)
) STRICT;
"""


class Directory:
    """Thread-safe; one connection under a lock. Raises NhiError naming the file when it cannot be used."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        # Made by us first: SQLite would create it with the umask's permissions.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        self._db = sqlite3.connect(path, timeout=10.0, check_same_thread=False, isolation_level=None)
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            # Revocations must survive a power cut.
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.executescript(_SCHEMA)
        except sqlite3.Error as error:
            self._db.close()
            raise NhiError(f"{path}: {error}") from error

    def close(self) -> None:
        with self._lock:
            self._db.close()

    def add_anchor(self, anchor: Anchor) -> None:
        with self._use() as db:
            db.execute(
                "INSERT OR IGNORE INTO anchors VALUES (?, ?, ?, ?, ?)",
                (anchor.kid, anchor.principal, anchor.public, anchor.kind, anchor.created_at),
            )

    def anchor(self, kid: bytes) -> Anchor | None:
        with self._use() as db:
            row = db.execute(
                "SELECT principal, kid, public, kind, created FROM anchors WHERE kid = ?", (kid,)
            ).fetchone()
        return Anchor(*row) if row else None

    def anchors(self) -> list[Anchor]:
        with self._use() as db:
            rows = db.execute("SELECT principal, kid, public, kind, created FROM anchors ORDER BY principal").fetchall()
        return [Anchor(*row) for row in rows]

    def agent(self, name: str) -> tuple[AgentKey, str] | None:
        """The registered agent and the name of its key file."""
        with self._use() as db:
            row = db.execute("SELECT name, id, owner, kid, created, key FROM agents WHERE name = ?", (name,)).fetchone()
        return (AgentKey(*row[:5]), row[5]) if row else None

    def put_agent(self, agent: AgentKey, key: str) -> None:
        """Registers an agent or gives it another key; the owner never changes."""
        with self._use() as db:
            db.execute(
                "INSERT INTO agents (name, id, owner, kid, key, created) VALUES (?, ?, ?, ?, ?, ?) "
                "ON CONFLICT (name) DO UPDATE SET kid = excluded.kid, key = excluded.key",
                (agent.name, agent.id, agent.owner, agent.kid, key, agent.created_at),
            )

    def agents(self) -> list[AgentKey]:
        with self._use() as db:
            rows = db.execute("SELECT name, id, owner, kid, created FROM agents ORDER BY name").fetchall()
        return [AgentKey(*row) for row in rows]

    def key_of(self, kid: bytes) -> str | None:
        """Name of the key file of the agent whose current key has that id."""
        with self._use() as db:
            row = db.execute("SELECT key FROM agents WHERE kid = ?", (kid,)).fetchone()
        return str(row[0]) if row else None

    def add_token(
        self, token_id: bytes, issuer: str, subject: str, kid: bytes, depth: int, not_before: int, expires: int
    ) -> None:
        with self._use() as db:
            # Expired tokens cannot be revoked any more, so they need not be remembered.
            db.execute("DELETE FROM tokens WHERE expires < ?", (not_before - 86_400,))
            db.execute(
                "INSERT INTO tokens VALUES (?, ?, ?, ?, ?, ?, ?)",
                (token_id, issuer, subject, kid, depth, not_before, expires),
            )

    def tokens(self) -> list[IssuedToken]:
        with self._use() as db:
            rows = db.execute("SELECT id, issuer, subject, depth, not_before, expires FROM tokens ORDER BY expires, id")
            return [IssuedToken(row[0].hex(), *row[1:]) for row in rows.fetchall()]

    def add_revocation(self, kind: str, value: str, entry: bytes) -> None:
        with self._use() as db:
            db.execute("INSERT OR IGNORE INTO revocations (kind, value, entry) VALUES (?, ?, ?)", (kind, value, entry))

    def revoked(self, marks: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
        """The first of the (kind, value) pairs that was revoked, or None."""
        with self._use() as db:
            for kind, value in marks:
                if db.execute("SELECT 1 FROM revocations WHERE kind = ? AND value = ?", (kind, value)).fetchone():
                    return kind, value
        return None

    def revocation_entries(self) -> list[bytes]:
        with self._use() as db:
            return [bytes(row[0]) for row in db.execute("SELECT entry FROM revocations ORDER BY seq").fetchall()]

    def revocation_epoch(self) -> int:
        with self._use() as db:
            return int(db.execute("SELECT coalesce(max(seq), 0) FROM revocations").fetchone()[0])

    @contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise NhiError(f"{self._path}: {error}") from error
