"""Windows, budgets on the shared quota table, and what happens when many ask at once."""

from __future__ import annotations

import threading
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from pydantic import ValidationError

from creto_hotpath.quota import QuotaTable
from creto_metering.budgets import Budgets, Hold, Levels, Refusal
from creto_metering.settings import BudgetSettings, Settings
from creto_metering.windows import parse_rate, parse_window

NS = 10**9
HOUR = 3600 * NS
NOW = int(datetime(2026, 3, 10, 12, tzinfo=ZoneInfo("UTC")).timestamp()) * NS
PATH = ("platform", "org:acme", "team:ml", "agent:researcher")


def at(text: str, zone: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=ZoneInfo(zone)).timestamp()) * NS


def make(tmp_path: Path, *budgets: dict[str, Any], ttl_s: int = 60) -> tuple[Budgets, QuotaTable]:
    table = QuotaTable(str(tmp_path / "quota.tab"), slots=64, reservations=128)
    return Budgets([BudgetSettings(**budget) for budget in budgets], table, ttl_s * NS), table


def held(budgets: Budgets, levels: Levels, amounts: tuple[int, int, int], now_ns: int = NOW) -> Hold:
    answer = budgets.reserve(levels, amounts, now_ns)
    assert isinstance(answer, Hold), answer
    return answer


def refused(budgets: Budgets, levels: Levels, amounts: tuple[int, int, int], now_ns: int = NOW) -> Refusal:
    answer = budgets.reserve(levels, amounts, now_ns)
    assert isinstance(answer, Refusal), answer
    return answer


def used(budgets: Budgets, now_ns: int = NOW, path: tuple[str, ...] = PATH) -> list[Any]:
    return [(row["used"], row["reserved"]) for row in budgets.report(path, now_ns)]


@pytest.mark.parametrize(
    ("name", "zone", "moment", "start", "end", "hours"),
    [
        ("day", "Europe/Berlin", "2026-03-29T12:00", "2026-03-29T00:00", "2026-03-30T00:00", 23),
        ("day", "Europe/Berlin", "2026-10-25T12:00", "2026-10-25T00:00", "2026-10-26T00:00", 25),
        ("day", "Africa/Cairo", "2026-04-24T12:00", "2026-04-24T01:00", "2026-04-25T00:00", 23),  # no midnight
        ("day", "UTC", "2026-03-29T12:00", "2026-03-29T00:00", "2026-03-30T00:00", 24),
        ("week", "Europe/Berlin", "2026-03-29T12:00", "2026-03-23T00:00", "2026-03-30T00:00", 167),
        ("month", "America/New_York", "2026-12-31T23:59", "2026-12-01T00:00", "2027-01-01T00:00", 744),
        ("hour", "Asia/Kolkata", "2026-03-29T12:40", "2026-03-29T12:00", "2026-03-29T13:00", 1),
        ("30m", "UTC", "2026-03-29T12:40", "2026-03-29T12:30", "2026-03-29T13:00", 0.5),
    ],
)
def test_windows_begin_where_the_clocks_of_the_place_say(
    name: str, zone: str, moment: str, start: str, end: str, hours: float
) -> None:
    found = parse_window(name, zone).bounds(at(moment, zone))
    assert found == (at(start, zone), at(end, zone))
    assert found[1] - found[0] == hours * HOUR


def test_both_hours_that_the_clocks_show_twice_are_windows_of_their_own() -> None:
    window = parse_window("hour", "Europe/Berlin")
    first = at("2026-10-25T02:30", "Europe/Berlin")
    assert window.bounds(first)[1] == window.bounds(first + HOUR)[0]


@pytest.mark.parametrize(
    "budget",
    [
        {"metric": "tokens", "limit": "5"},
        {"metric": "tokens", "window": "day"},
        {"metric": "tokens", "limit": "5.5", "window": "day"},
        {"metric": "cost_usd", "limit": 5.5, "window": "day"},
        {"metric": "cost_usd", "limit": "-1", "window": "day"},
        {"metric": "tokens", "limit": "5", "window": "fortnight"},
        {"metric": "tokens", "limit": "5", "window": "day", "timezone": "Mars/Olympus"},
        {"metric": "tokens", "limit": "5", "window": "30m", "timezone": "Europe/Berlin"},
        {"metric": "tokens", "limit": "5", "window": "day", "burst": 3},
        {"rate": "60/m", "limit": "5"},
        {"rate": "60/m", "mode": "soft"},
        {"rate": "0/m"},
        {"rate": "60 per minute"},
        {"level": "platform", "match": "x", "rate": "1/s"},
        {"match": "res*", "rate": "1/s"},
        {"match": "", "rate": "1/s"},
        {"rate": "1/s", "colour": "red"},
    ],
)
def test_budget_that_means_nothing_is_refused(budget: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        BudgetSettings(**budget)


def test_two_budgets_with_the_same_counter_and_match_are_refused() -> None:
    twice = {"metric": "tokens", "limit": "5", "window": "day"}
    with pytest.raises(ValidationError, match="budget 2 limits the same"):
        Settings(budgets=[twice, {**twice, "limit": "6"}])


def test_rates_are_parsed() -> None:
    assert parse_rate("60/m") == (60, 60 * NS)
    assert parse_rate("5/10s") == (5, 10 * NS)


def test_all_levels_are_charged_or_none(tmp_path: Path) -> None:
    budgets, _ = make(
        tmp_path,
        {"level": "platform", "metric": "cost_usd", "limit": "100", "window": "total"},
        {"level": "org", "metric": "tokens", "limit": "1000", "window": "day"},
        {"level": "agent", "metric": "cost_usd", "limit": "0.000000010", "window": "day"},
    )
    levels = budgets.levels(PATH, NOW)
    held(budgets, levels, (1, 100, 6))
    refusal = refused(budgets, levels, (1, 100, 5))
    assert refusal.slot.element == "agent:researcher"
    assert (refusal.state.used, refusal.state.reserved, refusal.requested) == (0, 6, 5)
    assert used(budgets) == [("0.00", "0.000000006"), (0, 100), ("0.00", "0.000000006")]


def test_exact_name_goes_before_everybody_and_star_counts_each_alone(tmp_path: Path) -> None:
    budgets, _ = make(
        tmp_path,
        {"metric": "requests", "limit": "1", "window": "day"},
        {"match": "researcher", "metric": "requests", "limit": "3", "window": "day"},
    )
    researcher = budgets.levels(PATH, NOW)
    assert [slot.limit for slot in researcher.slots] == [3]
    for name in ("a", "b"):
        levels = budgets.levels(("platform", f"agent:{name}"), NOW)
        held(budgets, levels, (1, 0, 0))
        refused(budgets, levels, (1, 0, 0))
    for _ in range(3):
        held(budgets, researcher, (1, 0, 0))
    refused(budgets, researcher, (1, 0, 0))


def test_agent_without_budgets_has_none(tmp_path: Path) -> None:
    budgets, _ = make(tmp_path, {"level": "team", "match": "ops", "rate": "1/s"})
    assert budgets.levels(PATH, NOW).slots == ()


def test_less_is_refunded_and_more_is_carried_as_debt(tmp_path: Path) -> None:
    budgets, _ = make(tmp_path, {"metric": "tokens", "limit": "100", "window": "day"})
    levels = budgets.levels(PATH, NOW)
    budgets.settle(held(budgets, levels, (1, 90, 0)), (1, 10, 0), NOW)
    assert used(budgets) == [(10, 0)]
    budgets.settle(held(budgets, levels, (1, 90, 0)), (1, 150, 0), NOW)
    assert used(budgets) == [(160, 0)]
    refused(budgets, levels, (1, 1, 0))
    held(budgets, levels, (1, 0, 0))


def test_released_reservation_leaves_no_trace(tmp_path: Path) -> None:
    budgets, _ = make(tmp_path, {"metric": "tokens", "limit": "100", "window": "day"}, {"rate": "1/m"})
    levels = budgets.levels(PATH, NOW)
    budgets.release(held(budgets, levels, (1, 90, 0)))
    assert used(budgets) == [(0, 0), (0, 0)]


def test_usage_learnt_after_its_hold_was_given_back_is_charged_all_the_same(tmp_path: Path) -> None:
    budgets, table = make(tmp_path, {"metric": "tokens", "limit": "100", "window": "total"}, ttl_s=1)
    levels = budgets.levels(PATH, NOW)
    hold = held(budgets, levels, (1, 50, 0))
    assert table.sweep(NOW + 2 * NS) == 1
    assert used(budgets, NOW + 2 * NS) == [(0, 0)]
    budgets.settle(hold, (1, 30, 0), NOW + 3 * NS)
    assert used(budgets, NOW + 3 * NS) == [(30, 0)]


def test_rate_refuses_until_its_time_and_says_when(tmp_path: Path) -> None:
    budgets, _ = make(tmp_path, {"rate": "60/m", "burst": 1})
    levels = budgets.levels(PATH, NOW)
    held(budgets, levels, (1, 0, 0))
    held(budgets, levels, (1, 0, 0))
    refusal = refused(budgets, levels, (1, 0, 0))
    assert refusal.slot.window is None
    assert refusal.retry_after_ns == NS
    held(budgets, levels, (1, 0, 0), NOW + NS)


def test_calendar_window_rolls_at_the_local_midnight_after_the_clocks_changed(tmp_path: Path) -> None:
    zone = "Europe/Berlin"
    budgets, _ = make(tmp_path, {"metric": "tokens", "limit": "10", "window": "day", "timezone": zone})
    evening = at("2026-03-29T23:59", zone)
    levels = budgets.levels(PATH, at("2026-03-29T00:00", zone))
    held(budgets, levels, (1, 10, 0), at("2026-03-29T01:30", zone))
    refusal = refused(budgets, levels, (1, 1, 0), evening)
    assert refusal.state.resets_at_ns == at("2026-03-30T00:00", zone)
    assert refusal.retry_after_ns == 60 * NS
    held(budgets, levels, (1, 10, 0), at("2026-03-30T00:00", zone))
    refused(budgets, levels, (1, 1, 0), at("2026-03-30T12:00", zone))


def test_hold_from_before_midnight_is_not_refunded_into_the_new_day(tmp_path: Path) -> None:
    zone = "Europe/Berlin"
    budgets, _ = make(tmp_path, {"metric": "tokens", "limit": "10", "window": "day", "timezone": zone})
    before, after = at("2026-03-29T23:59", zone), at("2026-03-30T00:01", zone)
    levels = budgets.levels(PATH, before)
    old = held(budgets, levels, (1, 10, 0), before)
    new = held(budgets, levels, (1, 4, 0), after)
    budgets.settle(old, (1, 2, 0), after)
    assert used(budgets, after) == [(0, 4)]
    budgets.settle(new, (1, 4, 0), after)
    assert used(budgets, after) == [(4, 0)]


def test_changed_limit_keeps_what_was_used(tmp_path: Path) -> None:
    budget = {"metric": "tokens", "limit": "100", "window": "day"}
    budgets, table = make(tmp_path, budget)
    budgets.settle(held(budgets, budgets.levels(PATH, NOW), (1, 60, 0)), (1, 60, 0), NOW)
    table.close()
    changed, _ = make(tmp_path, {**budget, "limit": "70", "mode": "hard"})
    levels = changed.levels(PATH, NOW)
    refused(changed, levels, (1, 11, 0))
    held(changed, levels, (1, 10, 0))


@pytest.mark.parametrize("mode", ["soft", "shadow"])
def test_soft_budget_allows_and_warns_once_per_window(
    tmp_path: Path, mode: str, caplog: pytest.LogCaptureFixture
) -> None:
    budgets, _ = make(tmp_path, {"metric": "tokens", "limit": "10", "window": "day", "mode": mode})
    levels = budgets.levels(PATH, NOW)
    assert not levels.limits_spending
    for _ in range(3):
        held(budgets, levels, (1, 8, 0))
    assert [record.getMessage().split(":")[0].split(" (")[0] for record in caplog.records] == [f"{mode} budget passed"]
    assert budgets.report(PATH, NOW)[0]["limit"] == 10


def test_fifty_callers_of_five_on_a_hundred_get_exactly_twenty(tmp_path: Path) -> None:
    budgets, _ = make(tmp_path, {"metric": "tokens", "limit": "100", "window": "day"}, {"rate": "1000/s"})
    levels = budgets.levels(PATH, NOW)
    start = threading.Barrier(50)
    answers: list[Hold | Refusal] = []

    def ask() -> None:
        start.wait()
        answers.append(budgets.reserve(levels, (1, 5, 0), NOW))

    threads = [threading.Thread(target=ask) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(answer, Hold) for answer in answers) == 20
    assert used(budgets)[0] == (0, 100)
