"""DNS as a gate: what an agent may ask, what it is told, and which addresses it was told for which names.

``DnsServer`` answers one link, ``Resolver`` asks the outside, ``Bindings`` remembers.
"""

from creto_proxy.dns.bindings import Bindings
from creto_proxy.dns.resolver import ResolutionFailed, Resolver
from creto_proxy.dns.server import CONTROL_ADDRESS, SYNTHETIC, Budget, DnsServer

__all__ = ["CONTROL_ADDRESS", "SYNTHETIC", "Bindings", "Budget", "DnsServer", "ResolutionFailed", "Resolver"]
