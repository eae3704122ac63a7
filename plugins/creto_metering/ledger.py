"""The ledger: every outcome once, in SQLite, fed by the journal and answering who used what.

A record is identified by the request's id, and the position in the journal segment is stored in the same transaction
as the records before it, so a crash at any point replays without losing or doubling. What a request cost is stored as
it was charged: a later price never rewrites it. Delegation is stored once per chain; what an agent caused through
others is derived from it and never billed twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias

import sqlalchemy as sa
from sqlalchemy.dialects import sqlite

from creto_proxy.model import Outcome

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_MS = 10_000
_SECOND_NS = 1_000_000_000
_DAY_NS = 86_400 * _SECOND_NS

By: TypeAlias = Literal["agent", "chain", "caused", "model", "provider", "day", "org", "team", "host", "run"]
GROUPS: tuple[By, ...] = ("agent", "chain", "caused", "model", "provider", "day", "org", "team", "host", "run")

metadata = sa.MetaData()

schema_version = sa.Table("schema_version", metadata, sa.Column("version", sa.Integer, primary_key=True))

cursor = sa.Table(
    "cursor",
    metadata,
    sa.Column("segment", sa.String, primary_key=True),
    sa.Column("position", sa.BigInteger, nullable=False),
)

# members: JSON array of SPIFFE ids from the human down to the agent.
chain = sa.Table(
    "chain",
    metadata,
    sa.Column("digest", sa.LargeBinary, primary_key=True),
    sa.Column("members", sa.String, nullable=False),
)

chain_member = sa.Table(
    "chain_member",
    metadata,
    sa.Column("member", sa.String, primary_key=True),
    sa.Column("digest", sa.LargeBinary, primary_key=True),
)

request = sa.Table(
    "request",
    metadata,
    sa.Column("id", sa.LargeBinary, primary_key=True),
    sa.Column("at_unix_ns", sa.BigInteger, nullable=False),
    sa.Column("day", sa.Integer, nullable=False),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("agent", sa.String, nullable=False),
    sa.Column("chain_digest", sa.LargeBinary, nullable=False),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("org", sa.String, nullable=False),
    sa.Column("team", sa.String, nullable=False),
    sa.Column("host", sa.String, nullable=False),
    sa.Column("decision", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("certainty", sa.String, nullable=False),
    sa.Column("provider", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("input", sa.BigInteger),
    sa.Column("output", sa.BigInteger),
    sa.Column("cache_read", sa.BigInteger),
    sa.Column("cache_write", sa.BigInteger),
    sa.Column("reasoning", sa.BigInteger),
    sa.Column("total", sa.BigInteger),
    sa.Column("other_units", sa.String, nullable=False),
    sa.Column("cost_nano_usd", sa.BigInteger, nullable=False),
    sa.Column("bytes_up", sa.BigInteger, nullable=False),
    sa.Column("bytes_down", sa.BigInteger, nullable=False),
    sa.Index("request_by_agent", "agent", "at_unix_ns"),
    sa.Index("request_by_time", "at_unix_ns"),
    sa.Index("request_by_chain", "chain_digest"),
)

_TOKENS = ("input", "output", "cache_read", "cache_write", "reasoning", "total")


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
                metadata.create_all(connection)
                found = connection.scalar(sa.select(schema_version.c.version))
                if found is None:
                    connection.execute(schema_version.insert().values(version=SCHEMA_VERSION))
        except sa.exc.DBAPIError as error:
            engine.dispose()
            raise LedgerError(f"{self._path}: {error.orig}") from None
        if found not in (None, SCHEMA_VERSION):
            engine.dispose()
            raise LedgerError(f"{self._path}: schema version {found}, this creto knows {SCHEMA_VERSION}")
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
        with self._transaction() as connection:
            self._store(connection, records)
            self._advance(connection, segment, upto)

    def _store(self, connection: sa.Connection, records: Sequence[Outcome]) -> None:
        if not records:
            return
        chains = {record.chain_digest: record.chain for record in records}
        _insert_new(
            connection, chain, [{"digest": d, "members": json.dumps(list(members))} for d, members in chains.items()]
        )
        members = [{"member": m, "digest": d} for d, ms in chains.items() for m in dict.fromkeys(ms)]
        _insert_new(connection, chain_member, members)
        _insert_new(connection, request, [_row(record) for record in records])

    def _advance(self, connection: sa.Connection, segment: str, upto: int) -> None:
        insert = sqlite.insert(cursor).values(segment=segment, position=upto)
        connection.execute(
            insert.on_conflict_do_update(
                index_elements=["segment"],
                set_={"position": insert.excluded.position},
                where=cursor.c.position < insert.excluded.position,
            )
        )

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
                *(sa.func.coalesce(sa.func.sum(request.c[name]), 0).label(name) for name in _TOKENS),
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


def _insert_new(connection: sa.Connection, table: sa.Table, rows: list[dict[str, Any]]) -> None:
    connection.execute(sqlite.insert(table).on_conflict_do_nothing(), rows)


def _row(record: Outcome) -> dict[str, Any]:
    usage = record.usage
    levels = dict(element.partition(":")[::2] for element in record.path)
    other = {kind: count for kind, count in usage.tokens.items() if kind not in _TOKENS}
    return {
        "id": record.id,
        "at_unix_ns": record.at_unix_ns,
        "day": record.at_unix_ns // _DAY_NS,
        "run": record.run,
        "agent": record.agent,
        "chain_digest": record.chain_digest,
        "path": json.dumps(list(record.path)),
        "org": levels.get("org", ""),
        "team": levels.get("team", ""),
        "host": record.host,
        "decision": record.decision,
        "reason": record.reason,
        "status": record.status,
        "certainty": usage.certainty,
        "provider": usage.provider,
        "model": usage.model,
        **{name: usage.tokens.get(name) for name in _TOKENS},
        "other_units": json.dumps(other, sort_keys=True) if other else "",
        "cost_nano_usd": usage.cost_nano_usd,
        "bytes_up": record.bytes_up,
        "bytes_down": record.bytes_down,
    }


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
