"""Decides which names may be asked for and which addresses may be dialled. Deny beats allow; nothing is allowed
unasked."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import ClassVar

from creto_egress.addresses import PUBLIC, kind, reaches
from creto_egress.names import BadName, NameTable, normalise
from creto_egress.presets import PRESETS, PUBLIC_ONLY
from creto_egress.rules import ANY_PORT, Rule, parse
from creto_egress.settings import EgressSettings
from creto_proxy.model import Address, Agent, Decision, Verdict

# Some 200 bytes each; an agent that asks for ever new names only pushes out its own.
REMEMBERED_NAMES = 4096
_ALLOWED_NAME = Decision(Verdict.ALLOW, "host_allowed")
_ALLOWED_ADDRESS = Decision(Verdict.ALLOW, "address_allowed")


class Guard:
    """An ``EgressGuard`` over one configuration. Every answer is O(labels of the name) plus the CIDR rules."""

    stable: ClassVar[bool] = True

    def __init__(self, settings: EgressSettings) -> None:
        listed = [entry for preset in settings.presets for entry in PRESETS.get(preset, ())]
        allowed = [parse(entry) for entry in (*settings.allow, *listed)]
        denied = [parse(entry, default_ports=ANY_PORT) for entry in settings.deny]
        self._names = _by_name(allowed)
        self._denied_names = _by_name(denied)
        self._networks = [rule for rule in allowed if rule.network is not None]
        self._denied_networks = [rule for rule in denied if rule.network is not None]
        self._any_public = PUBLIC_ONLY in settings.presets
        self._tls_default = settings.tls.default
        self._intercepted: NameTable[bool] = NameTable((pattern, True) for pattern in settings.tls.intercept)
        self._spliced: NameTable[bool] = NameTable((pattern, True) for pattern in settings.tls.splice)
        # The answer depends on the configuration alone, and agents ask for the same few names on every request.
        self._decide_name = lru_cache(maxsize=REMEMBERED_NAMES)(self._name_decision)

    def name_allowed(self, agent: Agent, name: str, port: int | None) -> Decision:
        """``host_allowed``, or ``bad_name``, ``host_denied``, ``host_not_allowed``, ``port_not_allowed``."""
        return self._decide_name(name, port)

    def _name_decision(self, name: str, port: int | None) -> Decision:
        try:
            name = normalise(name)
        except BadName as error:
            return _deny("bad_name", f"{error}.")
        if any(_denies(rule, port) for rule in self._denied_names.covering(name)):
            return _deny("host_denied", f"{name} is on the list of denied destinations.")
        rules = list(self._names.matching(name))
        if self._any_public or any(rule.covers_port(port) for rule in rules):
            return _ALLOWED_NAME
        if rules:
            ports = ", ".join(str(p) for p in sorted(frozenset[int]().union(*(rule.ports for rule in rules))))
            return _deny("port_not_allowed", f"{name} may be reached on port {ports} only, not on {port}.")
        return _deny(
            "host_not_allowed", f'{name} is not an allowed destination. To allow it: [egress] allow = ["{name}"].'
        )

    def address_allowed(self, agent: Agent, name: str | None, address: Address, port: int | None) -> Decision:
        """For a name: any public address, others by CIDR rule. For a literal (name None): by CIDR rule alone.

        ``address_allowed``, or ``address_denied``, ``address_not_public``, ``literal_not_allowed``.
        """
        for rule in self._denied_networks:
            if rule.network is not None and address in rule.network and _denies(rule, port):
                return _deny("address_denied", f"{address} is on the list of denied destinations ({rule.text}).")
        if any(_reaches(rule, address, port) for rule in self._networks):
            return _ALLOWED_ADDRESS
        place = kind(address)
        if place != PUBLIC:
            return _deny(
                "address_not_public",
                f"{name or address} leads to {address}, which is {place}; that needs a rule for the address itself.",
            )
        if name is None:
            return _deny(
                "literal_not_allowed", f"{address} was dialled by address; use its name, or allow its network."
            )
        return _ALLOWED_ADDRESS

    def tls_mode(self, name: str, port: int) -> str | None:
        """``"intercept"`` or ``"splice"``."""
        try:
            name = normalise(name)
        except BadName:
            return "intercept"
        if any(self._intercepted.matching(name)):
            return "intercept"
        return "splice" if any(self._spliced.matching(name)) else self._tls_default

    def raw_tcp(self, name: str | None, address: Address, port: int) -> bool:
        """True when a ``tcp://`` rule names this destination."""
        if name is None:
            return any(rule.raw and _reaches(rule, address, port) for rule in self._networks)
        try:
            rules = list(self._names.matching(normalise(name)))
        except BadName:
            return False
        return any(rule.raw and rule.covers_port(port) for rule in rules)


def _by_name(rules: Iterable[Rule]) -> NameTable[Rule]:
    return NameTable((rule.pattern, rule) for rule in rules if rule.pattern is not None)


def _denies(rule: Rule, port: int | None) -> bool:
    """Asked for "any port", a rule denies only when it denies all of them."""
    return not rule.ports if port is None else rule.covers_port(port)


def _reaches(rule: Rule, address: Address, port: int | None) -> bool:
    return rule.network is not None and rule.covers_port(port) and reaches(rule.network, address)


def _deny(reason: str, detail: str) -> Decision:
    return Decision(Verdict.DENY, reason, detail)
