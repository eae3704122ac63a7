"""What every command does to a request: pure functions from (request, command, now) to a ``Change``.

Nothing here reads a clock or a database, so every rule can be tested as a table and by property. Whoever calls these
applies time first (``advance``) and writes the result with compare-and-set.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from creto_oversight.approvers import canonical, is_human
from creto_oversight.requests import SECOND_NS, ApprovalRequest, Change, Happened, Rules, Vote
from creto_oversight.states import OPEN, Event, State, step

CRETO = "creto"
# Enough for a reason or a question; nobody reads more, and it is kept for ever.
TEXT_LIMIT = 4000
_AFTER_YES = frozenset({State.APPROVED, State.EXECUTING, State.EXECUTED, State.FAILED, State.INDETERMINATE})


class CommandRefused(Exception):
    """The command did nothing. problem: stable name; status: for HTTP surfaces; request: as it stands."""

    def __init__(self, problem: str, status: int, detail: str, request: ApprovalRequest | None = None) -> None:
        super().__init__(detail)
        self.problem = problem
        self.status = status
        self.detail = detail
        self.request = request


class Standing(enum.Enum):
    """What an identical submission meets."""

    WAIT = "wait"
    GRANT = "grant"
    BUSY = "busy"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    NEW = "new"


def standing(request: ApprovalRequest, now_ns: int) -> Standing:
    """How ``request`` answers a submission of its own action at ``now_ns``; time must have been applied."""
    if request.state in OPEN:
        return Standing.WAIT
    if request.state is State.APPROVED:
        return Standing.GRANT
    if request.state is State.EXECUTING:
        return Standing.BUSY
    if request.state is State.INDETERMINATE and not request.acknowledged:
        return Standing.UNKNOWN
    if request.state in (State.DENIED, State.TIMED_OUT) and now_ns < request.cooldown_ns:
        return Standing.REFUSED
    return Standing.NEW


def due_ns(request: ApprovalRequest) -> int | None:
    """When time next changes this request, None when it never does."""
    if request.state is State.APPROVED:
        return request.grant_until_ns
    if request.state not in OPEN:
        return None
    escalation = _escalation_due(request)
    return request.deadline_ns if escalation is None else min(escalation, request.deadline_ns)


def advance(request: ApprovalRequest, now_ns: int) -> Change:
    """Applies everything that time alone does up to ``now_ns``, in the order in which it fell due.

    Deadlines are exclusive: at the deadline it is too late. What fell due while no process ran is applied all the
    same, escalations before the deadline included.
    """
    events: list[Happened] = []
    while (due := due_ns(request)) is not None and due <= now_ns:
        if request.state is State.APPROVED:
            request = _end(request, Event.LAPSED, now_ns)
            events.append(Happened(Event.LAPSED, CRETO, {"due_ns": due}))
        elif due >= request.deadline_ns:
            cooldown = max(r.deny_cooldown_s for r in request.rules)
            request = replace(_end(request, Event.EXPIRED, now_ns), cooldown_ns=now_ns + _ns(cooldown))
            events.append(Happened(Event.EXPIRED, CRETO, {"due_ns": due}))
        else:
            request = replace(request, state=step(request.state, Event.ESCALATED), level=request.level + 1)
            events.append(Happened(Event.ESCALATED, CRETO, {"due_ns": due, "level": request.level}))
    return Change(request, tuple(events))


def vote(
    request: ApprovalRequest,
    human: str,
    *,
    approve: bool,
    comment: str,
    now_ns: int,
    version: int | None = None,
    via: str = "",
) -> Change:
    """One person's decision. A person counts once, with the last vote; denials are counted before approvals.

    Raises CommandRefused: ``already-decided``, ``approver-not-eligible``, ``stale-version``, ``reason-required``.
    Repeating a decision that has already carried is a success without effect, because callbacks come twice.
    """
    if request.state not in OPEN:
        if _repeats(request, human, approve):
            return Change(request)
        raise decided_already(request)
    if version is not None and version != request.version:
        raise CommandRefused("stale-version", 409, f"This is version {request.version} now; look again.", request)
    _require_eligible(request, human, approve=approve)
    if not approve and not comment.strip():
        raise CommandRefused("reason-required", 422, "A denial needs a reason; the agent is told it.", request)
    last = next((v for v in request.votes if v.human == human and v.version == request.version), None)
    if last is not None and last.approve == approve and last.comment == comment:
        return Change(request)
    ballot = Vote(human, approve, comment, now_ns, request.version, via)
    return _count(_with_vote(request, ballot), ballot, now_ns)


def ask(request: ApprovalRequest, human: str, question: str, now_ns: int) -> Change:
    """An eligible person wants to know more: escalation pauses until the answer, the deadline does not."""
    _require_open(request)
    _require_eligible(request, human, approve=False)
    if not question.strip():
        raise CommandRefused("question-required", 422, "There is no question.", request)
    asked = request.asked_ns if request.asked_ns is not None else now_ns
    state = step(request.state, Event.ASKED)
    after = replace(request, state=state, question=question, answer="", asked_ns=asked)
    return Change(after, (Happened(Event.ASKED, human, {"question": question}),))


def answer(request: ApprovalRequest, agent: str, text: str, now_ns: int) -> Change:
    """The agent's answer to the question. Raises CommandRefused unless there is one and the agent is the requester."""
    if request.state in OPEN and request.state is not State.INFO_REQUESTED:
        raise CommandRefused("no-question", 409, "Nobody has asked anything.", request)
    _require_open(request)
    if agent != request.agent:
        raise CommandRefused("not-requester", 403, "Only the agent that asked may answer.", request)
    asked = request.asked_ns if request.asked_ns is not None else now_ns
    back = State.ESCALATED if request.level else State.PENDING
    after = replace(
        request,
        state=step(request.state, Event.ANSWERED, to=back),
        answer=text,
        asked_ns=None,
        paused_ns=request.paused_ns + max(0, now_ns - asked),
    )
    return Change(after, (Happened(Event.ANSWERED, agent, {"answer": text}),))


def edit(request: ApprovalRequest, human: str, *, binding: str, body: bytes, shown_body: str, now_ns: int) -> Change:
    """A person changes what will be sent: a new version with its own fingerprint, all earlier votes void, and the
    editor's own approval of it. Refused unless every profile allows edits and the editor could approve."""
    _require_open(request)
    if not all(rules.allow_edit for rules in request.rules):
        raise CommandRefused("edit-not-allowed", 403, "The profile does not allow changing the action.", request)
    _require_eligible(request, human, approve=True)
    version = request.version + 1
    shown = replace(request.shown, body=shown_body, body_bytes=len(body))
    ballot = Vote(human, True, "", now_ns, version)
    after = replace(
        request,
        state=step(request.state, Event.EDITED),
        version=version,
        binding=binding,
        substitute=body,
        shown=shown,
        votes=(*request.votes, ballot),
    )
    edited = Happened(Event.EDITED, human, {"version": version, "fingerprint": binding})
    counted = _count(after, ballot, now_ns)
    return Change(counted.request, (edited, *counted.events))


def cancel(request: ApprovalRequest, actor: str, reason: str, now_ns: int) -> Change:
    """Withdraws an open request or an unused grant. Raises CommandRefused once it is decided or spent."""
    if request.state not in OPEN and request.state is not State.APPROVED:
        raise decided_already(request)
    after = replace(_end(request, Event.CANCELLED, now_ns), decided_by=actor, comment=reason)
    return Change(after, (Happened(Event.CANCELLED, actor, {"reason": reason}),))


def acknowledge(request: ApprovalRequest, actor: str, reason: str) -> Change:
    """Somebody has looked into an action of unknown outcome, so the agent may ask for it again."""
    if request.state is not State.INDETERMINATE:
        raise CommandRefused("nothing-to-acknowledge", 409, f"The request is {request.state}.", request)
    if request.acknowledged:
        return Change(request)
    after = replace(request, acknowledged=True, comment=reason)
    return Change(after, (Happened(Event.ACKNOWLEDGED, actor, {"reason": reason}),))


def spend(request: ApprovalRequest, owner: str, now_ns: int) -> Change:
    """Consumes the grant for ``owner``. Raises CommandRefused ``grant-spent`` when there is none (any more)."""
    if request.state is not State.APPROVED or now_ns >= request.grant_until_ns:
        raise CommandRefused("grant-spent", 409, f"No grant to spend: the request is {request.state}.", request)
    after = replace(request, state=step(request.state, Event.SPENT), owner=owner)
    return Change(after, (Happened(Event.SPENT, CRETO, {"owner": owner, "fingerprint": request.binding}),))


def settle(request: ApprovalRequest, event: Event, now_ns: int, *, status: int = 0, error: str = "") -> Change:
    """How the send ended: SUCCEEDED, FAILED or LOST. A request that is no longer executing stays as it is."""
    if request.state is not State.EXECUTING:
        return Change(request)
    after = replace(_end(request, event, now_ns), status=status, error=error)
    return Change(after, (Happened(event, CRETO, {"status": status, "error": error}),))


def notified(request: ApprovalRequest) -> Change:
    """Somebody has been told about this request."""
    if request.notified:
        return Change(request)
    return Change(replace(request, notified=True), (Happened(Event.NOTIFIED, CRETO),))


def refused_vote(request: ApprovalRequest, actor: str, refusal: CommandRefused, facts: Mapping[str, Any]) -> Change:
    """The history line of a vote that did not count."""
    return Change(request, (Happened(Event.VOTE_REFUSED, actor, {"problem": refusal.problem, **facts}),))


def decided_already(request: ApprovalRequest) -> CommandRefused:
    by = f" by {request.decided_by}" if request.decided_by else ""
    return CommandRefused("already-decided", 409, f"The request is {request.state}{by}; nothing was changed.", request)


def tidy(text: str) -> str:
    """Words of a person or an agent as they are kept: storable as UTF-8 and not longer than ``TEXT_LIMIT``."""
    return text[:TEXT_LIMIT].encode("utf-8", "backslashreplace").decode("utf-8")


def _count(request: ApprovalRequest, ballot: Vote, now_ns: int) -> Change:
    voted = Happened(
        Event.VOTED,
        ballot.human,
        {"approve": ballot.approve, "comment": ballot.comment, "version": ballot.version, "via": ballot.via},
    )
    if any(len(request.no & r.eligible(request.reached_s)) >= r.deny_threshold for r in request.rules):
        cooldown = max(r.deny_cooldown_s for r in request.rules)
        after = replace(
            _end(request, Event.REFUSED, now_ns),
            decided_by=ballot.human,
            comment=ballot.comment,
            cooldown_ns=now_ns + _ns(cooldown),
        )
        return Change(after, (voted, Happened(Event.REFUSED, CRETO, {"by": ballot.human})))
    if all(_carried(request, rules) for rules in request.rules):
        after = replace(
            request,
            state=step(request.state, Event.GRANTED),
            decided_by=ballot.human,
            comment=ballot.comment,
            grant_until_ns=now_ns + _ns(min(r.grant_ttl_s for r in request.rules)),
        )
        granted = {"by": sorted(request.yes), "fingerprint": request.binding, "until_ns": after.grant_until_ns}
        return Change(after, (voted, Happened(Event.GRANTED, CRETO, granted)))
    return Change(replace(request, state=step(request.state, Event.VOTED)), (voted,))


def _carried(request: ApprovalRequest, rules: Rules) -> bool:
    counted = {human for human in request.yes if _may_approve(request, rules, human)}
    groups = all(
        len(counted & set(rules.groups.get(group, ()))) >= least for group, least in rules.group_quorum.items()
    )
    return len(counted) >= rules.quorum and groups


def _may_approve(request: ApprovalRequest, rules: Rules, human: str) -> bool:
    # Without case: the name at the root of a chain may have been folded on its way into a SPIFFE id.
    return human in rules.eligible(request.reached_s) and human.casefold() not in _separated(request, rules)


def _separated(request: ApprovalRequest, rules: Rules) -> frozenset[str]:
    """The people who may not approve because the action is theirs."""
    if rules.separation == "none":
        return frozenset()
    people = request.chain[:1] if rules.separation == "owner" else request.chain
    return frozenset(canonical(principal).casefold() for principal in people)


def _require_eligible(request: ApprovalRequest, human: str, *, approve: bool) -> None:
    """Agents never decide, even when somebody listed them. Those kept apart may still deny."""
    listed = [r for r in request.rules if human in r.eligible(request.reached_s)]
    if not is_human(human) or not listed:
        raise CommandRefused("approver-not-eligible", 403, f"{human} is not an approver of this request.", request)
    if approve and not any(_may_approve(request, rules, human) for rules in listed):
        detail = f"{human} stands in the delegation chain, so another person must approve."
        raise CommandRefused("approver-not-eligible", 403, detail, request)


def _require_open(request: ApprovalRequest) -> None:
    if request.state not in OPEN:
        raise decided_already(request)


def _repeats(request: ApprovalRequest, human: str, approve: bool) -> bool:
    """True when this person's same decision is part of what carried the request to where it is."""
    carried = request.state in _AFTER_YES if approve else request.state is State.DENIED
    return carried and human in (request.yes if approve else request.no)


def _with_vote(request: ApprovalRequest, ballot: Vote) -> ApprovalRequest:
    others = tuple(v for v in request.votes if (v.human, v.version) != (ballot.human, ballot.version))
    return replace(request, votes=(*others, ballot))


def _end(request: ApprovalRequest, event: Event, now_ns: int) -> ApprovalRequest:
    return replace(request, state=step(request.state, event), ended_ns=now_ns)


def _escalation_due(request: ApprovalRequest) -> int | None:
    """When the next level falls due; None when there is none or an unanswered question holds it up."""
    if request.state is State.INFO_REQUESTED:
        return None
    steps = request.escalation_steps
    if request.level >= len(steps):
        return None
    return request.created_ns + _ns(steps[request.level]) + request.paused_ns


def _ns(seconds: float) -> int:
    return round(seconds * SECOND_NS)
