"""Cached decisions, and the one call that answers policy and charges quota."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from creto_hotpath._quota_types import CALENDAR, NO_HOLD, TOTAL

from .conftest import Form, outcome

NOW = 1_800_000_000_000_000_000
TTL = 60_000_000_000
LATER = NOW + 3600 * 1_000_000_000


def key(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def in_set(number: int, which: int = 0) -> bytes:
    """Keys with equal ``which`` share a set."""
    return number.to_bytes(8, "little") + which.to_bytes(8, "little")


def test_a_decision_is_kept_until_it_expires(form: Form) -> None:
    decisions = form("admit").DecisionTable(64)
    decisions.put(key("a"), 1, 7, LATER)
    assert decisions.get(key("a"), 1, NOW) == 7
    assert decisions.get(key("a"), 1, LATER - 1) == 7
    assert decisions.get(key("a"), 1, LATER) == 0
    assert decisions.get(key("b"), 1, NOW) == 0


@pytest.mark.parametrize("epoch", [0, 2, (1 << 47) - 1])
def test_a_decision_of_another_epoch_is_not_given(form: Form, epoch: int) -> None:
    decisions = form("admit").DecisionTable(64)
    decisions.put(key("a"), 1, 7, LATER)
    assert decisions.get(key("a"), epoch, NOW) == 0
    decisions.put(key("a"), epoch, 8, LATER)
    assert decisions.get(key("a"), epoch, NOW) == 8
    assert decisions.get(key("a"), 1, NOW) == 0


def test_a_later_decision_replaces_the_earlier(form: Form) -> None:
    decisions = form("admit").DecisionTable(64)
    decisions.put(key("a"), 1, 7, LATER)
    decisions.put(key("a"), 1, 0xFFFF, NOW + 1)
    assert decisions.get(key("a"), 1, NOW) == 0xFFFF
    assert decisions.get(key("a"), 1, NOW + 1) == 0


def test_a_full_set_drops_another_epoch_first_and_then_what_expires_soonest(form: Form) -> None:
    decisions = form("admit").DecisionTable(64)
    decisions.put(in_set(0), 1, 10, LATER)
    for number, expires in ((1, LATER + 3), (2, LATER + 1), (3, LATER + 2)):
        decisions.put(in_set(number), 2, 10 + number, expires)
    decisions.put(in_set(4), 2, 14, LATER)
    assert [decisions.get(in_set(n), 2, NOW) for n in range(5)] == [0, 11, 12, 13, 14]
    decisions.put(in_set(5), 2, 15, LATER + 9)
    assert [decisions.get(in_set(n), 2, NOW) for n in range(6)] == [0, 11, 12, 13, 0, 15]
    decisions.put(in_set(6), 2, 16, LATER + 9)
    assert [decisions.get(in_set(n), 2, NOW) for n in range(7)] == [0, 11, 0, 13, 0, 15, 16]


def test_keys_that_differ_in_one_bit_are_different_decisions(form: Form) -> None:
    decisions = form("admit").DecisionTable(4)
    base = random.Random(5).randbytes(16)
    decisions.put(base, 1, 7, LATER)
    for bit in range(128):
        other = (int.from_bytes(base, "little") ^ 1 << bit).to_bytes(16, "little")
        assert decisions.get(other, 1, NOW) == 0


def test_a_table_says_how_full_it_is(form: Form) -> None:
    table = form("admit").DecisionTable(64)
    assert table.used == 0
    for n in range(5):
        table.put(bytes([n]) * 16, 1, 1, NOW + 1)
    assert table.used == 5
    table.clear()
    assert table.used == 0


def test_clearing_forgets_everything(form: Form) -> None:
    decisions = form("admit").DecisionTable(64)
    decisions.put(key("a"), 1, 7, LATER)
    decisions.clear()
    assert decisions.get(key("a"), 1, NOW) == 0


@pytest.mark.parametrize(("asked", "made"), [(1, 4), (4, 4), (5, 8), (1000, 1024)])
def test_a_table_has_at_least_the_entries_asked_for(form: Form, asked: int, made: int) -> None:
    assert form("admit").DecisionTable(asked).entries == made


@pytest.mark.parametrize(
    ("epoch", "code", "expires"),
    [
        (1, 0, LATER),
        (1, 1 << 16, LATER),
        (-1, 1, LATER),
        (1 << 47, 1, LATER),
        (1, 1, 0),
        (1, 1, 1 << 63),
        (1, 1 << 70, 5),
    ],
)
def test_a_decision_out_of_bounds_is_refused(form: Form, epoch: int, code: int, expires: int) -> None:
    with pytest.raises(ValueError, match="must be between"):
        form("admit").DecisionTable(4).put(key("a"), epoch, code, expires)


def test_keys_are_16_bytes(form: Form) -> None:
    decisions = form("admit").DecisionTable(4)
    with pytest.raises(ValueError, match="16 bytes"):
        decisions.get(b"short", 1, NOW)
    with pytest.raises(TypeError):
        decisions.put("sixteen letters!", 1, 1, LATER)


numbers = st.integers(0, 9)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("put"), numbers, st.integers(0, 1), st.integers(1, 3), st.integers(0, 20), numbers),
            st.tuples(st.just("get"), numbers, st.integers(0, 1), st.integers(1, 3), st.integers(0, 20)),
        ),
        max_size=60,
    )
)
def test_both_forms_keep_and_drop_the_same_decisions(both: tuple[Form, Form], played: list[tuple[Any, ...]]) -> None:
    tables = [form("admit").DecisionTable(8) for form in both]
    for what, number, which, epoch, time, *code in played:
        if what == "put":
            answers = [outcome(t.put, in_set(number, which), epoch, code[0], time) for t in tables]
        else:
            answers = [outcome(t.get, in_set(number, which), epoch, time) for t in tables]
        assert answers[0] == answers[1]


# admission


class Desk:
    """A decision table, a quota table and the call over both."""

    def __init__(self, form: Form) -> None:
        self.module = form("admit")
        self.decisions = self.module.DecisionTable(64)
        self.quota = form("quota").QuotaTable(None, 64, 16)
        self.admission = self.module.Admission(self.decisions, self.quota)
        self.quota.define(key("org"), TOTAL, 100)
        self.quota.define(key("agent"), TOTAL, 10)
        self.path = self.quota.path([(key("org"), 0), (key("nobody"), 0), (key("agent"), 0)])

    def admit(self, amount: int, name: str = "permit", epoch: int = 1) -> tuple[int, int]:
        answer: tuple[int, int] = self.admission.admit(key(name), epoch, self.path, (amount,), NOW, TTL)
        return answer

    def reserved(self) -> list[int]:
        return [self.quota.state(key(name), NOW).reserved for name in ("org", "agent")]


@pytest.fixture
def desk(form: Form) -> Iterator[Desk]:
    desk = Desk(form)
    desk.decisions.put(key("permit"), 1, 5, LATER)
    yield desk
    desk.quota.close()


def test_a_permit_is_charged_to_every_level(desk: Desk) -> None:
    code, rid = desk.admit(4)
    assert code == 5
    assert rid > NO_HOLD
    assert desk.reserved() == [4, 4]
    assert desk.quota.commit(rid, (3,), NOW)
    assert desk.quota.state(key("agent"), NOW).used == 3


@pytest.mark.parametrize(("name", "epoch"), [("unknown", 1), ("permit", 2)])
def test_without_a_kept_decision_nothing_is_charged(desk: Desk, name: str, epoch: int) -> None:
    assert desk.admit(4, name, epoch) == (0, 0)
    assert desk.reserved() == [0, 0]


def test_a_refusal_is_given_back_and_charges_nothing(desk: Desk) -> None:
    refusal = desk.module.UNCHARGED | 9
    desk.decisions.put(key("forbid"), 1, refusal, LATER)
    assert desk.admit(4, "forbid") == (refusal, 0)
    assert desk.reserved() == [0, 0]


def test_a_permit_that_a_quota_refuses_names_the_pair_and_charges_nothing(desk: Desk) -> None:
    assert desk.admit(11) == (5, -3)
    assert desk.admit(101) == (5, -1)
    assert desk.reserved() == [0, 0]


def test_a_permit_without_quotas_holds_nothing(desk: Desk) -> None:
    assert desk.admission.admit(key("permit"), 1, None, (), NOW, TTL) == (5, NO_HOLD)
    empty = desk.quota.path([(key("nobody"), 0)])
    assert desk.admission.admit(key("permit"), 1, empty, (1,), NOW, TTL) == (5, NO_HOLD)


def test_an_ended_calendar_window_asks_to_be_rolled(desk: Desk) -> None:
    desk.quota.define(key("nobody"), CALENDAR, 10, window=(NOW - 10, NOW))
    assert desk.admit(1) == (5, 0)
    desk.quota.roll(key("nobody"), NOW, LATER)
    assert desk.admit(1)[1] > NO_HOLD


def test_a_path_of_another_table_is_refused(form: Form, desk: Desk) -> None:
    with form("quota").QuotaTable(None, 16, 2) as other, pytest.raises(ValueError, match="another quota table"):
        desk.admission.admit(key("permit"), 1, other.path([]), (), NOW, TTL)


@pytest.mark.parametrize(
    ("amounts", "now", "ttl"), [((-1,), NOW, TTL), ((), NOW, TTL), ((1,), -5, TTL), ((1,), NOW, 0), ([1], NOW, TTL)]
)
def test_arguments_out_of_bounds_are_refused(desk: Desk, amounts: Any, now: int, ttl: int) -> None:
    with pytest.raises((ValueError, TypeError)):
        desk.admission.admit(key("permit"), 1, desk.path, amounts, now, ttl)
    assert desk.reserved() == [0, 0]
