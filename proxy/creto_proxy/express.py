"""Which requests need not be put to the stages one by one, and what all stages said about them.

Most requests of an agent are like one it made a moment ago: same place, same method, same answers. A stage whose
answer to a request holds for every request of the same shape says so with a ``Lease``. When every stage does, their
answers are kept together as a ``Standing`` for at most ``LEASE_S``, and the compiled lane of the connection
(``creto_hotpath.express``) charges, forwards and records the next ones without a call into Python. A stage that gives
no lease is asked about every request, and so is everybody whose answer depends on the clock, on a person, or on more of
a body than what one look at it finds that it asks of a model (``Request.ask``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from creto_hotpath.admit import DecisionTable
from creto_hotpath.express import Express, Metered, Standing
from creto_hotpath.http1 import ResponseHead
from creto_hotpath.journal import Journal
from creto_hotpath.relay import Exchange, Tap, Upstream
from creto_proxy.audit import encode_usage, template
from creto_proxy.authorize import PATH_OVERRIDES, Policy
from creto_proxy.deadline import Guard
from creto_proxy.errors import StageFailed
from creto_proxy.hookspecs import Authorizer, Clock, Edits, Meter
from creto_proxy.meter import guarded, readable, unguarded
from creto_proxy.model import Charge, Flow, Lease, Metering, Outcome, Request, Usage
from creto_proxy.observe.observer import Observer
from creto_proxy.protect import Protection
from creto_proxy.protocols.detect import DETECTION_HEADERS, METHOD_OVERRIDES
from creto_proxy.target import Targets, sent_authority
from creto_proxy.upstream import Upstreams

# Together with ``service.REVOCATION_CHECK_S`` the second within which a revocation takes effect.
LEASE_S = 0.5
# Lanes kept; agents choose what they dial, so there must be a bound.
_LANES = 1024
# Standings of all lanes together, before all are forgotten: about fifty megabytes.
_STANDINGS = 16384
# By their values requests are told apart; whoever has one of the others comes to the stages.
_NAMED = (*sorted(DETECTION_HEADERS - {*METHOD_OVERRIDES}), "accept", "content-encoding", "content-type")
_BARRED = (*METHOD_OVERRIDES, *PATH_OVERRIDES)


@dataclass(frozen=True, slots=True)
class _Answers:
    """What the leases of all stages amount to. asks: they hold for bodies that ask the same of a model."""

    exact: bool
    asks: bool
    charge: Charge | None
    metering: Metering | None
    meter: str = ""


class Lanes:
    """The lanes of a gateway, one for all connections that came in the same way."""

    def __init__(
        self,
        *,
        journal: Journal,
        table: DecisionTable,
        policy: Policy,
        authorizers: Sequence[tuple[str, Authorizer | Meter]],
        targets: Targets,
        upstreams: Upstreams,
        protection: Protection,
        observer: Observer,
        guard: Guard,
        clock: Clock,
        sampling: bool,
    ) -> None:
        """sampling: traces that their callers record get a span of ours, which no lane can give them."""
        self._journal = journal
        self._table = table
        self._policy = policy
        self._targets = targets
        self._upstreams = upstreams
        self._protection = protection
        self._observer = observer
        self._guard = guard
        self._clock = clock
        self._sampling = sampling
        self._lanes: dict[tuple[Any, ...], Express] = {}
        self._learned = 0
        # A stage without the method has to see every request, and so there are no lanes at all.
        self._lessors = [(plugin, getattr(stage, "lease", None)) for plugin, stage in authorizers]
        # What came before was perhaps judged by other policies than those of this epoch.
        self._epoch, self._since_ns = table.epoch, 0
        self._open = all(lease is not None for _, lease in self._lessors)
        upstreams.retries.elsewhere = lambda: self.taken

    @property
    def taken(self) -> int:
        """Requests that were not put to the stages, as far as their lanes are still known."""
        return sum(lane.taken for lane in self._lanes.values())

    def lane(self, flow: Flow) -> Express | None:
        """The lane of a connection; None when some stage must see every request."""
        if not self._open:
            return None
        key = _way_in(flow)
        lane = self._lanes.get(key)
        if lane is None:
            if len(self._lanes) >= _LANES:
                self._forget()
                self._lanes.clear()  # open connections keep theirs
            lane = self._lanes[key] = self._make(flow)
        return lane

    def _make(self, flow: Flow) -> Express:
        return Express(
            self._journal,
            named=_NAMED,
            barred=_BARRED,
            prefixes=self._targets.prefixes if flow.way == "reverse" else None,
            absolute=flow.way == "explicit" and not flow.bound_names,
            sampling=self._sampling,
            keeper=self,
            counters=self._observer.counters,
            reuses=self._observer.reuses,
            valve=self._protection.load.valve,
            bad=self._upstreams.health.bad,
        )

    def close(self) -> None:
        """From now on every request comes to the stages."""
        self._open = False
        self._forget()

    def _forget(self) -> None:
        self._learned = 0
        for lane in self._lanes.values():
            lane.clear()

    def learn(
        self, request: Request, outcome: Outcome, exchange: Exchange, upstream: Upstream, edits: Edits | None
    ) -> None:
        """Keeps what was decided about ``request``, which is about to be sent to ``upstream`` with ``edits``.

        outcome: its record so far; what is only known at the end of an exchange is filled in each time.
        """
        lane = exchange.downstream.lane
        # A person said yes, or somebody read a body that means more than what it asks of a model: that is about this
        # request and no other.
        if not isinstance(lane, Express) or request.approval is not None:
            return
        if request.body is not None and request.ask is None:
            return
        if not self._open or upstream.pool.per_key == 0:
            return
        # A lane that was dropped may come back, but not beside another: what is kept must be known here.
        if self._lanes.setdefault(_way_in(request.flow), lane) is not lane:
            return
        if self._learned >= _STANDINGS:
            self._forget()
        self._learned += 1
        epoch, received_ns = self._table.epoch, request.received_ns
        if epoch != self._epoch:
            self._epoch, self._since_ns = epoch, self._clock.now_ns()
        if received_ns <= self._since_ns:
            return  # it may have been judged by policies that are no more
        answers = self._answers(request)
        if answers is None or (answers.exact and request.path != request.sent_path):
            return
        metering = answers.metering
        if answers.asks != (request.body is not None):
            return
        if (None if edits is None else edits.headers) != (None if metering is None else metering.edits):
            return
        route = self._targets.route(exchange.head.target) if request.flow.way == "reverse" else None
        agents = self._protection.agents
        charge = answers.charge if metering is None else metering.charge
        left_s = min(LEASE_S, request.agent.expires_at - self._clock.unix_ns() / 1e9)
        lane.learn(
            exchange.head,
            Standing(
                stack=upstream.stack,
                host=sent_authority(request),
                table=self._table,
                epoch=epoch,
                # Since it was judged: connecting may have taken long, and who asked may be nobody by now.
                expires_ns=received_ns + int(left_s * 1e9),
                record=template(outcome, metered=metering is not None),
                base="" if route is None else route.path,
                strip=0 if route is None else len(route.prefix),
                quota=None if charge is None else charge.table,
                path=None if charge is None else charge.path,
                amounts=() if charge is None else charge.amounts,
                ttl_ns=1 if charge is None else charge.ttl_ns,
                share=None if agents is None else agents.of(request.agent.id),
                context=outcome,
                metered=None if metering is None else self._metered(answers.meter, metering),
            ),
            exact=answers.exact,
            body=request.body,
        )

    def _metered(self, plugin: str, metering: Metering) -> Metered:
        """What the lane does with a model request besides."""
        call, look, account = self._guard.call, metering.tap, metering.account

        def watch(exchange: Exchange, head: ResponseHead) -> Tap | None:
            content_type = readable(head)
            if content_type is None:
                return None
            try:
                tap = call(plugin, "meter", look, content_type)
            except StageFailed:
                return None  # the request has been answered and must be paid for: its usage is then unknown
            return None if tap is None else guarded(plugin, tap, self._guard)

        def settle(
            tap: Tap | None, status: int, completed: bool, held: tuple[int, int, int]
        ) -> tuple[tuple[int, int, int] | None, bytes]:
            found = unguarded(tap)
            try:
                actual, usage = call(plugin, "meter", account, found, status, completed, held)
            except StageFailed:
                return None, encode_usage(Usage(certainty="unknown"))
            return actual, encode_usage(usage)

        return Metered(
            tariff=metering.tariff, watch=watch, settle=settle, edits=metering.edits, rewrite=metering.rewrite
        )

    def _answers(self, request: Request) -> _Answers | None:
        policy = self._policy.lease(request)
        if policy is None:
            return None
        leases = [("policy", policy)]
        for plugin, lessor in self._lessors:
            lease = None if lessor is None else self._guard.call(plugin, "lease", lessor, request)
            if not isinstance(lease, Lease):
                return None
            leases.append((plugin, lease))
        charges = [lease.charge for _, lease in leases if lease.charge is not None]
        meters = [(plugin, lease.metering) for plugin, lease in leases if lease.metering is not None]
        if len(charges) + len(meters) > 1:
            return None
        exact, asks = any(lease.exact for _, lease in leases), any(lease.asks for _, lease in leases)
        meter, metering = meters[0] if meters else ("", None)
        return _Answers(exact, asks, charges[0] if charges else None, metering, meter)

    # -- what a lane leaves to us

    def cells(self, standing: Standing, status_class: int) -> Sequence[int]:
        """Where the observer counts such requests."""
        outcome: Outcome = standing.context
        return self._observer.cells(
            outcome.agent, outcome.host, outcome.method, outcome.decision, outcome.reason, status_class, cached=True
        )

    def again(self) -> bool:
        """Whether the retry budget has room for one more."""
        return self._upstreams.again()

    def ended(self, exchange: Exchange, standing: Standing) -> None:
        """What an exchange says about its upstream."""
        self._upstreams.judge(standing.stack.key, exchange.status, exchange.error)


def _way_in(flow: Flow) -> tuple[Any, ...]:
    """What connections have in common that may use one lane."""
    # What came by HTTP/2 may have to go on by it: it takes no connection that others have found to speak HTTP/1.
    came = (flow.link, flow.way, flow.tls, flow.http2, flow.sni, flow.bound_names, flow.original, flow.port)
    # Inside a CONNECT they are those it was granted for; outside, each request has its own and then takes no lane.
    return (*came, flow.credentials if flow.bound_names else None)
