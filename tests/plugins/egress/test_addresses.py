"""Kinds of addresses, and what an allowed network reaches."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from creto_egress.addresses import PUBLIC, kind, reaches

IPV4 = st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address)
IPV6 = st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address)


@pytest.mark.parametrize("text", ["1.1.1.1", "93.184.216.34", "172.32.0.1", "2606:4700::1111", "2a00:1450::5"])
def test_internet_addresses_are_public(text: str) -> None:
    assert kind(ipaddress.ip_address(text)) == PUBLIC


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("169.254.169.254", "metadata"),
        ("168.63.129.16", "metadata"),
        ("fd00:ec2::254", "metadata"),
        ("127.0.0.1", "loopback"),
        ("0.0.0.0", "this host"),
        ("10.1.2.3", "private"),
        ("172.31.255.255", "private"),
        ("192.168.1.1", "private"),
        ("100.64.0.1", "carrier NAT"),
        ("169.254.1.1", "link-local"),
        ("198.18.0.1", "benchmarking"),
        ("224.0.0.251", "multicast"),
        ("255.255.255.255", "reserved"),
        ("192.0.0.2", "protocol assignment"),
        ("::", "this host"),
        ("::1", "loopback"),
        ("::ffff:169.254.169.254", "IPv4-mapped"),
        ("::ffff:1.1.1.1", "IPv4-mapped"),
        ("::7f00:1", "IPv4-compatible"),
        ("64:ff9b::a9fe:a9fe", "NAT64"),
        ("64:ff9b::101:101", "NAT64"),
        ("2002:a9fe:a9fe::", "6to4"),
        ("2001::1", "Teredo"),
        ("fe80::1", "link-local"),
        ("fe80::1%1", "link-local"),
        ("fd63::1", "private"),
        ("ff02::fb", "multicast"),
        ("4000::1", "reserved"),
        ("2606:4700::1%3", "reserved"),
    ],
)
def test_every_other_place_has_its_kind(text: str, expected: str) -> None:
    assert kind(ipaddress.ip_address(text)) == expected


@given(st.one_of(IPV4, IPV6))
def test_public_is_at_least_as_strict_as_the_registry_in_python(address: ipaddress.IPv4Address) -> None:
    if kind(address) == PUBLIC:
        assert address.is_global and not address.is_multicast


@given(IPV4)
def test_addresses_inside_addresses_are_never_public(inner: ipaddress.IPv4Address) -> None:
    value = int(inner)
    carriers = [0xFFFF << 32 | value, value, 0x64FF9B << 96 | value, 0x2002 << 112 | value << 80, 0x20010000 << 96]
    assert PUBLIC not in {kind(ipaddress.IPv6Address(carrier)) for carrier in carriers}


@pytest.mark.parametrize(
    ("network", "address", "reached"),
    [
        ("10.0.0.0/8", "10.1.2.3", True),
        ("10.1.0.0/16", "10.1.2.3", True),
        ("10.1.0.0/16", "10.2.2.3", False),
        ("127.0.0.0/8", "127.0.0.1", True),
        ("203.0.113.5/32", "203.0.113.5", True),
        ("0.0.0.0/0", "1.1.1.1", True),
        ("0.0.0.0/0", "10.1.2.3", False),
        ("0.0.0.0/0", "127.0.0.1", False),
        ("0.0.0.0/0", "169.254.169.254", False),
        ("169.254.0.0/16", "169.254.1.1", True),
        ("169.254.0.0/16", "169.254.169.254", False),
        ("169.254.169.254/32", "169.254.169.254", True),
        ("168.0.0.0/8", "168.63.129.16", False),
        ("::/0", "2606:4700::1", True),
        ("::/0", "::1", False),
        ("::/0", "::ffff:10.0.0.1", False),
        ("::/0", "64:ff9b::1", False),
        ("fd00::/8", "fd12::1", True),
        ("10.0.0.0/8", "::ffff:10.0.0.1", False),
    ],
)
def test_a_network_reaches_special_places_only_when_it_means_them(network: str, address: str, reached: bool) -> None:
    assert reaches(ipaddress.ip_network(network), ipaddress.ip_address(address)) is reached
