"""The entries of ``allow`` and ``deny``: what may be reached, on which ports, as what.

api.example.com            that name, ports 80 and 443 (in ``deny``: every port)
*.example.com:8080,8443    one more label, those ports;  name:*  every port
10.0.0.0/8:5432            addresses, for connections dialled by address or names that resolve there
[fd00:1::/32]:443          the same for IPv6
tcp://db.example.com:5432  bytes that are neither HTTP nor TLS may pass, too
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from creto_egress.addresses import Network
from creto_egress.names import BadName, pattern_labels

WEB_PORTS = frozenset((80, 443))
ANY_PORT: frozenset[int] = frozenset()

_ENTRY = re.compile(r"(?P<raw>tcp://)?(?:\[(?P<bracketed>[^\]]*)\]|(?P<plain>[^:\[\]]*))(?::(?P<ports>[^:]*))?")


class BadRule(ValueError):
    """An entry that cannot be read; the message quotes it and says why."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry. Either ``pattern`` or ``network`` is set; no ``ports`` means every port."""

    text: str
    pattern: str | None
    network: Network | None
    ports: frozenset[int]
    raw: bool

    def covers_port(self, port: int | None) -> bool:
        """True for a port of this rule, and for None ("on any port?")."""
        return port is None or not self.ports or port in self.ports


def parse(text: str, *, default_ports: frozenset[int] = WEB_PORTS) -> Rule:
    """The rule an entry stands for. Raises BadRule."""
    match = _ENTRY.fullmatch(text)
    if match is None:
        if text.count(":") > 1 and "//" not in text:
            raise BadRule(f"{text!r}: write IPv6 in brackets, [2001:db8::/32]:443")
        raise BadRule(f"{text!r} is not NAME[:PORT,...], CIDR[:PORT,...] or tcp://NAME:PORT")
    raw = match["raw"] is not None
    place = match["bracketed"] if match["bracketed"] is not None else match["plain"]
    if match["ports"] is None and raw:
        raise BadRule(f"{text!r}: tcp:// needs a port")
    ports = default_ports if match["ports"] is None else _ports(text, match["ports"])
    network = _network(text, place, bracketed=match["bracketed"] is not None)
    if network is not None:
        return Rule(text, None, network, ports, raw)
    try:
        pattern_labels(place)
    except BadName as error:
        raise BadRule(f"{text!r}: {error}") from error
    return Rule(text, place.removesuffix(".").lower(), None, ports, raw)


def _ports(text: str, listed: str) -> frozenset[int]:
    if listed == "*":
        return ANY_PORT
    ports = set()
    for item in listed.split(","):
        if not re.fullmatch(r"[0-9]{1,5}", item) or not 0 < int(item) < 65536:
            raise BadRule(f"{text!r}: {item!r} is not a port (1 to 65535, separated by commas, or *)")
        ports.add(int(item))
    return frozenset(ports)


def _network(text: str, place: str, *, bracketed: bool) -> Network | None:
    looks_numeric = bracketed or "/" in place or re.fullmatch(r"[0-9.]+", place)
    if not looks_numeric:
        return None
    try:
        network = ipaddress.ip_network(place)
    except ValueError as error:
        raise BadRule(f"{text!r}: {error}") from error
    if bracketed != (network.version == 6):
        raise BadRule(f"{text!r}: brackets are for IPv6")
    return network
