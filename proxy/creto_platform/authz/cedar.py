"""Cedar through ``cedarpy``, used only in the ways that fail closed.

What has to be respected (all of it is checked at start by ``self_test``):

- Cedar skips a policy whose evaluation fails, so a broken forbid would let everything pass. An evaluation with any
  error, or without a decision, is therefore a "deny" here, whatever Cedar concluded.
- An ``Entities`` handle that was built without the schema knows no action groups, and ``action in
  Action::"egress"`` then silently never matches. Handles are made in one place, which demands the schema.
- Policies get their own ids only when they are loaded through Cedar's JSON format; otherwise ids are positions.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

import cedarpy

from creto_platform.authz.port import EngineUnsafe, OversightProfile, Query, Verdict

Approval: TypeAlias = Mapping[str, object]
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What Cedar made of one request. ``decision`` is "Allow", "Deny" or "NoDecision"; ``reasons`` is sorted."""

    decision: str
    reasons: tuple[str, ...]
    errors: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """False when the decision cannot be trusted."""
        return not self.errors and self.decision != "NoDecision"

    @property
    def allowed(self) -> bool:
        return self.clean and self.decision == "Allow"


@dataclass(frozen=True, slots=True)
class Rule:
    """What the annotations of one policy say. profile: of ``@require_oversight``; obligations: ``"quota:NAME"``..."""

    id: str
    profile: str | None
    obligations: tuple[str, ...]
    description: str


@dataclass(frozen=True, slots=True)
class Ruling:
    """The four-way decision. ``settled``: the bare evaluation alone decided, so the answer may be remembered."""

    verdict: Verdict
    reason: str
    policies: tuple[str, ...]
    profiles: tuple[str, ...] = ()
    obligations: tuple[str, ...] = ()
    errors: tuple[str, ...] = ()
    settled: bool = False


def evaluate(
    policies: cedarpy.PolicySet, entities: cedarpy.Entities, request: Mapping[str, Any], schema: cedarpy.Schema | None
) -> Evaluation:
    """One evaluation. ``schema`` validates the request; None is for showing what goes wrong without it."""
    try:
        result = cedarpy.is_authorized(dict(request), policies, entities, schema)
    except (ValueError, TypeError) as error:
        return Evaluation("NoDecision", (), (str(error),))
    diagnostics = result.diagnostics
    return Evaluation(result.decision.value, tuple(sorted(diagnostics.reasons)), tuple(diagnostics.errors))


def rule_on(
    evaluate_with: Callable[[Approval | None], Evaluation],
    rules: Mapping[str, Rule],
    hypothetical: Callable[[frozenset[str]], Approval],
    approval: Approval | None = None,
) -> Ruling:
    """Decides between allow, deny and oversight.

    evaluate_with: evaluates the request with the given ``context.approval`` (None: without one). hypothetical: the
    best approval that satisfying these profiles could bring. approval: what people have really said so far.

    (a) An error or no decision is a deny. (b) Allow brings the obligations of the permits that made it. (c) A deny
    made only by forbids annotated ``@require_oversight`` becomes "oversight" if approvals would lift it: each profile
    on its own must lift its own forbids, all together must give Allow, and no other forbid may come up. Nobody is
    asked about something that would stay forbidden. (d) Everything else is a deny.

    A real approval that names ``profiles`` allows only when these cover every profile asked for: a yes to one
    question is never taken for a yes to another one, however loosely a policy is written.
    """
    bare = evaluate_with(None)
    if not bare.clean:
        return _broken(bare)
    actual = bare if approval is None else evaluate_with(approval)
    if not actual.clean:
        return _broken(actual)
    demanded = _profiles(bare.reasons, rules) if bare.decision == "Deny" else frozenset()
    if actual.allowed and _covers(approval, demanded):
        obligations = {duty for policy in actual.reasons for duty in rules[policy].obligations}
        return Ruling(
            "allow", "policy_permit", actual.reasons, obligations=tuple(sorted(obligations)), settled=approval is None
        )
    reasons = bare.reasons if actual.allowed else actual.reasons
    asks = bool(reasons and demanded) and all(rules[policy].profile for policy in reasons + bare.reasons)
    if not asks:
        reason = "policy_forbid" if reasons else "policy_no_permit"
        return Ruling("deny", reason, reasons, settled=approval is None)
    refusal = _would_stay_forbidden(evaluate_with, rules, hypothetical, demanded)
    if refusal is not None:
        return refusal if refusal.errors else Ruling("deny", "policy_forbid", reasons)
    return Ruling("oversight", "oversight_required", reasons, profiles=tuple(sorted(demanded)))


def _would_stay_forbidden(
    evaluate_with: Callable[[Approval | None], Evaluation],
    rules: Mapping[str, Rule],
    hypothetical: Callable[[frozenset[str]], Approval],
    demanded: frozenset[str],
) -> Ruling | None:
    """None when satisfying every demanded profile leads to Allow."""
    together = evaluate_with(hypothetical(demanded))
    if not together.clean:
        return _broken(together)
    if not together.allowed:
        return Ruling("deny", "policy_forbid", together.reasons)
    if len(demanded) == 1:
        return None
    for profile in sorted(demanded):
        alone = evaluate_with(hypothetical(frozenset((profile,))))
        if not alone.clean:
            return _broken(alone)
        left = _profiles(alone.reasons, rules) if alone.decision == "Deny" else frozenset()
        hard = alone.decision == "Deny" and not all(rules[policy].profile for policy in alone.reasons)
        if hard or profile in left or left - demanded:
            return Ruling("deny", "policy_forbid", alone.reasons)
    return None


def _profiles(policies: Iterable[str], rules: Mapping[str, Rule]) -> frozenset[str]:
    return frozenset(profile for policy in policies if (profile := rules[policy].profile))


def _covers(approval: Approval | None, demanded: frozenset[str]) -> bool:
    satisfied = None if approval is None else approval.get("profiles")
    return satisfied is None or (isinstance(satisfied, (list, tuple, set, frozenset)) and demanded <= set(satisfied))


def _broken(evaluation: Evaluation) -> Ruling:
    return Ruling("deny", "policy_error", evaluation.reasons, errors=evaluation.errors or ("no decision",))


def best_approval(
    profiles: Mapping[str, OversightProfile] | None, words: frozenset[str], fingerprint: str
) -> Callable[[frozenset[str]], Approval]:
    """Makes the ``hypothetical`` of ``rule_on``. words: stand in for the groups where a profile leaves them open."""

    def satisfied(names: frozenset[str]) -> Approval:
        chosen = [(profiles or {}).get(name, OversightProfile()) for name in names]
        counts = [2**31 if profile.approvals is None else profile.approvals for profile in chosen]
        groups = frozenset[str]().union(*(words if profile.groups is None else profile.groups for profile in chosen))
        return {
            "id": "hypothetical",
            "satisfied": True,
            "approvals": max(counts),
            "groups": sorted(groups),
            "fingerprint": fingerprint,
        }

    return satisfied


def entity(kind: str, name: str) -> dict[str, str]:
    return {"type": f"Creto::{kind}", "id": name}


def entities_for(
    query: Query, zones: Iterable[str], schema: cedarpy.Schema, *, tool: str | None = None, model: str | None = None
) -> cedarpy.Entities:
    """The entities one query can touch: agent, owner, org, host and its zones. The owner is known to be in the org.

    tool, model: what the host is asked for; it is in the entities of these names as it is in its zones. Raises
    ValueError when they do not fit the schema.
    """
    if not isinstance(schema, cedarpy.Schema):
        raise TypeError("entities need the schema: without it action groups never match")
    org, owner = entity("Org", query.org), entity("Human", query.owner)
    memberships = [entity("Zone", zone) for zone in zones]
    memberships += [entity(kind, name) for kind, name in (("Tool", tool), ("Model", model)) if name is not None]
    nodes = [
        {"uid": org, "attrs": {}, "parents": []},
        {"uid": owner, "attrs": {}, "parents": [org]},
        {
            "uid": entity("Agent", query.principal),
            "attrs": {"owner": {"__entity": owner}, "env": query.env},
            "parents": [org],
        },
        {"uid": entity("Host", query.host), "attrs": {}, "parents": memberships},
    ]
    nodes += [{"uid": uid, "attrs": {}, "parents": []} for uid in memberships]
    return cedarpy.Entities.from_json_str(json.dumps(nodes), schema)


def request_for(query: Query, context: Mapping[str, object]) -> dict[str, Any]:
    """The Cedar request for ``query`` with ``context`` already in Cedar's JSON."""
    return {
        "principal": entity("Agent", query.principal),
        "action": entity("Action", query.action),
        "resource": entity("Host", query.host),
        "context": dict(context),
    }


def to_json(name: str, value: object) -> object:
    """A context attribute in Cedar's JSON. Raises ValueError naming the attribute, never its value."""
    match name:
        case "root":
            return {"__entity": entity("Human", _text(name, value))}
        case "now":
            return {"__extn": {"fn": "datetime", "arg": _timestamp(value)}}
        case "ip":
            return {"__extn": {"fn": "ip", "arg": _address(value)}}
        case "approval":
            return _approval(value)
    if isinstance(value, (str, bool)) or (isinstance(value, int) and -(2**63) <= value < 2**63):
        return value
    raise ValueError(f'context attribute "{name}" is neither text, truth value nor 64-bit integer')


def _text(name: str, value: object) -> str:
    if isinstance(value, str):
        return value
    raise ValueError(f'context attribute "{name}" is not text')


def _address(value: object) -> str:
    try:
        address = ipaddress.ip_address(_text("ip", value))
    except ValueError:
        raise ValueError('context attribute "ip" is not an address') from None
    # ::ffff:169.254.169.254 reaches the same machine as 169.254.169.254, so it must meet the same ranges.
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _timestamp(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        try:
            value = _EPOCH + timedelta(microseconds=value // 1000)
        except OverflowError:
            raise ValueError('context attribute "now" is out of range') from None
    if not isinstance(value, datetime) or value.tzinfo is None:
        raise ValueError('context attribute "now" is neither unix nanoseconds nor a datetime with zone')
    # Cedar takes exactly three digits of fraction (Cedar reference, "datetime").
    return value.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="milliseconds") + "Z"


def _approval(value: object) -> dict[str, object]:
    if not isinstance(value, Mapping):
        raise ValueError('context attribute "approval" is not a record')
    groups = value.get("groups")
    if not isinstance(groups, (list, tuple, set, frozenset)):
        raise ValueError('context attribute "approval" has no list of groups')
    fields: dict[str, object] = {name: value.get(name) for name in ("id", "satisfied", "approvals", "fingerprint")}
    return {**fields, "groups": sorted(map(str, groups))}


_PROBE_SCHEMA = """
entity Agent; entity Host;
action egress;
action read in [egress] appliesTo { principal: [Agent], resource: [Host], context: { depth: Long, ip?: ipaddr } };
"""
_PROBE_PERMIT = '@id("permit") permit (principal, action, resource);'
_PROBE_GROUP = _PROBE_PERMIT + '@id("group") forbid (principal, action in Action::"egress", resource);'
_PROBE_BROKEN = _PROBE_PERMIT + '@id("broken") forbid (principal, action, resource) when { context.depth > 3 };'
_PROBE_RANGE = (
    _PROBE_PERMIT
    + '@id("range") forbid (principal, action, resource) when { context.ip.isInRange(ip("169.254.0.0/16")) };'
)


def compile_policies(policies: Mapping[str, object]) -> cedarpy.PolicySet:
    """A policy set whose reasons carry our ids. policies: id -> the policy in Cedar's JSON policy format."""
    document = {"staticPolicies": dict(policies), "templates": {}, "templateLinks": []}
    return cedarpy.PolicySet.from_json_str(json.dumps(document))


def _probe(text: str) -> cedarpy.PolicySet:
    parsed = json.loads(cedarpy.policies_to_json_str(text))["staticPolicies"].values()
    return compile_policies({policy["annotations"]["id"]: policy for policy in parsed})


def self_test() -> None:
    """Checks that the engine behaves as ``rule_on`` relies on. Raises EngineUnsafe naming what does not hold."""
    schema = cedarpy.Schema.from_str(_PROBE_SCHEMA)
    nodes = [{"uid": {"type": kind, "id": "x"}, "attrs": {}, "parents": []} for kind in ("Agent", "Host")]
    entities = cedarpy.Entities.from_json_str(json.dumps(nodes), schema)

    def ask(policies: str, context: Mapping[str, object], checked: bool = True) -> Evaluation:
        request = {
            "principal": {"type": "Agent", "id": "x"},
            "action": {"type": "Action", "id": "read"},
            "resource": {"type": "Host", "id": "x"},
            "context": context,
        }
        return evaluate(_probe(policies), entities, request, schema if checked else None)

    metadata = {"__extn": {"fn": "ip", "arg": "169.254.169.254"}}
    facts = {
        "a plain permit allows": ask(_PROBE_PERMIT, {"depth": 1}).allowed,
        "reasons carry our ids": ask(_PROBE_PERMIT, {"depth": 1}).reasons == ("permit",),
        "a forbid on an action group matches": ask(_PROBE_GROUP, {"depth": 1}).reasons == ("group",),
        "a forbid that cannot be evaluated is not an allow": not ask(_PROBE_BROKEN, {"depth": "x"}, False).allowed,
        "a context that breaks the schema has no decision": not ask(_PROBE_PERMIT, {"depth": "x"}).allowed,
        "a missing attribute has no decision": not ask(_PROBE_PERMIT, {}).allowed,
        "a fraction has no decision": not ask(_PROBE_PERMIT, {"depth": 1.5}).allowed,
        "an integer beyond 64 bits has no decision": not ask(_PROBE_PERMIT, {"depth": 2**63}).allowed,
        "an address range matches": ask(_PROBE_RANGE, {"depth": 1, "ip": metadata}).reasons == ("range",),
    }
    broken = [fact for fact, holds in facts.items() if not holds]
    if broken:
        raise EngineUnsafe("the Cedar engine failed its self-test: " + "; ".join(broken))
