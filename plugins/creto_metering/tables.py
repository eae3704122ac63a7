"""The ledger's tables, and how the tables of an earlier version become them.

What requests have in common (who asked whom, by which chain, what was said to it) stands once, in ``shape``; an
``entry`` is what is left of a request: when, how many tokens and bytes, for how much. ``request`` is both together,
one row for each request, which is what queries are about.
"""

from __future__ import annotations

import sqlalchemy as sa

VERSION = 2
DAY_NS = 86_400 * 1_000_000_000
TOKENS = ("input", "output", "cache_read", "cache_write", "reasoning", "total")

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

# Those by which shapes are looked for come first: the index of the constraint serves queries too.
_SHAPE = (
    sa.Column("chain_digest", sa.LargeBinary, nullable=False),
    sa.Column("agent", sa.String, nullable=False),
    sa.Column("host", sa.String, nullable=False),
    sa.Column("decision", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
    sa.Column("status", sa.Integer, nullable=False),
    sa.Column("certainty", sa.String, nullable=False),
    sa.Column("provider", sa.String, nullable=False),
    sa.Column("model", sa.String, nullable=False),
    sa.Column("run", sa.String, nullable=False),
    sa.Column("path", sa.String, nullable=False),
    sa.Column("org", sa.String, nullable=False),
    sa.Column("team", sa.String, nullable=False),
)
SHAPE = tuple(column.name for column in _SHAPE)

shape = sa.Table(
    "shape", metadata, sa.Column("id", sa.Integer, primary_key=True), *_SHAPE, sa.UniqueConstraint(*SHAPE)
)

# In the order of the key a shape's entries lie together and by time, so that no other index is needed to sum them.
entry = sa.Table(
    "entry",
    metadata,
    sa.Column("shape", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("at_unix_ns", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("id", sa.LargeBinary, primary_key=True, unique=True),
    *(sa.Column(name, sa.BigInteger) for name in TOKENS),
    sa.Column("other_units", sa.String, nullable=False),
    sa.Column("cost_nano_usd", sa.BigInteger, nullable=False),
    sa.Column("bytes_up", sa.BigInteger, nullable=False),
    sa.Column("bytes_down", sa.BigInteger, nullable=False),
    sqlite_with_rowid=False,
)
ENTRY = tuple(column.name for column in entry.columns)

# The columns of the view, in the order they had as a table.
_REQUEST = (
    "id", "at_unix_ns", "day", "run", "agent", "chain_digest", "path", "org", "team", "host", "decision", "reason",
    "status", "certainty", "provider", "model", *TOKENS, "other_units", "cost_nano_usd", "bytes_up", "bytes_down",
)  # fmt: skip
# Rounds down, before 1970 too, which division does not.
_DAY = f"(entry.at_unix_ns - (entry.at_unix_ns % {DAY_NS} + {DAY_NS}) % {DAY_NS}) / {DAY_NS}"
_SOURCES = {"day": f"{_DAY} AS day", **{name: f"shape.{name}" for name in SHAPE}}

request = sa.table("request", *(sa.column(name) for name in _REQUEST))


def _insert(into: str, columns: tuple[str, ...]) -> str:
    return f"INSERT INTO {into} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) ON CONFLICT DO NOTHING"


# For the driver itself: most of the time that statements of SQLAlchemy take is spent on each row.
INSERT_CHAIN = _insert("chain", ("digest", "members"))
INSERT_MEMBER = _insert("chain_member", ("member", "digest"))
INSERT_ENTRY = _insert("entry", ENTRY)
INSERT_SHAPE = _insert("shape", SHAPE)
ADVANCE = (
    "INSERT INTO cursor (segment, position) VALUES (?, ?) ON CONFLICT (segment) DO UPDATE "
    "SET position = excluded.position WHERE position < excluded.position"
)
FIND_SHAPE = f"SELECT id FROM shape WHERE {' AND '.join(f'{name} = ?' for name in SHAPE)}"


def prepare(connection: sa.Connection) -> int:
    """Makes the tables where there are none, or of those of an earlier version; the version that is there now.

    A version that this creto does not know is left as it is.
    """
    schema_version.create(connection, checkfirst=True)
    found = connection.scalar(sa.select(schema_version.c.version))
    if found is None:
        _create(connection)
        connection.execute(schema_version.insert().values(version=VERSION))
        return VERSION
    if found == 1:
        _from_first(connection)
        return VERSION
    return int(found)


def _create(connection: sa.Connection) -> None:
    metadata.create_all(connection)
    columns = ", ".join(_SOURCES.get(name, f"entry.{name}") for name in _REQUEST)
    connection.exec_driver_sql(
        f"CREATE VIEW request AS SELECT {columns} FROM shape JOIN entry ON entry.shape = shape.id"
    )


def _from_first(connection: sa.Connection) -> None:
    """Version 1 had one table ``request`` with everything in each row."""
    for index in ("request_by_agent", "request_by_time", "request_by_chain"):
        connection.exec_driver_sql(f"DROP INDEX IF EXISTS {index}")
    connection.exec_driver_sql("ALTER TABLE request RENAME TO request_1")
    _create(connection)
    shapes, entries = ", ".join(SHAPE), ", ".join(ENTRY[1:])
    connection.exec_driver_sql(f"INSERT INTO shape ({shapes}) SELECT DISTINCT {shapes} FROM request_1")
    connection.exec_driver_sql(
        f"INSERT INTO entry (shape, {entries}) SELECT shape.id, {', '.join(f'request_1.{name}' for name in ENTRY[1:])} "
        f"FROM request_1 JOIN shape USING ({shapes}) ORDER BY shape.id, request_1.at_unix_ns"
    )
    connection.exec_driver_sql("DROP TABLE request_1")
    connection.execute(schema_version.update().values(version=VERSION))
