"""The ledger: every outcome once, in SQLite, fed by the journal and answering who used what.

A record is identified by the request's id, and the position in the journal segment is stored in the same transaction
as the records before it, so a crash at any point replays without losing or doubling. What a request cost is stored as
it was charged: a later price never rewrites it. Delegation is stored once per chain; what an agent caused through
others is derived from it and never billed twice.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from creto_metering import tables
from creto_metering.groups import By
from creto_metering.tables import TOKENS, chain, chain_member, cursor, request
from creto_proxy.batch import FIELD, Batch, Counts, Made
from creto_proxy.model import Outcome

_BUSY_TIMEOUT_MS = 10_000
# Chains that are known to be in the ledger; an agent has one for as long as its delegation lasts.
_CHAINS = 10_000
# SQLite stores this as NULL. Unlike None, the driver takes it without looking for something that adapts its type; so
# it does with a bytearray, but not with bytes.
_NULL = float("nan")


class LedgerError(Exception):
    """The ledger cannot be used; the text names the file and says why."""


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over one group. Costs are nano-dollars; ``uncertain`` is the part that is not from a provider's own count.

    requests includes refused ones. Token counts hold what was reported; ``unknown`` requests reported none.
    """

    key: str
    requests: int
    refused: int
    unknown: int
    input: int
    output: int
    cache_read: int
    cache_write: int
    reasoning: int
    total: int
    cost_nano_usd: int
    uncertain_nano_usd: int


class Ledger:
    """``Consumer`` of the journal. Made without side effects; ``open`` creates or checks the database.

    Safe for several threads, and for several processes on one file.
    """

    name = "metering"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._engine: sa.Engine | None = None
        self._applying = threading.Lock()
        self._writer: Any = None  # the driver's connection, while ``apply`` has it
        self._chains: set[tuple[bytes, tuple[str, ...]]] = set()
        self._shapes = Made([FIELD[name] for name in _SHAPE_OF], self._shape)
        self._columns = (
            self._shapes,
            FIELD["at_unix_ns"],
            Made([FIELD["id"]], bytearray, keep=False),
            Counts(FIELD["usage.tokens"], TOKENS, _NULL, _other_units),
            FIELD["usage.cost_nano_usd"],
            FIELD["bytes_up"],
            FIELD["bytes_down"],
        )

    def open(self, *, create: bool = True) -> None:
        """Raises LedgerError when the file is of another version, cannot be opened, or is missing and not wanted."""
        if not create and not self._path.exists():
            raise LedgerError(f"{self._path}: there is no ledger yet; nothing has been recorded")
        if create and not self._path.exists():
            self._path.touch(mode=0o600)
        engine = sa.create_engine(f"sqlite:///{self._path}", connect_args={"timeout": _BUSY_TIMEOUT_MS / 1000})
        sa.event.listen(engine, "connect", _configure)
        sa.event.listen(engine, "begin", _begin)
        try:
            with engine.begin() as connection:
                found = tables.prepare(connection)
        except sa.exc.DBAPIError as error:
            engine.dispose()
            raise LedgerError(f"{self._path}: {error.orig}") from None
        if found != tables.VERSION:
            engine.dispose()
            raise LedgerError(f"{self._path}: schema version {found}, this creto knows {tables.VERSION}")
        self._engine = engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.dispose()
            self._engine = None

    def position(self, segment: str) -> int:
        """Bytes of a journal segment that are in the ledger; 0 for one never seen."""
        with self._read() as connection:
            return connection.scalar(sa.select(cursor.c.position).where(cursor.c.segment == segment)) or 0

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        """Stores the records and the position behind them, or neither. Records that are there already are skipped."""
        with self._applying:
            try:
                with self._transaction() as connection:
                    self._writer = connection.connection.driver_connection
                    fresh = self._store(connection, records)
                    self._advance(connection, segment, upto)
            except BaseException:
                # What it says may have been rolled back.
                self._shapes.clear()
                raise
            finally:
                self._writer = None
            self._remember(fresh)

    def _store(self, connection: sa.Connection, records: Sequence[Outcome]) -> set[tuple[bytes, tuple[str, ...]]]:
        """Returns the chains that were not known to be in the ledger."""
        if not records:
            return set()
        if isinstance(records, Batch):
            chains = dict(zip(records.column("chain_digest"), records.column("chain"), strict=True))
            rows = records.rows(self._columns, self._row)
        else:
            chains = {record.chain_digest: record.chain for record in records}
            rows = [self._row(record) for record in records]
        fresh = chains.items() - self._chains
        if fresh:
            digests = {digest: memoryview(digest) for digest, _ in fresh}
            members = [(member, digests[d]) for d, members in fresh for member in dict.fromkeys(members)]
            connection.exec_driver_sql(
                tables.INSERT_CHAIN, [(digests[digest], json.dumps(list(members))) for digest, members in fresh]
            )
            if members:
                connection.exec_driver_sql(tables.INSERT_MEMBER, members)
        connection.exec_driver_sql(tables.INSERT_ENTRY, rows)
        return fresh

    def _remember(self, chains: set[tuple[bytes, tuple[str, ...]]]) -> None:
        if len(self._chains) + len(chains) > _CHAINS:
            self._chains.clear()
        self._chains |= chains

    def _row(self, record: Outcome) -> tuple[Any, ...]:
        """The entry of a record, as ``_columns`` make it."""
        usage = record.usage
        return (
            self._shape(
                record.agent, record.chain_digest, record.path, record.host, record.decision, record.reason,
                record.status, usage.certainty, usage.provider, usage.model, record.run,
            ),
            record.at_unix_ns,
            memoryview(record.id),
            *(usage.tokens.get(name) for name in TOKENS),
            _other_units(usage.tokens),
            usage.cost_nano_usd,
            record.bytes_up,
            record.bytes_down,
        )  # fmt: skip

    def _shape(
        self, agent: str, digest: bytes, path: Sequence[str], host: str, decision: str, reason: str, status: int,
        certainty: str, provider: str, model: str, run: str,
    ) -> int:  # fmt: skip
        """The number of a shape, which is made where there is none yet."""
        levels = dict(element.partition(":")[::2] for element in path)
        values = (
            memoryview(digest), agent, host, decision, reason, status, certainty, provider, model, run,
            json.dumps(list(path)), levels.get("org", ""), levels.get("team", ""),
        )  # fmt: skip
        found = self._writer.execute(tables.FIND_SHAPE, values).fetchone()
        # Nobody else can make it meanwhile: the transaction began as a writing one.
        number: int = self._writer.execute(tables.INSERT_SHAPE, values).lastrowid if found is None else found[0]
        return number

    def _advance(self, connection: sa.Connection, segment: str, upto: int) -> None:
        connection.exec_driver_sql(tables.ADVANCE, (segment, upto))

    def totals(
        self, by: By, *, since_ns: int = 0, until_ns: int = 2**62, agent: str | None = None
    ) -> tuple[list[Totals], int]:
        """``(sums per group, as_of)`` over [since, until), dearest group first.

        by "chain" sums what each delegation chain used itself; "caused" what everybody in a chain caused, themselves
        or through agents they delegated to, so its rows overlap. as_of: Unix ns of the newest record applied.
        """
        key, source = _grouping(by)
        where = [request.c.at_unix_ns >= since_ns, request.c.at_unix_ns < until_ns]
        if agent is not None:
            where.append(request.c.agent == agent)
        uncertain = request.c.certainty.in_(("estimated", "unknown"))
        query = (
            sa.select(
                key.label("key"),
                sa.func.count().label("requests"),
                _sum_if(request.c.decision == "deny", 1).label("refused"),
                _sum_if(request.c.certainty == "unknown", 1).label("unknown"),
                *(sa.func.coalesce(sa.func.sum(request.c[name]), 0).label(name) for name in TOKENS),
                sa.func.coalesce(sa.func.sum(request.c.cost_nano_usd), 0).label("cost_nano_usd"),
                _sum_if(uncertain, request.c.cost_nano_usd).label("uncertain_nano_usd"),
            )
            .select_from(source)
            .where(*where)
            .group_by(key)
            .order_by(sa.desc("cost_nano_usd"), sa.desc("requests"), "key")
        )
        with self._read() as connection:
            rows = [Totals(**row) for row in connection.execute(query).mappings()]
            as_of = connection.scalar(sa.select(sa.func.max(request.c.at_unix_ns))) or 0
        return [_named(row, by) for row in rows], as_of

    def paths(self) -> list[tuple[str, ...]]:
        """Quota paths of all agents that ever made a request."""
        with self._read() as connection:
            found = connection.scalars(sa.select(request.c.path).distinct().order_by(request.c.path))
            return [tuple(json.loads(path)) for path in found]

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        with self._opened().begin() as connection:
            yield connection

    @contextmanager
    def _read(self) -> Iterator[sa.Connection]:
        # Reading takes no write lock, unlike ``_begin``: a report must not stand in the way of the consumer.
        with self._opened().connect().execution_options(creto_reads=True) as connection:
            yield connection

    def _opened(self) -> sa.Engine:
        if self._engine is None:
            raise LedgerError(f"{self._path}: the ledger is not open")
        return self._engine


def _configure(connection: Any, _record: object) -> None:
    # Transactions begin where ``_begin`` says so, not where the driver guesses.
    connection.isolation_level = None
    # FULL: a cursor that survives a power failure must not point behind records that did not.
    for pragma in ("journal_mode = WAL", f"busy_timeout = {_BUSY_TIMEOUT_MS}", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: sa.Connection) -> None:
    # IMMEDIATE: a transaction that reads before it writes could otherwise fail with SQLITE_BUSY whatever the timeout.
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("creto_reads") else "BEGIN IMMEDIATE")


# What a shape is made of, in the order of ``Ledger._shape``.
_SHAPE_OF = (
    "agent", "chain_digest", "path", "host", "decision", "reason", "status", "usage.certainty", "usage.provider",
    "usage.model", "run",
)  # fmt: skip


def _other_units(tokens: dict[str, int]) -> str:
    other = {kind: count for kind, count in tokens.items() if kind not in TOKENS}
    return json.dumps(other, sort_keys=True) if other else ""


def _grouping(by: By) -> tuple[sa.ColumnElement[Any], sa.FromClause]:
    if by == "chain":
        return chain.c.members, request.join(chain, chain.c.digest == request.c.chain_digest)
    if by == "caused":
        return chain_member.c.member, request.join(chain_member, chain_member.c.digest == request.c.chain_digest)
    return request.c[by], request


def _named(row: Totals, by: By) -> Totals:
    key = row.key
    if by == "chain":
        key = " > ".join(json.loads(row.key))
    elif by == "day":
        key = _iso_day(int(row.key))
    return Totals(key, *(getattr(row, name) for name in Totals.__slots__[1:]))


def _iso_day(day: int) -> str:
    return datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()


def _sum_if(condition: sa.ColumnElement[bool], value: Any) -> sa.ColumnElement[int]:
    return sa.func.coalesce(sa.func.sum(sa.case((condition, value), else_=0)), 0)
