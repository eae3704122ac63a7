"""The gate stage: persist, tell, hold, and spend the grant exactly once.

A held socket is a convenience on top of a durable request. When it closes, for whatever reason, the request goes on:
an approval that comes later is a detached grant, which the next identical submission of the same agent uses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from creto_oversight import answers, engine
from creto_oversight.approvers import Directory
from creto_oversight.desk import Desk, Submission, Submitted, TooMany
from creto_oversight.engine import CommandRefused, Standing
from creto_oversight.fingerprint import Action, Unhashable, fingerprint
from creto_oversight.hold import NONE, Heartbeat, heartbeat
from creto_oversight.redact import shown
from creto_oversight.requests import SECOND_NS, ApprovalRequest, Rules
from creto_oversight.states import Event, State
from creto_oversight.store import StoreUnavailable
from creto_oversight.watch import Offload, Watching
from creto_proxy.hookspecs import Client, Clock
from creto_proxy.model import Decision, Outcome, Request

log = logging.getLogger("creto.oversight")

NAME = "oversight"
BODY_LIMIT = 1 << 20
# How soon a held call notices that its agent has hung up.
GONE_S = 0.25
# Statuses that creto answers with itself when the upstream did not.
_OURS = frozenset({502, 503, 504})
# Errors that are certain to precede the first byte sent.
_NEVER_SENT = frozenset({"upstream_unreachable", "name_not_found"})


class Profiles(Protocol):
    """What the gate needs to know of the configuration; ``OversightSettings`` is one."""

    @property
    def hold_max_s(self) -> float: ...
    @property
    def held_max(self) -> int: ...
    def undefined(self, names: Iterable[str]) -> tuple[str, ...]: ...
    def rules(self, name: str) -> Rules: ...
    def directory(self) -> Directory: ...


@dataclass(frozen=True, slots=True)
class Grant:
    """What this gate remembers about an approved request until it is sent: the action exactly as approved."""

    id: str
    action: Action
    bind_headers: tuple[str, ...]
    spent: bool = False


class OversightGate:
    """Holds what a person must decide. One per process."""

    def __init__(
        self,
        desk: Desk,
        watch: Watching,
        offload: Offload,
        profiles: Profiles,
        clock: Clock,
        run: str,
    ) -> None:
        self._desk = desk
        self._watch = watch
        self._offload = offload
        self._profiles = profiles
        self._directory = profiles.directory()
        self._clock = clock
        self._run = run
        self._held = 0

    async def hold(self, request: Request, decision: Decision, client: Client) -> Decision:
        """ALLOW with ``request.approval`` and ``request.fingerprint`` set, DENY, or ESCALATE when the call could not
        be held until the answer. Anything that keeps a person from being asked properly is a DENY."""
        unknown = self._profiles.undefined(decision.profiles)
        if unknown or not decision.profiles:
            names = ", ".join(unknown) or "none"
            detail = f"Policy demands an oversight profile that is not defined ({names})."
            return answers.refusal("approval_profile_unknown", detail, 403, decision.policies)
        try:
            return await self._hold(request, decision, client)
        except Unhashable as error:
            return answers.refusal(error.reason, error.detail, error.status, decision.policies)
        except TooMany as error:
            return answers.flood(error)
        except CommandRefused as error:
            return answers.refusal(error.problem.replace("-", "_"), error.detail, error.status, decision.policies)
        except StoreUnavailable as error:
            log.error("requests for approval cannot be stored: %s", error)
            return answers.refusal(
                "approval_unavailable", "Requests for approval cannot be stored now.", 503, decision.policies
            )

    def spend(self, request: Request) -> bool:
        """Consumes the grant durably. False when there is none, or the request is not the approved one any more."""
        grant = request.notes.get(NAME)
        if not isinstance(grant, Grant) or grant.spent or request.approval is None or request.approval.id != grant.id:
            return False
        request.notes[NAME] = Grant(grant.id, grant.action, grant.bind_headers, spent=True)
        try:
            if Action.of(request, grant.bind_headers) != grant.action:
                return False
            self._desk.spend(grant.id, agent=request.agent, binding=request.approval.fingerprint)
        except (CommandRefused, StoreUnavailable, Unhashable) as error:
            log.warning("the grant of %s was not spent: %s", grant.id, error)
            return False
        return True

    def settled(self, request: Request, outcome: Outcome) -> None:
        """Stores how the send ended. When even that fails the request stays EXECUTING, and becomes INDETERMINATE once
        this process is gone; it is never sent again."""
        grant = request.notes.get(NAME)
        if not isinstance(grant, Grant) or not grant.spent:
            return
        event = outcome_event(outcome)
        try:
            self._desk.settle(grant.id, event, status=outcome.status, error=outcome.error)
        except (CommandRefused, StoreUnavailable) as error:
            log.error("the outcome of %s (%s) was not stored: %s", grant.id, event, error)

    async def _hold(self, request: Request, decision: Decision, client: Client) -> Decision:
        rules = tuple(self._profiles.rules(name) for name in decision.profiles)
        action = _action(request, rules)
        submitted = await self._offload(lambda: self._submit(request, decision, rules, action))
        request.fingerprint = submitted.request.fingerprint
        if submitted.standing is not Standing.WAIT:
            return self._answer(request, submitted.request, action)
        if self._held >= self._profiles.held_max:
            return answers.pending(submitted.request, self._desk.now_ns())
        self._held += 1
        try:
            found = await self._wait(submitted.request.id, self._heartbeat(request), client)
        finally:
            self._held -= 1
        return self._answer(request, found, action)

    def _submit(self, request: Request, decision: Decision, rules: tuple[Rules, ...], action: Action) -> Submitted:
        return self._desk.submit(
            Submission(
                agent=request.agent,
                fingerprint=fingerprint(action, _in_all(rules, lambda r: r.volatile)),
                rules=rules,
                directory=self._directory,
                shown=shown(request, action, _in_any(rules, lambda r: r.redact)),
                policies=decision.policies,
                run=self._run,
            )
        )

    async def _wait(self, request_id: str, beat: Heartbeat, client: Client) -> ApprovalRequest:
        """The request as soon as it is decided, or as it is when the call cannot be held any longer."""
        started = now = self._clock.now_ns()
        end = started + round(min(beat.limit_s, self._profiles.hold_max_s) * SECOND_NS)
        next_beat = started + round(beat.every_s * SECOND_NS)
        with self._watch.attached(request_id) as bell:
            found = await self._look(request_id)
            while _waiting(found) and now < end and not client.gone:
                due = engine.due_ns(found) or found.deadline_ns
                until_due_s = max(0.0, (due - self._desk.now_ns()) / SECOND_NS)
                until_ns = min(end, next_beat) if beat.status else end
                rang = await bell.wait(min(GONE_S, until_due_s, max(0.0, (until_ns - now) / SECOND_NS)))
                now = self._clock.now_ns()
                if rang or self._desk.now_ns() >= due:
                    found = await self._look(request_id)
                if beat.status and now >= next_beat and _waiting(found):
                    client.interim(beat.status)
                    next_beat = now + round(beat.every_s * SECOND_NS)
        return found

    async def _look(self, request_id: str) -> ApprovalRequest:
        return await self._offload(lambda: self._desk.look(request_id))

    def _answer(self, request: Request, found: ApprovalRequest, action: Action) -> Decision:
        now_ns = self._desk.now_ns()
        standing = engine.standing(found, now_ns)
        if standing is Standing.WAIT:
            return answers.pending(found, now_ns)
        if standing is not Standing.GRANT:
            return answers.closed(found, standing, now_ns)
        bound = _in_any(found.rules, lambda r: r.bind_headers)
        if found.substitute is not None:
            # An approver changed the body: what was approved is what is sent, and the agent is told.
            request.body = found.substitute
            action = Action.of(request, bound)
        request.fingerprint = found.binding
        request.approval = answers.approval_of(found)
        request.notes[NAME] = Grant(found.id, action, bound)
        return answers.granted(found)

    def _heartbeat(self, request: Request) -> Heartbeat:
        return heartbeat(request.headers) if request.kind == "http" else NONE


def outcome_event(outcome: Outcome) -> Event:
    """What a finished send amounts to: FAILED when it is certain that nothing was sent, or the upstream said no; LOST
    when nobody can know."""
    if outcome.decision == "deny" or outcome.upstream_ns == 0 or outcome.error in _NEVER_SENT:
        return Event.FAILED
    if outcome.status == 0 or (outcome.error and outcome.status in _OURS):
        return Event.LOST
    return Event.SUCCEEDED if outcome.status < 400 else Event.FAILED


def _action(request: Request, rules: Sequence[Rules]) -> Action:
    if request.body is not None and len(request.body) > BODY_LIMIT:
        raise Unhashable("approval_body_too_large", f"A body over {BODY_LIMIT} bytes cannot be approved.", 413)
    if request.body is None and _has_body(request):
        raise Unhashable("approval_body_unknown", "The body is not known as a whole, so it cannot be approved.", 413)
    coding = (request.headers.get("content-encoding") or "identity").strip().lower()
    if request.body and coding != "identity":
        detail = f"A body in {coding} coding cannot be shown to a person; send it plain."
        raise Unhashable("approval_body_encoded", detail, 415)
    return Action.of(request, _in_any(rules, lambda r: r.bind_headers))


def _has_body(request: Request) -> bool:
    if request.kind != "http":
        return False
    length = (request.headers.get("content-length") or "0").strip()
    return request.headers.get("transfer-encoding") is not None or length.strip("0") != ""


def _in_all(rules: Sequence[Rules], pick: Callable[[Rules], Sequence[str]]) -> tuple[str, ...]:
    """What every profile names: the strictest reading of what may stay unbound."""
    common = set(pick(rules[0])).intersection(*(pick(r) for r in rules[1:]))
    return tuple(sorted(common))


def _in_any(rules: Sequence[Rules], pick: Callable[[Rules], Sequence[str]]) -> tuple[str, ...]:
    return tuple(sorted({item for r in rules for item in pick(r)}))


def _waiting(request: ApprovalRequest) -> bool:
    """Whether holding on makes sense: a question has to reach the agent at once."""
    return request.state in (State.PENDING, State.ESCALATED)
