"""What kind of place an address is. Only "public" ones may be reached because a name resolved to them.

Addresses that carry another inside (IPv4-mapped, NAT64, 6to4, Teredo) are a kind of their own and never public: the
network may unwrap them after the check. The table is creto's, not ``ipaddress.is_global``, whose answers changed
between patch releases of Python; tests hold it to being at least as strict.

Source: IANA IPv4 and IPv6 Special-Purpose Address Registries (RFC 6890 and updates); metadata endpoints from the
providers' documentation (AWS, Azure, GCP, Alibaba, Oracle, OpenStack).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from typing import TypeAlias

from creto_proxy.model import Address

Network: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network

PUBLIC = "public"

_SPECIAL: Sequence[tuple[str, str]] = (
    # The narrower a network the earlier, so that the first hit is the most telling one.
    ("169.254.169.254/32", "metadata"),
    ("169.254.170.2/32", "metadata"),  # ECS task credentials
    ("169.254.170.23/32", "metadata"),  # EKS pod identity
    ("100.100.100.200/32", "metadata"),  # Alibaba Cloud
    ("168.63.129.16/32", "metadata"),  # Azure, inside an otherwise public range
    ("192.0.0.192/32", "metadata"),  # Oracle Cloud
    ("fd00:ec2::254/128", "metadata"),
    ("fd00:ec2::23/128", "metadata"),
    ("fd20:ce::254/128", "metadata"),
    ("0.0.0.0/8", "this host"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "carrier NAT"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "protocol assignment"),
    ("192.0.2.0/24", "documentation"),
    ("192.31.196.0/24", "protocol assignment"),
    ("192.52.193.0/24", "protocol assignment"),
    ("192.88.99.0/24", "6to4 relay"),
    ("192.168.0.0/16", "private"),
    ("192.175.48.0/24", "protocol assignment"),
    ("198.18.0.0/15", "benchmarking"),
    ("198.51.100.0/24", "documentation"),
    ("203.0.113.0/24", "documentation"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("::/128", "this host"),
    ("::1/128", "loopback"),
    ("::ffff:0:0/96", "IPv4-mapped"),
    ("::/96", "IPv4-compatible"),
    ("64:ff9b::/96", "NAT64"),
    ("64:ff9b:1::/48", "NAT64"),
    ("100::/64", "discard"),
    ("2001::/32", "Teredo"),
    ("2001::/23", "protocol assignment"),
    ("2001:db8::/32", "documentation"),
    ("2002::/16", "6to4"),
    ("3fff::/20", "documentation"),
    ("5f00::/16", "segment routing"),
    ("fc00::/7", "private"),
    ("fe80::/10", "link-local"),
    ("fec0::/10", "site-local"),
    ("ff00::/8", "multicast"),
)

_TABLE: Sequence[tuple[Network, str]] = tuple((ipaddress.ip_network(text), kind) for text, kind in _SPECIAL)
# Everything the IPv6 Internet uses; the rest of the space is unassigned and could come to mean anything.
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


def kind(address: Address) -> str:
    """``"public"``, or what the address is instead: ``"private"``, ``"metadata"``, ``"IPv4-mapped"``..."""
    for network, name in _TABLE:
        if address.version == network.version and address in network:
            return name
    if isinstance(address, ipaddress.IPv6Address) and (address.scope_id or address not in _GLOBAL_UNICAST):
        return "reserved"
    return PUBLIC


def reaches(network: Network, address: Address) -> bool:
    """True when an allowed CIDR means this address.

    A network that is wider than a special range was not written with that range in mind: ``0.0.0.0/0`` reaches every
    public address, and neither the cloud's metadata service nor the host's own loopback.
    """
    if address.version != network.version or address not in network:
        return False
    special = [entry for entry, _ in _TABLE if entry.version == address.version and address in entry]
    return all(_within(network, entry) for entry in special)


def _within(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.prefixlen >= outer.prefixlen and inner.network_address in outer
