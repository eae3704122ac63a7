"""The record of one finished or refused request, put together from what the stages know of it."""

from __future__ import annotations

from typing import Any

from creto_hotpath.relay import Exchange
from creto_proxy.model import Decision, Outcome, Request


def outcome_of(
    request: Request, decision: Decision | None, *, at_unix_ns: int, run: str, **facts: Any
) -> Outcome:
    """How ``request`` ended; refused ones have an outcome too. facts: the fields that only the caller knows."""
    agent = request.agent
    approval = request.approval
    allowed = decision is not None and decision.allowed
    asked = decision.facts.get("approval_id", "") if decision is not None else ""
    return Outcome(
        id=request.id,
        at_unix_ns=at_unix_ns,
        agent=agent.id,
        chain=agent.chain,
        chain_digest=agent.chain_digest,
        path=agent.path,
        link=request.flow.link,
        way=request.flow.way,
        kind=request.kind,
        action=request.action,
        method=request.method,
        scheme=request.scheme,
        host=request.host,
        port=request.port,
        target=request.path,
        decision=("approved" if approval is not None else "allow") if allowed else "deny",
        reason=decision.reason if decision is not None else "",
        policies=decision.policies if decision is not None else (),
        approval_id=approval.id if approval is not None else str(asked),
        run=run,
        resource=request.resource,
        trace=request.trace,
        **facts,
    )


def times_of(exchange: Exchange, ready_ns: int, held_ns: int, reach_ns: int) -> dict[str, int]:
    """The times of an outcome, nanoseconds. ready_ns: when all that is decided on was there; held_ns, reach_ns: how
    long a person and the way to the upstream took since."""
    end = exchange.ended_ns
    decided = exchange.forwarded_ns or end
    return {
        "creto_ns": max(0, decided - ready_ns - held_ns - reach_ns),
        "held_ns": held_ns,
        "upstream_ns": max(0, end - decided),
        "total_ns": end - exchange.received_ns,
    }
