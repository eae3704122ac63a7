"""What a configuration may say, and how a mistake is told."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from creto_oversight.settings import OversightSettings
from creto_proxy.hookspecs import DefinesProfiles


def profile(**changes: Any) -> dict[str, Any]:
    return {"profiles": {"p": {"approvers": ["alice"], **changes}}}


@pytest.mark.parametrize(
    ("document", "words"),
    [
        (profile(approvers=[]), "approvers is empty"),
        ({"profiles": {"p": {}}}, "approvers"),
        (profile(quorum=2), "can never be reached by 1"),
        (profile(quorum=0), "quorum"),
        (profile(approvers=["alice", "alice"], quorum=2), "can never be reached by 1"),
        (profile(approvers=["group:nobody"]), "group 'nobody' is not defined"),
        (profile(groups={"finance": 1}), "group 'finance' is not defined"),
        (profile(groups={"f": 2}) | {"groups": {"f": ["alice", "bob"]}}, "fewer of its members"),
        ({"groups": {"f": []}}, "has no members"),
        (profile(approvers=["alice", "Alice"]), "differ only in case"),
        (profile(approvers=["agent:a0"]), "not the name of a person"),
        (profile(approvers=["human:alice"]), "not the name of a person"),
        (profile(approvers=["al ice"]), "not the name of a person"),
        (profile(approvers=["alice\x1b"]), "not the name of a person"),
        (profile(volatile=["amount"]), "not a JSON pointer"),
        (profile(volatile=[""]), "not a JSON pointer"),
        (profile(redact=["x"]), "not a JSON pointer"),
        (profile(bind_headers=["a b"]), "not a field name"),
        (profile(separation="some"), "separation"),
        (profile(timeout_s=0), "timeout_s"),
        (profile(escalation=[{"after_s": 3600, "add": ["bob"]}]), "only after the timeout"),
        (profile(escalation=[{"after_s": 60, "add": []}]), "add"),
        (profile(qorum=1), "qorum"),
        ({"humans": {"alice": ["os:a"], "bob": ["os:a"]}}, "claimed by 'alice' and 'bob'"),
        ({"humans": {"alice": ["alice"]}}, "not an identity"),
        ({"hold_max_s": -1}, "hold_max_s"),
    ],
)
def test_a_mistake_is_named(document: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        OversightSettings.model_validate(document)


def test_a_profile_becomes_rules() -> None:
    settings = OversightSettings.model_validate(
        {
            "groups": {"finance": ["alice", "bob"]},
            "humans": {"alice": ["os:ali"]},
            "profiles": {
                "pay": {
                    "quorum": 2, "approvers": ["group:finance", "carol"], "groups": {"finance": 1},
                    "bind_headers": ["X-A"], "escalation": [{"after_s": 60, "add": ["dan"]}],
                }
            },
        }
    )  # fmt: skip
    rules = settings.rules("pay")
    assert rules.approvers == ("human:alice", "human:bob", "human:carol")
    assert rules.groups == {"finance": ("human:alice", "human:bob")}
    assert (rules.separation, rules.bind_headers) == ("chain", ("x-a",)), "more than one approver: nobody in the chain"
    assert rules.eligible(60) - rules.eligible(59) == {"human:dan"}
    assert settings.directory().resolve("os:ali") == "human:alice"
    assert settings.undefined(["pay", "other"]) == ("other",)
    assert isinstance(settings, DefinesProfiles)
    assert settings.oversight_profiles() == {"pay": (2, frozenset({"finance"}))}


def test_nothing_configured_means_no_profile() -> None:
    assert OversightSettings().undefined(["default"]) == ("default",)
