"""Holds what clients know against what creto kept: every answered request has one outcome, one ledger row, one entry in
the audit log.

The journal is read record by record and counted per request. Ledger and audit log are held against the journal by the
number of their ids and the sum of them modulo 2**128: both are unique by id, so equal number and equal sum is the same
set.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from creto_hotpath.journal import read_frames, segments
from creto_proxy.audit import decode

Say = Callable[[str], None]
_MODULUS = 1 << 128
_BLOCK = 1 << 16


@dataclass(slots=True)
class Ids:
    """How many ids there are, and their sum modulo 2**128."""

    count: int = 0
    sum: int = 0

    def add(self, identifier: bytes) -> None:
        self.count += 1
        self.sum = (self.sum + int.from_bytes(identifier, "big")) % _MODULUS


@dataclass(slots=True)
class Account:
    """answered: requests whose answer a client saw whole. unanswered: sent, then the connection broke. lost: answered
    requests without an outcome. doubled: requests with several. broken_at: Unix times at which connections broke
    with a request under way.
    """

    answered: int = 0
    unanswered: int = 0
    lost: int = 0
    doubled: int = 0
    unanswered_recorded: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    broken_at: list[float] = field(default_factory=list)
    journal: Ids = field(default_factory=Ids)
    ledger: Ids = field(default_factory=Ids)
    audit: Ids = field(default_factory=Ids)
    audit_size: int = 0
    problems: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        return {
            "answered": self.answered,
            "unanswered": self.unanswered,
            "unanswered_recorded": self.unanswered_recorded,
            "lost": self.lost,
            "doubled": self.doubled,
            "refused": self.refused,
            "connections_broken": len(self.broken_at),
            "journal_outcomes": self.journal.count,
            "ledger_rows": self.ledger.count,
            "audit_entries": self.audit_size,
        }


def behind(state: Path) -> int:
    """Bytes of the journal that ledger or audit log have not derived from yet."""
    sizes = {path.name: written(path) for path in segments(state / "journal")}
    waiting = 0
    for database, query in (
        (state / "metering.db", "SELECT segment, position FROM cursor"),
        (state / "audit" / "index.db", "SELECT source, upto FROM sources"),
    ):
        done = dict(_rows(database, query))
        waiting = max(waiting, sum(max(0, size - done.get(name, 0)) for name, size in sizes.items()))
    return waiting


def written(path: Path) -> int:
    """Where the last frame of a segment ends: room that was made for more is zero. A frame that ends in zeros seems
    shorter by them, which is less than any frame."""
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while end:
            begin = max(0, end - _BLOCK)
            file.seek(begin)
            if data := file.read(end - begin).rstrip(b"\0"):
                return begin + len(data)
            end = begin
    return 0


def await_derived(state: Path, patience_s: float) -> bool:
    """Waits until everything is derived; False when the time is up first."""
    end = time.monotonic() + patience_s
    while behind(state):
        if time.monotonic() > end:
            return False
        time.sleep(0.25)
    return True


def account(state: Path, log: Path, say: Say) -> Account:
    """Reads both sides; ``problems`` says where they differ. Creto must have ended."""
    found = Account()
    sent = _sent(log, found)
    seen = {connection: bytearray(answered + waiting) for connection, (answered, waiting) in sent.items()}
    stray = 0
    for path in segments(state / "journal"):
        for payload, _ in read_frames(path, 0):
            outcome = decode(payload)
            found.journal.add(outcome.id)
            if outcome.target.startswith("/s/"):
                _, _, connection, number = outcome.target.split("/")
                counts = seen.get(int(connection), bytearray())
                place = int(number)
                if place < len(counts):
                    counts[place] = min(255, counts[place] + 1)
                else:
                    stray += 1
        say(f"{path.name}: {found.journal.count:,} outcomes so far")
    for source, (answered, _) in sent.items():
        counts = seen[source]
        found.lost += counts[:answered].count(0)
        found.doubled += len(counts) - counts.count(0) - counts.count(1)
        found.unanswered_recorded += sum(map(bool, counts[answered:]))
    for (identifier,) in _rows(state / "metering.db", "SELECT id FROM request"):
        found.ledger.add(identifier)
    for (identifier,) in _rows(state / "audit" / "index.db", "SELECT id FROM ids"):
        found.audit.add(identifier)
    found.audit_size = next(_rows(state / "audit" / "index.db", "SELECT size FROM head"))[0]
    found.problems = _problems(found, stray)
    return found


def _sent(log: Path, found: Account) -> dict[int, tuple[int, int]]:
    """connection -> (answered, waiting), as ``peers.steady`` wrote it."""
    sent: dict[int, tuple[int, int]] = {}
    lines = log.read_text().splitlines()
    for line in lines:
        if line.startswith("!"):
            status = line.split()[3]
            found.refused[status] = found.refused.get(status, 0) + 1
            continue
        connection, answered, waiting, at = line.split()
        sent[int(connection)] = int(answered), int(waiting)
        if int(waiting):
            found.broken_at.append(float(at))
        found.answered += int(answered)
        found.unanswered += int(waiting)
    return sent


def _rows(database: Path, query: str) -> Iterator[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=30)) as connection:
        yield from connection.execute(query)


def _problems(found: Account, stray: int) -> list[str]:
    problems = []
    if found.lost:
        problems.append(f"{found.lost} answered requests have no outcome in the journal")
    if found.doubled:
        problems.append(f"{found.doubled} requests have more than one outcome in the journal")
    if stray:
        problems.append(f"{stray} outcomes are of requests that no client sent")
    if found.ledger != found.journal:
        problems.append(f"the ledger has {found.ledger.count:,} rows for {found.journal.count:,} outcomes")
    if found.audit != found.journal or found.audit_size != found.journal.count:
        problems.append(f"the audit log has {found.audit_size:,} entries for {found.journal.count:,} outcomes")
    problems += [f"{count:,} requests were answered {status}" for status, count in sorted(found.refused.items())]
    return problems
