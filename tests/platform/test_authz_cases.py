"""The policy cases of ``cases/oversight.json``, through one adapter.

``CRETO_CASES_DIR`` names another directory with a file of that name and shape. A case's ``given`` is the context on
top of ``base_context``, except for the names the adapter knows: ``raw_context`` (instead of it), ``schema`` (false: no
validation), and the fields of a query (``principal``, ``org``, ``env``, ``owner``, ``action``, ``resource``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from creto_platform.authz import EmbeddedAuthz, OversightProfile, Query
from creto_platform.authz.cedar import best_approval, entities_for, evaluate, request_for, rule_on, to_json
from creto_platform.authz.policyset import OPTIONAL, REQUIRED, compile_some

CASES = Path(os.environ.get("CRETO_CASES_DIR", Path(__file__).parents[1] / "cases")) / "oversight.json"
DOCUMENT = json.loads(CASES.read_text(encoding="utf-8"))
POLICY_CASES = [case for case in DOCUMENT["cases"] if case["kind"] == "policy"]
WORDS = {"allow": "ALLOW", "deny": "DENY", "oversight": "REQUIRES_OVERSIGHT"}
FIELDS = ("principal", "org", "env", "owner", "action")


class Adapter:
    """Asks the engine what a case asks, and says what it found in the words of the cases."""

    def __init__(self, directory: Path) -> None:
        (directory / "cases.cedar").write_text(DOCUMENT["cedar"]["policy"], encoding="utf-8")
        self.authz = EmbeddedAuthz(
            directory, profiles={"payments-refund": OversightProfile(2, frozenset(("finance",)))}
        )

    def query(self, given: Mapping[str, Any]) -> Query:
        fields: dict[str, Any] = {"principal": "a1", "org": "acme", "env": "dev", "owner": "h1", "action": "httpWrite"}
        fields |= {name: given[name] for name in FIELDS if name in given}
        known = {*FIELDS, "resource", "raw_context", "schema"}
        usual = {**REQUIRED, "now": DOCUMENT["t0_unix"] * 10**9, **DOCUMENT["cedar"]["base_context"]}
        context = given.get("raw_context") or {**usual, **{k: v for k, v in given.items() if k not in known}}
        return Query(**fields, host=given.get("resource", "api.stripe.com"), context=context)

    def ask(self, given: Mapping[str, Any]) -> dict[str, object]:
        query = self.query(given)
        if given.get("schema", True):
            return self._checked(query)
        return self._unchecked(query)

    def _checked(self, query: Query) -> dict[str, object]:
        found = self.authz.explain(query)
        assert self.authz.decide(query) == found.answer
        broken = found.answer.reason == "policy_error"
        return {
            "cedar": "NoDecision" if broken else "Allow" if found.answer.verdict == "allow" else "Deny",
            "decision": WORDS[found.answer.verdict],
            "determining": list(found.answer.policies),
            "cedar_errors": len(found.errors),
            "profiles": list(found.answer.profiles),
            "obligations": list(found.answer.obligations),
        }

    def _unchecked(self, query: Query) -> dict[str, object]:
        """The decision over an evaluation in which the schema checks nothing of the request."""
        loaded = self.authz.policies
        policies = compile_some(loaded.policies.values())
        entities = entities_for(query, (), loaded.schema)
        special = {name for name in ("now", "root", "ip") if isinstance(query.context.get(name), (str, int))}
        context = {name: to_json(name, v) if name in special else v for name, v in query.context.items()}
        bare = {name: value for name, value in context.items() if name != "approval"}
        rules = {policy.id: policy.rule for policy in loaded.policies.values()}
        evaluations = []

        def evaluate_with(approval: Mapping[str, object] | None) -> Any:
            known = bare if approval is None else {**bare, "approval": dict(approval)}
            evaluations.append(evaluate(policies, entities, request_for(query, known), None))
            return evaluations[-1]

        given = context.get("approval")
        assert given is None or isinstance(given, dict)
        ruling = rule_on(evaluate_with, rules, best_approval(loaded.profiles, frozenset(), ""), given)
        return {
            "cedar": evaluations[0].decision,
            "decision": WORDS[ruling.verdict],
            "determining": list(ruling.policies),
            "cedar_errors": len(evaluations[0].errors),
            "profiles": list(ruling.profiles),
            "obligations": list(ruling.obligations),
        }

    def second_is_fresh_evaluation(self, given: Mapping[str, Any]) -> bool:
        """True when, for every attribute the policies read, another value is not answered from the table."""
        reads = self.authz.reads("httpWrite") - {"approval", "fingerprint"}
        assert reads
        for name in reads:
            first = self.query({**given, name: {**REQUIRED, **OPTIONAL}[name]})
            other = {str: "/v1/refunds/other", int: 400}[type({**REQUIRED, **OPTIONAL}[name])]
            self.authz.decide(first)
            before = self.authz.evaluations
            self.authz.decide(first)
            remembered = self.authz.evaluations == before
            self.authz.decide(self.query({**given, name: other}))
            if self.authz.evaluations == before or not (remembered or self.authz.key(first) is None):
                return False
        return True


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return Adapter(tmp_path)


@pytest.mark.parametrize("case", POLICY_CASES, ids=[case["id"] for case in POLICY_CASES])
def test_policy_case(case: Mapping[str, Any], adapter: Adapter) -> None:
    expected = dict(case["expect"])
    fresh = expected.pop("second_is_fresh_evaluation", None)
    if fresh is not None:
        assert adapter.second_is_fresh_evaluation(case["given"]) is fresh
    found = adapter.ask(case["given"]) if expected else {}
    assert {name: found.get(name, "not reported") for name in expected} == expected


def test_the_schema_of_the_cases_agrees_with_ours() -> None:
    """Every attribute their schema requires or allows is one the proxy supplies."""
    assert set(DOCUMENT["cedar"]["base_context"]) <= set(REQUIRED) | set(OPTIONAL)
    assert POLICY_CASES
