"""Entries of allow and deny, and the settings around them."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from creto_egress.presets import PRESETS
from creto_egress.rules import ANY_PORT, WEB_PORTS, BadRule, parse
from creto_egress.settings import EgressSettings, Preset


@pytest.mark.parametrize(
    ("text", "pattern", "network", "ports", "raw"),
    [
        ("api.example.com", "api.example.com", None, WEB_PORTS, False),
        ("API.Example.COM.", "api.example.com", None, WEB_PORTS, False),
        ("*.x.test:8443", "*.x.test", None, {8443}, False),
        ("x.test:80,443,8080", "x.test", None, {80, 443, 8080}, False),
        ("x.test:*", "x.test", None, ANY_PORT, False),
        ("tcp://db.x.test:5432", "db.x.test", None, {5432}, True),
        ("10.0.0.0/8:5432", None, "10.0.0.0/8", {5432}, False),
        ("203.0.113.7", None, "203.0.113.7/32", WEB_PORTS, False),
        ("tcp://10.0.0.5:6379", None, "10.0.0.5/32", {6379}, True),
        ("[fd00:1::/32]:443", None, "fd00:1::/32", {443}, False),
        ("[fd00::1]", None, "fd00::1/128", WEB_PORTS, False),
    ],
)
def test_entries_say_what_they_allow(
    text: str, pattern: str | None, network: str | None, ports: Iterable[int], raw: bool
) -> None:
    rule = parse(text)
    assert (rule.pattern, rule.ports, rule.raw) == (pattern, frozenset(ports), raw)
    assert rule.network == (network and ipaddress.ip_network(network))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "*",
        ":443",
        "x.test:",
        "x.test:0",
        "x.test:65536",
        "x.test:http",
        "x.test:+80",
        "x.test:80,",
        "x.test:-1",
        "tcp://x.test",
        "udp://x.test:53",
        "https://x.test/",
        "x.test/path",
        "10.0.0.1/8",
        "300.1.1.1",
        "0177.0.0.1",
        "fd00::/8",
        "[fd00::/8",
        "[10.0.0.0/8]:80",
        "[x.test]:80",
        "bücher.example",
        "x.test:80:90",
    ],
)
def test_what_cannot_be_read_is_an_error_that_quotes_it(text: str) -> None:
    with pytest.raises(BadRule) as caught:
        parse(text)
    assert text[:8] in str(caught.value)


@given(st.text(alphabet="abc.*:/[]0123456789,-tcp", max_size=30))
def test_any_text_is_a_rule_or_refused(text: str) -> None:
    try:
        rule = parse(text)
    except BadRule:
        return
    assert (rule.pattern is None) != (rule.network is None)


def test_settings_name_the_entry_that_is_wrong() -> None:
    with pytest.raises(ValidationError) as caught:
        EgressSettings.model_validate({"allow": ["fine.test", "tcp://nothing"]})
    [problem] = caught.value.errors()
    assert problem["loc"] == ("allow", 1)
    assert "tcp://nothing" in problem["msg"]


@pytest.mark.parametrize(
    "section", [{"alow": []}, {"presets": ["everything"]}, {"tls": {"default": "off"}}, {"tls": {"splice": ["*"]}}]
)
def test_settings_refuse_what_they_do_not_know(section: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        EgressSettings.model_validate(section)


def test_every_preset_can_be_chosen_and_read() -> None:
    assert set(get_args(Preset)) == {*PRESETS, "public_only"}
    for entries in PRESETS.values():
        assert all(parse(entry).pattern for entry in entries)
