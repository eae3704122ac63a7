"""Holds what a person must decide, and spends the grant exactly once before the send."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from creto_hotpath.relay import Exchange
from creto_proxy.deadline import Guard
from creto_proxy.errors import Held, StageFailed
from creto_proxy.hookspecs import Client, Gate
from creto_proxy.model import Decision, Outcome, Request, Verdict

# A gate bounds its own wait by what the agent's client can stand; this only catches one that hangs.
HOLD_CEILING_S = 900.0


class HeldClient:
    """The agent's connection as a gate sees it while a call is held."""

    __slots__ = ("_exchange",)

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def interim(self, status: int) -> None:
        self._exchange.interim(status)

    @property
    def gone(self) -> bool:
        return bool(self._exchange.over)


class Gates:
    """The gate stage: every gate must be satisfied; without one, what needs a person is refused."""

    def __init__(self, gates: Sequence[tuple[str, Gate]], guard: Guard) -> None:
        self._gates = tuple(gates)
        self._guard = guard

    async def hold(self, request: Request, decision: Decision, client: Client) -> Decision:
        if not self._gates:
            return Decision(
                Verdict.DENY,
                "approval_unavailable",
                "This action needs a person's approval, and no oversight plugin is enabled.",
                policies=decision.policies,
            )
        answer = decision
        for plugin, gate in self._gates:
            try:
                async with asyncio.timeout(HOLD_CEILING_S):
                    answer = await self._guard.wait(plugin, "gate", _hold(gate, request, decision, client))
            except TimeoutError:
                raise StageFailed(f"plugin {plugin} did not answer in its gate", reason="stage_timeout") from None
            if not answer.allowed:
                return answer
        return answer

    async def spend(self, request: Request) -> bool:
        """Consumes the grant durably; False when there is none (any more). Only then may the request be sent."""
        for plugin, gate in self._gates:
            if not await self._guard.aside(plugin, "gate", gate.spend, request):
                return False
        return True

    async def settled(self, request: Request, outcome: Outcome) -> None:
        for plugin, gate in self._gates:
            try:
                await self._guard.aside(plugin, "gate", gate.settled, request, outcome)
            except StageFailed:
                continue  # logged by the guard; the request stays EXECUTING and becomes INDETERMINATE


async def _hold(gate: Gate, request: Request, decision: Decision, client: Client) -> Decision:
    """A coroutine whatever the plugin made of its method, so that it is guarded from its first line."""
    return await gate.hold(request, decision, client)


def pending(decision: Decision) -> Held:
    """What an agent is told whose call a person has not answered yet."""
    return Held(
        decision.detail or "A person must approve this. Retry the identical request; do not change arguments.",
        approval_id=str(decision.facts.get("approval_id", "")),
        facts=decision.facts,
    )
