"""``GET http://creto.internal/v1/usage``: what the asking agent has used and may still use."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from creto_metering.ledger import Ledger, Totals
from creto_metering.money import usd
from creto_metering.windows import iso
from creto_proxy.hookspecs import Clock, ControlRequest, ControlResponse

if TYPE_CHECKING:
    from creto_metering.meter import RequestMeter


class UsageRoutes:
    """An agent sees its own usage only. Budgets are live; usage is what the ledger has applied until ``as_of``."""

    prefix = "/v1/usage"

    def __init__(self, ledger: Ledger, meter: RequestMeter, clock: Clock) -> None:
        self._ledger = ledger
        self._meter = meter
        self._clock = clock

    async def handle(self, request: ControlRequest) -> ControlResponse:
        if request.method not in ("GET", "HEAD"):
            return _problem(405, "method_not_allowed", "Usage can only be read.")
        if request.path.rstrip("/") != self.prefix:
            return _problem(404, "not_found", f"There is only {self.prefix}.")
        agent = request.agent
        rows, as_of = await asyncio.to_thread(self._ledger.totals, "model", agent=agent.id)
        now_ns = self._clock.unix_ns()
        return ControlResponse(
            200,
            {
                "agent": agent.id,
                "as_of": iso(as_of) if as_of else None,
                "usage": summed(rows),
                "models": [document(row) for row in rows if row.key],
                "budgets": self._meter.budgets.report(agent.path, now_ns),
            },
        )


def document(row: Totals) -> dict[str, Any]:
    """One row of totals as JSON: integers as they are, dollars as exact decimal text."""
    return {
        "key": row.key,
        "requests": row.requests,
        "refused": row.refused,
        "unknown": row.unknown,
        "tokens": {
            "input": row.input,
            "output": row.output,
            "cache_read": row.cache_read,
            "cache_write": row.cache_write,
            "reasoning": row.reasoning,
            "total": row.total,
        },
        "cost_nano_usd": row.cost_nano_usd,
        "cost_usd": usd(row.cost_nano_usd),
        "uncertain_usd": usd(row.uncertain_nano_usd),
    }


def summed(rows: list[Totals]) -> dict[str, Any]:
    """All rows as one, without a key."""
    numbers = [sum(getattr(row, name) for row in rows) for name in Totals.__slots__[1:]]
    whole = document(Totals("", *numbers))
    del whole["key"]
    return whole


def _problem(status: int, reason: str, detail: str) -> ControlResponse:
    kind = f"urn:creto:problem:{reason.replace('_', '-')}"
    return ControlResponse(status, {"type": kind, "status": status, "reason": reason, "detail": detail})
