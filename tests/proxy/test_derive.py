"""Ledger and audit log of a journal are the same whether its records are taken as they stand or one by one."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_hotpath.journal import Journal
from creto_metering.ledger import Ledger
from creto_platform.audit import EmbeddedAudit
from creto_platform.crypto import EmbeddedCrypto
from creto_proxy import replay
from creto_proxy.audit import AuditTrail, decode, encode
from creto_proxy.batch import Batch
from creto_proxy.hookspecs import Consumer
from creto_proxy.model import Outcome, Usage
from creto_proxy.testing import make_agent, make_outcome, make_request

CRYPTO = EmbeddedCrypto()
# Where there is one: an example syncs dozens of files.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
BASE = make_outcome(make_request(), usage=Usage("exact", "openai", "m", {"input": 1, "total": 1, "web_search": 2}, 7))

words = st.sampled_from(["", "a", "b", "é", "x" * 40, "deny", "approved", "read_timeout", "org:acme", "team:ml", "a\0b"])
# Sums of them are asked for, which SQLite makes in 64 bits.
counts = st.integers(0, 1 << 55) | st.integers(0, 300)
usages = st.builds(
    Usage, words, words, words,
    st.dictionaries(st.sampled_from(["input", "output", "total", "other", "é"]), counts), st.integers(-5, 1 << 55),
)  # fmt: skip
outcomes = st.builds(
    replace,
    st.just(BASE),
    id=st.integers(0, 40).map(lambda number: number.to_bytes(16, "big")),
    at_unix_ns=st.integers(0, 1 << 62) | st.integers(-(1 << 60), -1),
    agent=words,
    chain=st.lists(words, max_size=3).map(tuple),
    chain_digest=st.sampled_from([bytes(32), b"\1" * 32, b""]),
    path=st.lists(words, max_size=4).map(tuple),
    host=words,
    port=st.integers(0, 65_535),
    target=words | st.just("/" + "t" * 70_000),
    decision=words,
    reason=words,
    policies=st.lists(words, max_size=3).map(tuple),
    status=st.integers(0, 599),
    error=words,
    usage=usages,
    bytes_up=counts,
    bytes_down=st.integers(-3, 3),
    run=words,
    trace=words,
)


def older(payload: bytes) -> bytes:
    """As a version wrote it that had fewer fields."""
    return bytes(msgpack.packb(msgpack.unpackb(payload, raw=False)[:-2]))


def odd(payload: bytes) -> bytes:
    """The same in another spelling: the last text, which is short, with a longer head."""
    text = msgpack.unpackb(payload)[-1].encode()
    return payload[: -len(text) - 1] + b"\xda" + len(text).to_bytes(2, "big") + text if len(text) < 32 else payload


class OneByOne:
    """A consumer that is given plain outcomes."""

    def __init__(self, inner: Consumer) -> None:
        self._inner, self.name = inner, inner.name

    def position(self, segment: str) -> int:
        return self._inner.position(segment)

    def apply(self, segment: str, records: Sequence[Outcome], upto: int) -> None:
        assert isinstance(records, Batch)
        self._inner.apply(segment, list(records), upto)


def derived(folder: Path, payloads: Sequence[bytes], plain: bool) -> tuple[Any, ...]:
    """What stands in the ledger, the answers it gives, and the audit log."""
    (folder / "journal").mkdir(parents=True)
    with Journal(str(folder / "journal"), "dead", flush="record") as journal:
        for payload in payloads:
            journal.append(payload)
    ledger = Ledger(folder / "metering.db")
    ledger.open()
    audit = EmbeddedAudit(folder / "audit", folder / "signed", CRYPTO, publish_every_s=None)
    consumers: list[Consumer] = [ledger, AuditTrail(audit)]
    running = replay.Replay(folder / "journal", "own", [OneByOne(each) for each in consumers] if plain else consumers)
    running.start()
    assert running.stop()
    head = audit.publish()
    entries = [entry.data for entry in audit.read(0, 1000)]
    totals = [ledger.totals(by) for by in ("agent", "chain", "caused", "day", "model", "team")]
    ledger.close()
    audit.close()
    with closing(sqlite3.connect(folder / "metering.db")) as database:
        tables = [
            database.execute(f"SELECT * FROM {name} ORDER BY 1, 2").fetchall()
            for name in ("request", "chain", "chain_member", "cursor")
        ]
    return tables, totals, ledger.name, entries, (head.size, head.root)


@given(st.lists(st.tuples(outcomes, st.sampled_from("uuuuov")), max_size=12), st.integers(1, 5))
@settings(deadline=None, max_examples=20)
def test_both_ways_lead_to_the_same(found: list[tuple[Outcome, str]], batch: int) -> None:
    spelled = {"u": lambda payload: payload, "o": older, "v": odd}
    payloads = [spelled[how](encode(outcome)) for outcome, how in found]
    for payload, (outcome, how) in zip(payloads, found, strict=True):
        assert decode(payload) == (replace(outcome, resource="", trace="") if how == "o" else outcome)
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay, "BATCH", batch)
        assert derived(Path(folder, "one"), payloads, True) == derived(Path(folder, "many"), payloads, False)


def test_an_ordinary_record_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparison above would compare one way with itself."""
    def none(*_: object) -> None:
        raise AssertionError("it was taken apart")

    monkeypatch.setattr(replay, "decode", none)
    used = Usage("exact", "openai", "gpt-4o", {"input": 20, "web_search": 1}, 1 << 40)
    plain = make_outcome(make_request("POST", agent=make_agent("other")), usage=used)
    tables, _, _, entries, _ = derived(tmp_path / "state", [encode(plain), encode(replace(plain, id=bytes(16)))], False)
    assert (len(tables[0]), len(entries)) == (2, 2)


@pytest.mark.parametrize("window", [1 << 20, 1000])
def test_records_larger_than_what_is_read_at_a_time_are_applied(
    tmp_path: Path, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "_WINDOW", window)
    payloads = [
        encode(replace(BASE, id=number.to_bytes(16, "big"), target="/" + "t" * size))
        for number, size in enumerate((5, 500, 3000, 5, 999, 0))
    ]
    tables, _, _, entries, _ = derived(tmp_path / "state", payloads, False)
    assert [row[0][-1] for row in tables[0]] == list(range(6)) == [msgpack.unpackb(entry)["id"][-1] for entry in entries]
