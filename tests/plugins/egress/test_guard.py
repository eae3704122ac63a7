"""What the guard answers, as tables."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest

from creto_egress.guard import Guard
from creto_egress.settings import EgressSettings
from creto_proxy.model import Agent, Verdict

AGENT = Agent(
    id="spiffe://local/agent/a1", name="a1", chain=("spiffe://local/human/h",), chain_digest=bytes(32), path=(),
    expires_at=0.0,
)  # fmt: skip


def guard(**section: Any) -> Guard:
    return Guard(EgressSettings.model_validate(section))


LAB = ["api.allowed.test:80,443,8080", "other.allowed.test", "*.wild.test:443"]


@pytest.mark.parametrize(
    ("name", "port", "reason"),
    [
        ("api.allowed.test", 8080, "host_allowed"),
        ("API.Allowed.TEST.", 443, "host_allowed"),
        ("api.allowed.test", None, "host_allowed"),
        ("api.allowed.test", 22, "port_not_allowed"),
        ("other.allowed.test", 8080, "port_not_allowed"),
        ("x.wild.test", 443, "host_allowed"),
        ("x.wild.test", 80, "port_not_allowed"),
        ("a.b.wild.test", 443, "host_not_allowed"),
        ("wild.test", 443, "host_not_allowed"),
        ("evilwild.test", 443, "host_not_allowed"),
        ("evil.test", 443, "host_not_allowed"),
        ("2852039166", 80, "bad_name"),
        ("api.allowed.test@evil.test", 80, "bad_name"),
        ("xn--allowed-.test", 443, "bad_name"),
    ],
)
def test_names(name: str, port: int | None, reason: str) -> None:
    decision = guard(allow=LAB).name_allowed(AGENT, name, port)
    assert decision.reason == reason
    assert decision.allowed is (reason == "host_allowed")


def test_nothing_is_allowed_unasked() -> None:
    empty = guard()
    assert empty.name_allowed(AGENT, "pypi.org", 443).verdict is Verdict.DENY
    assert empty.address_allowed(AGENT, None, ipaddress.ip_address("1.1.1.1"), 443).verdict is Verdict.DENY


def test_deny_beats_allow_and_presets() -> None:
    strict = guard(allow=["*.x.test"], presets=["public_only"], deny=["a.x.test", "*.evil.test", "b.x.test:8443"])
    for name, port, reason in (
        ("a.x.test", 443, "host_denied"),
        ("a.x.test", None, "host_denied"),
        ("very.deep.evil.test", 443, "host_denied"),
        ("c.x.test", 443, "host_allowed"),
        ("anything.test", 9999, "host_allowed"),
    ):
        assert strict.name_allowed(AGENT, name, port).reason == reason, (name, port)
    # One denied port leaves the name resolvable.
    assert strict.name_allowed(AGENT, "b.x.test", None).allowed
    assert not strict.name_allowed(AGENT, "b.x.test", 8443).allowed
    assert strict.name_allowed(AGENT, "b.x.test", 443).allowed


def test_refusal_says_what_to_do() -> None:
    detail = guard(allow=LAB).name_allowed(AGENT, "evil.test", 443).detail
    assert 'allow = ["evil.test"]' in detail
    assert "443, 8080" in guard(allow=LAB).name_allowed(AGENT, "api.allowed.test", 22).detail


@pytest.mark.parametrize(
    ("name", "address", "port", "reason"),
    [
        ("api.allowed.test", "93.184.216.34", 443, "address_allowed"),
        ("api.allowed.test", "169.254.169.254", 80, "address_not_public"),
        ("api.allowed.test", "127.0.0.1", 80, "address_not_public"),
        ("api.allowed.test", "::ffff:93.184.216.34", 80, "address_not_public"),
        ("api.allowed.test", "64:ff9b::a9fe:a9fe", 80, "address_not_public"),
        ("db.corp.test", "10.1.2.3", 5432, "address_allowed"),
        ("db.corp.test", "10.1.2.3", None, "address_allowed"),
        ("db.corp.test", "10.1.2.3", 22, "address_not_public"),
        (None, "10.1.2.3", 5432, "address_allowed"),
        (None, "10.9.2.3", 5432, "address_denied"),
        (None, "93.184.216.34", 443, "literal_not_allowed"),
        (None, "203.0.113.7", 443, "address_allowed"),
        (None, "127.0.0.1", 5432, "address_not_public"),
        (None, "::ffff:10.1.2.3", 5432, "address_not_public"),
    ],
)
def test_addresses(name: str | None, address: str, port: int | None, reason: str) -> None:
    rules = guard(allow=[*LAB, "10.0.0.0/8:5432", "203.0.113.7"], deny=["10.9.0.0/16"])
    decision = rules.address_allowed(AGENT, name, ipaddress.ip_address(address), port)
    assert decision.reason == reason


def test_tls_is_intercepted_unless_told_otherwise() -> None:
    rules = guard(tls={"splice": ["*.bank.test", "pinned.test"], "intercept": ["api.bank.test"]})
    modes = [rules.tls_mode(n, 443) for n in ("x.test", "www.bank.test", "api.bank.test", "PINNED.test", "bad..name")]
    assert modes == ["intercept", "splice", "intercept", "splice", "intercept"]
    assert guard(tls={"default": "splice"}).tls_mode("x.test", 443) == "splice"


def test_raw_tcp_needs_a_rule_of_its_own() -> None:
    rules = guard(allow=["db.x.test:5432", "tcp://raw.x.test:5432", "tcp://10.0.0.5:6379", "10.0.0.6:6379"])
    public, inner = ipaddress.ip_address("93.184.216.34"), ipaddress.ip_address("10.0.0.5")
    assert rules.raw_tcp("raw.x.test", public, 5432)
    assert not rules.raw_tcp("raw.x.test", public, 443)
    assert not rules.raw_tcp("db.x.test", public, 5432)
    assert rules.raw_tcp(None, inner, 6379)
    assert not rules.raw_tcp(None, ipaddress.ip_address("10.0.0.6"), 6379)
    # The name decides: an address rule does not make another name raw.
    assert not rules.raw_tcp("evil.test", inner, 6379)
