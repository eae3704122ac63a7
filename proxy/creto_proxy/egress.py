"""Turns an allowed request into the right to dial one verified address: the only place where a ``Permit`` is made.

Names decide, addresses are verified. The address dialled is one that creto resolved (or the operator pinned) and that
every egress guard accepted *now*, not only when DNS was answered; nothing is resolved again after the check.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Protocol

from creto_proxy.deadline import Guard
from creto_proxy.errors import Refused
from creto_proxy.hookspecs import EgressGuard
from creto_proxy.model import Address, Agent, Decision, Flow, Permit, Request, Verdict
from creto_proxy.settings import Endpoint

_SEAL = object()


class Resolver(Protocol):
    """Name -> addresses, cached by TTL. Raises ``OSError`` when there is no answer."""

    def cached(self, name: str) -> Sequence[Address] | None: ...
    async def resolve(self, name: str) -> Sequence[Address]: ...


def genuine(permit: Permit) -> bool:
    """True for a permit made here, whatever else carries the same fields."""
    return permit.seal is _SEAL


def literal(host: str) -> Address | None:
    """The address when ``host`` is a canonical address literal, None for names (including odd numerals)."""
    # Every request comes by here, nearly always with a name; literals end in a digit or hold a colon.
    if not host[-1:].isdigit() and ":" not in host:
        return None
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Egress:
    """The egress stage."""

    def __init__(
        self, guards: Sequence[tuple[str, EgressGuard]], resolver: Resolver, pins: Mapping[str, Endpoint], guard: Guard
    ) -> None:
        self._guards = tuple(guards)
        self._resolver = resolver
        self._pins = pins
        self._guard = guard

    def name_decision(self, agent: Agent, name: str, port: int | None) -> Decision:
        """The strictest answer of all guards for a name; without any guard nothing may leave."""
        if not self._guards:
            return Decision(Verdict.DENY, "no_egress_guard", "No egress plugin is enabled, so nothing may leave.")
        decision: Decision | None = None
        for plugin, guard in self._guards:
            answer = self._guard.decide(plugin, "egress", guard.name_allowed, agent, name, port)
            decision = answer if decision is None else decision.stricter(answer)
        assert decision is not None
        return decision

    def address_decision(self, agent: Agent, name: str | None, address: Address, port: int | None) -> Decision:
        """The strictest answer of all guards for an address, under a name or (None) as a literal."""
        decision = Decision(Verdict.DENY, "no_egress_guard")
        for index, (plugin, guard) in enumerate(self._guards):
            answer = self._guard.decide(plugin, "egress", guard.address_allowed, agent, name, address, port)
            decision = answer if index == 0 else decision.stricter(answer)
        return decision

    def tls_mode(self, name: str, port: int) -> str:
        """"intercept" unless a guard says "splice" for that name."""
        for plugin, guard in self._guards:
            mode = self._guard.call(plugin, "egress", guard.tls_mode, name, port)
            if mode is not None:
                return mode
        return "intercept"

    async def raw_tcp(self, flow: Flow) -> str | None:
        """Where that connection goes, by name or as an address, when a rule lets bytes that are neither TLS nor HTTP
        pass to it; None when there is no such rule.

        An explicit CONNECT says a name only: guards are asked with the address it has now; without one it goes nowhere.
        """
        name = flow.bound_names[0] if flow.bound_names else None
        address = flow.original[0] if flow.original is not None else await self._first(name or "")
        if address is None:
            return None
        if name is not None and literal(name) is not None:
            name = None  # the authority of a CONNECT to an address: rules for addresses are about it
        passes = any(
            self._guard.call(plugin, "egress", guard.raw_tcp, name, address, flow.port)
            for plugin, guard in self._guards
        )
        return (name or str(address)) if passes else None

    async def _first(self, name: str) -> Address | None:
        """The address a name stands for, as far as that can be known before anything was verified."""
        pin = self._pins.get(name)
        if pin is not None:
            return pin.address
        try:
            return next(iter(self._resolver.cached(name) or await self._resolver.resolve(name)), None)
        except OSError:
            return None

    def permit_now(self, request: Request) -> Permit | None:
        """A Permit when everything needed is known already; None when the name has to be resolved first.

        Raises ``Refused`` when a guard says no.
        """
        known = self._known(request)
        if known is None or isinstance(known, Permit):
            return known
        return self._verified(request, known, only_first=True)[0]

    def permits_now(self, request: Request) -> Sequence[Permit] | None:
        """As ``permit_now``, but one Permit for every address that all guards accept, the best first."""
        known = self._known(request)
        if known is None:
            return None
        if isinstance(known, Permit):
            return (known,)
        permits = self._verified(request, known)
        if request.flow.original is not None and literal(request.host) is None:
            permits += self._others(request, known)
        return permits

    async def permit(self, request: Request) -> Permit:
        """A Permit, resolving the name if need be. Raises ``Refused``, or ``OSError`` when there is no answer."""
        return (await self.permits(request))[0]

    async def permits(self, request: Request) -> Sequence[Permit]:
        """As ``permit``, but one Permit for every address that all guards accept, the best first."""
        ready = self.permits_now(request)
        if ready is not None:
            return ready
        return self._verified(request, await self._resolver.resolve(request.host))

    def _known(self, request: Request) -> Permit | Sequence[Address] | None:
        """What may be dialled without a question to DNS: pinned, or addresses that are yet to be verified."""
        address = literal(request.host)
        if address is not None:
            return (address,)
        self._require(self.name_decision(request.agent, request.host, request.port))
        pin = self._pins.get(request.host)
        if pin is not None:
            return self._make(request, pin.address, pin.port)
        if request.flow.original is not None:
            return (request.flow.original[0],)
        return self._resolver.cached(request.host)

    def _others(self, request: Request, dialled: Sequence[Address]) -> list[Permit]:
        """The other addresses of the name that the agent dialled one of. It sees creto accept every connection, so
        trying the next when one is down is not left to it."""
        known = self._resolver.cached(request.host)
        others = [address for address in known or () if address not in dialled]
        try:
            return self._verified(request, others)
        except Refused:
            return []

    def _verified(self, request: Request, addresses: Sequence[Address], only_first: bool = False) -> list[Permit]:
        """A Permit for each address that every guard accepts, or for the first. Raises ``Refused`` without any."""
        name = None if literal(request.host) is not None else request.host
        refusal: Decision | None = None
        permits: list[Permit] = []
        for address in addresses:
            decision = self.address_decision(request.agent, name, address, request.port)
            if decision.allowed:
                permits.append(self._make(request, address, request.port))
                if only_first:
                    break
            else:
                refusal = refusal or decision
        if not permits:
            raise Refused(refusal or Decision(Verdict.DENY, "no_address", f"{request.host} has no usable address."))
        return permits

    def _make(self, request: Request, address: Address, port: int) -> Permit:
        # TLS towards the upstream exactly when the agent speaks TLS to us and we terminated it, or asked for https.
        tls = request.kind == "http" and request.scheme == "https"
        return Permit(name=request.host, address=address, port=port, tls=tls, seal=_SEAL)

    @staticmethod
    def _require(decision: Decision) -> None:
        if not decision.allowed:
            raise Refused(decision)



