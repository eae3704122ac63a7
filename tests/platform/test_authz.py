"""Decisions: the four-way algorithm, the engine's traps, zones, and what may be remembered."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_hotpath.admit import UNCHARGED, Admission, DecisionTable
from creto_hotpath.quota import QuotaTable
from creto_platform.authz import (
    ACTIONS,
    Answer,
    Authz,
    EmbeddedAuthz,
    EngineUnsafe,
    OversightProfile,
    PolicyError,
    Query,
    bundled_policies,
    cedar,
)
from creto_platform.authz.policyset import OPTIONAL, REQUIRED, compile_some, load_policies
from creto_platform.authz.reads import reach
from creto_platform.authz.zones import Zones, host_problem

PERMIT = '@id("permit") permit (principal, action, resource);'
APPROVED = "context has approval && context.approval.satisfied && context.approval.fingerprint == context.fingerprint"
SECOND = 10**9


class Time:
    """Unix nanoseconds that move when told to."""

    def __init__(self) -> None:
        self.ns = 1_800_000_000 * SECOND

    def __call__(self) -> int:
        return self.ns


def engine(directory: Path, *policies: str, **options: Any) -> EmbeddedAuthz:
    (directory / "a.cedar").write_text("\n".join(policies), encoding="utf-8")
    return EmbeddedAuthz(directory, **options)


def ask(host: str = "api.example.com", action: str = "httpWrite", **context: Any) -> Query:
    fields: dict[str, Any] = {"principal": "a1", "org": "acme", "env": "dev", "owner": "h1", "expires_ns": 0}
    fields |= {name: context.pop(name) for name in fields if name in context}
    return Query(**fields, action=action, host=host, context={**REQUIRED, "fingerprint": "F1", **context})


def approval(**changes: Any) -> dict[str, Any]:
    return {"id": "A", "satisfied": True, "approvals": 2, "groups": ["finance"], "fingerprint": "F1", **changes}


def forbid(name: str, condition: str, profile: str = "", unless: str = APPROVED) -> str:
    annotation = f'@require_oversight("{profile}")' if profile else ""
    return (
        f'@id("{name}") {annotation} forbid (principal, action, resource) when {{ {condition} }} unless {{ {unless} }};'
    )


def test_it_is_an_authz(tmp_path: Path) -> None:
    port: Authz = engine(tmp_path, PERMIT)
    assert port.decide(ask()) == Answer("allow", "policy_permit", 'permitted by policy "permit"', ("permit",))


def test_no_policy_that_matches_is_a_deny(tmp_path: Path) -> None:
    authz = engine(tmp_path, '@id("p") permit (principal, action == Creto::Action::"httpRead", resource);')
    assert authz.decide(ask()) == Answer("deny", "policy_no_permit", "no policy permits httpWrite here")


def test_forbid_beats_permit_and_says_why(tmp_path: Path) -> None:
    authz = engine(
        tmp_path,
        PERMIT,
        '@id("f") @description("never  on\n Sundays") forbid (principal, action, resource);',
    )
    answer = authz.decide(ask())
    assert answer == Answer("deny", "policy_forbid", 'forbidden by policy "f": never on Sundays', ("f",))


@pytest.mark.parametrize("action", ACTIONS)
def test_group_of_actions_reaches_every_action(tmp_path: Path, action: str) -> None:
    authz = engine(tmp_path, PERMIT, '@id("f") forbid (principal, action in Creto::Action::"egress", resource);')
    assert authz.decide(ask(action=action)).policies == ("f",)


def test_obligations_come_from_every_determining_permit(tmp_path: Path) -> None:
    authz = engine(
        tmp_path,
        '@id("b") @quota("day") @rate("60/m") permit (principal, action, resource);',
        '@id("a") @quota("month") permit (principal, action, resource);',
        '@id("c") @quota("never") permit (principal, action, resource) when { context.depth > 5 };',
    )
    answer = authz.decide(ask())
    assert (answer.policies, answer.obligations) == (("a", "b"), ("quota:day", "quota:month", "rate:60/m"))


def test_oversight_is_asked_for_when_an_approval_would_help(tmp_path: Path) -> None:
    answer = engine(tmp_path, PERMIT, forbid("f", "context.depth > 0", "ops")).decide(ask())
    assert (answer.verdict, answer.reason) == ("oversight", "oversight_required")
    assert (answer.policies, answer.profiles, answer.obligations) == (("f",), ("ops",), ())


HOPELESS = {
    "no permit": [forbid("f", "true", "ops")],
    "a hard forbid matches too": [PERMIT, forbid("f", "true", "ops"), forbid("hard", "true", unless="false")],
    "no approval lifts the forbid": [PERMIT, forbid("f", "true", "ops", unless="false")],
    "an approval brings up another forbid": [
        PERMIT,
        forbid("f", "true", "ops"),
        '@id("g") forbid (principal, action, resource) when { context has approval };',
    ],
    "the profile has too few approvers": [
        PERMIT,
        forbid("f", "true", "ops", unless=f"{APPROVED} && context.approval.approvals >= 3"),
    ],
    "the profile lacks the group": [
        PERMIT,
        forbid("f", "true", "ops", unless=f'{APPROVED} && context.approval.groups.contains("legal")'),
    ],
    "one of two profiles cannot be satisfied": [
        PERMIT,
        forbid("f", "true", "ops"),
        forbid("g", "true", "board", unless="false"),
    ],
    "the permit is gone with an approval": [
        '@id("p") permit (principal, action, resource) unless { context has approval };',
        forbid("f", "true", "ops"),
    ],
}


@pytest.mark.parametrize("why", HOPELESS)
def test_nobody_is_asked_about_what_stays_forbidden(tmp_path: Path, why: str) -> None:
    profiles = {"ops": OversightProfile(2, frozenset(("finance",))), "board": OversightProfile(1, frozenset())}
    answer = engine(tmp_path, *HOPELESS[why], profiles=profiles).decide(ask())
    assert answer.verdict == "deny"
    assert answer.profiles == ()


def test_unknown_strength_of_a_profile_is_taken_for_enough(tmp_path: Path) -> None:
    unless = f'{APPROVED} && context.approval.approvals >= 7 && context.approval.groups.containsAll(["a", "b"])'
    assert engine(tmp_path, PERMIT, forbid("f", "true", "ops", unless)).decide(ask()).verdict == "oversight"


def test_every_profile_that_matches_must_be_satisfied(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "true", "ops"), forbid("g", "context.depth > 0", "finance"))
    assert authz.decide(ask()).profiles == ("finance", "ops")
    assert authz.decide(ask(approval=approval(profiles=["ops"]))).verdict == "oversight"
    assert authz.decide(ask(approval=approval(profiles=["ops", "finance"]))).verdict == "allow"


def test_each_profile_must_lift_its_own_forbid(tmp_path: Path) -> None:
    """Together they would allow, but "ops" alone can never bring two people: its forbid rides on the other's."""
    profiles = {"ops": OversightProfile(1, frozenset()), "finance": OversightProfile(2, frozenset())}
    policies = [PERMIT, forbid("f", "true", "ops", f"{APPROVED} && context.approval.approvals >= 2")]
    policies.append(forbid("g", "true", "finance"))
    assert engine(tmp_path, *policies, profiles=profiles).decide(ask()).verdict == "deny"


def test_approval_of_the_same_action_allows(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "true", "ops"))
    assert authz.decide(ask(approval=approval())).verdict == "allow"


@pytest.mark.parametrize(
    "given",
    [approval(fingerprint="F2"), approval(satisfied=False), approval(profiles=[]), approval(profiles="ops")],
    ids=["another action", "not satisfied", "satisfies no profile", "profiles are not a list"],
)
def test_approval_that_does_not_count_asks_again(tmp_path: Path, given: Mapping[str, Any]) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "true", "ops"))
    assert authz.decide(ask(approval=given)).verdict == "oversight"


def test_approval_for_another_action_counts_for_nothing_even_under_a_careless_policy(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "true", "ops", unless="context has approval"))
    assert authz.decide(ask(approval=approval())).verdict == "allow"
    assert authz.decide(ask(approval=approval(fingerprint="F2"))).verdict == "oversight"
    assert authz.decide(ask(fingerprint="", approval=approval(fingerprint=""))).verdict == "oversight"


def test_hard_forbid_wins_over_an_approval(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "true", "ops"), forbid("cap", "context.depth > 3", unless="false"))
    assert authz.decide(ask(approval=approval())).verdict == "allow"
    assert authz.decide(ask(depth=4, approval=approval())).policies == ("cap",)


@pytest.mark.parametrize(
    "broken",
    [
        {"satisfied": "yes"},
        {"approvals": 1.5},
        {"approvals": 2**63},
        {"approvals": None},
        {"groups": "finance"},
        {"id": None},
    ],
    ids=str,
)
def test_malformed_approval_is_a_deny(tmp_path: Path, broken: Mapping[str, Any]) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "true", "ops"))
    answer = authz.decide(ask(approval=approval(**broken)))
    assert (answer.verdict, answer.reason) == ("deny", "policy_error")


def test_approval_that_is_no_record_is_a_deny(tmp_path: Path) -> None:
    assert engine(tmp_path, PERMIT).decide(ask(approval="yes")).reason == "policy_error"


@pytest.mark.parametrize(
    "context",
    [
        {"depth": "x"},
        {"depth": 1.5},
        {"depth": 2**63},
        {"depth": None},
        {"path": "\ud800"},
        {"path": 7},
        {"now": "yesterday"},
        {"now": datetime(2026, 1, 1)},
        {"now": 2**200},
        {"ip": "nowhere"},
        {"root": 1},
    ],
    ids=str,
)
def test_value_that_a_policy_reads_and_cannot_be_used_is_a_deny(tmp_path: Path, context: Mapping[str, Any]) -> None:
    reads_it_all = (
        'context.depth > 5 || context.path == "/x" || context.now < datetime("2000-01-01") || '
        '(context has ip && context.ip.isLoopback()) || context.root == Creto::Human::"x"'
    )
    authz = engine(tmp_path, PERMIT, forbid("f", reads_it_all, unless="false"))
    assert authz.decide(ask(now=1_800_000_000 * SECOND)).verdict == "allow"
    answer = authz.decide(ask(**{"now": 1_800_000_000 * SECOND, **context}))
    assert (answer.verdict, answer.reason) == ("deny", "policy_error")


def test_missing_value_that_a_policy_reads_is_a_deny(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "context.depth > 5", unless="false"))
    query = Query("a1", "acme", "dev", "h1", "httpRead", "a.example", {"method": "GET"})
    assert authz.decide(query).reason == "policy_error"


def test_nothing_that_no_policy_reads_is_needed(tmp_path: Path) -> None:
    query = Query("a1", "acme", "dev", "h1", "httpRead", "a.example", {})
    assert engine(tmp_path, PERMIT).decide(query).verdict == "allow"


def test_detail_never_quotes_the_request(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", 'context.path == "/x"', unless="false"))
    for query in (ask(path="/token-s3cret"), ask(path="s3cret\ud800"), ask("S3CRET.example")):
        assert "s3cret" not in str(authz.decide(query)).lower()


def test_unknown_action_is_a_deny(tmp_path: Path) -> None:
    answer = engine(tmp_path, PERMIT).decide(ask(action="egress"))
    assert (answer.verdict, answer.reason) == ("deny", "unknown_action")


@pytest.mark.parametrize(
    "host",
    [
        "Example.com",
        "example.com.",
        "example.com:443",
        "",
        "a b",
        "ex\xe4mple.com",
        "*.a.com",
        "[::1]",
        "0:0::1",
        "0x7f.1",
    ]
    + ["127.1", "1", "a" * 254, "fe80::1%eth0", "a..b", "a\n.com"],
)
def test_host_that_is_not_normal_is_a_deny(tmp_path: Path, host: str) -> None:
    answer = engine(tmp_path, PERMIT).decide(ask(host))
    assert (answer.verdict, answer.reason) == ("deny", "host_not_normalised")


@pytest.mark.parametrize(
    "host", ["a", "api.example.com", "xn--exmple-cua.com", "_x.a-b.c1", "127.0.0.1", "2001:db8::1"]
)
def test_normal_host_is_normal(host: str) -> None:
    assert host_problem(host) is None


def test_wildcard_of_a_zone_is_exactly_one_more_label() -> None:
    zones = Zones({"z": ["*.example.com", "other.org"], "y": ["a.example.com"]})
    assert zones.of("a.example.com") == ("y", "z")
    assert zones.of("b.example.com") == ("z",)
    assert zones.of("other.org") == ("z",)
    for host in ("example.com", "a.b.example.com", "a.other.org", "xexample.com", "example.com.evil.org"):
        assert zones.of(host) == ()


def test_zone_decides(tmp_path: Path) -> None:
    policy = '@id("llm") permit (principal, action, resource in Creto::Zone::"llm");'
    authz = engine(tmp_path, policy, zones={"llm": ["*.openai.com"]})
    assert authz.decide(ask("api.openai.com")).verdict == "allow"
    assert authz.decide(ask("api.eu.openai.com")).verdict == "deny"


def test_org_owner_and_env_decide(tmp_path: Path) -> None:
    authz = engine(
        tmp_path,
        '@id("p") permit (principal in Creto::Org::"acme", action, resource) '
        'when { principal.env == "dev" && principal.owner == Creto::Human::"h1" '
        '&& principal.owner in Creto::Org::"acme" };',
    )
    assert authz.decide(ask()).verdict == "allow"
    for other in ({"org": "evil"}, {"env": "prod"}, {"owner": "h2"}):
        assert authz.decide(ask(**other)).verdict == "deny"


@pytest.mark.parametrize("host", ["169.254.169.254", "100.100.100.200", "fd00:ec2::254", "metadata.google.internal"])
@pytest.mark.parametrize("action", ACTIONS)
def test_default_policies_keep_agents_from_metadata(host: str, action: str) -> None:
    authz = EmbeddedAuthz(bundled_policies() / "default")
    query = Query("a1", "local", "dev", "h1", action, host, {"depth": 1})
    assert authz.decide(query).verdict == "deny"
    assert authz.decide(Query("a1", "local", "dev", "h1", action, "api.example.com", {"depth": 1})).verdict == "allow"


def test_default_policies_see_through_mapped_addresses_and_deep_chains() -> None:
    authz = EmbeddedAuthz(bundled_policies() / "default")
    assert authz.decide(ask(ip="::ffff:169.254.169.254")).policies == ("no-metadata",)
    assert authz.decide(ask("::ffff:a9fe:a9fe")).verdict == "deny"
    assert authz.decide(ask(depth=10)).verdict == "allow"
    assert authz.decide(ask(depth=11)).policies == ("no-deep-chains",)


def test_example_refund_waits_for_two_people() -> None:
    authz = EmbeddedAuthz(bundled_policies() / "examples")

    def refund(**context: Any) -> Answer:
        return authz.decide(ask("api.stripe.com", org="local", path="/v1/refunds", **context))

    assert refund(amount_minor=500).verdict == "allow"
    assert refund(amount_minor=501).profiles == ("payments-refund",)
    assert refund().profiles == ("payments-refund",)
    assert refund(amount_minor=100_001).policies == ("refund-hard-cap", "refund-over-5")
    assert refund(amount_minor=501, approval=approval()).verdict == "allow"
    assert refund(amount_minor=501, approval=approval(approvals=1)).verdict == "oversight"


def test_example_model_zone_carries_its_obligations() -> None:
    authz = EmbeddedAuthz(bundled_policies() / "examples", zones={"llm": ["api.openai.com"]})
    answer = authz.decide(ask("api.openai.com", org="local"))
    assert answer.obligations == ("quota:llm-day", "rate:60/m")
    assert authz.decide(ask("api.openai.com", action="tunnel", org="local")).policies == ("llm-no-tunnel",)
    assert authz.decide(ask("api.openai.com", org="local", env="prod", depth=2)).verdict == "deny"
    assert authz.decide(ask("api.openai.com", org="local", model="x-opus-1")).profiles == ("llm-large",)


# The traps of the engine.


def test_self_test_passes_on_the_installed_engine() -> None:
    cedar.self_test()


def test_engine_that_drops_errors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cedarpy.is_authorized

    def forgetful(*arguments: Any) -> Any:
        result = real(*arguments)
        result.diagnostics.errors.clear()
        return result

    monkeypatch.setattr(cedarpy, "is_authorized", forgetful)
    with pytest.raises(EngineUnsafe, match="a forbid that cannot be evaluated is not an allow"):
        engine(tmp_path, PERMIT)


def test_engine_without_action_groups_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = cedarpy.Entities.from_json_str
    monkeypatch.setattr(cedarpy.Entities, "from_json_str", staticmethod(lambda text, schema=None: real(text)))
    with pytest.raises(EngineUnsafe, match="a forbid on an action group matches"):
        engine(tmp_path, PERMIT)


def test_engine_that_allows_everything_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    yes = cedarpy.AuthzResult({"decision": "Allow", "diagnostics": {"reason": ["permit"], "errors": []}})
    monkeypatch.setattr(cedarpy, "is_authorized", lambda *arguments: yes)
    with pytest.raises(EngineUnsafe):
        engine(tmp_path, PERMIT)


def test_entities_are_never_built_without_the_schema() -> None:
    with pytest.raises(TypeError, match="entities need the schema"):
        cedar.entities_for(ask(), (), None)  # type: ignore[arg-type]


def test_error_in_a_forbid_is_a_deny_although_cedar_allows(tmp_path: Path) -> None:
    loaded = engine(tmp_path, PERMIT, forbid("f", "context.depth > 3", "ops")).policies
    policies = compile_some(loaded.policies.values())
    query = ask()
    entities = cedar.entities_for(query, (), loaded.schema)
    seen = cedar.evaluate(policies, entities, cedar.request_for(query, {"depth": "x"}), None)
    assert (seen.decision, len(seen.errors)) == ("Allow", 1)
    rules = {policy.id: policy.rule for policy in loaded.policies.values()}
    ruling = cedar.rule_on(lambda _: seen, rules, lambda _: {})
    assert (ruling.verdict, ruling.reason) == ("deny", "policy_error")


@pytest.mark.parametrize("broken_at", [0, 1, 2, 3])
def test_error_in_any_of_the_evaluations_is_a_deny(tmp_path: Path, broken_at: int) -> None:
    """Bare, together, and each of two profiles alone: whichever fails, nobody is asked and nothing is allowed."""
    authz = engine(tmp_path, PERMIT, forbid("f", "true", "ops"), forbid("g", "true", "finance"))
    loaded = authz.policies
    rules = {policy.id: policy.rule for policy in loaded.policies.values()}
    answers = [cedar.Evaluation("Deny", ("f", "g"), ())] + [cedar.Evaluation("Allow", ("permit",), ())]
    answers += [cedar.Evaluation("Deny", ("f",), ()), cedar.Evaluation("Deny", ("g",), ())]

    def run(evaluations: list[cedar.Evaluation]) -> cedar.Ruling:
        left = iter(evaluations)
        return cedar.rule_on(lambda _: next(left), rules, lambda _: {})

    assert run(answers).verdict == "oversight"
    answers[broken_at] = cedar.Evaluation(answers[broken_at].decision, answers[broken_at].reasons, ("boom",))
    assert (run(answers).verdict, run(answers).errors) == ("deny", ("boom",))
    answers[broken_at] = cedar.Evaluation("NoDecision", (), ())
    assert run(answers).verdict == "deny"


# What a policy reads.


@pytest.mark.parametrize(
    ("condition", "reads", "bare"),
    [
        ("context.depth > 3", {"depth"}, {"depth"}),
        ("context has amount_minor && context.amount_minor > 3", {"amount_minor"}, {"amount_minor"}),
        ('context has approval.id && context.path == "x"', {"approval", "path"}, {"approval"}),
        ("context.depth > 1 && context has approval && context.now < context.now", {"depth", "approval", "now"}, None),
        ("(context.depth > 1 && context has approval) == (context.port > 1)", {"depth", "approval", "port"}, None),
        ('!(context has approval) || context.path == "x"', {"approval", "path"}, {"approval"}),
        (
            'if context has approval then context.path == "x" else context.depth > 1',
            {"approval", "path", "depth"},
            None,
        ),
        ("true || context.depth > 1", set(), set()),
        ('{"a": context.path, "b": [context.method]}.a == "x"', {"path", "method"}, {"path", "method"}),
        ("context.ip.isInRange(ip(context.path))", {"ip", "path"}, {"ip", "path"}),
        ('principal.env == "x" && action in Creto::Action::"egress"', set(), set()),
        ('context.root is Creto::Human in Creto::Org::"x"', {"root"}, {"root"}),
    ],
)
def test_reads_are_derived_from_the_syntax(condition: str, reads: set[str], bare: set[str] | None) -> None:
    found = reach(f"permit (principal, action, resource) when {{ {condition} }};")
    assert set(found.reads or ()) == reads
    assert set(found.bare_reads or ()) == (bare if bare is not None else reads - {"path", "now"})


@pytest.mark.parametrize("condition", ["context == context", "[context].isEmpty()", '{"c": context}.c.path == "x"'])
def test_whole_context_is_beyond_following(condition: str, tmp_path: Path) -> None:
    text = f"permit (principal, action, resource) when {{ {condition} }};"
    assert (reach(text).reads, reach(text).bare_reads) == (None, None)


def test_syntax_that_is_not_modelled_is_beyond_following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def newer(_: str) -> Any:
        raise ValueError("unmodelled variant")

    monkeypatch.setattr(cedarpy, "policies_to_pst", newer)
    authz = engine(tmp_path, '@id("p") permit (principal, action == Creto::Action::"httpRead", resource);')
    assert authz.reads("tcp") == frozenset((*REQUIRED, *OPTIONAL))
    assert authz.decide(ask(action="httpRead")).verdict == "allow"
    assert authz.key(ask(action="httpRead")) is None


def test_reads_are_per_action(tmp_path: Path) -> None:
    authz = engine(
        tmp_path,
        '@id("r") permit (principal, action == Creto::Action::"httpRead", resource) when { context.path like "/a*" };',
        '@id("w") permit (principal, action in Creto::Action::"egress", resource) when { context.depth < 3 };',
    )
    assert authz.reads("httpRead") == {"path", "depth"}
    assert authz.reads("tcp") == {"depth"}
    assert authz.reads("nothing") == frozenset()


# What is remembered.


def fresh(authz: EmbeddedAuthz, query: Query) -> bool:
    """Asks, and says whether Cedar had to be asked."""
    before = authz.evaluations
    authz.decide(query)
    return authz.evaluations > before


def test_answer_is_remembered_for_equal_questions(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", 'context.path == "/no"', unless="false"))
    assert fresh(authz, ask(path="/a"))
    assert not fresh(authz, ask(path="/a"))
    assert not fresh(authz, ask(path="/a", method="PUT", model="x", amount_minor=4))
    assert authz.decide(ask(path="/a")) == authz.explain(ask(path="/a")).answer


@pytest.mark.parametrize(
    "other",
    [
        {"path": "/b"},
        {"principal": "a2"},
        {"org": "other"},
        {"env": "prod"},
        {"owner": "h2"},
        {"host": "b.example"},
        {"action": "httpRead"},
        {"amount_minor": 1},
        {"amount_minor": 0},
    ],
    ids=str,
)
def test_whatever_the_answer_depends_on_is_in_the_key(tmp_path: Path, other: Mapping[str, Any]) -> None:
    condition = 'context.path == "/no" || (context has amount_minor && context.amount_minor > 5)'
    authz = engine(tmp_path, PERMIT, forbid("f", condition, unless="false"))
    first = {"host": "a.example", "path": "/a"}
    assert fresh(authz, ask(**first))
    assert fresh(authz, ask(**{**first, **other}))
    assert not fresh(authz, ask(**first))


def test_absent_and_empty_and_types_have_different_keys(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", 'context has model && context.model == "no"', unless="false"))
    values: tuple[Any, ...] = ("", "1", "-", 1, True, "True")
    keys = [authz.key(ask()), *(authz.key(ask(model=value)) for value in values)]
    assert None not in keys
    assert len(set(keys)) == len(keys)


def test_hard_denies_are_remembered(tmp_path: Path) -> None:
    authz = engine(tmp_path, forbid("f", "true", unless="false"))
    assert fresh(authz, ask())
    assert not fresh(authz, ask())
    assert authz.decide(ask()).policies == ("f",)


@pytest.mark.parametrize(
    ("policies", "context"),
    [
        ([PERMIT, forbid("f", "true", "ops")], {}),
        ([PERMIT, forbid("f", "true", "ops", unless="false")], {}),
        ([PERMIT, forbid("f", "true", "ops")], {"approval": approval()}),
        ([PERMIT, forbid("f", "true", "ops")], {"approval": approval(fingerprint="F2")}),
        ([PERMIT, forbid("f", 'context.now > datetime("2100-01-01")', unless="false")], {}),
        ([PERMIT, '@id("f") forbid (principal, action, resource) when { {"c": context}.c.depth > 9 };'], {}),
        ([PERMIT, forbid("f", "context.depth > 9", unless="false")], {"depth": "x"}),
    ],
    ids=["oversight", "hopeless", "approved", "other approval", "clock", "whole context", "error"],
)
def test_what_must_not_be_remembered_is_asked_again(
    tmp_path: Path, policies: list[str], context: Mapping[str, Any]
) -> None:
    authz = engine(tmp_path, *policies)
    query = ask(**{"now": 1_800_000_000 * SECOND, **context})
    assert fresh(authz, query)
    assert fresh(authz, query)


def test_clock_in_the_branch_of_an_approval_does_not_forbid_remembering(tmp_path: Path) -> None:
    unless = f'{APPROVED} && context.now < datetime("2100-01-01")'
    authz = engine(tmp_path, PERMIT, forbid("f", "context.depth > 5", "ops", unless))
    assert fresh(authz, ask())
    assert not fresh(authz, ask())


def test_answer_is_forgotten_after_a_minute(tmp_path: Path) -> None:
    clock = Time()
    authz = engine(tmp_path, PERMIT, clock=clock)
    assert fresh(authz, ask())
    clock.ns += 59 * SECOND
    assert not fresh(authz, ask())
    clock.ns += SECOND
    assert fresh(authz, ask())


def test_answer_does_not_outlive_the_delegation(tmp_path: Path) -> None:
    clock = Time()
    authz = engine(tmp_path, PERMIT, clock=clock)
    query = ask(expires_ns=clock.ns + 5 * SECOND)
    assert fresh(authz, query)
    clock.ns += 4 * SECOND
    assert not fresh(authz, query)
    clock.ns += SECOND
    assert fresh(authz, query)


def test_time_zones_of_now_are_respected(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("night", 'context.now.toTime() < duration("8h")', unless="false"))
    assert authz.decide(ask(now=datetime(2026, 1, 1, 7, 59, 59, 999999, UTC))).verdict == "deny"
    assert authz.decide(ask(now=datetime(2026, 1, 1, 8, tzinfo=UTC))).verdict == "allow"
    assert authz.decide(ask(now=int(datetime(2026, 1, 1, 7, 59, tzinfo=UTC).timestamp()) * SECOND)).verdict == "deny"


def test_reload_changes_answers_at_once_and_grows_the_epoch(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT)
    before, digest = authz.epoch, authz.policy_epoch
    assert authz.decide(ask()).verdict == "allow"
    (tmp_path / "a.cedar").write_text(PERMIT.replace("permit (", "forbid ("), encoding="utf-8")
    assert authz.decide(ask()).verdict == "allow"
    assert authz.reload() == authz.epoch == before + 1
    assert authz.decide(ask()).verdict == "deny"
    assert authz.policy_epoch != digest


def test_failed_reload_changes_nothing(tmp_path: Path) -> None:
    authz = engine(
        tmp_path, '@id("p") permit (principal, action, resource in Creto::Zone::"z");', zones={"z": ["a.example"]}
    )
    before = authz.epoch, authz.policy_epoch
    with pytest.raises(PolicyError):
        authz.reload(zones={})
    (tmp_path / "a.cedar").write_text("nonsense", encoding="utf-8")
    with pytest.raises(PolicyError):
        authz.reload()
    assert (authz.epoch, authz.policy_epoch) == before
    assert authz.decide(ask("a.example")).verdict == "allow"
    (tmp_path / "a.cedar").write_text(
        '@id("p") permit (principal, action, resource in Creto::Zone::"z");', encoding="utf-8"
    )
    authz.reload()
    assert authz.decide(ask("a.example")).verdict == "allow"


def test_invalidate_forgets_and_keeps_the_policies(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT)
    authz.decide(ask())
    before, digest = authz.epoch, authz.policy_epoch
    assert authz.invalidate() == before + 1
    assert fresh(authz, ask())
    assert authz.policy_epoch == digest


def test_late_writer_of_an_old_epoch_is_ignored(tmp_path: Path) -> None:
    """An evaluation that began before a reload ends after it: its answer must not be found afterwards."""

    class Slow(DecisionTable):
        reload: Any = None

        def put(self, key: bytes, epoch: int, code: int, expires_ns: int) -> None:
            hook, self.reload = self.reload, None
            if hook is not None:
                hook()
            super().put(key, epoch, code, expires_ns)

    table = Slow()
    authz = engine(tmp_path, PERMIT, table=table)

    def reload() -> None:
        (tmp_path / "a.cedar").write_text(PERMIT.replace("permit (", "forbid ("), encoding="utf-8")
        authz.reload()

    table.reload = reload
    assert authz.decide(ask()).verdict == "allow"
    assert authz.decide(ask()).verdict == "deny"


def test_admission_gives_the_remembered_answer_in_one_call(tmp_path: Path) -> None:
    table = DecisionTable()
    clock = Time()
    authz = engine(tmp_path, PERMIT, forbid("f", 'context.path == "/no"', unless="false"), table=table, clock=clock)
    admission = Admission(table, QuotaTable(slots=64))
    for path, charged in (("/a", True), ("/no", False)):
        query = ask(path=path)
        answer, key = authz.decide(query), authz.key(query)
        assert key is not None
        code, reservation = admission.admit(key, authz.epoch, None, (), clock(), SECOND)
        assert authz.answer_for(code, authz.epoch) == answer
        assert (reservation != 0) is charged
        assert bool(code & UNCHARGED) is not charged
    authz.invalidate()
    assert authz.answer_for(code, authz.epoch - 1) is None
    assert authz.answer_for(code, authz.epoch) is None


def test_many_threads_get_the_same_answers(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, forbid("f", "context.depth > 5", unless="false"))
    wrong: list[Answer] = []

    def worker(start: int) -> None:
        for number in range(60):
            depth = (start + number) % 10
            answer = authz.decide(ask(f"h{number % 7}.example", depth=depth))
            if (answer.verdict == "deny") is not (depth > 5):
                wrong.append(answer)
            if number % 20 == 0:
                authz.invalidate()

    threads = [threading.Thread(target=worker, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


# Cached, sliced and trimmed answers against Cedar asked about everything.

RICH = [
    '@id("all") @quota("day") permit (principal in Creto::Org::"acme", action, resource);',
    '@id("read") permit (principal, action == Creto::Action::"httpRead", resource in Creto::Zone::"z");',
    '@id("b") forbid (principal, action, resource == Creto::Host::"b.example") when { context.path like "/x*" };',
    '@id("deep") forbid (principal, action in Creto::Action::"egress", resource) when { context.depth > 3 };',
    '@id("prod") forbid (principal, action in [Creto::Action::"tunnel", Creto::Action::"tcp"], resource) '
    'when { principal.env == "prod" } unless { context.port == 443 };',
    '@id("cap") forbid (principal, action, resource) when { context has amount_minor && context.amount_minor > 9 };',
    '@id("net") forbid (principal, action, resource) '
    'when { context has ip && context.ip.isInRange(ip("10.0.0.0/8")) };',
    '@id("zone") forbid (principal, action, resource in Creto::Zone::"z") '
    'when { if context has model then context.model == "big" else context.method == "PUT" };',
    '@id("ask") @require_oversight("ops") forbid (principal, action == Creto::Action::"httpWrite", resource) '
    f'when {{ context.path == "/pay" }} unless {{ {APPROVED} }};',
]

QUERIES = st.builds(
    lambda principal, org, env, action, host, context: Query(principal, org, env, "h1", action, host, context),
    st.sampled_from(["a1", "a2"]),
    st.sampled_from(["acme", "other"]),
    st.sampled_from(["dev", "prod"]),
    st.sampled_from(ACTIONS),
    st.sampled_from(["a.example", "b.example", "c.example", "10.0.0.1"]),
    st.fixed_dictionaries(
        {
            "method": st.sampled_from(["GET", "PUT"]),
            "path": st.one_of(
                st.sampled_from(["/", "/x", "/x/y", "/pay"]), st.text(st.characters(codec="utf-8"), max_size=5)
            ),
            "scheme": st.just("https"),
            "way": st.just("explicit"),
            "fingerprint": st.just("F1"),
            "root": st.just("h1"),
            "depth": st.integers(0, 5),
            "port": st.sampled_from([443, 8443]),
            "now": st.just(1_800_000_000 * SECOND),
        },
        optional={
            "model": st.sampled_from(["big", "small", ""]),
            "amount_minor": st.integers(-(2**63), 2**63 - 1) | st.integers(8, 11),
            "ip": st.sampled_from(["10.1.2.3", "192.0.2.1", "::1"]),
        },
    ),
)


@pytest.fixture(scope="module")
def rich(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedAuthz:
    return engine(tmp_path_factory.mktemp("rich"), *RICH, zones={"z": ["*.example"]}, clock=Time())


def cedar_alone(authz: EmbeddedAuthz, query: Query) -> tuple[str, tuple[str, ...]]:
    """Cedar over every policy and the whole context, nothing sliced, trimmed or remembered."""
    loaded = authz.policies
    entities = cedar.entities_for(query, loaded.zones.of(query.host), loaded.schema)
    context = {name: cedar.to_json(name, value) for name, value in query.context.items()}
    if query.host[0].isdigit():
        context.setdefault("ip", cedar.to_json("ip", query.host))
    seen = cedar.evaluate(
        compile_some(loaded.policies.values()), entities, cedar.request_for(query, context), loaded.schema
    )
    assert seen.clean
    return seen.decision, seen.reasons


@settings(max_examples=100, deadline=None)
@given(st.lists(QUERIES, min_size=1, max_size=6))
def test_remembered_answer_is_the_fresh_answer(rich: EmbeddedAuthz, queries: list[Query]) -> None:
    for query in [*queries, *queries]:
        answer = rich.decide(query)
        assert answer == rich.explain(query).answer
        decision, reasons = cedar_alone(rich, query)
        assert answer.policies == reasons
        approved = replace(query, context={**query.context, "approval": approval()})
        helps = reasons == ("ask",) and cedar_alone(rich, approved)[0] == "Allow"
        assert answer.verdict == ("allow" if decision == "Allow" else "oversight" if helps else "deny")


def test_property_meets_every_policy(rich: EmbeddedAuthz) -> None:
    """Guards the property above: its queries can reach each policy and both sides of the table."""
    loaded = load_policies(rich._directory, zones={"z": ["*.example"]})
    assert set(loaded.policies) == {"all", "read", "b", "deep", "prod", "cap", "net", "zone", "ask"}
    assert rich.decide(ask("10.0.0.1", action="httpRead")).policies == ("net",)
    assert json.dumps(sorted(rich.reads("httpRead"))) == '["amount_minor", "depth", "ip", "method", "model", "path"]'
