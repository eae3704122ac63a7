"""Quotas: all or nothing on every level, exact limits, windows, rates, debts, refunds, and the file they live in."""

from __future__ import annotations

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from creto_hotpath import _quota_file as layout
from creto_hotpath._quota_types import (
    CALENDAR,
    CONCURRENCY,
    CONCURRENCY_RETRY_NS,
    FIXED,
    GCRA,
    MAX_AMOUNT,
    MAX_PAIRS,
    MAX_TIME,
    NO_HOLD,
    TOTAL,
    QuotaFull,
    QuotaTableError,
)

from .conftest import Form, outcome

S = 1_000_000_000
HOUR = 3600 * S
NOW = 1_800_000_000 * S
TTL = 60 * S
CASES = json.loads((Path(__file__).parents[1] / "cases" / "metering.json").read_text())["cases"]


def key(name: str) -> bytes:
    return name.encode().ljust(16, b"\0")


def case(name: str) -> dict[str, Any]:
    (found,) = (c for c in CASES if c["id"] == name)
    return dict(found)


@pytest.fixture
def table(form: Form) -> Iterator[Any]:
    with form("quota").QuotaTable(None, slots=64, reservations=64) as table:
        yield table


def one(table: Any, name: str, kind: int, limit: int, **more: Any) -> Any:
    """A table with one quota; gives the path that charges meter 0 to it."""
    table.define(key(name), kind, limit, **more)
    return table.path([(key(name), 0)])


def left(table: Any, name: str, now: int = NOW) -> int:
    state = table.state(key(name), now)
    return int(state.limit - state.used - state.reserved)


# all or nothing


def test_a_reservation_is_charged_to_every_level(table: Any) -> None:
    levels = ["platform", "org", "team", "agent"]
    for level in levels:
        table.define(key(level), TOTAL, 100)
    path = table.path([(key(level), 0) for level in levels])
    rid = table.reserve(path, (30,), NOW, TTL)
    assert rid > NO_HOLD
    assert [left(table, level) for level in levels] == [70] * 4
    assert table.commit(rid, (20,), NOW)
    assert [table.state(key(level), NOW).used for level in levels] == [20] * 4


def test_a_refusal_names_the_first_refusing_pair_and_charges_nobody(table: Any) -> None:
    table.define(key("org"), TOTAL, 100)
    table.define(key("team"), TOTAL, 10)
    table.define(key("agent"), TOTAL, 5)
    path = table.path([(key("org"), 0), (key("nobody"), 0), (key("team"), 0), (key("agent"), 0)])
    assert table.reserve(path, (11,), NOW, TTL) == -3  # index 2 of the keys given, not of those that are defined
    assert table.reserve(path, (6,), NOW, TTL) == -4
    assert [left(table, level) for level in ("org", "team", "agent")] == [100, 10, 5]
    assert [table.state(key(level), NOW).denied for level in ("org", "team", "agent")] == [0, 1, 1]


def test_each_meter_is_charged_its_own_amount(table: Any) -> None:
    for name in ("requests", "tokens", "cost"):
        table.define(key(name), TOTAL, 1000)
    path = table.path([(key("requests"), 0), (key("tokens"), 1), (key("cost"), 2)])
    rid = table.reserve(path, (1, 50, 700), NOW, TTL)
    assert [left(table, name) for name in ("requests", "tokens", "cost")] == [999, 950, 300]
    table.commit(rid, (1, 40, 900), NOW)
    assert [left(table, name) for name in ("requests", "tokens", "cost")] == [999, 960, 100]


def test_an_oversize_request_leaves_the_rest_to_others(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    assert table.reserve(path, (11,), NOW, TTL) == -1
    assert table.reserve(path, (10,), NOW, TTL) > 0


def test_an_amount_of_nothing_is_never_refused(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    table.charge(path, (50,), NOW)
    assert table.reserve(path, (1,), NOW, TTL) == -1
    assert table.reserve(path, (0,), NOW, TTL) > 0


def test_a_path_without_quotas_holds_nothing(table: Any) -> None:
    path = table.path([(key("nobody"), 0)])
    assert len(path) == 0
    assert table.reserve(path, (5,), NOW, TTL) == NO_HOLD
    assert table.commit(NO_HOLD, (5,), NOW)
    assert table.release(NO_HOLD)


def test_a_path_picks_up_quotas_defined_and_removed_later(table: Any) -> None:
    path = table.path([(key("a"), 0)])
    table.define(key("a"), TOTAL, 1)
    assert table.reserve(path, (2,), NOW, TTL) == -1
    assert len(path) == 1
    assert table.remove(key("a"))
    assert table.reserve(path, (2,), NOW, TTL) == NO_HOLD
    assert not table.remove(key("a"))


# settlement


def test_more_than_reserved_becomes_a_debt_that_refuses_what_follows(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    table.commit(table.reserve(path, (5,), NOW, TTL), (25,), NOW)
    state = table.state(key("a"), NOW)
    assert (state.used, state.reserved, state.remaining) == (25, 0, 0)
    assert table.reserve(path, (1,), NOW, TTL) == -1


def test_settling_twice_does_nothing_the_second_time(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    rid = table.reserve(path, (5,), NOW, TTL)
    assert table.commit(rid, (3,), NOW)
    assert not table.commit(rid, (3,), NOW)
    assert not table.release(rid)
    assert left(table, "a") == 7


@pytest.mark.parametrize("rid", [0, -1, 2, 12345, 1 << 20, 99 << 20 | 63, 1 << 62])
def test_an_unknown_reservation_is_not_settled(table: Any, rid: int) -> None:
    one(table, "a", TOTAL, 10)
    assert not table.commit(rid, (3,), NOW)
    assert not table.release(rid)
    assert left(table, "a") == 10


def test_a_released_reservation_is_given_back_whole(table: Any) -> None:
    path = one(table, "a", FIXED, 10, period_ns=HOUR)
    assert table.release(table.reserve(path, (7,), NOW, TTL))
    assert left(table, "a") == 10


def test_the_number_of_a_reservation_is_not_used_again(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    first = table.reserve(path, (1,), NOW, TTL)
    table.release(first)
    second = table.reserve(path, (1,), NOW, TTL)
    assert first != second
    assert not table.release(first)
    assert left(table, "a") == 9


def test_committing_other_meters_than_reserved_is_refused_and_changes_nothing(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    rid = table.reserve(path, (5,), NOW, TTL)
    with pytest.raises(ValueError, match="1 meters were reserved, 2 committed"):
        table.commit(rid, (1, 1), NOW)
    assert table.commit(rid, (1,), NOW)


def test_what_was_used_without_asking_can_be_charged_and_corrected(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    assert table.charge(path, (15,), NOW)
    assert left(table, "a") == -5
    assert table.charge(path, (-12,), NOW)
    assert left(table, "a") == 7


# time to live


def test_a_hold_ends_when_its_time_is_up(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    rid = table.reserve(path, (5,), NOW, TTL)
    assert table.sweep(NOW + TTL - 1) == 0
    assert table.sweep(NOW + TTL) == 1
    assert left(table, "a") == 10
    assert not table.commit(rid, (5,), NOW + TTL)


def test_a_full_reservation_table_sweeps_itself_and_then_refuses(form: Form) -> None:
    with form("quota").QuotaTable(None, slots=16, reservations=3) as table:
        path = one(table, "a", TOTAL, 100)
        for ttl in (TTL, 2 * TTL, 2 * TTL):
            assert table.reserve(path, (1,), NOW, ttl) > 0
        with pytest.raises(QuotaFull, match="all 3 reservations"):
            table.reserve(path, (1,), NOW, TTL)
        assert table.state(key("a"), NOW).reserved == 3
        assert table.reserve(path, (1,), NOW + TTL, TTL) > 0
        assert table.state(key("a"), NOW).reserved == 3


# windows


def test_a_fixed_window_starts_at_multiples_of_its_period(table: Any) -> None:
    path = one(table, "a", FIXED, 10, period_ns=HOUR)
    late = NOW + 1234 * S
    table.commit(table.reserve(path, (10,), late, TTL), (10,), late)
    state = table.state(key("a"), late)
    assert state.window_start_ns == late - late % HOUR
    assert state.resets_at_ns == state.window_start_ns + HOUR
    assert table.reserve(path, (1,), state.resets_at_ns - 1, TTL) == -1
    assert table.reserve(path, (10,), state.resets_at_ns, TTL) > 0


@pytest.mark.parametrize("actual", [0, 3, 25])
def test_a_window_that_ended_meanwhile_is_neither_refunded_nor_charged(table: Any, actual: int) -> None:
    path = one(table, "a", FIXED, 10, period_ns=HOUR)
    old = table.reserve(path, (8,), NOW, HOUR * 2)
    table.commit(table.reserve(path, (4,), NOW + HOUR, TTL), (4,), NOW + HOUR)
    assert table.commit(old, (actual,), NOW + HOUR)
    state = table.state(key("a"), NOW + HOUR)
    assert (state.used, state.reserved) == (4, 0)


def test_a_clock_that_steps_back_does_not_reopen_a_window(table: Any) -> None:
    path = one(table, "a", FIXED, 10, period_ns=HOUR)
    table.commit(table.reserve(path, (10,), NOW, TTL), (10,), NOW)
    assert table.reserve(path, (1,), NOW - 2 * HOUR, TTL) == -1


def test_an_ended_calendar_window_asks_to_be_rolled(table: Any) -> None:
    path = one(table, "a", CALENDAR, 10, window=(NOW, NOW + HOUR))
    table.commit(table.reserve(path, (10,), NOW, TTL), (10,), NOW)
    assert table.reserve(path, (1,), NOW + HOUR - 1, TTL) == -1
    assert table.reserve(path, (1,), NOW + HOUR, TTL) == 0
    assert table.expired(path, NOW + HOUR) == [0]
    assert table.roll(key("a"), NOW + HOUR, NOW + 2 * HOUR)
    assert not table.roll(key("a"), NOW + HOUR, NOW + 2 * HOUR)  # another process came first
    assert table.expired(path, NOW + HOUR) == []
    assert table.reserve(path, (10,), NOW + HOUR, TTL) > 0


def test_only_the_ended_calendar_quotas_of_a_path_are_named(table: Any) -> None:
    table.define(key("day"), CALENDAR, 10, window=(NOW, NOW + HOUR))
    table.define(key("month"), CALENDAR, 10, window=(NOW, NOW + 9 * HOUR))
    path = table.path([(key("nobody"), 0), (key("month"), 0), (key("day"), 0)])
    assert table.expired(path, NOW + HOUR) == [2]
    assert not table.charge(path, (1,), NOW + HOUR)
    assert left(table, "month") == 10


def test_an_earlier_calendar_window_is_ignored(table: Any) -> None:
    one(table, "a", CALENDAR, 10, window=(NOW, NOW + HOUR))
    assert not table.roll(key("a"), NOW - HOUR, NOW)
    assert not table.roll(key("nobody"), NOW, NOW + 1)
    assert table.state(key("a"), NOW).window_start_ns == NOW


def test_a_restart_on_the_same_day_keeps_the_day(table: Any) -> None:
    path = one(table, "a", CALENDAR, 10, window=(NOW, NOW + HOUR))
    table.charge(path, (4,), NOW)
    table.define(key("a"), CALENDAR, 10, window=(NOW, NOW + HOUR))
    assert left(table, "a") == 6
    table.define(key("a"), CALENDAR, 10, window=(NOW + HOUR, NOW + 2 * HOUR))
    assert left(table, "a") == 10


# concurrency


def test_concurrency_is_held_and_given_back(table: Any) -> None:
    path = one(table, "a", CONCURRENCY, 2)
    first, second = (table.reserve(path, (1,), NOW, TTL) for _ in range(2))
    assert table.reserve(path, (1,), NOW, TTL) == -1
    assert table.commit(first, (1,), NOW)
    assert table.release(second)
    state = table.state(key("a"), NOW)
    assert (state.used, state.reserved) == (0, 0)


# changes at run time


def test_a_changed_limit_moves_what_remains_by_the_difference(table: Any) -> None:
    path = one(table, "a", FIXED, 100, period_ns=HOUR)
    table.charge(path, (30,), NOW)
    for limit, remaining in ((200, 170), (10, 0), (50, 20)):
        table.define(key("a"), FIXED, limit, period_ns=HOUR)
        assert table.state(key("a"), NOW).remaining == remaining


def test_another_period_counts_what_is_held_as_used(table: Any) -> None:
    path = one(table, "a", FIXED, 10, period_ns=HOUR)
    rid = table.reserve(path, (4,), NOW + HOUR, TTL)
    table.define(key("a"), FIXED, 10, period_ns=7 * HOUR)
    assert table.state(key("a"), NOW + HOUR).used == 4
    assert table.commit(rid, (0,), NOW + HOUR)
    state = table.state(key("a"), NOW + HOUR)
    assert (state.used, state.reserved) == (4, 0)


def test_a_shorter_period_with_the_same_start_keeps_its_holds(table: Any) -> None:
    path = one(table, "a", FIXED, 10, period_ns=2 * HOUR)
    rid = table.reserve(path, (4,), NOW, TTL)
    table.define(key("a"), FIXED, 10, period_ns=HOUR)
    table.commit(rid, (1,), NOW)
    state = table.state(key("a"), NOW)
    assert (state.used, state.reserved) == (1, 0)


def test_another_kind_starts_afresh_and_ignores_older_holds(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    rid = table.reserve(path, (4,), NOW, TTL)
    table.define(key("a"), CONCURRENCY, 10)
    assert left(table, "a") == 10
    assert table.release(rid)
    assert left(table, "a") == 10


def test_a_removed_quota_comes_back_empty_and_ignores_older_holds(table: Any) -> None:
    path = one(table, "a", TOTAL, 10)
    rid = table.reserve(path, (4,), NOW, TTL)
    table.remove(key("a"))
    assert not table.reserve(path, (11,), NOW, TTL) < 0
    table.define(key("a"), TOTAL, 10)
    assert table.release(rid)
    assert left(table, "a") == 10


def test_places_of_removed_quotas_are_used_again(form: Form) -> None:
    with form("quota").QuotaTable(None, slots=16, reservations=4) as table:
        for n in range(100):
            table.define(key(f"q{n}"), TOTAL, n)
            assert table.state(key(f"q{n}"), NOW).limit == n
            assert table.remove(key(f"q{n}"))


def test_a_table_without_room_says_so_and_keeps_working(form: Form) -> None:
    with form("quota").QuotaTable(None, slots=16, reservations=4) as table:
        for n in range(12):
            table.define(key(f"q{n}"), TOTAL, n)
        with pytest.raises(QuotaFull, match="3/4 of 16"):
            table.define(key("one more"), TOTAL, 1)
        table.define(key("q3"), TOTAL, 33)
        assert table.state(key("q3"), NOW).limit == 33
        assert len(table.path([(key("one more"), 0)])) == 0


# rates


def test_a_burst_fits_at_once_and_then_one_per_interval(table: Any) -> None:
    path = one(table, "a", GCRA, 3, period_ns=1000, burst=4)  # E is 333 1/3 ns: nothing may be rounded on the way
    assert [table.reserve(path, (1,), NOW, TTL) > 0 for _ in range(6)] == [True] * 5 + [False]
    assert table.retry_after_ns(key("a"), 1, NOW) == 334
    assert table.reserve(path, (1,), NOW + 333, TTL) == -1
    assert table.reserve(path, (1,), NOW + 334, TTL) > 0
    assert table.reserve(path, (1,), NOW + 666, TTL) == -1
    assert table.reserve(path, (1,), NOW + 667, TTL) > 0
    assert table.reserve(path, (1,), NOW + 1000, TTL) > 0  # three intervals are exactly one period


def test_more_than_the_burst_never_fits(table: Any) -> None:
    path = one(table, "a", GCRA, 10, period_ns=S, burst=4)
    assert table.reserve(path, (6,), NOW, TTL) == -1
    assert table.retry_after_ns(key("a"), 6, NOW) == -1
    assert table.reserve(path, (5,), NOW, TTL) > 0


def test_a_rate_of_many_units_per_nanosecond_is_exact(table: Any) -> None:
    path = one(table, "a", GCRA, 10**12, period_ns=60 * S, burst=10**12)  # 1000 dollars a minute, in nano-dollars
    assert table.reserve(path, (10**12,), NOW, TTL) > 0
    assert table.reserve(path, (2,), NOW, TTL) == -1
    assert table.reserve(path, (1,), NOW, TTL) > 0
    assert table.reserve(path, (1666,), NOW + 100, TTL) > 0
    assert table.reserve(path, (1,), NOW + 100, TTL) == -1


def test_releasing_at_once_restores_a_rate_exactly(table: Any) -> None:
    path = one(table, "a", GCRA, 7, period_ns=S, burst=9)
    before = table.state(key("a"), NOW)
    rids = [table.reserve(path, (amount,), NOW, TTL) for amount in (3, 1, 5)]
    for rid in rids:
        assert table.release(rid)
    after = table.state(key("a"), NOW)
    assert (after.used, after.limit) == (before.used, before.limit) == (0, 10)


def test_what_time_has_drained_is_not_refunded_again(table: Any) -> None:
    path = one(table, "a", GCRA, 1, period_ns=S, burst=9)
    early = table.reserve(path, (10,), NOW, 2 * TTL)
    table.reserve(path, (5,), NOW + 11 * S, TTL)
    assert table.commit(early, (0,), NOW + 12 * S)
    assert left(table, "a", NOW + 12 * S) == 6  # five charged a second ago, and not a unit more back


def test_a_debt_delays_a_rate(table: Any) -> None:
    path = one(table, "a", GCRA, 1, period_ns=S, burst=4)
    table.commit(table.reserve(path, (1,), NOW, TTL), (20,), NOW)
    assert table.retry_after_ns(key("a"), 1, NOW) == 16 * S
    assert table.reserve(path, (1,), NOW + 16 * S - 1, TTL) == -1
    assert table.reserve(path, (1,), NOW + 16 * S, TTL) > 0


def test_a_changed_rate_keeps_the_arrival_time_and_settles_no_older_holds(table: Any) -> None:
    path = one(table, "a", GCRA, 10, period_ns=S, burst=9)
    rid = table.reserve(path, (10,), NOW, TTL)
    table.define(key("a"), GCRA, 1, period_ns=S, burst=9)
    assert table.release(rid)
    assert left(table, "a") == 9  # one second of arrival time is one unit now
    table.define(key("a"), GCRA, 1, period_ns=S, burst=9)  # the same again changes nothing
    assert left(table, "a") == 9


# when to come back


def test_retry_after_says_when_each_kind_may_fit(table: Any) -> None:
    paths = {
        "fixed": one(table, "fixed", FIXED, 5, period_ns=HOUR),
        "calendar": one(table, "calendar", CALENDAR, 5, window=(NOW, NOW + 7)),
        "total": one(table, "total", TOTAL, 5),
        "slots": one(table, "slots", CONCURRENCY, 5),
    }
    for path in paths.values():
        assert table.reserve(path, (5,), NOW, TTL) > 0
    wait = {name: table.retry_after_ns(key(name), 1, NOW) for name in paths}
    assert wait == {"fixed": HOUR - NOW % HOUR, "calendar": 7, "total": -1, "slots": CONCURRENCY_RETRY_NS}
    assert {table.retry_after_ns(key(name), 6, NOW) for name in paths} == {-1}
    assert {table.retry_after_ns(key(name), 0, NOW) for name in paths} == {0}
    assert table.retry_after_ns(key("nobody"), 1, NOW) == 0


def test_the_state_of_nothing_is_an_error(table: Any) -> None:
    with pytest.raises(KeyError, match=key("nobody").hex()):
        table.state(key("nobody"), NOW)


# bounds


@pytest.mark.parametrize(
    ("kind", "limit", "more", "why"),
    [
        (99, 1, {}, "kind"),
        (TOTAL, -1, {}, "limit"),
        (TOTAL, MAX_AMOUNT + 1, {}, "limit"),
        (TOTAL, 1, {"burst": 1}, "burst"),
        (TOTAL, 1, {"window": (1, 2)}, "CALENDAR"),
        (CALENDAR, 1, {}, "CALENDAR"),
        (CALENDAR, 1, {"window": (2, 2)}, "window"),
        (CALENDAR, 1, {"window": (-1, 2)}, "window"),
        (FIXED, 1, {}, "period_ns"),
        (GCRA, 1, {"period_ns": 0}, "period_ns"),
        (GCRA, 0, {"period_ns": S}, "limit"),
        (GCRA, 1, {"period_ns": S, "burst": -1}, "burst"),
        (GCRA, 1, {"period_ns": 1 << 60, "burst": 8}, "refill"),
    ],
)
def test_a_definition_that_cannot_be_is_refused(
    table: Any, kind: int, limit: int, more: dict[str, Any], why: str
) -> None:
    with pytest.raises(ValueError, match=why):
        table.define(key("a"), kind, limit, **more)
    with pytest.raises(KeyError):
        table.state(key("a"), NOW)


@pytest.mark.parametrize(
    ("amounts", "now", "ttl", "error"),
    [
        ((-1,), NOW, TTL, ValueError),
        ((MAX_AMOUNT + 1,), NOW, TTL, ValueError),
        ((1 << 80,), NOW, TTL, ValueError),
        ((), NOW, TTL, ValueError),
        ((1,) * 17, NOW, TTL, ValueError),
        ([1], NOW, TTL, TypeError),
        ((1.5,), NOW, TTL, TypeError),
        ((1,), -1, TTL, ValueError),
        ((1,), MAX_TIME + 1, TTL, ValueError),
        ((1,), NOW, 0, ValueError),
    ],
)
def test_a_reservation_out_of_bounds_is_refused(
    table: Any, amounts: Any, now: int, ttl: int, error: type[Exception]
) -> None:
    path = one(table, "a", TOTAL, 10)
    with pytest.raises(error):
        table.reserve(path, amounts, now, ttl)
    assert left(table, "a") == 10


def test_a_path_has_each_quota_once_and_few_enough(table: Any) -> None:
    with pytest.raises(ValueError, match="twice"):
        table.path([(key("a"), 0), (key("a"), 1)])
    with pytest.raises(ValueError, match="meter"):
        table.path([(key("a"), 16)])
    with pytest.raises(ValueError, match="16 bytes"):
        table.path([(b"short", 0)])


def test_a_path_may_not_outgrow_a_reservation(form: Form) -> None:
    with form("quota").QuotaTable(None, slots=128, reservations=2) as table:
        path = table.path([(key(f"q{n}"), 0) for n in range(MAX_PAIRS + 1)])
        for n in range(MAX_PAIRS):
            table.define(key(f"q{n}"), GCRA, 1 + n, period_ns=HOUR, burst=9)
        rid = table.reserve(path, (1,), NOW, TTL)
        assert table.commit(rid, (9,), NOW)
        table.define(key(f"q{MAX_PAIRS}"), TOTAL, 1)
        with pytest.raises(ValueError, match="48 quotas"):
            table.reserve(path, (1,), NOW, TTL)


def test_a_path_belongs_to_its_table(form: Form, table: Any) -> None:
    with form("quota").QuotaTable(None, slots=16, reservations=2) as other:
        path = other.path([])
        with pytest.raises(ValueError, match="another quota table"):
            table.reserve(path, (), NOW, TTL)
        with pytest.raises(ValueError, match="another quota table"):
            table.expired(path, NOW)


def test_the_largest_amounts_do_not_overflow(table: Any) -> None:
    path = one(table, "a", TOTAL, MAX_AMOUNT)
    for _ in range(5):
        table.charge(path, (MAX_AMOUNT,), NOW)
    rid = table.reserve(path, (0,), NOW, MAX_TIME)
    assert table.commit(rid, (MAX_AMOUNT,), NOW)
    assert table.reserve(path, (MAX_AMOUNT,), NOW, TTL) == -1
    rate = one(table, "r", GCRA, 1, period_ns=HOUR, burst=1)
    for _ in range(3):
        table.charge(rate, (MAX_AMOUNT,), NOW)
    assert table.reserve(rate, (1,), MAX_TIME // 2, TTL) == -1  # the arrival time saturates decades ahead


def test_a_closed_table_says_so(form: Form) -> None:
    table = form("quota").QuotaTable(None, slots=16, reservations=2)
    path = one(table, "a", TOTAL, 1)
    table.close()
    table.close()
    for name, arguments in (("reserve", (path, (1,), NOW, TTL)), ("sweep", (NOW,)), ("release", (1 << 20,))):
        with pytest.raises(QuotaTableError, match="closed"):
            getattr(table, name)(*arguments)


# cases of other systems


@pytest.mark.parametrize("name", ["rediscell.gcra", "rediscell.readme"])
def test_gcra_answers_like_redis_cell(table: Any, name: str) -> None:
    given = case(name)["input"]
    path = one(table, "a", GCRA, given["count"], period_ns=given["period_ms"] * 1_000_000, burst=given["max_burst"])
    for step, expect in zip(given["steps"], case(name)["expect"]["steps"], strict=True):
        now = NOW + step["t_ms"] * 1_000_000
        retry = table.retry_after_ns(key("a"), step["quantity"], now)
        rid = table.reserve(path, (step["quantity"],), now, TTL)
        state = table.state(key("a"), now)
        assert (rid < 0) == expect["limited"]
        assert state.limit == case(name)["expect"]["limit"]
        assert state.remaining == expect["remaining"]
        assert Fraction(max(0, state.resets_at_ns - now), S) == Fraction(expect["reset_after_s"])
        if rid < 0:  # for what fits the case says -1, we say 0
            assert Fraction(retry, S if retry > 0 else 1) == Fraction(expect["retry_after_s"])
        else:
            assert retry == 0


@pytest.mark.parametrize("name", ["guber.token.negative", "guber.token.change_limit", "guber.token.expiry"])
def test_windows_answer_like_gubernator(table: Any, name: str) -> None:
    given = case(name)["input"]
    period = given["duration_ms"] * 1_000_000
    path = one(table, "a", FIXED, given["limit"], period_ns=period)
    for step, expect in zip(given["steps"], case(name)["expect"]["steps"], strict=True):
        now = NOW - NOW % period + step.get("t_ms", 0) * 1_000_000
        table.define(key("a"), FIXED, step.get("limit", given["limit"]), period_ns=period)
        hits = step["hits"]
        fits = table.charge(path, (hits,), now) if hits < 0 else table.reserve(path, (hits,), now, TTL) > 0
        assert fits == (expect["status"] == "UNDER_LIMIT")
        assert table.state(key("a"), now).remaining == expect["remaining"]


def test_a_fixed_window_counts_like_envoy(form: Form) -> None:
    given = case("envoy.fixed_window.hour")["input"]
    for step, expect in zip(given["steps"], case("envoy.fixed_window.hour")["expect"]["steps"], strict=True):
        with form("quota").QuotaTable(None, slots=16, reservations=4) as table:
            path = one(table, "a", FIXED, given["limit"], period_ns=given["window_s"] * S)
            now = step["t_s"] * S
            table.charge(path, (step["counter_before"],), now)
            assert (table.reserve(path, (step["hits"],), now, TTL) > 0) == (expect["code"] == "OK")
            state = table.state(key("a"), now)
            assert state.remaining == expect["remaining"]
            assert state.window_start_ns == expect["window_start"] * S


def test_several_buckets_answer_like_tensorzero(table: Any) -> None:
    given = case("tz.atomic_multi_key")["input"]
    names = list(given["buckets"])
    for name in names:
        table.define(key(name), TOTAL, given["buckets"][name]["capacity"])
    path = table.path([(key(name), meter) for meter, name in enumerate(names)])
    for step, expect in zip(given["steps"], case("tz.atomic_multi_key")["expect"]["steps"], strict=True):
        if step["op"] == "consume":
            amounts = tuple(step["amounts"].get(name, 0) for name in names)
            assert (table.reserve(path, amounts, NOW, TTL) > 0) == expect["success"]
        for name, balance in expect["balances"].items():
            assert left(table, name) == balance


def test_racing_threads_are_admitted_exactly_to_the_limit(table: Any) -> None:
    given, expect = case("tz.race")["input"], case("tz.race")["expect"]
    table.define(key("wide"), TOTAL, given["capacity"] * 10)
    table.define(key("a"), TOTAL, given["capacity"])
    path = table.path([(key("wide"), 0), (key("a"), 0)])
    start = threading.Barrier(given["concurrent_requests"])
    answers: list[int] = []

    def call() -> None:
        start.wait(60)
        answers.append(table.reserve(path, (given["amount_each"],), NOW, TTL))

    threads = [threading.Thread(target=call) for _ in range(given["concurrent_requests"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sum(answer > 0 for answer in answers) == expect["successes"]
    assert table.state(key("a"), NOW).reserved == table.state(key("wide"), NOW).reserved == expect["consumed"]


def test_a_reserving_hierarchy_refuses_what_a_postpaid_one_lets_overshoot(table: Any) -> None:
    levels = case("bifrost.hierarchy")["input"]["levels"]
    for level in levels:
        table.charge(one(table, level["id"], TOTAL, int(level["limit"])), (int(level["used"]),), NOW)
    path = table.path([(key(level["id"]), 0) for level in levels])
    assert table.reserve(path, (2,), NOW, TTL) == -1
    assert table.reserve(path, (1,), NOW, TTL) > 0


# the file


def test_usage_and_reservations_survive_a_restart(form: Form, tmp_path: Path) -> None:
    file = str(tmp_path / "quota.tab")
    with form("quota").QuotaTable(file, slots=16, reservations=4) as table:
        path = one(table, "a", TOTAL, 10)
        table.charge(path, (2,), NOW)
        rid = table.reserve(path, (3,), NOW, TTL)
        name = table.key("agent", "llm.chat")
    assert os.stat(file).st_mode & 0o777 == 0o600
    with form("quota").QuotaTable(file, slots=16, reservations=4) as table:
        state = table.state(key("a"), NOW)
        assert (state.used, state.reserved) == (2, 3)
        assert table.commit(rid, (1,), NOW)
        assert left(table, "a") == 7
        assert table.key("agent", "llm.chat") == name


def test_two_tables_on_one_file_are_one_table(form: Form, tmp_path: Path) -> None:
    file = str(tmp_path / "quota.tab")
    module = form("quota")
    with module.QuotaTable(file, 16, 4) as one_table, module.QuotaTable(file, 16, 4) as other:
        path = other.path([(key("a"), 0)])
        one_table.define(key("a"), TOTAL, 10)
        rid = other.reserve(path, (4,), NOW, TTL)
        assert left(one_table, "a") == 6
        assert one_table.commit(rid, (1,), NOW)
        assert left(other, "a") == 9


def test_a_table_grows_with_everything_in_it(form: Form, tmp_path: Path) -> None:
    file = str(tmp_path / "quota.tab")
    with form("quota").QuotaTable(file, slots=16, reservations=2) as table:
        names = [f"q{n}" for n in range(11)]
        for name in names:
            table.define(key(name), TOTAL, 100)
        table.define(key("gone"), TOTAL, 100)
        path = table.path([(key(name), 0) for name in [*names, "gone"]])
        rid = table.reserve(path, (5,), NOW, TTL)
        done = table.reserve(path, (1,), NOW, TTL)
        table.commit(done, (1,), NOW)
        table.remove(key("gone"))
        seed = table.key("x")
    with form("quota").QuotaTable(file, slots=1000, reservations=9) as table:
        assert (table.slots, table.reservations) == (1024, 9)
        assert table.key("x") == seed
        assert [left(table, name) for name in names] == [94] * 11
        assert table.commit(rid, (0,), NOW)
        assert [left(table, name) for name in names] == [99] * 11
        path = table.path([(key(name), 0) for name in names])
        assert all(table.reserve(path, (1,), NOW, TTL) > 0 for _ in range(9))
    with form("quota").QuotaTable(file, slots=16, reservations=2) as table:
        assert (table.slots, table.reservations) == (1024, 9)  # it never shrinks
    assert sorted(os.listdir(tmp_path)) == ["quota.tab"]


def test_the_other_form_takes_over_when_nobody_uses_the_table(both: tuple[Form, Form], tmp_path: Path) -> None:
    file = str(tmp_path / "quota.tab")
    first, second = (form("quota") for form in both)
    for opener, other in ((first, second), (second, first)):
        with opener.QuotaTable(file, 16, 4) as table:
            path = one(table, "a", TOTAL, 10)
            table.charge(path, (1,), NOW)
            with pytest.raises(QuotaTableError, match="form of creto"):
                other.QuotaTable(file, 16, 4)
            table.charge(path, (1,), NOW)
    with first.QuotaTable(file, 16, 4) as table:
        assert table.state(key("a"), NOW).used == 4


def test_a_file_that_others_may_read_is_refused(form: Form, tmp_path: Path) -> None:
    file = tmp_path / "quota.tab"
    form("quota").QuotaTable(str(file), 16, 4).close()
    file.chmod(0o640)
    with pytest.raises(QuotaTableError, match="0600"):
        form("quota").QuotaTable(str(file), 16, 4)


def test_a_symbolic_link_is_refused(form: Form, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        form("quota").QuotaTable(str(tmp_path / "link"), 16, 4)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_is_no_table_is_refused_and_left_alone(form: Form, tmp_path: Path) -> None:
    file = tmp_path / "quota.tab"
    file.touch(0o600)
    content = b"not a table " * 1000
    file.write_bytes(content)
    with pytest.raises(QuotaTableError, match="not a quota table"):
        form("quota").QuotaTable(str(file), 16, 4)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("word", "value", "why"),
    [
        (layout.H_VERSION, 2, "version 2"),
        (layout.H_SLOTS, 15, "damaged"),
        (layout.H_SLOTS, 1 << 40, "damaged"),
        (layout.H_RECORDS, 5, "damaged"),
        (layout.H_HIGH, 99, "damaged"),
        (layout.H_FREE, -1, "damaged"),
        (layout.H_UNDO_COUNT, 1 << 30, "damaged"),
    ],
)
def test_a_header_that_cannot_be_is_refused(form: Form, tmp_path: Path, word: int, value: int, why: str) -> None:
    file = tmp_path / "quota.tab"
    form("quota").QuotaTable(str(file), 16, 4).close()
    data = bytearray(file.read_bytes())
    data[word * 8 : word * 8 + 8] = value.to_bytes(8, "little", signed=True)
    file.write_bytes(data)
    with pytest.raises(QuotaTableError, match=why):
        form("quota").QuotaTable(str(file), 16, 4)


def test_a_file_whose_creator_died_is_begun_again(form: Form, tmp_path: Path) -> None:
    file = tmp_path / "quota.tab"
    file.touch(0o600)
    file.write_bytes(bytes(8192))
    with form("quota").QuotaTable(str(file), 16, 4) as table:
        one(table, "a", TOTAL, 1)


def test_a_refused_or_dropped_table_leaves_no_descriptor_behind(form: Form, tmp_path: Path) -> None:
    file = tmp_path / "quota.tab"
    form("quota").QuotaTable(str(file), 16, 4).close()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(70):  # more than there are seats
        table = form("quota").QuotaTable(str(file), 16, 4)
        del table
    file.chmod(0o644)
    for _ in range(3):
        with pytest.raises(QuotaTableError):
            form("quota").QuotaTable(str(file), 16, 4)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_full_house_is_refused(form: Form, tmp_path: Path) -> None:
    file = str(tmp_path / "quota.tab")
    tables = [form("quota").QuotaTable(file, 16, 4) for _ in range(layout.SEATS)]
    with pytest.raises(QuotaTableError, match="64 processes"):
        form("quota").QuotaTable(file, 16, 4)
    tables.pop().close()
    form("quota").QuotaTable(file, 16, 4).close()
    for table in tables:
        table.close()


# any sequence of operations

NAMES = ["a", "b", "c"]
PATHS = [("a",), ("a", "b"), ("c", "b", "a"), ("a", "nobody")]
small = st.integers(0, 12)
definitions = st.one_of(
    st.tuples(st.just(TOTAL), small, st.just(0), st.just(0)),
    st.tuples(st.just(CONCURRENCY), small, st.just(0), st.just(0)),
    st.tuples(st.just(FIXED), small, st.sampled_from([7, 10, 60]), st.just(0)),
    st.tuples(st.just(CALENDAR), small, st.just(20), st.just(0)),
    st.tuples(st.just(GCRA), st.integers(1, 7), st.sampled_from([5, 30]), st.integers(0, 8)),
)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("define"), st.sampled_from(NAMES), definitions),
        st.tuples(st.just("reserve"), st.sampled_from(PATHS), st.tuples(small, small), st.integers(1, 40)),
        st.tuples(st.just("commit"), st.integers(0, 30), st.tuples(small, small)),
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("charge"), st.sampled_from(PATHS), st.tuples(st.integers(-9, 9), st.integers(-9, 9))),
        st.tuples(st.just("roll"), st.sampled_from(NAMES), st.integers(0, 3)),
        st.tuples(st.just("remove"), st.sampled_from(NAMES)),
        st.tuples(st.just("sweep")),
        st.tuples(st.just("wait"), st.integers(-3, 15)),
    ),
    max_size=40,
)


class Player:
    """Plays operations on a table; ``say`` is everything it answered."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.now = 1000
        self.rids: list[int] = []
        self.paths = {names: table.path([(key(n), i % 2) for i, n in enumerate(names)]) for names in PATHS}
        self.say: list[Any] = []

    def play(self, operation: tuple[Any, ...]) -> None:
        name, *rest = operation
        self.say.append(outcome(getattr(self, name), *rest))
        for quota in NAMES:
            self.say.append(outcome(self.table.state, key(quota), self.now))
            self.say.append(outcome(self.table.retry_after_ns, key(quota), 3, self.now))

    def define(self, quota: str, definition: tuple[int, int, int, int]) -> None:
        kind, limit, period, burst = definition
        if kind == CALENDAR:
            start = self.now - self.now % period
            self.table.define(key(quota), kind, limit, window=(start, start + period))
        else:
            self.table.define(key(quota), kind, limit, period_ns=period, burst=burst)

    def reserve(self, names: tuple[str, ...], amounts: tuple[int, int], ttl: int) -> int:
        rid = int(self.table.reserve(self.paths[names], amounts, self.now, ttl))
        if rid > 0:
            self.rids.append(rid)
        return rid

    def _rid(self, which: int) -> int:
        return self.rids[which % len(self.rids)] if self.rids else 12345

    def commit(self, which: int, actual: tuple[int, int]) -> bool:
        return bool(self.table.commit(self._rid(which), actual, self.now))

    def release(self, which: int) -> bool:
        return bool(self.table.release(self._rid(which)))

    def charge(self, names: tuple[str, ...], amounts: tuple[int, int]) -> bool:
        return bool(self.table.charge(self.paths[names], amounts, self.now))

    def roll(self, quota: str, ahead: int) -> bool:
        start = self.now - self.now % 20 + 20 * ahead
        return bool(self.table.roll(key(quota), start, start + 20))

    def remove(self, quota: str) -> bool:
        return bool(self.table.remove(key(quota)))

    def sweep(self) -> int:
        return int(self.table.sweep(self.now))

    def wait(self, ticks: int) -> None:
        self.now += ticks


def words_of(file: str) -> list[int]:
    """The words of a table without what may differ: form, hash key, pids, and what stands in a finished undo log."""
    with open(file, "rb") as table:
        words = memoryview(table.read()).cast("q").tolist()
    assert words[layout.H_UNDO_COUNT] == words[layout.H_LOCK] == 0
    words[layout.H_ENGINE] = words[layout.H_SEED] = words[layout.H_SEED + 1] = 0
    words[layout.H_UNDO : layout.HEADER_WORDS] = []
    return list(words)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(operations)
def test_both_forms_answer_alike_and_write_the_same_words(
    both: tuple[Form, Form], played: list[tuple[Any, ...]]
) -> None:
    with tempfile.TemporaryDirectory() as directory:
        files = [os.path.join(directory, form.name) for form in both]
        answers = []
        for form, file in zip(both, files, strict=True):
            with form("quota").QuotaTable(file, 16, 5) as table:
                player = Player(table)
                for operation in played:
                    player.play(operation)
                answers.append(player.say)
        assert answers[0] == answers[1]
        assert words_of(files[0]) == words_of(files[1])


class Reference:
    """What the quotas mean, without a table: windows as dictionaries, rates as exact fractions.

    It knows neither changes of definitions nor refunds to rates; both have tests of their own.
    """

    def __init__(self, definitions: dict[str, tuple[int, int, int, int]]) -> None:
        self.quotas = definitions
        self.used: dict[tuple[str, int], int] = {}
        self.held: dict[tuple[str, int], int] = {}
        self.window: dict[str, int] = dict.fromkeys(definitions, 0)
        self.arrival: dict[str, Fraction] = dict.fromkeys(definitions, Fraction(0))
        self.holds: dict[int, tuple[list[tuple[str, int, int, int]], int]] = {}

    def _at(self, name: str, now: int) -> tuple[str, int]:
        kind, _, period, _ = self.quotas[name]
        if kind == FIXED:
            return name, max(self.window[name], now - now % period)
        return name, 0

    def reserve(self, names: tuple[str, ...], amounts: tuple[int, int], now: int, ttl: int, rid: int) -> int:
        pairs = [(n, i % 2, i) for i, n in enumerate(names) if n in self.quotas]
        for name, meter, index in pairs:
            kind, limit, period, burst = self.quotas[name]
            amount = amounts[meter]
            if not amount:
                continue
            if kind == GCRA:
                new = max(Fraction(now), self.arrival[name]) + Fraction(period, limit) * amount
                if now < new - Fraction(period, limit) * (burst + 1):
                    return -(1 + index)
            else:
                at = self._at(name, now)
                if self.used.get(at, 0) + self.held.get(at, 0) + amount > limit:
                    return -(1 + index)
        charged = []
        for name, meter, _ in pairs:
            kind, limit, period, _ = self.quotas[name]
            at = self._at(name, now)
            self.window[name] = at[1]
            self.held[at] = self.held.get(at, 0) + amounts[meter]
            if kind == GCRA and amounts[meter]:
                self.arrival[name] = max(Fraction(now), self.arrival[name]) + Fraction(period, limit) * amounts[meter]
            charged.append((*at, meter, amounts[meter]))
        self.holds[rid] = (charged, now + ttl)
        return rid

    def settle(self, rid: int, actual: tuple[int, int], now: int) -> bool:
        if rid not in self.holds:
            return False
        charged, _ = self.holds.pop(rid)
        for name, window, meter, amount in charged:
            kind, limit, period, _ = self.quotas[name]
            self.held[name, window] -= amount
            if kind == GCRA and actual[meter] > amount:
                extra = Fraction(period, limit) * (actual[meter] - amount)
                self.arrival[name] = max(Fraction(now), self.arrival[name]) + extra
            elif kind in (TOTAL, FIXED):
                self.used[name, window] = self.used.get((name, window), 0) + actual[meter]
        return True

    def left(self, name: str, now: int) -> int:
        kind, limit, period, burst = self.quotas[name]
        if kind == GCRA:
            interval = Fraction(period, limit)
            ahead = max(Fraction(0), self.arrival[name] - now)
            return int((interval * (burst + 1) - ahead) // interval)
        at = self._at(name, now)
        return limit - self.used.get(at, 0) - self.held.get(at, 0)


timeless = st.one_of(
    st.tuples(st.just(TOTAL), small, st.just(0), st.just(0)),
    st.tuples(st.just(CONCURRENCY), small, st.just(0), st.just(0)),
    st.tuples(st.just(FIXED), small, st.sampled_from([7, 10, 60]), st.just(0)),
    st.tuples(st.just(GCRA), st.integers(1, 7), st.sampled_from([5, 30]), st.integers(0, 8)),
)
calls = st.lists(
    st.one_of(
        st.tuples(st.just("reserve"), st.sampled_from(PATHS), st.tuples(small, small), st.integers(1, 40)),
        st.tuples(st.just("commit"), st.integers(0, 30), st.tuples(small, small)),
        st.tuples(st.just("wait"), st.integers(-3, 15)),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.tuples(timeless, timeless, timeless), calls)
def test_a_table_answers_like_its_definition(
    form: Form, kinds: tuple[tuple[int, int, int, int], ...], played: list[tuple[Any, ...]]
) -> None:
    with form("quota").QuotaTable(None, 16, 64) as table:
        player = Player(table)
        reference = Reference(dict(zip(NAMES, kinds, strict=True)))
        for name, definition in reference.quotas.items():
            player.define(name, definition)
        amounts_of: dict[int, tuple[int, int]] = {}
        for call, *rest in played:
            if call == "reserve":
                names, amounts, ttl = rest
                rid = player.reserve(names, amounts, ttl)
                assert rid == reference.reserve(names, amounts, player.now, ttl, rid if rid > 0 else 99)
                amounts_of[rid] = amounts
            elif call == "commit":
                rid = player._rid(rest[0])
                held = amounts_of.get(rid, (0, 0))
                actual = (max(held[0], rest[1][0]), max(held[1], rest[1][1]))
                assert table.commit(rid, actual, player.now) == reference.settle(rid, actual, player.now)
            else:
                player.wait(*rest)
            for name in NAMES:
                assert left(table, name, player.now) == reference.left(name, player.now)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(
    st.integers(1, 7),
    st.sampled_from([5, 30, 100]),
    st.integers(0, 8),
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(0, 60), st.integers(0, 25)), max_size=25),
)
@example(2, 5, 1, [(1, 0, 1, 0), (1, 1, 0, 1), (1, 0, 0, 2)])  # half a nanosecond of a hold has not drained
def test_refunds_never_give_back_more_than_was_not_used(
    form: Form, count: int, period: int, burst: int, requests: list[tuple[int, int, int, int]]
) -> None:
    """A rate that is refunded is never ahead of one that had known from the start what would be used."""
    events: list[tuple[int, int, int]] = []  # (time, order, request)
    at = 1000
    for n, (_, _, duration, gap) in enumerate(requests):
        at += gap
        events += [(at, n, n), (at + duration, len(requests) + n, n)]
    with form("quota").QuotaTable(None, 16, 64) as table:
        path = one(table, "a", GCRA, count, period_ns=period, burst=burst)
        interval = Fraction(period, count)
        foreseen = Fraction(0)
        held: dict[int, int] = {}
        for now, _, n in sorted(events):
            amount, actual, _, _ = requests[n]
            if n not in held:
                held[n] = table.reserve(path, (amount,), now, 10_000)
                if held[n] > 0:
                    foreseen = max(foreseen, Fraction(now)) + interval * min(actual, amount)
            elif held[n] > 0:
                assert table.commit(held[n], (min(actual, amount),), now)
            ahead = max(Fraction(0), foreseen - now)
            assert left(table, "a", now) <= (interval * (burst + 1) - ahead) // interval
