"""The path of a request, on one screen.

    accept -> identify -> authorize -> gate -> egress -> upstream -> meter -> audit

``Passage`` walks one request through it. Everything that can be answered now is a plain call on the way; whatever
must wait (a person, DNS, a connect) leaves the path by becoming one task, the agent's connection paused meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Hashable, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from creto_hotpath.http1 import ResponseHead
from creto_hotpath.relay import Exchange, Upstream
from creto_proxy.audit import Recorder
from creto_proxy.authorize import Policy
from creto_proxy.control import HOST, Control
from creto_proxy.deadline import Guard
from creto_proxy.egress import Egress
from creto_proxy.errors import CretoError, Permanent, Refused, Transient, UpstreamUnreachable
from creto_proxy.express import Lanes
from creto_proxy.gate import Gates, HeldClient, pending
from creto_proxy.hookspecs import Authorizer, Client, Clock, Edits, Meter, Tap
from creto_proxy.identify import Identify
from creto_proxy.meter import Meters, readable
from creto_proxy.model import Decision, Outcome, Permit, Request, Usage, Verdict
from creto_proxy.observe.observer import Nobody, Watcher
from creto_proxy.observe.tracecontext import Forward
from creto_proxy.outcome import outcome_of, times_of
from creto_proxy.protect import InFlight, Protection
from creto_proxy.refusal import render
from creto_proxy.revocation import Revocations
from creto_proxy.target import sent_authority, sent_target
from creto_proxy.upstream import Upstreams
from creto_proxy.websocket import Upgrade, Watchers

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
    lanes: Lanes | None = None
    messages: Watchers | None = None
    protection: Protection = field(default_factory=Protection)
    observer: Watcher = field(default_factory=Nobody)
    forward_trace: Forward | None = None
    revocations: Revocations = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "revocations", Revocations(self.identify, self.guard))

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
        self.observer.holding(1)
        try:
            answer = await self.gates.hold(request, decision, client)
        finally:
            self.observer.holding(-1)
        waited = self.clock.now_ns() - started
        self.observer.held(waited, answer)
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

    def record(self, outcome: Outcome, decision: Decision | None) -> None:
        """Writes it down and counts it: once for everything that ends."""
        self.recorder.record(outcome)
        self.observer.request(outcome, decision)

    def settle(self, request: Request, outcome: Outcome) -> None:
        """Tells the gates how the send ended; off the loop, because they write it down durably."""
        self.spawn(self.gates.settled(request, outcome))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def outcome(self, request: Request, decision: Decision | None, **facts: Any) -> Outcome:
        """The record of how it ended; refused requests have one too."""
        return outcome_of(request, decision, at_unix_ns=self.clock.unix_ns(), run=self.run, **facts)


class Passage:
    """One HTTP request on its way through the stages."""

    __slots__ = (
        "_decision", "_edits", "_error", "_exchange", "_held_ns", "_kept", "_key", "_outcome", "_pipeline", "_ready_ns",
        "_reach_ns", "_request", "_sent", "_share", "_spent", "_tap", "_upgrade", "_waiting_for_body",
    )  # fmt: skip

    def __init__(
        self, pipeline: Pipeline, exchange: Exchange, request: Request, share: InFlight | None = None
    ) -> None:
        self._pipeline = pipeline
        self._share = share
        self._kept = 0  # bytes of memory set aside for the body
        self._key: Hashable = None  # of the connection it was sent on
        self._exchange = exchange
        self._request = request
        self._decision: Decision | None = None
        self._edits: Edits | None = None
        self._tap: Tap | None = None
        self._upgrade: Upgrade | None = None
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
                self._share = None
                self._collect_or(pipeline.held_body_bytes, self._ask_control)
            else:
                share, self._share = self._share, None
                pipeline.protection.admit(share)
                self._share = share
                self._collect_or(pipeline.body_limit(self._request), self._decide)
        except CretoError as error:
            self._refuse(error)

    def body(self, body: bytes | None) -> None:
        """The collected body arrived; None when it is larger than what was asked for."""
        if body is None:
            self._refuse(Permanent("The body is larger than may be inspected.", reason="body_too_large", status=413))
            return
        if self._taken():
            return
        self._request.body = body
        self._pipeline.protection.memory.give(self._kept - len(body))
        self._kept = len(body)
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

    def _taken(self) -> bool:
        """Whether a lane takes the request now that its body is there: from then on this knows nothing of it."""
        lane = self._exchange.downstream.lane
        if lane is None or self._waiting_for_body is not None or self._request.host == HOST:
            return False
        if self._share is not None:
            self._share.leave()  # a lane counts for itself
        try:
            lane.take(self._exchange)
        finally:
            if taken := self._exchange.lane is not None:
                self._pipeline.protection.memory.give(self._kept)
                self._share, self._kept = None, 0
            elif self._share is not None:
                self._share.enter()
        return taken

    def _collect_or(self, limit: int, proceed: Any) -> None:
        if limit and self._body_unread():
            self._collect(limit)
        else:
            proceed()

    def _collect(self, limit: int) -> None:
        head, memory = self._exchange.head, self._pipeline.protection.memory
        size = limit if head.chunked else min(limit, head.content_length)
        try:
            memory.take(size, last=self._request.host == HOST)
        except CretoError:
            self._pipeline.meters.release(self._request)
            raise
        self._kept = size
        self._exchange.collect(limit)

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
                self._collect(self._pipeline.held_body_bytes)
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
                raise pending(decision)
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
            if self._exchange.head.upgrade is not None:
                self._upgrade = Upgrade(self._exchange, self._request, pipeline.messages, pipeline.revocations)
            permit = pipeline.egress.permit_now(self._request)
            permits: Sequence[Permit] = ()
            if permit is not None and pipeline.upstreams.health.bad and permit.key in pipeline.upstreams.health.bad:
                permits = pipeline.upstreams.usable(pipeline.egress.permits_now(self._request) or ())
                permit = permits[0]
        except CretoError:
            pipeline.meters.release(self._request)
            raise
        # What a person approved once is sent once: never on a connection that may be dead already.
        pooled = permit is not None and self._request.approval is None
        upstream = pipeline.upstreams.idle(permit, self._request) if permit is not None and pooled else None
        if upstream is not None:
            pipeline.observer.reused()
            self._forward(upstream)
        else:
            self._wait_for(self._reach(permits))

    async def _reach(self, permits: Sequence[Permit]) -> None:
        pipeline = self._pipeline
        started = pipeline.clock.now_ns()
        try:
            permits = permits or pipeline.upstreams.usable(await pipeline.egress.permits(self._request))
            upstream = await pipeline.upstreams.connect(permits, self._request)
        except (CretoError, asyncio.CancelledError) as error:
            pipeline.meters.release(self._request)
            pipeline.observer.connected(error.reason if isinstance(error, CretoError) else "agent_gone")
            raise
        except OSError as error:
            pipeline.meters.release(self._request)
            pipeline.observer.connected("name_not_found")
            raise UpstreamUnreachable(
                f"{self._request.host} has no address: {error}.", reason="name_not_found"
            ) from error
        pipeline.observer.connected("ok")
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
        self._key = upstream.key
        self._pipeline.upstreams.retries.requests += 1
        self._exchange.on_response = self._answered
        self._exchange.allow_upgrade = self._request.method == "GET"
        edits = self._edits
        edited = fields = edits.headers if edits is not None else None
        if self._upgrade is not None:
            fields = self._upgrade.attach(upstream, fields)
        forward_trace = self._pipeline.forward_trace
        if forward_trace is not None and self._request.trace:
            fields = forward_trace(self._request.trace, self._request.id, fields)
        if fields is edited and self._pipeline.lanes is not None:
            self._learn(self._pipeline.lanes, upstream)
        self._exchange.forward(
            upstream,
            target=sent_target(self._request),
            host=sent_authority(self._request),
            edits=fields,
            body=self._body_to_send(),
        )

    def _learn(self, lanes: Lanes, upstream: Upstream) -> None:
        """Lets requests like this one go without being asked about, where every stage agrees."""
        nothing = {"status": 0, "error": "", "usage": Usage(), "bytes_up": 0, "bytes_down": 0}
        times = {"creto_ns": 0, "held_ns": 0, "upstream_ns": 0, "total_ns": 0}
        outcome = self._pipeline.outcome(self._request, self._decision, **nothing, **times)
        try:
            lanes.learn(self._request, outcome, self._exchange, upstream, self._edits)
        except CretoError:
            pass  # a stage failed to say; it is asked again next time

    def _body_to_send(self) -> bytes | None:
        """What a person approved is what is sent; otherwise a meter's edited body, or the agent's own."""
        edits = self._edits
        if edits is None or edits.body is None or self._request.approval is not None:
            return self._request.body
        return edits.body

    def stale(self) -> None:
        """The connection died before answering: once more, on a fresh one, unless it was a person's one yes."""
        if self._request.approval is not None or not self._pipeline.upstreams.again():
            self._refuse(UpstreamUnreachable(f"{self._request.host} closed the connection.", reason="upstream_closed"))
            return
        self._wait_for(self._reach(()))

    def _answered(self, exchange: Exchange, head: ResponseHead) -> Tap | None:
        if self._upgrade is not None:
            try:
                self._upgrade.answered(head)
            except CretoError as error:
                self._refuse(error)
        self._request.answer = head
        content_type = readable(head)
        if content_type is None:
            return None
        self._tap = self._pipeline.meters.tap(self._request, head.status, content_type)
        return self._tap

    def abort(self) -> None:
        """Cuts off agent and upstream; ``end`` follows at once, after an upgrade when both sides are closed."""
        if self._exchange.status == HTTPStatus.SWITCHING_PROTOCOLS:
            self._exchange.downstream.transport.abort()
        else:
            self._exchange.abort()

    @property
    def expected(self) -> int:
        """Bytes, at most, of a body that is being collected; 0 when none is."""
        return self._kept if self._request.body is None else 0

    def overdue(self, status: int, reason: str, detail: str) -> None:
        """Ends what goes on too slowly: with ``status`` while there is no answer, else by cutting it off."""
        if self._exchange.first_byte_ns:
            self._error = reason
            self.abort()
        else:
            self._refuse(Transient(detail, reason=reason, status=status), close=True)

    def _refuse(self, error: CretoError, *, close: bool = False) -> None:
        if isinstance(error, Refused):
            self._decision = error.decision
        else:
            self._error = error.reason
        if not self._exchange.over:
            status, headers, body = render(error, self._request)
            self._exchange.respond(status, headers, body, close=close)

    def end(self) -> None:
        """Settles and records, before the agent sees the last bytes of its answer."""
        exchange, request, pipeline = self._exchange, self._request, self._pipeline
        if self._upgrade is not None:
            self._error = self._upgrade.end() or self._error
        usage = Usage()
        if self._kept:
            pipeline.protection.memory.give(self._kept)
        if self._share is not None:
            self._share.leave()
        if self._sent:
            pipeline.upstreams.judge(self._key, exchange.status, self._error or exchange.error)
            usage = pipeline.meters.settle(request, self._tap, status=exchange.status, completed=exchange.completed)
        outcome = pipeline.outcome(
            request,
            self._decision,
            status=exchange.status,
            error=self._error or exchange.error,
            usage=usage,
            bytes_up=exchange.bytes_up,
            bytes_down=exchange.bytes_down,
            **times_of(exchange, self._ready_ns, self._held_ns, self._reach_ns),
        )
        self._outcome = outcome
        if request.host != HOST:
            pipeline.record(outcome, self._decision)
        if self._spent:
            pipeline.settle(request, outcome)
