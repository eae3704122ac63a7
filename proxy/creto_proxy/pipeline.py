"""The path of a request, on one screen.

    accept -> identify -> authorize -> gate -> egress -> upstream -> meter -> audit

``Passage`` walks one request through it. Everything that can be answered now is a plain call on the way; whatever
must wait (a person, DNS, a connect) leaves the path by becoming one task, the agent's connection paused meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from creto_hotpath.http1 import ResponseHead
from creto_hotpath.relay import Exchange, Upstream
from creto_proxy.audit import Recorder
from creto_proxy.authorize import Policy
from creto_proxy.control import HOST, Control
from creto_proxy.deadline import Guard
from creto_proxy.egress import Egress
from creto_proxy.errors import CretoError, Held, Permanent, Refused, UpstreamUnreachable
from creto_proxy.gate import Gates
from creto_proxy.hookspecs import Authorizer, Client, Clock, Edits, Meter, Tap
from creto_proxy.identify import Identify
from creto_proxy.meter import Meters
from creto_proxy.model import Decision, Outcome, Permit, Request, Usage, Verdict
from creto_proxy.refusal import render
from creto_proxy.upstream import Upstreams

log = logging.getLogger("creto")


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The stages in order, and what runs them."""

    identify: Identify
    policy: Policy
    authorizers: tuple[tuple[str, Authorizer | Meter], ...]
    gates: Gates
    egress: Egress
    upstreams: Upstreams
    meters: Meters
    recorder: Recorder
    control: Control
    guard: Guard
    clock: Clock
    tasks: set[asyncio.Task[None]]
    run: str
    held_body_bytes: int

    def body_limit(self, request: Request) -> int:
        """The most body any stage wants to see before it decides; 0 when the head is enough."""
        limit = self.policy.body_limit(request)
        for plugin, stage in self.authorizers:
            limit = max(limit, self.guard.call(plugin, "body_limit", stage.body_limit, request))
        return limit

    def authorize(self, request: Request) -> Decision:
        """Policy, then quota and every other authorizer, in order; the strictest answer. DENY ends it at once, and
        what had been reserved by then is given back."""
        decision = self.policy.authorize(request)
        if decision.verdict is Verdict.DENY:
            return decision
        try:
            for plugin, stage in self.authorizers:
                answer = self.guard.decide(plugin, "authorize", stage.authorize, request)
                decision = decision.stricter(answer)
                if decision.verdict is Verdict.DENY:
                    break
        except CretoError:
            self.meters.release(request)
            raise
        if decision.verdict is Verdict.DENY:
            self.meters.release(request)
        return decision

    async def ask(self, request: Request, decision: Decision, client: Client) -> tuple[Decision, int]:
        """(answer, nanoseconds waited) for an ESCALATE: asks a person, then policy and quota once more with the
        approval in context. Nothing is reserved while a person thinks, and the grant is not spent yet."""
        started = self.clock.now_ns()
        self.meters.release(request)
        answer = await self.gates.hold(request, decision, client)
        waited = self.clock.now_ns() - started
        if not answer.allowed:
            return answer, waited
        if client.gone:
            return Decision(Verdict.DENY, "agent_gone", "The agent hung up while its call was held."), waited
        # People take longer than delegations live: who asks now is the agent as it stands now, or nobody.
        agent = self.identify(request.flow)
        if agent is None or agent.id != request.agent.id:
            return Decision(Verdict.DENY, "unknown_agent", "The delegation ended while the call was held."), waited
        request.agent = agent
        decision = self.authorize(request)
        if decision.verdict is Verdict.ESCALATE:
            self.meters.release(request)
            return Decision(
                Verdict.DENY, "approval_insufficient", "The approval does not satisfy policy.", decision.policies
            ), waited
        return decision, waited

    async def spend(self, request: Request) -> None:
        """Consumes the grant of an approved request, durably and last before the send. Raises Refused without one."""
        if request.approval is not None and not await self.gates.spend(request):
            raise Refused(Decision(Verdict.DENY, "grant_spent", "This approval has been used already."))

    def settle(self, request: Request, outcome: Outcome) -> None:
        """Tells the gates how the send ended; off the loop, because they write it down durably."""
        self.spawn(self.gates.settled(request, outcome))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def outcome(self, request: Request, decision: Decision | None, **facts: Any) -> Outcome:
        """The record of how it ended; refused requests have one too."""
        agent = request.agent
        approval = request.approval
        allowed = decision is not None and decision.allowed
        asked = decision.facts.get("approval_id", "") if decision is not None else ""
        return Outcome(
            id=request.id,
            at_unix_ns=self.clock.unix_ns(),
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
            run=self.run,
            resource=request.resource,
            trace=request.trace,
            **facts,
        )


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


class Passage:
    """One HTTP request on its way through the stages."""

    __slots__ = (
        "_decision", "_edits", "_error", "_exchange", "_held_ns", "_outcome", "_pipeline", "_ready_ns", "_reach_ns",
        "_request", "_sent", "_spent", "_tap", "_waiting_for_body",
    )  # fmt: skip

    def __init__(self, pipeline: Pipeline, exchange: Exchange, request: Request) -> None:
        self._pipeline = pipeline
        self._exchange = exchange
        self._request = request
        self._decision: Decision | None = None
        self._edits: Edits | None = None
        self._tap: Tap | None = None
        self._error = ""
        self._sent = False
        self._spent = False
        self._outcome: Outcome | None = None
        self._waiting_for_body: Decision | None = None
        self._ready_ns = request.received_ns
        self._held_ns = 0
        self._reach_ns = 0

    def begin(self) -> None:
        """Decides on the head alone when every stage can, else once the body is complete."""
        pipeline = self._pipeline
        try:
            pipeline.recorder.require()
            if self._request.host == HOST:
                self._collect_or(pipeline.held_body_bytes, self._ask_control)
            else:
                self._collect_or(pipeline.body_limit(self._request), self._decide)
        except CretoError as error:
            self._refuse(error)

    def body(self, body: bytes | None) -> None:
        """The collected body arrived; None when it is larger than what was asked for."""
        if body is None:
            self._refuse(Permanent("The body is larger than may be inspected.", reason="body_too_large", status=413))
            return
        self._request.body = body
        self._ready_ns = self._pipeline.clock.now_ns()
        try:
            if self._request.host == HOST:
                self._ask_control()
            elif self._waiting_for_body is not None:
                self._hold()
            else:
                self._decide()
        except CretoError as error:
            self._refuse(error)

    def _collect_or(self, limit: int, proceed: Any) -> None:
        if limit and self._body_unread():
            self._exchange.collect(limit)
        else:
            proceed()

    def _body_unread(self) -> bool:
        head = self._exchange.head
        return self._request.body is None and bool(head.chunked or head.content_length > 0)

    def _ask_control(self) -> None:
        async def answer() -> None:
            status, headers, body = await self._pipeline.control.answer(self._request)
            self._exchange.respond(status, headers, body)

        self._decision = Decision(Verdict.ALLOW, "control")
        self._wait_for(answer())

    def _decide(self) -> None:
        decision = self._pipeline.authorize(self._request)
        self._decision = decision
        if decision.allowed:
            self._send()
        elif decision.verdict is Verdict.ESCALATE:
            self._check_egress()
            # A held request is kept whole, because what is approved must be exactly what is sent.
            self._waiting_for_body = decision
            if self._body_unread():
                self._exchange.collect(self._pipeline.held_body_bytes)
            else:
                self._hold()
        else:
            raise Refused(decision)

    def _check_egress(self) -> None:
        """Raises Refused for what could not be sent anyway: nobody is to be asked about that."""
        try:
            self._pipeline.egress.permit_now(self._request)
        except CretoError:
            self._pipeline.meters.release(self._request)
            raise

    def _hold(self) -> None:
        asked = self._waiting_for_body
        assert asked is not None

        async def hold() -> None:
            decision, self._held_ns = await self._pipeline.ask(self._request, asked, HeldClient(self._exchange))
            self._decision = decision
            if self._exchange.over:
                self._pipeline.meters.release(self._request)
            elif decision.allowed:
                self._send()
            elif decision.verdict is Verdict.ESCALATE:
                raise _pending(decision)
            else:
                raise Refused(decision)

        self._wait_for(hold())

    def _wait_for(self, work: Coroutine[Any, Any, None]) -> None:
        """Leaves the path for one task. Whatever it raises refuses the request: an unanswered agent would hang."""

        async def step() -> None:
            try:
                await work
            except CretoError as error:
                self._refuse(error)
            except Exception:
                log.exception("a request failed inside creto")
                self._refuse(CretoError("creto failed while handling this request; the operator's log says why."))

        self._pipeline.spawn(step())

    def _send(self) -> None:
        """Everything said yes: dial what egress permits and relay."""
        pipeline = self._pipeline
        try:
            self._edits = pipeline.meters.edits(self._request)
            permit = pipeline.egress.permit_now(self._request)
        except CretoError:
            pipeline.meters.release(self._request)
            raise
        # What a person approved once is sent once: never on a connection that may be dead already.
        pooled = permit is not None and self._request.approval is None
        upstream = pipeline.upstreams.idle(permit) if permit is not None and pooled else None
        if upstream is not None:
            self._forward(upstream)
        else:
            self._wait_for(self._reach(permit))

    async def _reach(self, permit: Permit | None) -> None:
        pipeline = self._pipeline
        started = pipeline.clock.now_ns()
        try:
            permit = permit or await pipeline.egress.permit(self._request)
            upstream = await pipeline.upstreams.connect(permit)
        except (CretoError, asyncio.CancelledError):
            pipeline.meters.release(self._request)
            raise
        except OSError as error:
            pipeline.meters.release(self._request)
            raise UpstreamUnreachable(
                f"{self._request.host} has no address: {error}.", reason="name_not_found"
            ) from error
        self._reach_ns += pipeline.clock.now_ns() - started
        if not self._exchange.over and self._request.approval is not None:
            await self._spend(upstream)
        if self._exchange.over:
            pipeline.meters.release(self._request)
            upstream.release()
            if self._spent and self._outcome is not None:
                pipeline.settle(self._request, self._outcome)  # the agent left in between: spent and never sent
            return
        self._forward(upstream)

    async def _spend(self, upstream: Upstream) -> None:
        try:
            await self._pipeline.spend(self._request)
        except CretoError:
            upstream.release()
            self._pipeline.meters.release(self._request)
            raise
        self._spent = True

    def _forward(self, upstream: Upstream) -> None:
        self._sent = True
        self._exchange.on_response = self._answered
        self._exchange.allow_upgrade = self._request.method == "GET"
        edits = self._edits
        self._exchange.forward(
            upstream,
            target=_target(self._request),
            host=_authority(self._request),
            edits=edits.headers if edits is not None else None,
            body=self._body_to_send(),
        )

    def _body_to_send(self) -> bytes | None:
        """What a person approved is what is sent; otherwise a meter's edited body, or the agent's own."""
        edits = self._edits
        if edits is None or edits.body is None or self._request.approval is not None:
            return self._request.body
        return edits.body

    def stale(self) -> None:
        """The connection died before answering: once more, on a fresh one, unless it was a person's one yes."""
        if self._request.approval is not None:
            self._refuse(UpstreamUnreachable(f"{self._request.host} closed the connection.", reason="upstream_closed"))
            return
        self._wait_for(self._reach(None))

    def _answered(self, exchange: Exchange, head: ResponseHead) -> Tap | None:
        if head.status < 200 or head.status == HTTPStatus.SWITCHING_PROTOCOLS:
            return None
        content_type = (head.headers.get("content-type") or "").partition(";")[0].strip().lower()
        if (head.headers.get("content-encoding") or "identity").lower() != "identity":
            return None  # nobody here looks into compressed bodies; usage is then unknown
        self._tap = self._pipeline.meters.tap(self._request, head.status, content_type)
        return self._tap

    def abort(self) -> None:
        """Cuts off agent and upstream; ``end`` follows at once, after an upgrade when both sides are closed."""
        if self._exchange.status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._exchange.downstream.transport.abort()
        else:
            self._exchange.abort()

    def _refuse(self, error: CretoError) -> None:
        if isinstance(error, Refused):
            self._decision = error.decision
        else:
            self._error = error.reason
        if not self._exchange.over:
            status, headers, body = render(error, self._request)
            self._exchange.respond(status, headers, body)

    def end(self) -> None:
        """Settles and records, before the agent sees the last bytes of its answer."""
        exchange, request, pipeline = self._exchange, self._request, self._pipeline
        usage = Usage()
        if self._sent:
            usage = pipeline.meters.settle(request, self._tap, status=exchange.status, completed=exchange.completed)
        outcome = pipeline.outcome(
            request,
            self._decision,
            status=exchange.status,
            error=self._error or exchange.error,
            usage=usage,
            bytes_up=exchange.bytes_up,
            bytes_down=exchange.bytes_down,
            **self._times(),
        )
        self._outcome = outcome
        if request.host != HOST:
            pipeline.recorder.record(outcome)
        if self._spent:
            pipeline.settle(request, outcome)

    def _times(self) -> dict[str, int]:
        exchange = self._exchange
        end = exchange.ended_ns
        decided = exchange.forwarded_ns or end
        return {
            "creto_ns": max(0, decided - self._ready_ns - self._held_ns - self._reach_ns),
            "held_ns": self._held_ns,
            "upstream_ns": max(0, end - decided),
            "total_ns": end - exchange.received_ns,
        }


def _pending(decision: Decision) -> Held:
    return Held(
        decision.detail or "A person must approve this. Retry the identical request; do not change arguments.",
        approval_id=str(decision.facts.get("approval_id", "")),
        facts=decision.facts,
    )


def _target(request: Request) -> str:
    return f"{request.sent_path}?{request.query}" if request.query else request.sent_path


def _authority(request: Request) -> str:
    host = f"[{request.host}]" if ":" in request.host else request.host
    default = 443 if request.scheme == "https" else 80
    return host if request.port == default else f"{host}:{request.port}"
