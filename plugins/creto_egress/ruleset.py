"""The kernel rules that leave an agent no way around the sidecar, as plain values.

Nothing here talks to the kernel: ``run_mode`` says which rules are wanted, ``nft.py`` puts them there. One table of
family inet, so that there is no IPv6 path beside the IPv4 one. Each rule carries its text in the syntax of nft(8),
which is what errors and tests show.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass
from typing import Literal, TypeAlias

TABLE = "creto"

IPPROTO_TCP, IPPROTO_UDP = 6, 17
_NFPROTO_IPV4 = 2
_IPS_DST_NAT = 1 << 5  # linux/netfilter/nf_conntrack_common.h
_DNS_PORT = 53


class Meta(enum.IntEnum):
    """Packet facts of the ``meta`` expression (NFT_META_*)."""

    OIFNAME = 7
    NFPROTO = 15
    L4PROTO = 16


@dataclass(frozen=True, slots=True)
class MetaIs:
    """``meta KEY VALUE``; value as the kernel compares it."""

    key: Meta
    value: bytes


@dataclass(frozen=True, slots=True)
class PayloadIs:
    """``length`` bytes at ``offset`` of the network or transport header equal ``value``, or differ when ``negate``."""

    base: Literal["network", "transport"]
    offset: int
    value: bytes
    mask: bytes | None = None
    negate: bool = False


@dataclass(frozen=True, slots=True)
class FragmentHeader:
    """``exthdr frag exists``: an IPv6 packet has a fragment header."""


@dataclass(frozen=True, slots=True)
class Translated:
    """``ct status dnat``: the connection was redirected by the chain before."""


@dataclass(frozen=True, slots=True)
class RedirectTo:
    """``redirect to :PORT`` on the loopback of the packet's family."""

    port: int


@dataclass(frozen=True, slots=True)
class Reject:
    """``reject with icmpx admin-prohibited``: the sender learns at once."""


class Verdict(enum.IntEnum):
    DROP = 0
    ACCEPT = 1


Expression: TypeAlias = MetaIs | PayloadIs | FragmentHeader | Translated | RedirectTo | Reject | Verdict


@dataclass(frozen=True, slots=True)
class Rule:
    """text: what it says, in nft syntax; expressions: the same for the kernel."""

    text: str
    expressions: tuple[Expression, ...]


class Hook(enum.IntEnum):
    """Where a base chain sits (NF_INET_*)."""

    FORWARD = 2
    OUTPUT = 3


@dataclass(frozen=True, slots=True)
class Chain:
    name: str
    kind: Literal["filter", "nat"]
    hook: Hook
    priority: int
    policy: Verdict
    rules: tuple[Rule, ...]


@dataclass(frozen=True, slots=True)
class Table:
    name: str
    chains: tuple[Chain, ...]


def run_mode(tcp_port: int, dns_port: int) -> Table:
    """Rules for the network namespace of one agent whose sidecar listens inside it on the two ports.

    All TCP goes to the sidecar, so does DNS wherever it is sent; what stays inside the namespace is left alone, and
    everything else is rejected at once. If these rules vanish there is still no route out of the namespace.
    """
    loopback = MetaIs(Meta.OIFNAME, b"lo".ljust(16, b"\0"))
    return Table(
        TABLE,
        (
            # Before connection tracking (-400) puts fragments together and hides that there were any.
            Chain(
                "fragments",
                "filter",
                Hook.OUTPUT,
                -450,
                Verdict.ACCEPT,
                (
                    Rule(
                        "meta nfproto ipv4 ip frag-off & 0x3fff != 0 drop",
                        (
                            MetaIs(Meta.NFPROTO, bytes((_NFPROTO_IPV4,))),
                            PayloadIs("network", 6, b"\0\0", mask=b"\x3f\xff", negate=True),
                            Verdict.DROP,
                        ),
                    ),
                    Rule("exthdr frag exists drop", (FragmentHeader(), Verdict.DROP)),
                ),
            ),
            Chain(
                "redirect",
                "nat",
                Hook.OUTPUT,
                -100,
                Verdict.ACCEPT,
                (
                    # First of all, because 127.0.0.53 and the like are on loopback too.
                    _redirect(IPPROTO_UDP, _DNS_PORT, dns_port),
                    _redirect(IPPROTO_TCP, _DNS_PORT, dns_port),
                    Rule('oifname "lo" accept', (loopback, Verdict.ACCEPT)),
                    _redirect(IPPROTO_TCP, None, tcp_port),
                ),
            ),
            Chain(
                "leave",
                "filter",
                Hook.OUTPUT,
                0,
                Verdict.DROP,
                (
                    Rule('oifname "lo" accept', (loopback, Verdict.ACCEPT)),
                    # A redirected packet still shows its old interface here; only its translation tells.
                    Rule("ct status dnat accept", (Translated(), Verdict.ACCEPT)),
                    Rule("reject with icmpx admin-prohibited", (Reject(),)),
                ),
            ),
            Chain("forward", "filter", Hook.FORWARD, 0, Verdict.DROP, ()),
        ),
    )


def _redirect(protocol: int, port: int | None, to: int) -> Rule:
    name = {IPPROTO_TCP: "tcp", IPPROTO_UDP: "udp"}[protocol]
    match: tuple[Expression, ...] = (MetaIs(Meta.L4PROTO, bytes((protocol,))),)
    if port is None:
        return Rule(f"meta l4proto {name} redirect to :{to}", (*match, RedirectTo(to)))
    match = (*match, PayloadIs("transport", 2, struct.pack(">H", port)))
    return Rule(f"{name} dport {port} redirect to :{to}", (*match, RedirectTo(to)))


def translated_status() -> bytes:
    """The conntrack status bit of a destination-translated connection, in host byte order as the kernel keeps it."""
    return struct.pack("=I", _IPS_DST_NAT)
