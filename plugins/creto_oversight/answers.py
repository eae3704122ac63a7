"""What the agent is told, as Decisions: one function per way a request can stand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from creto_oversight.desk import TooMany
from creto_oversight.engine import Standing
from creto_oversight.notify import utc
from creto_oversight.requests import SECOND_NS, ApprovalRequest
from creto_oversight.states import OPEN, State
from creto_proxy.model import Approval, Decision, Verdict

# The LLM SDKs honour a Retry-After up to a minute or two, then give up; 30 s suits all of them.
RETRY_S = 30
RETRY = "Retry the identical request; do not change arguments."


def approval_of(request: ApprovalRequest) -> Approval:
    """The approval as policy sees it. Only for requests that hold a grant."""
    return Approval(
        id=request.id,
        satisfied=request.state is State.APPROVED,
        approvals=len(request.yes),
        groups=request.groups,
        fingerprint=request.binding,
        approvers=tuple(sorted(request.yes)),
        profiles=request.profiles,
    )


def granted(request: ApprovalRequest) -> Decision:
    return Decision(Verdict.ALLOW, "approved", policies=request.policies, facts=_facts(request))


def pending(request: ApprovalRequest, now_ns: int) -> Decision:
    """Not answered while the call could be held; becomes 428."""
    left_s = math.ceil((request.deadline_ns - now_ns) / SECOND_NS)
    retry_s = max(1, min(RETRY_S, left_s))
    asked = request.state is State.INFO_REQUESTED
    return Decision(
        Verdict.ESCALATE,
        "approval_pending",
        f"An approver asks: {request.question}" if asked else f"A person has been asked to approve this. {RETRY}",
        policies=request.policies,
        profiles=request.profiles,
        status=428,
        retry_after_s=retry_s,
        facts={**_facts(request), "poll": poll_path(request.id), "retry_after_s": retry_s},
    )


def closed(request: ApprovalRequest, standing: Standing, now_ns: int) -> Decision:
    """The no that a request which is not waiting any more gives to its own action."""
    status, reason, detail = _no(request, standing)
    cool = request.cooldown_ns - now_ns
    return Decision(
        Verdict.DENY,
        reason,
        detail,
        policies=request.policies,
        status=status,
        retry_after_s=cool / SECOND_NS if status == 403 and cool > 0 else None,
        facts=_facts(request),
    )


def flood(error: TooMany) -> Decision:
    return Decision(Verdict.DENY, "approval_flood", error.detail, status=429, retry_after_s=error.retry_after_s)


def refusal(reason: str, detail: str, status: int, policies: tuple[str, ...] = ()) -> Decision:
    """A no that has nothing to do with any stored request."""
    return Decision(Verdict.DENY, reason, detail, policies=policies, status=status)


def poll_path(request_id: str) -> str:
    return f"/v1/approvals/{request_id}"


def document(request: ApprovalRequest) -> dict[str, Any]:
    """What the agent may read about its own request: no approver list, no stored action."""
    facts = dict(_facts(request))
    facts |= {
        "id": request.id,
        "created": utc(request.created_ns),
        "profiles": list(request.profiles),
        "version": request.version,
        "open": request.state in OPEN,
    }
    if request.state is State.APPROVED:
        facts["grant_until"] = utc(request.grant_until_ns)
    if request.comment:
        facts["comment"] = request.comment
    return facts


def _facts(request: ApprovalRequest) -> Mapping[str, Any]:
    facts: dict[str, Any] = {
        "approval_id": request.id,
        "state": str(request.state),
        "deadline": utc(request.deadline_ns),
    }
    if request.question:
        facts["question"] = request.question
    if request.version > 1:
        facts |= {"modified": True, "version": request.version}
    return facts


def _no(request: ApprovalRequest, standing: Standing) -> tuple[int, str, str]:
    if standing is Standing.BUSY:
        return 409, "approval_in_use", "The identical action is being carried out right now."
    if standing is Standing.UNKNOWN:
        return (
            409,
            "outcome_unknown",
            "This action was sent once and nobody knows how it ended, so it is not sent again until a person has "
            + f"looked into it: creto approvals acknowledge {request.id}",
        )
    if request.state is State.DENIED:
        return 403, "approval_denied", f"Denied by {request.decided_by.removeprefix('human:')}: {request.comment}"
    if request.state is State.CANCELLED:
        return 403, "approval_cancelled", f"The request for approval was withdrawn: {request.comment}"
    if request.state is State.TIMED_OUT and request.grant_until_ns:
        return 403, "approval_lapsed", "The approval was not used in time. Retry to ask again."
    if request.state is State.TIMED_OUT:
        return 403, "approval_timed_out", "Nobody approved this in time."
    return 409, "grant_spent", f"The approval has been used: the action is {request.state}."
