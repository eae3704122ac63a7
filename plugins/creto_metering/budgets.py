"""Budgets as counters of the shared quota table: which apply to an agent, what is held, what is charged.

Every level of an agent's quota path (platform, org, team, agent) is charged in one atomic step or none is. Estimates
are upper bounds, so concurrent requests cannot pass together before the first of them is charged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from creto_hotpath.quota import CALENDAR, FIXED, GCRA, TOTAL, QuotaPath, QuotaState, QuotaTable
from creto_metering.money import MAX_NANO, usd
from creto_metering.settings import BudgetSettings
from creto_metering.windows import SECOND_NS, Window, iso, parse_rate, parse_window
from creto_proxy.model import Charge

log = logging.getLogger("creto.metering")

REQUESTS, TOKENS, COST = 0, 1, 2
METERS: Final = {"requests": REQUESTS, "tokens": TOKENS, "cost_usd": COST}

# Counter of a budget that only watches: it counts like any other and refuses nothing.
_NO_LIMIT = MAX_NANO
# Paths of agents that are remembered; more are looked up again.
_REMEMBERED = 8192
# Each turn rolls every window of the path that has ended; two processes may do it at once.
_ROLLS = 4

Amounts: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Slot:
    """One budget for one element of a quota path ("agent:researcher"), and its counter. window None: a rate."""

    budget: BudgetSettings
    element: str
    key: bytes
    window: Window | None

    @property
    def meter(self) -> int:
        return METERS[self.budget.metric]

    @property
    def limit(self) -> int:
        return self.budget.limit_units()

    def shown(self, units: int) -> str | int:
        """Units as people write them: dollars as text, everything else as a number."""
        return usd(units) if self.meter == COST else units


@dataclass(frozen=True, slots=True)
class Levels:
    """The budgets of one agent, widest level first. limits_spending: one of them can refuse for tokens or cost."""

    slots: tuple[Slot, ...]
    path: QuotaPath
    limits_spending: bool


@dataclass(frozen=True, slots=True)
class Hold:
    """What a request has reserved and has still to settle."""

    id: int
    levels: Levels
    amounts: Amounts


@dataclass(frozen=True, slots=True)
class Refusal:
    """The budget that did not allow it. retry_after_ns: -1 when waiting does not help."""

    slot: Slot
    state: QuotaState
    requested: int
    retry_after_ns: int


class Budgets:
    """All budgets over one quota table. Processes that share the table share the counters."""

    def __init__(self, budgets: Sequence[BudgetSettings], table: QuotaTable, ttl_ns: int) -> None:
        self._budgets = tuple(budgets)
        self._table = table
        self._ttl_ns = ttl_ns
        self._levels: dict[tuple[str, ...], Levels] = {}
        self._warned: dict[bytes, int] = {}

    def levels(self, path: tuple[str, ...], now_ns: int) -> Levels:
        """The budgets that apply to an agent with that quota path, their counters defined."""
        levels = self._levels.get(path)
        if levels is None:
            if len(self._levels) >= _REMEMBERED:
                self._levels.clear()
            levels = self._levels[path] = self._resolve(path, now_ns)
        return levels

    def reserve(self, levels: Levels, amounts: Amounts, now_ns: int) -> Hold | Refusal:
        """Holds the amounts on every budget, or says which one is in the way."""
        answer = 0
        for _ in range(_ROLLS):
            answer = self._table.reserve(levels.path, amounts, now_ns, self._ttl_ns)
            if answer:
                break
            self._roll(levels, now_ns)
        if answer > 0:
            self._watch(levels, now_ns)
            return Hold(answer, levels, amounts)
        if answer == 0:
            raise RuntimeError("a calendar window would not begin")
        slot = levels.slots[-answer - 1]
        amount = amounts[slot.meter]
        return Refusal(
            slot,
            self._table.state(slot.key, now_ns),
            amount,
            self._table.retry_after_ns(slot.key, amount, now_ns),
        )

    def settle(self, hold: Hold, actual: Amounts, now_ns: int) -> None:
        """Charges what was used; what was held beyond it is free again, what it exceeds is carried as a debt.

        A hold whose time was up meanwhile has been given back already; its usage is charged all the same.
        """
        if self._table.commit(hold.id, actual, now_ns):
            return
        if not self._table.charge(hold.levels.path, actual, now_ns):
            self._roll(hold.levels, now_ns)
            self._table.charge(hold.levels.path, actual, now_ns)

    def charge_of(self, hold: Hold) -> Charge:
        """What it takes to hold and charge the same again without asking here."""
        return Charge(self._table, hold.levels.path, hold.amounts, self._ttl_ns)

    def release(self, hold: Hold) -> None:
        """Gives everything back: nothing was sent."""
        self._table.release(hold.id)

    def report(self, path: tuple[str, ...], now_ns: int) -> list[dict[str, Any]]:
        """What is left of every budget of an agent, as documents."""
        return [described(slot, counted(self._table, slot, now_ns)) for slot in self.levels(path, now_ns).slots]

    def _resolve(self, path: tuple[str, ...], now_ns: int) -> Levels:
        slots = applying(self._budgets, path, self._table)
        for slot in slots:
            _define(self._table, slot, now_ns)
        return Levels(
            slots=slots,
            path=self._table.path([(slot.key, slot.meter) for slot in slots]),
            limits_spending=any(slot.meter != REQUESTS and slot.budget.mode == "hard" for slot in slots),
        )

    def _roll(self, levels: Levels, now_ns: int) -> None:
        for index in self._table.expired(levels.path, now_ns):
            slot = levels.slots[index]
            if slot.window is not None:
                self._table.roll(slot.key, *slot.window.bounds(now_ns))

    def _watch(self, levels: Levels, now_ns: int) -> None:
        """Says once per window that a soft or shadow budget has been passed."""
        for slot in levels.slots:
            if slot.budget.mode == "hard":
                continue
            state = self._table.state(slot.key, now_ns)
            if state.used + state.reserved > slot.limit and self._warned.get(slot.key) != state.window_start_ns:
                self._warned[slot.key] = state.window_start_ns
                log.warning(
                    "%s budget passed (%s): %s of %s has used or reserved %s of %s per %s",
                    slot.budget.mode,
                    "allowed" if slot.budget.mode == "soft" else "hard would refuse",
                    slot.budget.metric,
                    slot.element,
                    slot.shown(state.used + state.reserved),
                    slot.shown(slot.limit),
                    slot.budget.window,
                )


def applying(budgets: Sequence[BudgetSettings], path: Sequence[str], table: QuotaTable) -> tuple[Slot, ...]:
    """The budgets of a quota path, in path order. One for an exact name goes before "*" with the same counter."""
    slots = []
    for element in path:
        level, _, name = element.partition(":")
        chosen: dict[tuple[str, ...], BudgetSettings] = {}
        for budget in budgets:
            if budget.level == level and (budget.match == "*" or budget.match == name):
                held = chosen.get(budget.counter())
                if held is None or held.match == "*":
                    chosen[budget.counter()] = budget
        slots += [_slot(budget, element, table) for budget in chosen.values()]
    return tuple(slots)


def _slot(budget: BudgetSettings, element: str, table: QuotaTable) -> Slot:
    _, metric, window, zone = budget.counter()
    return Slot(
        budget=budget,
        element=element,
        # Neither limit nor mode is part of the key: changing them must not forget what was used.
        key=table.key("budget", element, metric, window, zone),
        window=None if budget.window is None else parse_window(budget.window, zone),
    )


def _define(table: QuotaTable, slot: Slot, now_ns: int) -> None:
    budget, window = slot.budget, slot.window
    if window is None:
        count, period_ns = parse_rate(budget.rate or "")
        burst = count - 1 if budget.burst is None else budget.burst
        table.define(slot.key, GCRA, count, period_ns=period_ns, burst=burst)
        return
    limit = slot.limit if budget.mode == "hard" else _NO_LIMIT
    if window.kind == "total":
        table.define(slot.key, TOTAL, limit)
    elif window.kind == "fixed":
        table.define(slot.key, FIXED, limit, period_ns=window.period_ns)
    else:
        table.define(slot.key, CALENDAR, limit, window=window.bounds(now_ns))


def counted(table: QuotaTable, slot: Slot, now_ns: int) -> QuotaState:
    """What a budget's counter says; empty when nothing was ever counted, and when its window has passed."""
    try:
        state = table.state(slot.key, now_ns)
    except KeyError:
        state = QuotaState(0, 0, 0, 0, 0, 0)
    if slot.window is None:
        count = parse_rate(slot.budget.rate or "")[0]
        burst = count - 1 if slot.budget.burst is None else slot.budget.burst
        return QuotaState(burst + 1, state.used, state.reserved, 0, state.resets_at_ns, state.denied)
    start, end = slot.window.bounds(now_ns)
    passed = slot.window.kind != "total" and state.resets_at_ns <= now_ns
    used, reserved = (0, 0) if passed else (state.used, state.reserved)
    return QuotaState(slot.limit, used, reserved, start, end, state.denied)


def described(slot: Slot, state: QuotaState) -> dict[str, Any]:
    """One budget as a document; ``resets_at`` is None when waiting changes nothing."""
    budget = slot.budget
    return {
        "level": slot.element,
        "metric": budget.metric,
        "window": budget.window or budget.rate,
        "timezone": budget.timezone,
        "mode": budget.mode,
        "limit": slot.shown(state.limit),
        "used": slot.shown(state.used),
        "reserved": slot.shown(state.reserved),
        "remaining": slot.shown(state.remaining),
        "resets_at": iso(state.resets_at_ns) if state.resets_at_ns else None,
        "denied": state.denied,
    }


def retry_after_s(refusal: Refusal) -> float | None:
    """Seconds until the same request may fit, None when it never will."""
    return None if refusal.retry_after_ns < 0 else refusal.retry_after_ns / SECOND_NS
