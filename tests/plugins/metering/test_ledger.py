"""The ledger: each outcome once, whatever dies; and the commands that read it."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from creto_metering.budgets import Budgets, Hold
from creto_metering.commands import quota, usage
from creto_metering.groups import GROUPS
from creto_metering.ledger import Ledger, LedgerError
from creto_metering.settings import Settings
from creto_proxy.model import Agent, Outcome, Usage
from creto_proxy.testing import EPOCH_NS, make_agent, make_outcome, make_request

DAY_NS = 86_400 * 10**9
EXACT = Usage("exact", "openai", "gpt-4o", {"input": 20, "output": 5, "total": 25, "web_search": 1}, 100)


def outcome(number: int, agent: Agent | None = None, used: Usage | None = EXACT, **more: Any) -> Outcome:
    request = make_request("POST", agent=agent or make_agent())
    return replace(make_outcome(request, usage=used), id=number.to_bytes(16, "big"), **more)


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = Ledger(tmp_path / "metering.db")
    opened.open()
    yield opened
    opened.close()


def sums(ledger: Ledger, by: Any = "agent", **more: Any) -> list[tuple[str, int, int]]:
    return [(row.key, row.requests, row.cost_nano_usd) for row in ledger.totals(by, **more)[0]]


def test_replay_changes_nothing(ledger: Ledger) -> None:
    records = [outcome(n) for n in range(5)]
    ledger.apply("a.jnl", records[:3], 30)
    ledger.apply("a.jnl", records[1:], 50)
    ledger.apply("a.jnl", records, 50)
    ledger.apply("other.jnl", records, 7)
    assert sums(ledger) == [("spiffe://local/agent/tester", 5, 500)]
    assert (ledger.position("a.jnl"), ledger.position("other.jnl"), ledger.position("new.jnl")) == (50, 7, 0)


def test_position_never_goes_back(ledger: Ledger) -> None:
    ledger.apply("a.jnl", [], 50)
    ledger.apply("a.jnl", [outcome(1)], 40)
    assert ledger.position("a.jnl") == 50
    assert sums(ledger)[0][1] == 1


def test_records_and_position_are_stored_together_or_not_at_all(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Ledger, "_advance", fail)
    with pytest.raises(OSError, match="disk full"):
        ledger.apply("a.jnl", [outcome(1)], 10)
    monkeypatch.undo()
    assert (sums(ledger), ledger.position("a.jnl")) == ([], 0)


KILLED = """
    import os, signal, sys
    from pathlib import Path
    from creto_metering.ledger import Ledger
    from tests_support import records

    where = sys.argv[2]
    if where == "before the position":
        Ledger._advance = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    ledger = Ledger(Path(sys.argv[1]))
    ledger.open()
    ledger.apply("a.jnl", records(), 100)
    os.kill(os.getpid(), signal.SIGKILL)
"""

SUPPORT = """
    from dataclasses import replace
    from creto_proxy.model import Usage
    from creto_proxy.testing import make_outcome, make_request

    def records():
        used = Usage("exact", "openai", "gpt-4o", {"input": 20, "output": 5, "total": 25}, 100)
        return [replace(make_outcome(make_request(), usage=used), id=bytes([n]) * 16) for n in range(50)]
"""


@pytest.mark.parametrize(("where", "applied"), [("before the position", 0), ("after the commit", 100)])
def test_killed_consumer_loses_nothing_and_doubles_nothing(tmp_path: Path, where: str, applied: int) -> None:
    (tmp_path / "tests_support.py").write_text(textwrap.dedent(SUPPORT))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    path = tmp_path / "metering.db"
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), str(path), where], env=environment, timeout=60, check=False
    )
    assert child.returncode == -signal.SIGKILL
    ledger = Ledger(path)
    ledger.open()
    assert ledger.position("a.jnl") == applied
    assert sum(requests for _, requests, _ in sums(ledger)) == applied // 2
    replayed = [outcome(int.from_bytes(bytes([n]) * 16, "big")) for n in range(50)]
    ledger.apply("a.jnl", replayed, 100)
    assert sums(ledger) == [("spiffe://local/agent/tester", 50, 5000)]
    ledger.close()


def test_two_processes_may_write_one_ledger(ledger: Ledger, tmp_path: Path) -> None:
    other = Ledger(tmp_path / "metering.db")
    other.open()
    ledger.apply("a.jnl", [outcome(1)], 10)
    other.apply("b.jnl", [outcome(2)], 20)
    assert sums(ledger) == sums(other) == [("spiffe://local/agent/tester", 2, 200)]
    other.close()


def test_what_delegates_caused_is_theirs_once_and_everybodys_above_them(ledger: Ledger) -> None:
    lead = make_agent("lead")
    helper = replace(
        make_agent("helper"),
        chain=(*lead.chain, "spiffe://local/agent/helper"),
        chain_digest=b"\1" * 32,
    )
    ledger.apply("a.jnl", [outcome(1, lead), outcome(2, helper), outcome(3, helper)], 1)
    human, leads, helpers = helper.chain
    assert sums(ledger, "caused") == [(leads, 3, 300), (human, 3, 300), (helpers, 2, 200)]
    assert sums(ledger, "chain") == [(" > ".join(helper.chain), 2, 200), (" > ".join(lead.chain), 1, 100)]
    assert sum(cost for _, _, cost in sums(ledger, "agent")) == 300


def test_totals_tell_refused_unknown_and_estimated_apart(ledger: Ledger) -> None:
    records = [
        outcome(1),
        outcome(2, used=Usage("unknown", "openai", "gpt-4o", {}, 70)),
        outcome(3, used=Usage("estimated", "openai", "x", {"total": 4}, 30)),
        outcome(4, used=Usage(), decision="deny", reason="budget_exhausted"),
    ]
    ledger.apply("a.jnl", records, 1)
    (row,), as_of = ledger.totals("agent")
    assert (row.requests, row.refused, row.unknown) == (4, 1, 1)
    assert (row.total, row.cost_nano_usd, row.uncertain_nano_usd) == (29, 200, 100)
    assert as_of == EPOCH_NS


def test_totals_of_a_time_and_of_one_agent(ledger: Ledger) -> None:
    later = outcome(2, make_agent("other"), at_unix_ns=EPOCH_NS + DAY_NS)
    ledger.apply("a.jnl", [outcome(1), later], 1)
    assert sums(ledger, "day") == [("2026-01-01", 1, 100), ("2026-01-02", 1, 100)]
    assert sums(ledger, "day", since_ns=EPOCH_NS + 1) == [("2026-01-02", 1, 100)]
    assert sums(ledger, "day", until_ns=EPOCH_NS + 1) == [("2026-01-01", 1, 100)]
    assert sums(ledger, agent="spiffe://local/agent/other") == [("spiffe://local/agent/other", 1, 100)]
    for by in GROUPS:
        assert sum(requests for _, requests, _ in sums(ledger, by)) >= 2


def test_database_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "metering.db"
    first = Ledger(path)
    first.open()
    first.close()
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(LedgerError, match="schema version 99"):
        Ledger(path).open()


FIRST = """
    CREATE TABLE schema_version (version INTEGER NOT NULL, PRIMARY KEY (version));
    INSERT INTO schema_version VALUES (1);
    CREATE TABLE cursor (segment VARCHAR NOT NULL, position BIGINT NOT NULL, PRIMARY KEY (segment));
    CREATE TABLE chain (digest BLOB NOT NULL, members VARCHAR NOT NULL, PRIMARY KEY (digest));
    CREATE TABLE chain_member (member VARCHAR NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (member, digest));
    CREATE TABLE request (
        id BLOB NOT NULL, at_unix_ns BIGINT NOT NULL, day INTEGER NOT NULL, run VARCHAR NOT NULL,
        agent VARCHAR NOT NULL, chain_digest BLOB NOT NULL, path VARCHAR NOT NULL, org VARCHAR NOT NULL,
        team VARCHAR NOT NULL, host VARCHAR NOT NULL, decision VARCHAR NOT NULL, reason VARCHAR NOT NULL,
        status INTEGER NOT NULL, certainty VARCHAR NOT NULL, provider VARCHAR NOT NULL, model VARCHAR NOT NULL,
        input BIGINT, output BIGINT, cache_read BIGINT, cache_write BIGINT, reasoning BIGINT, total BIGINT,
        other_units VARCHAR NOT NULL, cost_nano_usd BIGINT NOT NULL, bytes_up BIGINT NOT NULL,
        bytes_down BIGINT NOT NULL, PRIMARY KEY (id)
    );
    CREATE INDEX request_by_agent ON request (agent, at_unix_ns);
    CREATE INDEX request_by_time ON request (at_unix_ns);
    CREATE INDEX request_by_chain ON request (chain_digest);
"""


def dumped(path: Path) -> list[list[Any]]:
    with closing(sqlite3.connect(path)) as connection:
        names = ("request", "chain", "chain_member", "cursor")
        return [connection.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall() for name in names]


def test_a_ledger_of_the_first_version_is_taken_over_whole(ledger: Ledger, tmp_path: Path) -> None:
    other = replace(make_agent("other"), chain_digest=b"\1" * 32, path=("platform", "org:acme", "agent:other"))
    records = [
        *(outcome(n, at_unix_ns=EPOCH_NS + n * DAY_NS) for n in range(3)),
        outcome(3, other, Usage("unknown", "openai", "x", {}, 70), decision="deny", bytes_up=9),
        outcome(4, other, at_unix_ns=EPOCH_NS - 1),
        outcome(5, at_unix_ns=-1),
    ]
    ledger.apply("a.jnl", records, 60)
    first = tmp_path / "first.db"
    with closing(sqlite3.connect(first)) as connection, connection:
        connection.executescript(FIRST)
        for name, rows in zip(("request", "chain", "chain_member", "cursor"), dumped(tmp_path / "metering.db"), strict=True):
            connection.executemany(f"INSERT INTO {name} VALUES ({','.join('?' * len(rows[0]))})", rows)
    taken = Ledger(first)
    taken.open()
    assert dumped(first) == dumped(tmp_path / "metering.db")
    for by in GROUPS:
        assert taken.totals(by) == ledger.totals(by)
    assert taken.totals("agent", agent=other.id) == ledger.totals("agent", agent=other.id)
    assert (taken.position("a.jnl"), taken.paths()) == (60, ledger.paths())
    for each in (taken, ledger):
        each.apply("a.jnl", [*records, outcome(6, other)], 70)
    assert dumped(first) == dumped(tmp_path / "metering.db")
    taken.close()
    again = Ledger(first)
    again.open()
    assert again.totals("day") == ledger.totals("day")
    again.close()


def test_a_request_before_1970_was_on_the_day_before(ledger: Ledger) -> None:
    ledger.apply("a.jnl", [outcome(1, at_unix_ns=-1), outcome(2, at_unix_ns=0)], 1)
    assert sums(ledger, "day", since_ns=-1) == [("1969-12-31", 1, 100), ("1970-01-01", 1, 100)]


def test_file_that_is_no_database_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "metering.db"
    path.write_bytes(b"not a database at all" * 100)
    with pytest.raises(LedgerError, match="metering.db: file is not a database"):
        Ledger(path).open()


def test_database_is_private(ledger: Ledger, tmp_path: Path) -> None:
    assert (tmp_path / "metering.db").stat().st_mode & 0o777 == 0o600


class Operator:
    """What commands are given by the ``creto`` command."""

    def __init__(self, state_dir: Path, settings: Settings | None = None) -> None:
        self.state_dir = state_dir
        self.json = True
        self.config = type("Config", (), {"sections": {"metering": settings or Settings()}})()

    def emit(self, rows: Any, document: Any) -> None:
        assert all(isinstance(row, dict) for row in rows)
        print(json.dumps(document))


def invoke(command: Any, operator: Operator, *arguments: str) -> Any:
    result = CliRunner().invoke(command, arguments, obj=operator, catch_exceptions=False)
    return json.loads(result.output) if result.exit_code == 0 else result.output


def test_usage_command_shows_totals_and_their_freshness(ledger: Ledger, tmp_path: Path) -> None:
    ledger.apply("a.jnl", [outcome(1), outcome(2)], 1)
    operator = Operator(tmp_path)
    shown = invoke(usage, operator, "--by", "model")
    assert shown["as_of"] == "2026-01-01T00:00:00Z"
    assert [(row["key"], row["tokens"]["total"], row["cost_usd"]) for row in shown["rows"]] == [
        ("gpt-4o", 50, "0.0000002")
    ]
    assert shown["total"]["cost_nano_usd"] == 200
    assert invoke(usage, operator, "--by", "caused")["total"] is None
    assert invoke(usage, operator, "--since", "2026-01-02")["rows"] == []
    assert len(invoke(usage, operator, "--since", "2026-01-01T01:00+01:00")["rows"]) == 1
    assert "is neither an age" in invoke(usage, operator, "--since", "yesterday")


def test_usage_command_without_a_ledger_says_so_and_makes_none(tmp_path: Path) -> None:
    assert "there is no ledger yet" in invoke(usage, Operator(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_quota_command_shows_every_budget_of_every_known_agent(ledger: Ledger, tmp_path: Path) -> None:
    from creto_hotpath.quota import QuotaTable

    settings = Settings(
        budgets=[
            {"level": "platform", "metric": "requests", "limit": "9", "window": "total"},
            {"level": "agent", "metric": "cost_usd", "limit": "5", "window": "total"},
            {"level": "agent", "match": "named", "rate": "60/m"},
        ]
    )
    assert invoke(quota, Operator(tmp_path, settings)) == {"budgets": []}
    agent = make_agent()
    with QuotaTable(str(tmp_path / "quota.tab")) as table:
        budgets = Budgets(settings.budgets, table, DAY_NS)
        hold = budgets.reserve(budgets.levels(agent.path, EPOCH_NS), (1, 10, 1_500_000_000), EPOCH_NS)
        assert isinstance(hold, Hold)
        ledger.apply("a.jnl", [outcome(1)], 1)
        shown = invoke(quota, Operator(tmp_path, settings))["budgets"]
    assert [(b["level"], b["metric"], b["limit"], b["reserved"], b["remaining"]) for b in shown] == [
        ("platform", "requests", 9, 1, 8),
        ("agent:named", "cost_usd", "5.00", "0.00", "5.00"),
        ("agent:named", "requests", 60, 0, 60),
        ("agent:tester", "cost_usd", "5.00", "1.50", "3.50"),
    ]


def test_prices_are_imported_into_a_file_that_loads(tmp_path: Path) -> None:
    pytest.importorskip("genai_prices", reason="genai-prices is an optional dependency")
    from creto_metering.prices import load_prices

    path = tmp_path / "prices.json"
    shown = invoke(usage, Operator(tmp_path), "import-prices", "--provider", "anthropic", "--output", str(path))
    assert shown["models"] == len(load_prices(path).models) > 10
    complaint = invoke(usage, Operator(tmp_path), "import-prices", "--provider", "nobody", "--output", str(path))
    assert "knows no provider nobody" in complaint
