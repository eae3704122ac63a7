"""Policy sees exactly the attributes it reads, taken from the request; bodies only where a rule lifts them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from creto_platform.authz import Answer, Query, Watch
from creto_proxy.authorize import Policy
from creto_proxy.bodies import json_pointer
from creto_proxy.model import Approval, Verdict
from creto_proxy.settings import Extract
from creto_proxy.testing import make_request


class Recording:
    """An authz that reads what it is told to and remembers what it was asked."""

    epoch = 1

    def __init__(self, *reads: str, verdict: str = "allow") -> None:
        self._reads, self._verdict = frozenset(reads), verdict
        self.asked: list[Query] = []

    def reads(self, action: str) -> frozenset[str]:
        return self._reads

    def lasting(self, query: Query) -> frozenset[str] | None:
        return None

    def watch(self, host: str) -> Watch:
        return Watch()

    def decide(self, query: Query) -> Answer:
        self.asked.append(query)
        return Answer(self._verdict, "policy_permit", "", ("p",))  # type: ignore[arg-type]


AMOUNT = Extract(host="pay.test", path="/v1/*", field="/amount", attribute="amount_minor")


def context(authz: Recording, body: Any = None, **facts: Any) -> Mapping[str, Any]:
    raw = json.dumps(body).encode() if body is not None else None
    request = make_request("POST", host="pay.test", path="/v1/refunds", body=raw)
    for name, value in facts.items():
        setattr(request, name, value)
    Policy(authz, [AMOUNT]).authorize(request)
    return authz.asked[-1].context


def test_only_what_policies_read_is_computed() -> None:
    assert context(Recording("method", "depth")) == {"method": "POST", "depth": 1}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"amount": 800}, {"amount_minor": 800}),
        ({"amount": 8.5}, {}),
        ({"amount": 2**63}, {}),
        ({"amount": {"x": 1}}, {}),
        ({}, {}),
        ([1], {}),
    ],
)
def test_extracted_fields_are_whole_numbers_or_text_or_absent(body: Any, expected: dict[str, Any]) -> None:
    assert context(Recording("amount_minor"), body) == expected


def test_an_approval_reaches_policy_with_its_fingerprint() -> None:
    approval = Approval("ovr_1", True, 2, frozenset({"finance", "a"}), "sha256:x", profiles=("pay",))
    seen = context(Recording("approval", "fingerprint"), approval=approval, fingerprint="sha256:x")
    assert seen["fingerprint"] == "sha256:x"
    assert seen["approval"]["groups"] == ["a", "finance"] and seen["approval"]["profiles"] == ["pay"]


@pytest.mark.parametrize(
    ("verdict", "expected"), [("allow", Verdict.ALLOW), ("oversight", Verdict.ESCALATE), ("deny", Verdict.DENY)]
)
def test_verdicts_map_one_to_one(verdict: str, expected: Verdict) -> None:
    assert Policy(Recording(verdict=verdict)).authorize(make_request()).verdict is expected


def test_the_body_is_wanted_only_where_a_rule_or_mcp_needs_it() -> None:
    policy = Policy(Recording(), [AMOUNT], body_bytes=77)
    assert policy.body_limit(make_request("POST", host="pay.test", path="/v1/refunds")) == 77
    assert policy.body_limit(make_request("POST", host="pay.test", path="/v2/refunds")) == 0
    assert policy.body_limit(make_request("POST", host="a.pay.test", path="/v1/refunds")) == 0
    assert policy.body_limit(make_request("POST", headers={"Mcp-Method": "tools/call"})) == 77


def test_json_pointers_follow_rfc_6901() -> None:
    document = b'{"a": [{"b/c": 1, "d~e": 2}], "": 3}'
    assert json_pointer(document, "/a/0/b~1c") == 1
    assert json_pointer(document, "/a/0/d~0e") == 2
    assert json_pointer(document, "/") == 3
    assert json_pointer(document, "") == json.loads(document)
    for pointer in ("/a/1/b", "/a/-", "/a/x", "/a/0/b/c", "/nope"):
        assert json_pointer(document, pointer) is None
