"""What ledger and audit log cost per journal record, beside the least that their database and their hashes can cost.

    pytest benches/bench_derive.py -s

A journal is written once for each of two contents: *repeated* (one agent, one address, as a load test makes it) and
*varied* (agents, hosts, models, paths and token counts that change with every record). Then rounds alternate between
the consumers, each with its own ``Replay`` of that journal into an empty state directory:

- *read*: frames, checksums and layout, by a consumer that looks at nothing;
- *outcomes*: one that wants every record as an ``Outcome``, as a third-party plugin does;
- *ledger*, *audit*: the two of creto, the audit log published to its end; *both* is what a controller does.

Baselines of the same run: ``sqlite3`` executemany of what the ledger says of each request, as values, into one table
with a column for each and indexes by agent, time and chain; the same of the rows of the ledger's own table ``entry``;
``hashlib`` SHA-256 of the audit log's leaves, one call each, and of as many nodes.

The unit is CPU of this process, all threads, per record: it holds on a shared machine. CRETO_BENCH_RECORDS and
CRETO_BENCH_ROUNDS lengthen it.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import platform
import sqlite3
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import pytest

from creto_hotpath.journal import Journal
from creto_metering.ledger import Ledger
from creto_platform import audit_directories
from creto_platform.audit import EmbeddedAudit, LogReader
from creto_platform.crypto import EmbeddedCrypto
from creto_proxy.audit import AuditTrail, encode
from creto_proxy.hookspecs import Consumer
from creto_proxy.model import Outcome, Usage
from creto_proxy.replay import Replay
from creto_proxy.testing import make_agent, make_outcome, make_request

RECORDS = int(os.environ.get("CRETO_BENCH_RECORDS", "100000"))
ROUNDS = int(os.environ.get("CRETO_BENCH_ROUNDS", "3"))
PATIENCE_S = 600.0
INDEXES = ("agent, at_unix_ns", "at_unix_ns", "chain_digest")
# Name of a table, the statements that make it, its rows.
Rows: TypeAlias = tuple[str, list[str], list[tuple[object, ...]]]


def record_id(number: int, at_unix_ns: int) -> bytes:
    """As a UUIDv7: the milliseconds first."""
    return (at_unix_ns // 10**6).to_bytes(6, "big") + b"\x70\0" + hashlib.sha256(number.to_bytes(8, "big")).digest()[:8]


def repeated() -> Iterator[Outcome]:
    base = make_outcome(make_request())
    for number in itertools.count():
        at = base.at_unix_ns + number * 17_000
        yield replace(base, id=record_id(number, at), at_unix_ns=at, bytes_down=1024, creto_ns=17_000 + number % 977)


def varied() -> Iterator[Outcome]:
    agents = [make_agent(f"agent-{number}") for number in range(40)]
    for number, agent in enumerate(agents):
        agents[number] = replace(agent, chain_digest=hashlib.sha256(agent.id.encode()).digest())
    for number in itertools.count():
        request = make_request("POST", host=f"api-{number % 23}.example.com", agent=agents[number * 7 % 40])
        tokens = {"input": 100 + number % 3001, "output": number % 977, "total": 100 + number % 3001 + number % 977}
        usage = Usage("exact", "openai", f"gpt-{number % 5}", tokens, 1000 * (number % 7919))
        base = make_outcome(request, usage=usage)
        at = base.at_unix_ns + number * 17_000
        yield replace(
            base,
            id=record_id(number, at),
            at_unix_ns=at,
            target=f"/v1/threads/{number:x}/runs",
            policies=("llm-allowed", f"team-{number % 11}"),
            bytes_up=1900 + number % 501,
            bytes_down=961 + number % 1013,
            total_ns=620_000_000 + number,
        )


class Looking:
    """A consumer that keeps nothing."""

    name = "looking"

    def __init__(self, every: bool) -> None:
        self._every = every
        self._positions: dict[str, int] = {}

    def position(self, segment: str) -> int:
        return self._positions.get(segment, 0)

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        if self._every:
            for outcome in records:
                outcome.id  # noqa: B018
        self._positions[segment] = upto


class Bench:
    """A journal of ``RECORDS`` outcomes of a dead worker, and what can be made of it."""

    def __init__(self, folder: Path, content: Callable[[], Iterator[Outcome]]) -> None:
        self._folder = folder
        self._rounds = itertools.count()
        self._crypto = EmbeddedCrypto()
        self.journal = folder / "journal"
        self.journal.mkdir()
        (self.journal / "dead.lock").touch()
        with Journal(str(self.journal), "dead") as journal:
            for number, outcome in enumerate(itertools.islice(content(), RECORDS)):
                journal.append(encode(outcome))
                if number % 1000 == 999:
                    journal.flush()

    def state(self) -> Path:
        state = self._folder / f"state-{next(self._rounds)}"
        (state / "journal").mkdir(parents=True)
        for path in self.journal.iterdir():
            os.link(path, state / "journal" / path.name)
        return state

    def replay(self, state: Path, *consumers: Consumer) -> None:
        replay = Replay(state / "journal", "own", consumers)
        replay.start()
        assert replay.stop(PATIENCE_S)

    def read(self) -> float:
        return self._looked(False)

    def outcomes(self) -> float:
        return self._looked(True)

    def _looked(self, every: bool) -> float:
        state = self.state()
        begin = time.process_time()
        self.replay(state, Looking(every))
        return time.process_time() - begin

    def ledger(self) -> float:
        return self._derived(ledger=True)

    def audit(self) -> float:
        return self._derived(audit=True)

    def both(self) -> float:
        return self._derived(ledger=True, audit=True)

    def _derived(self, *, ledger: bool = False, audit: bool = False) -> float:
        state = self.state()
        book, log = Ledger(state / "metering.db"), EmbeddedAudit(*audit_directories(state), self._crypto)
        book.open()
        consumers: list[Consumer] = [book] if ledger else []
        begin = time.process_time()
        self.replay(state, *consumers, *([AuditTrail(log)] if audit else []))
        book.close()
        log.close()
        return time.process_time() - begin

    def rows(self) -> tuple[Rows, Rows]:
        """What the ledger says of each request; and its table of those, with the statement that made it."""
        state = self.state()
        book = Ledger(state / "metering.db")
        book.open()
        self.replay(state, book)
        book.close()
        with closing(sqlite3.connect(state / "metering.db")) as connection:
            wide = connection.execute("SELECT * FROM request")
            columns = ",".join(column[0] for column in wide.description)
            made = [f"CREATE TABLE request ({columns}, PRIMARY KEY (id))"]
            made += [f"CREATE INDEX by_{name[:5]} ON request ({name})" for name in INDEXES]
            (entry,) = connection.execute("SELECT sql FROM sqlite_master WHERE name = 'entry'").fetchone()
            return ("request", made, wide.fetchall()), (
                "entry", [entry], connection.execute("SELECT * FROM entry ORDER BY id").fetchall()
            )  # fmt: skip

    def leaves(self) -> list[bytes]:
        state = self.state()
        log = EmbeddedAudit(*audit_directories(state), self._crypto)
        self.replay(state, AuditTrail(log))
        log.close()
        reader = LogReader(audit_directories(state)[0] / "log")
        return [entry.data for entry in reader.tail(RECORDS)]


def inserted(path: Path, table: Rows) -> float:
    """The baseline of the ledger."""
    name, made, rows = table
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        for statement in made:
            connection.execute(statement)
        marks = ",".join("?" * len(rows[0]))
        begin = time.process_time()
        for at in range(0, len(rows), 2000):
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(f"INSERT OR IGNORE INTO {name} VALUES ({marks})", rows[at : at + 2000])
            connection.execute("COMMIT")
        return time.process_time() - begin


def hashed(leaves: list[bytes]) -> float:
    """The baseline of the audit log: its leaves, and as many nodes."""
    sha256 = hashlib.sha256
    begin = time.process_time()
    digests = [sha256(b"\0" + leaf).digest() for leaf in leaves]
    for at in range(0, len(digests) - 1, 2):
        sha256(b"\1" + digests[at] + digests[at + 1]).digest()
        sha256(b"\1" + digests[at + 1] + digests[at]).digest()
    return time.process_time() - begin


@pytest.mark.parametrize("content", [repeated, varied], ids=lambda content: content.__name__)
def bench_derive(content: Callable[[], Iterator[Outcome]], tmp_path: Path) -> None:
    bench = Bench(tmp_path, content)
    wide, narrow = bench.rows()
    leaves = bench.leaves()
    assert len(wide[2]) == len(narrow[2]) == len(leaves) == RECORDS
    databases = (tmp_path / f"baseline-{number}.db" for number in itertools.count())
    stages: dict[str, Callable[[], float]] = {
        "read": bench.read,
        "outcomes": bench.outcomes,
        "sqlite3, one table": lambda: inserted(next(databases), wide),
        "sqlite3, entries": lambda: inserted(next(databases), narrow),
        "ledger": bench.ledger,
        "hashlib sha256": lambda: hashed(leaves),
        "audit": bench.audit,
        "both": bench.both,
    }
    taken: dict[str, list[float]] = {name: [] for name in stages}
    for number in range(ROUNDS):
        for name in stages if number % 2 == 0 else reversed(stages):
            taken[name].append(stages[name]() / RECORDS * 1e6)
    print(f"\n{content.__name__}: {RECORDS:,} records, {ROUNDS} rounds, Python {platform.python_version()}, "
          f"SQLite {sqlite3.sqlite_version}")  # fmt: skip
    print(f"{'':22}{'us/record':>10}  {'least..most':>16}{'records/s of a core':>22}")
    for name, times in taken.items():
        median = statistics.median(times)
        print(f"{name:22}{median:10.2f}  {min(times):7.2f}..{max(times):7.2f}{1e6 / median:22,.0f}")
