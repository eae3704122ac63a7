"""The durable record: requests, and an append-only, hash-chained history of everything that happened to them.

A change and its history lines are one transaction; a request is written by compare-and-set on (state, revision).
Several processes share one SQLite file: writers take the lock at once (BEGIN IMMEDIATE), so they queue instead of
failing half-way. ``synchronous=FULL`` wherever something is decided or spent, NORMAL for what the agent would simply
repeat after a power cut (SQLite, "PRAGMA synchronous": WAL with NORMAL loses no consistency, only the last commits).
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import msgspec
from sqlalchemy import (
    DDL,
    URL,
    BigInteger,
    Boolean,
    Column,
    Connection,
    CursorResult,
    Engine,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    RowMapping,
    String,
    Table,
    Text,
    create_engine,
    event,
    func,
    insert,
    select,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from creto_oversight.requests import ApprovalRequest, Change, Happened
from creto_oversight.states import LIVE, OPEN, State

DATABASE = "oversight.db"
SCHEMA = 1
# Transactions here last about a millisecond; whoever waits longer than this meets something broken.
BUSY_S = 2.0

_metadata = MetaData()
_serial = BigInteger().with_variant(Integer, "sqlite")
_meta = Table("oversight_meta", _metadata, Column("schema", Integer, primary_key=True))
_request = Table(
    "oversight_request",
    _metadata,
    Column("seq", _serial, primary_key=True, autoincrement=True),
    Column("id", String(40), nullable=False, unique=True),
    Column("agent", Text, nullable=False),
    Column("root", Text, nullable=False),
    Column("fingerprint", String(80), nullable=False),
    Column("state", String(20), nullable=False),
    Column("live", Boolean, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("created_ns", BigInteger, nullable=False),
    Column("due_ns", BigInteger),
    Column("notified", Boolean, nullable=False),
    Column("doc", LargeBinary, nullable=False),
)
Index("oversight_request_action", _request.c.agent, _request.c.fingerprint, _request.c.seq)
Index("oversight_request_root", _request.c.root, _request.c.created_ns)
Index("oversight_request_agent", _request.c.agent, _request.c.created_ns)
Index("oversight_request_agent_state", _request.c.agent, _request.c.state)
Index("oversight_request_root_state", _request.c.root, _request.c.state)
Index("oversight_request_due", _request.c.due_ns)
Index("oversight_request_state", _request.c.state)
# At most one request per action is alive: whatever the code does, there are never two grants for one action.
Index(
    "oversight_request_one_live",
    _request.c.agent,
    _request.c.fingerprint,
    unique=True,
    sqlite_where=_request.c.live,
    postgresql_where=_request.c.live,
)
_event = Table(
    "oversight_event",
    _metadata,
    Column("seq", _serial, primary_key=True, autoincrement=True),
    Column("request", String(40), nullable=False),
    Column("revision", Integer, nullable=False),
    Column("at_ns", BigInteger, nullable=False),
    Column("event", String(20), nullable=False),
    Column("actor", Text, nullable=False),
    Column("facts", Text, nullable=False),
    Column("prev", LargeBinary, nullable=False),
    Column("hash", LargeBinary, nullable=False),
)
Index("oversight_event_request", _event.c.request, _event.c.seq)
for _verb in ("UPDATE", "DELETE"):
    event.listen(
        _event,
        "after_create",
        DDL(  # type: ignore[no-untyped-call]
            f"CREATE TRIGGER oversight_event_no_{_verb.lower()} BEFORE {_verb} ON oversight_event "
            "BEGIN SELECT RAISE(ABORT, 'the history is append-only'); END"
        ).execute_if(dialect="sqlite"),
    )

_decode = msgspec.json.Decoder(ApprovalRequest).decode
_GENESIS = bytes(32)


class StoreUnavailable(Exception):
    """The record cannot be read or written, so nothing may be decided or sent."""


class Conflict(Exception):
    """Somebody else changed the request since it was read."""


class HistoryBroken(Exception):
    """The history is not what was written: a line was changed, removed or put in. ``seq`` is the first bad line."""

    def __init__(self, seq: int) -> None:
        super().__init__(f"the approval history does not verify at line {seq}")
        self.seq = seq


class Line(msgspec.Struct, frozen=True):
    """One line of a request's history as stored."""

    seq: int
    request: str
    at_ns: int
    event: str
    actor: str
    facts: dict[str, Any]


class Session:
    """One transaction on the record. Where history lines are written, ``now_ns`` stamps them."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def get(self, request_id: str) -> ApprovalRequest | None:
        return self._one(select(_request.c.doc).where(_request.c.id == request_id))

    def latest(self, agent: str, fingerprint: str) -> ApprovalRequest | None:
        """The youngest request for exactly this action."""
        same = (_request.c.agent == agent) & (_request.c.fingerprint == fingerprint)
        return self._one(select(_request.c.doc).where(same).order_by(_request.c.seq.desc()).limit(1))

    def listed(self, *, states: Iterable[State] | None = None, limit: int = 200) -> list[ApprovalRequest]:
        """The youngest requests first."""
        query = select(_request.c.doc).order_by(_request.c.seq.desc()).limit(limit)
        if states is not None:
            query = query.where(_request.c.state.in_(sorted(states)))
        return [_decode(row.doc) for row in self._connection.execute(query)]

    def due(self, now_ns: int, limit: int = 500) -> list[str]:
        """Ids of requests that time changes at or before ``now_ns``, the longest overdue first."""
        query = select(_request.c.id).where(_request.c.due_ns <= now_ns).order_by(_request.c.due_ns).limit(limit)
        return list(self._connection.execute(query).scalars())

    def executing(self) -> list[tuple[str, str]]:
        """(id, owner) of every request whose grant is spent and whose outcome is not known yet."""
        query = select(_request.c.doc).where(_request.c.state == State.EXECUTING)
        found = [_decode(row.doc) for row in self._connection.execute(query)]
        return [(request.id, request.owner) for request in found]

    def unannounced(self) -> list[str]:
        """Ids of open requests that nobody has been told about."""
        query = select(_request.c.id).where(_request.c.state.in_(sorted(OPEN)), ~_request.c.notified)
        return list(self._connection.execute(query).scalars())

    def open_count(self, column: str, value: str) -> int:
        """Number of open requests of an ``"agent"`` or a ``"root"``."""
        query = select(func.count()).where(_request.c[column] == value, _request.c.state.in_(sorted(OPEN)))
        return int(self._connection.execute(query).scalar_one())

    def youngest(self, column: str, value: str, since_ns: int, limit: int) -> list[int]:
        """When the ``limit`` youngest requests of an agent or root made after ``since_ns`` were made, newest first."""
        query = (
            select(_request.c.created_ns)
            .where(_request.c[column] == value, _request.c.created_ns > since_ns)
            .order_by(_request.c.created_ns.desc())
            .limit(limit)
        )
        return list(self._connection.execute(query).scalars())

    def history(self, request_id: str) -> list[Line]:
        query = select(_event).where(_event.c.request == request_id).order_by(_event.c.seq)
        return [_line(row) for row in self._connection.execute(query).mappings()]

    def last_event(self) -> int:
        return int(self._connection.execute(select(func.coalesce(func.max(_event.c.seq), 0))).scalar_one())

    def changed_since(self, seq: int) -> frozenset[str]:
        """Ids of the requests with history lines after ``seq``."""
        query = select(_event.c.request).where(_event.c.seq > seq).distinct()
        return frozenset(self._connection.execute(query).scalars())

    def add(self, change: Change, due_ns: int | None, now_ns: int) -> ApprovalRequest:
        """Stores a new request with its first history lines."""
        request = change.request
        self._connection.execute(insert(_request).values(id=request.id, **_columns(request, due_ns)))
        self._append(request, change.events, now_ns)
        return request

    def save(self, before: ApprovalRequest, change: Change, due_ns: int | None, now_ns: int) -> ApprovalRequest:
        """Writes a change of ``before`` and its history lines; raises Conflict when it is no longer what was read."""
        after = change.request if change.request is before else replace(change.request, revision=before.revision + 1)
        if after is not before:
            result: CursorResult[Any] = self._connection.execute(
                update(_request)
                .where(
                    _request.c.id == before.id,
                    _request.c.state == before.state,
                    _request.c.revision == before.revision,
                )
                .values(**_columns(after, due_ns))
            )
            if result.rowcount != 1:
                raise Conflict(before.id)
        self._append(after, change.events, now_ns)
        return after

    def _append(self, request: ApprovalRequest, events: Sequence[Happened], now_ns: int) -> None:
        if not events:
            return
        newest = select(_event.c.hash).order_by(_event.c.seq.desc()).limit(1)
        prev = self._connection.execute(newest).scalar_one_or_none() or _GENESIS
        for happened in events:
            facts = msgspec.json.encode(happened.facts, order="sorted").decode()
            line = (request.id, request.revision, now_ns, str(happened.event), happened.actor, facts)
            digest = _link(prev, line)
            self._connection.execute(
                insert(_event).values(
                    request=request.id,
                    revision=request.revision,
                    at_ns=now_ns,
                    event=happened.event,
                    actor=happened.actor,
                    facts=facts,
                    prev=prev,
                    hash=digest,
                )
            )
            prev = digest

    def _one(self, query: Any) -> ApprovalRequest | None:
        doc = self._connection.execute(query).scalar_one_or_none()
        return None if doc is None else _decode(doc)


class Store:
    """Requests for approval in one SQLite file, shared by every creto process with the same state directory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._normal: Engine | None = None
        self._full: Engine | None = None

    def open(self) -> None:
        """Creates or opens the file (0600). Raises StoreUnavailable, also for one that a newer creto made."""
        try:
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreUnavailable(f"{self.path}: {error.strerror}") from None
        self._normal = _engine(self.path, "NORMAL")
        self._full = _engine(self.path, "FULL")
        with self._transaction(self._full, "IMMEDIATE") as connection:
            _metadata.create_all(connection)
            version = connection.execute(select(_meta.c.schema)).scalar_one_or_none()
            if version is None:
                connection.execute(insert(_meta).values(schema=SCHEMA))
            elif version != SCHEMA:
                raise StoreUnavailable(f"{self.path}: has schema {version}, this creto knows {SCHEMA}")

    def close(self) -> None:
        for engine in (self._normal, self._full):
            if engine is not None:
                engine.dispose()
        self._normal = self._full = None

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A consistent view; nothing can be written. Raises StoreUnavailable."""
        with self._transaction(self._normal, "DEFERRED") as connection:
            yield Session(connection)

    @contextmanager
    def writing(self, *, durable: bool) -> Iterator[Session]:
        """One transaction, rolled back when the block raises. durable: on disk before this returns.

        Raises StoreUnavailable."""
        with self._transaction(self._full if durable else self._normal, "IMMEDIATE") as connection:
            yield Session(connection)

    def verify_history(self) -> int:
        """Number of history lines, when every hash follows from the line before; raises HistoryBroken."""
        count, prev = 0, _GENESIS
        with self._transaction(self._normal, "DEFERRED") as connection:
            for row in connection.execute(select(_event).order_by(_event.c.seq)).mappings():
                line = (row["request"], row["revision"], row["at_ns"], row["event"], row["actor"], row["facts"])
                if row["prev"] != prev or row["hash"] != _link(prev, line):
                    raise HistoryBroken(row["seq"])
                count, prev = count + 1, row["hash"]
        return count

    @contextmanager
    def _transaction(self, engine: Engine | None, mode: str) -> Iterator[Connection]:
        if engine is None:
            raise StoreUnavailable(f"{self.path}: not open")
        try:
            with engine.connect() as connection:
                with connection.execution_options(creto_begin=mode).begin():
                    yield connection
        except (SQLAlchemyError, sqlite3.Error, msgspec.DecodeError) as error:
            cause = error.__cause__ or error
            raise StoreUnavailable(f"{self.path}: {cause}") from error


class Ticker:
    """Tells cheaply whether another connection has committed anything, by ``PRAGMA data_version`` (microseconds)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._connection: sqlite3.Connection | None = None

    def version(self) -> int:
        """A number that differs from the last one when the file has changed. Raises StoreUnavailable."""
        try:
            if self._connection is None:
                uri = f"file:{quote(str(self._path))}?mode=ro"
                self._connection = sqlite3.connect(uri, uri=True, timeout=BUSY_S, check_same_thread=False)
            return int(self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{self._path}: {error}") from error

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _columns(request: ApprovalRequest, due_ns: int | None) -> dict[str, Any]:
    return {
        "agent": request.agent,
        "root": request.root,
        "fingerprint": request.fingerprint,
        "state": str(request.state),
        "live": request.state in LIVE,
        "revision": request.revision,
        "created_ns": request.created_ns,
        "due_ns": due_ns,
        "notified": request.notified,
        "doc": msgspec.json.encode(request),
    }


def _line(row: RowMapping) -> Line:
    return Line(row["seq"], row["request"], row["at_ns"], row["event"], row["actor"], msgspec.json.decode(row["facts"]))


def _link(prev: bytes, line: tuple[object, ...]) -> bytes:
    return hashlib.sha256(prev + msgspec.json.encode(line)).digest()


def _engine(path: Path, synchronous: str) -> Engine:
    # URL.create rather than a string: a state directory may contain "?" or "%".
    engine = create_engine(URL.create("sqlite+pysqlite", database=str(path)), connect_args={"timeout": BUSY_S})

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        # sqlite3 would open transactions by itself, deferred ones, which fail half-way under contention.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"BEGIN {connection.get_execution_options()['creto_begin']}")

    return engine
