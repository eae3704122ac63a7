"""Host names: when they are normal, and which zones they belong to."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping

_LABEL = re.compile(r"[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\Z")


def host_problem(host: str) -> str | None:
    """Why ``host`` is not in the one form policies compare, or None when it is.

    Normal is a lower-case A-label name of at most 253 characters without port and trailing dot (RFC 1123 section 2.1,
    RFC 5890 section 2.3.2.1; "_" is let through because it occurs in practice), or an address literal exactly as
    ``ipaddress`` prints it, without brackets and zone index. Cedar compares byte by byte, so any other spelling of
    the same host would slip past a forbid.
    """
    if not host or len(host) > 253:
        return "is empty or longer than 253 characters"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        pass
    else:
        if "%" in host:
            return "has a zone index"
        return None if str(address) == host else f'must be written "{address}"'
    labels = host.split(".")
    if not all(map(_LABEL.match, labels)):
        return "is not a lower-case host name without port and trailing dot"
    # "127.1" and "0x7f.1" are addresses to inet_aton (and so to many clients), names to nobody: WHATWG URL 3.5.
    if labels[-1].isdigit() or re.match(r"0x[0-9a-f]*\Z", labels[-1]):
        return "looks like an address but is not a canonical one"
    return None


class Zones:
    """Named groups of hosts: ``zone name -> hosts and "*.domain" patterns``.

    "*.example.com" stands for exactly one more label: ``a.example.com``, not ``example.com`` nor ``a.b.example.com``.
    ``of`` costs two dictionary look-ups. Raises ValueError naming every bad pattern.
    """

    __slots__ = ("_exact", "_under", "names")

    def __init__(self, zones: Mapping[str, Iterable[str]]) -> None:
        self.names = frozenset(zones)
        exact: dict[str, set[str]] = {}
        under: dict[str, set[str]] = {}
        problems = []
        for zone, patterns in zones.items():
            if not zone:
                problems.append("a zone has an empty name")
            for pattern in patterns:
                wildcard = pattern.startswith("*.")
                host = pattern[2:] if wildcard else pattern
                problem = host_problem(host)
                if problem is None and wildcard and is_address(host):
                    problem = "puts a wildcard before an address"
                if problem is not None:
                    problems.append(f'zone "{zone}": "{pattern}" {problem}')
                (under if wildcard else exact).setdefault(host, set()).add(zone)
        if problems:
            raise ValueError("; ".join(problems))
        self._exact = {host: tuple(sorted(names)) for host, names in exact.items()}
        self._under = {host: tuple(sorted(names)) for host, names in under.items()}

    def of(self, host: str) -> tuple[str, ...]:
        """Names of the zones that ``host`` (normalised) is in, sorted."""
        exact = self._exact.get(host, ())
        _, dot, parent = host.partition(".")
        under = self._under.get(parent, ()) if dot and not is_address(host) else ()
        return tuple(sorted({*exact, *under})) if exact and under else exact or under

    def canonical(self) -> list[tuple[str, str]]:
        """Every (pattern, zone) pair in a fixed order, for hashing."""
        wild = [("*." + host, zone) for host, zones in self._under.items() for zone in zones]
        return sorted([(host, zone) for host, zones in self._exact.items() for zone in zones] + wild)


def is_address(host: str) -> bool:
    """True for an IPv4 or IPv6 literal without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
