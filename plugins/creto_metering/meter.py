"""Reserves what a model request may cost, watches the answer, settles what it did cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from types import MappingProxyType

from creto_hotpath.usage import Dialect, Framing, UsageScanner
from creto_metering import native
from creto_metering.ask import Ask, BadBody, is_plain, parse_ask, plain_ask, with_usage_included
from creto_metering.budgets import COST, Amounts, Budgets, Hold, Refusal, retry_after_s
from creto_metering.money import MAX_NANO
from creto_metering.prices import Price, PriceBook
from creto_metering.providers import Endpoint, Providers
from creto_metering.settings import Settings
from creto_metering.windows import iso
from creto_proxy.hookspecs import Clock, Edits, Tap
from creto_proxy.model import Certainty, Decision, Lease, Metering, Request, Usage, Verdict

log = logging.getLogger("creto.metering")

NOTE = "metering"
_ONE_REQUEST: Amounts = (1, 0, 0)
# An answer that comes as it is.
_READABLE = {"accept-encoding": "identity"}
_FRAMINGS: Mapping[str, Framing] = {
    "application/json": "document",
    "text/event-stream": "events",
    "application/vnd.amazon.eventstream": "frames",
    # What Ollama streams, and Cohere's first version.
    "application/x-ndjson": "lines",
    "application/stream+json": "lines",
}


@dataclass(slots=True)
class Ticket:
    """What metering knows of one request. ask None: it uses no model, or none whose use can be seen."""

    ask: Ask | None = None
    price: Price | None = None
    hold: Hold | None = None
    amounts: Amounts = _ONE_REQUEST
    hides_usage: bool = False


def reconcile(reserved: int, actual: int, *, exact: bool) -> int:
    """What to charge on top of a reservation, negative for a refund: only exact usage is refunded, more is charged."""
    return actual - reserved if exact else max(0, actual - reserved)


class RequestMeter:
    """The ``Meter`` of this plugin: model requests in requests, tokens and nano-dollars, all others in requests."""

    def __init__(self, settings: Settings, clock: Clock, providers: Mapping[str, str] | None = None) -> None:
        """providers: hosts that the core knows as model providers besides the public ones."""
        self._settings = settings
        self._clock = clock
        self._providers = Providers({**(providers or {}), **settings.providers})
        self._default_nano = settings.default_cost_nano
        self._budgets: Budgets | None = None
        self._prices = PriceBook(())

    def open(self, budgets: Budgets, prices: PriceBook) -> None:
        """Begins to work on these counters and prices; before it, every request is refused by an exception."""
        self._budgets = budgets
        self._prices = prices

    @property
    def budgets(self) -> Budgets:
        if self._budgets is None:
            raise RuntimeError("metering has not been started")
        return self._budgets

    def body_limit(self, request: Request) -> int:
        """The whole body of a model request, since it says what the answer may cost; no other body."""
        endpoint = self._endpoint(request)
        return self._settings.max_body if endpoint is not None and endpoint.operation is not None else 0

    def authorize(self, request: Request) -> Decision:
        """Reserves, or refuses: 429 with the budget in the way, 400 for a body that cannot be read for certain."""
        self.release(request)
        ticket = Ticket()
        endpoint = self._endpoint(request)
        if endpoint is not None and endpoint.operation is not None:
            refusal = self._estimate(request, endpoint, ticket)
            if refusal is not None:
                return refusal
        now_ns = self._clock.unix_ns()
        levels = self.budgets.levels(request.agent.path, now_ns)
        if endpoint is not None and endpoint.operation is None and levels.limits_spending:
            if self._settings.unmetered == "deny":
                return _unmetered(request)
        if levels.slots:
            answer = self.budgets.reserve(levels, ticket.amounts, now_ns)
            if isinstance(answer, Refusal):
                return _refused(answer)
            ticket.hold = answer
        request.notes[NOTE] = ticket
        return Decision(Verdict.ALLOW, "within_budget" if levels.slots else "no_budget")

    def lease(self, request: Request) -> Lease | None:
        """One request on every budget, for whatever uses no model; a tariff for model requests that ask for the same,
        where one look at the body says what that is."""
        ticket = _ticket(request)
        if ticket is None:
            return None
        if ticket.ask is not None:
            plain = request.ask is not None and is_plain(ticket.ask.endpoint)
            metering = self._metering(request, ticket, ticket.ask) if plain else None
            return None if metering is None else Lease(exact=True, asks=True, metering=metering)
        # On the host of a provider the path says whether a model is used.
        exact = self._providers.provider(request.host) is not None
        if ticket.hold is None:
            return Lease(exact)
        return Lease(exact, self.budgets.charge_of(ticket.hold))

    def _metering(self, request: Request, ticket: Ticket, ask: Ask) -> Metering | None:
        try:
            tariff = ask.tariff(ticket.price, self._settings.default_max_output, self._default_nano)
        except ValueError:
            return None  # more than a tariff counts with
        edits = self.edits(request)
        return Metering(
            tariff=tariff,
            tap=partial(_tap, ask.endpoint.dialect, ticket.hides_usage),
            account=partial(self._account, ask, ticket.price),
            charge=None if ticket.hold is None else self.budgets.charge_of(ticket.hold),
            edits=None if edits is None else edits.headers,
            rewrite=with_usage_included if ticket.hides_usage else None,
        )

    def release(self, request: Request) -> None:
        """The request is not sent: nothing is charged. Does nothing when nothing is held."""
        ticket = _ticket(request)
        if ticket is not None and ticket.hold is not None:
            self.budgets.release(ticket.hold)
            ticket.hold = None

    def edits(self, request: Request) -> Edits | None:
        """An answer that can be read, and usage in a stream whose client did not ask for it."""
        ticket = _ticket(request)
        if ticket is None or ticket.ask is None:
            return None
        ask, body = ticket.ask, None
        # Bedrock is the one provider whose clients sign; elsewhere the field means nothing.
        aws = ask.endpoint.provider == "bedrock"
        signed = native.signed_fields(request.headers.get("authorization")) if aws else None
        if signed is not None:
            # What is signed stays as it is: usage is then unknown where an answer is encoded, or a stream without it.
            return None if "accept-encoding" in signed else Edits(headers=_READABLE)
        if self._settings.include_usage and ask.streams and not ask.wants_usage and request.body is not None:
            body = with_usage_included(request.body)
            ticket.hides_usage = True
        return Edits(headers=_READABLE, body=body)

    def tap(self, request: Request, status: int, content_type: str) -> Tap | None:
        """Watches JSON and event streams that answer a model request."""
        ticket = _ticket(request)
        if ticket is None or ticket.ask is None:
            return None
        return _tap(ticket.ask.endpoint.dialect, ticket.hides_usage, content_type)

    def settle(self, request: Request, tap: Tap | None, *, status: int, completed: bool) -> Usage:
        """Charges what was used. Usage that is not known for certain keeps the whole reservation."""
        ticket = _ticket(request)
        if ticket is None:
            return Usage()
        if ticket.ask is None:
            self._charge(ticket, _ONE_REQUEST)
            return Usage()
        head = request.answer if ticket.ask.endpoint.dialect == "bedrock" else None
        said = {} if head is None else native.counted_in_head(head.get)
        actual, usage = self._account(ticket.ask, ticket.price, tap, status, completed, ticket.amounts, said)
        self._charge(ticket, actual)
        return usage

    def _account(
        self,
        ask: Ask,
        reserved_at: Price | None,
        tap: Tap | None,
        status: int,
        completed: bool,
        held: Amounts,
        said: Mapping[str, int] = MappingProxyType({}),
    ) -> tuple[Amounts, Usage]:
        """What is charged for an answer, and the usage to record. said: usage in its head, for want of a better."""
        endpoint = ask.endpoint
        tokens, model, exact = None, "", False
        if isinstance(tap, UsageScanner):
            tokens, model = tap.usage, tap.model
            exact = tap.final or (completed and tap.last)
        if said and (tokens is None or tokens.keys() < said.keys()):
            tokens, exact = dict(said), completed
        if tokens is None:
            if status >= 400:
                # Providers do not bill errors; the request itself was made.
                return _ONE_REQUEST, Usage("none", endpoint.provider, ask.model)
            tokens = {}
        exact = exact and "input" in tokens and ("output" in tokens or endpoint.operation == "embedding")
        price = self._prices.price(endpoint.provider, model, self._clock.unix_ns(), ask.when) or reserved_at
        used = tokens["total"] if "total" in tokens else tokens.get("input", 0) + tokens.get("output", 0)
        _, held_tokens, held_cost = held
        # Without a price the cost stays what was reserved, however exact the tokens are.
        cost = 0 if price is None else min(price.cost_nano(tokens), MAX_NANO)
        cost = held_cost + reconcile(held_cost, cost, exact=exact and price is not None)
        certainty: Certainty = "unknown" if not exact else "exact" if price is not None else "estimated"
        actual = (1, held_tokens + reconcile(held_tokens, used, exact=exact), cost)
        return actual, Usage(certainty, endpoint.provider, model or ask.model, tokens, cost)

    def _estimate(self, request: Request, endpoint: Endpoint, ticket: Ticket) -> Decision | None:
        """Fills in the ticket's upper bounds; a Decision when the request cannot be let through."""
        encoding = (request.headers.get("content-encoding") or "identity").strip().lower()
        if encoding != "identity":
            return _bad_body(f"its body is encoded with {encoding[:32]!r}; send it as it is")
        body = request.body or b""
        plain = request.ask
        try:
            plain = plain if is_plain(endpoint) else None
            ask = parse_ask(endpoint, body) if plain is None else plain_ask(endpoint, len(body), plain)
        except BadBody as error:
            return _bad_body(str(error))
        price = self._prices.price(endpoint.provider, ask.model, self._clock.unix_ns(), ask.when)
        if price is None and self._settings.unknown_model == "deny":
            return Decision(
                Verdict.DENY,
                "unknown_model",
                f"There is no price for this model of {endpoint.provider}, so its cost cannot be limited. "
                "Use a priced model, or add a [[metering.price]].",
                facts={"provider": endpoint.provider, "model": ask.model[:64]},
            )
        ticket.ask, ticket.price = ask, price
        tokens_in = ask.input_ceiling(price)
        tokens_out = ask.output_ceiling(price, self._settings.default_max_output)
        cost = self._default_nano
        if price is not None:
            cost = price.ceiling_nano(tokens_in, tokens_out, caches=ask.caches, audio=ask.audio)
        ticket.amounts = (1, min(tokens_in + tokens_out, MAX_NANO), min(cost, MAX_NANO))
        return None

    def _charge(self, ticket: Ticket, actual: Amounts) -> None:
        if ticket.hold is not None:
            hold, ticket.hold = ticket.hold, None
            self.budgets.settle(hold, actual, self._clock.unix_ns())

    def _endpoint(self, request: Request) -> Endpoint | None:
        return self._providers.endpoint(
            kind=request.kind,
            method=request.method,
            host=request.host,
            path=request.path,
            upgrade=request.headers.get("upgrade") is not None,
        )


def _ticket(request: Request) -> Ticket | None:
    ticket = request.notes.get(NOTE)
    return ticket if isinstance(ticket, Ticket) else None


def _tap(dialect: Dialect, hides_usage: bool, content_type: str) -> UsageScanner | None:
    framing = _framing(content_type)
    return None if framing is None else UsageScanner(dialect, framing, hides_usage and framing == "events")


@lru_cache(64)
def _framing(content_type: str) -> Framing | None:
    media = content_type.partition(";")[0].strip().lower()
    return _FRAMINGS.get(media, "document" if media.endswith("+json") else None)


def _bad_body(why: str) -> Decision:
    detail = f"The body of this model request cannot be metered: {why}."
    return Decision(Verdict.DENY, "bad_request_body", detail, status=400)


def _unmetered(request: Request) -> Decision:
    return Decision(
        Verdict.DENY,
        "unmetered_endpoint",
        f"What this asks of {request.host} cannot be metered, and this agent has a budget. Use chat completions, "
        "responses, embeddings, messages or what the provider has instead of them over HTTP, or set "
        'metering.unmetered = "allow".',
    )


def _refused(refusal: Refusal) -> Decision:
    slot, state = refusal.slot, refusal.state
    facts = {
        "level": slot.element,
        "metric": slot.budget.metric,
        "limit": slot.shown(state.limit),
        "used": slot.shown(state.used),
        "reserved": slot.shown(state.reserved),
        "requested": slot.shown(refusal.requested),
        "reset_at": iso(state.resets_at_ns) if state.resets_at_ns else None,
        "window": slot.budget.window or slot.budget.rate,
    }
    rate = slot.window is None
    return Decision(
        Verdict.DENY,
        "rate_exceeded" if rate else "budget_exhausted",
        _rate_detail(refusal) if rate else _budget_detail(refusal),
        status=429,
        retry_after_s=retry_after_s(refusal),
        facts=facts,
    )


def _rate_detail(refusal: Refusal) -> str:
    return f"{refusal.slot.element} may make {refusal.slot.budget.rate} requests; wait before the next one."


def _budget_detail(refusal: Refusal) -> str:
    slot, state, requested = refusal.slot, refusal.state, refusal.requested
    what = {"cost_usd": "dollars", "tokens": "tokens", "requests": "requests"}[slot.budget.metric]
    per = "in total" if slot.budget.window == "total" else f"per {slot.budget.window}"
    used = state.used + state.reserved
    limit = f"{slot.shown(state.limit)} {what} {per}"
    text = f"budget exhausted: {slot.element} may use {limit} and has used or reserved {slot.shown(used)}"
    if slot.meter == COST or slot.budget.metric == "tokens":
        text += f"; this request may use up to {slot.shown(requested)}"
        if requested > state.limit:
            text += ", more than the whole budget: set a lower output limit or send less"
    return f"{text}."
