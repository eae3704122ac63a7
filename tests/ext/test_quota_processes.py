"""Quotas shared by processes: exact under contention, and nothing stays locked or half done when one is killed."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from creto_hotpath._quota_types import TOTAL, QuotaBusy

from .conftest import Form

ACTOR = Path(__file__).with_name("quota_actor.py")
NOW = 1_800_000_000_000_000_000
TTL = 60_000_000_000


def key(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


@pytest.fixture
def table(form: Form, tmp_path: Path) -> Iterator[Any]:
    with form("quota").QuotaTable(str(tmp_path / "quota.tab"), 64, 64) as table:
        yield table


class Actors:
    """Processes that share a table; all are gone when the block ends."""

    def __init__(self, form: Form, table: Any) -> None:
        self._command = [sys.executable, str(ACTOR), form.module("quota"), table.filename]
        self._all: list[subprocess.Popen[str]] = []

    def start(self, what: str, *arguments: str) -> subprocess.Popen[str]:
        actor = subprocess.Popen(
            [*self._command, what, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._all.append(actor)
        return actor

    def end(self) -> None:
        for actor in self._all:
            actor.kill()
            actor.communicate()


@contextmanager
def actors(form: Form, table: Any) -> Iterator[Actors]:
    running = Actors(form, table)
    try:
        yield running
    finally:
        running.end()


def until_ready(actor: subprocess.Popen[str]) -> None:
    assert actor.stdout is not None
    assert actor.stdout.readline() == "ready\n"


def go(actor: subprocess.Popen[str]) -> None:
    assert actor.stdin is not None
    actor.stdin.write("go\n")
    actor.stdin.flush()


def total(running: list[subprocess.Popen[str]]) -> int:
    for actor in running:
        until_ready(actor)
    for actor in running:
        go(actor)
    said = [actor.communicate(timeout=120)[0] for actor in running]
    return sum(int(text) for text in said)


def test_processes_are_admitted_exactly_to_the_limit(form: Form, table: Any) -> None:
    limit = 900_000 if form.compiled else 600
    table.define(key("platform"), TOTAL, 10 * limit)
    table.define(key("org"), TOTAL, limit)
    table.define(key("agent"), TOTAL, 10 * limit)
    with actors(form, table) as cast:
        running = [cast.start("hammer", "platform,org,agent", str(limit // 2)) for _ in range(3)]
        assert total(running) == limit
    for name in ("platform", "org", "agent"):
        state = table.state(key(name), NOW)
        assert (state.used, state.reserved) == (limit, 0)
    assert table.state(key("org"), NOW).denied == limit // 2


def test_teams_in_different_processes_share_their_organisation_exactly(form: Form, table: Any) -> None:
    limit = 400_000 if form.compiled else 400
    table.define(key("org"), TOTAL, limit)
    table.define(key("one"), TOTAL, limit)
    table.define(key("other"), TOTAL, limit // 4)
    with actors(form, table) as cast:
        running = [cast.start("hammer", names, str(limit)) for names in ("one,org", "org,other")]
        assert total(running) == limit
    one, other = (table.state(key(name), NOW).used for name in ("one", "other"))
    assert one + other == limit
    assert other <= limit // 4


def test_processes_that_define_the_same_quotas_make_each_once(form: Form, table: Any) -> None:
    with actors(form, table) as cast:
        running = [cast.start("define", "40") for _ in range(3)]
        for actor in running:
            until_ready(actor)
        for actor in running:
            go(actor)
        assert [actor.wait(120) for actor in running] == [0, 0, 0]
    for number in range(40):
        assert table.state(key(f"q{number}"), NOW).limit == 1000
    for number in range(40, 48):  # 3/4 of 64: there is room for exactly eight more
        table.define(key(f"q{number}"), TOTAL, 1)


def test_a_forked_child_takes_a_seat_of_its_own(form: Form, table: Any) -> None:
    table.define(key("a"), TOTAL, 50)
    with actors(form, table) as cast:
        said, _ = cast.start("fork_and_share", "a", "30").communicate(timeout=120)
    assert sum(int(word) for word in said.split()) == 50
    assert table.state(key("a"), NOW).reserved == 50


def test_killing_a_process_anywhere_leaves_the_levels_in_step_and_nothing_locked(form: Form, table: Any) -> None:
    source = random.Random(7)
    names = ["platform", "org", "agent"]
    for name in names:
        table.define(key(name), TOTAL, 1 << 50)
    path = table.path([(key(name), 0) for name in names])
    with actors(form, table) as cast:
        for _ in range(12):
            running = [cast.start("churn", ",".join(names)) for _ in range(2)]
            for actor in running:
                until_ready(actor)
                go(actor)
            for _ in range(source.randrange(20, 400)):  # they run while this process uses the table too
                rid = table.reserve(path, (2,), NOW, TTL)
                assert table.commit(rid, (1,), NOW)
            for actor in running:
                actor.kill()
                actor.wait()
            states = [table.state(key(name), NOW) for name in names]
            assert len({(state.used, state.reserved) for state in states}) == 1
            assert states[0].reserved in (0, 2, 4)  # what the two had in flight, until its time is up
            assert table.sweep(NOW + TTL) == states[0].reserved // 2
    assert {table.state(key(name), NOW).reserved for name in names} == {0}
    rids = [table.reserve(path, (1,), NOW, TTL) for _ in range(64)]  # no reservation was lost
    assert all(table.release(rid) for rid in rids)


def test_what_a_killed_process_had_half_done_is_undone(form: Form, table: Any) -> None:
    table.define(key("a"), TOTAL, 10)
    path = table.path([(key("a"), 0)])
    assert table.reserve(path, (3,), NOW, TTL) > 0
    with actors(form, table) as cast:
        assert cast.start("die_halfway", "a").wait(120) == -9
    assert table.state(key("a"), NOW).reserved == 3
    assert table.reserve(path, (7,), NOW, TTL) > 0


def test_what_it_had_half_done_is_undone_after_a_restart_too(form: Form, table: Any) -> None:
    table.define(key("a"), TOTAL, 10)
    assert table.reserve(table.path([(key("a"), 0)]), (3,), NOW, TTL) > 0
    with actors(form, table) as cast:
        assert cast.start("die_halfway", "a").wait(120) == -9
    file = table.filename
    table.close()
    with form("quota").QuotaTable(file, 64, 64) as reopened:
        assert reopened.state(key("a"), NOW).reserved == 3


def test_a_new_process_does_not_sit_down_in_a_dead_owners_seat(form: Form, table: Any) -> None:
    table.define(key("a"), TOTAL, 10)
    assert table.reserve(table.path([(key("a"), 0)]), (3,), NOW, TTL) > 0
    with actors(form, table) as cast:
        assert cast.start("die_halfway", "a").wait(120) == -9
    with form("quota").QuotaTable(table.filename, 64, 64) as joined:
        assert joined.state(key("a"), NOW).reserved == 3


def test_a_living_owner_that_does_not_come_out_is_reported_and_not_robbed(form: Form, table: Any) -> None:
    table.define(key("a"), TOTAL, 10)
    path = table.path([(key("a"), 0)])
    with actors(form, table) as cast:
        inside = cast.start("stay_inside")
        until_ready(inside)
        with pytest.raises(QuotaBusy, match="has kept the quota table"):
            table.reserve(path, (1,), NOW, TTL)
        inside.kill()
        inside.wait()
        assert table.reserve(path, (1,), NOW, TTL) > 0


def test_an_owners_death_is_noticed_while_its_forked_child_lives(form: Form, table: Any) -> None:
    table.define(key("a"), TOTAL, 10)
    path = table.path([(key("a"), 0)])
    with actors(form, table) as cast:
        parent = cast.start("die_with_a_child")
        until_ready(parent)
        assert parent.wait(120) == -9
        assert table.reserve(path, (1,), NOW, TTL) > 0
        go(parent)  # the child, which has its parent's standard input, ends
