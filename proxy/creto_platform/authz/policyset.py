"""Loads a directory of Cedar policies, whole or not at all, and finds every mistake in it.

A directory holds ``*.cedar`` files and, optionally, its own ``schema.cedarschema``; without one the schema that ships
with the product applies. A directory that has no ``*.cedar`` of its own but a ``default`` folder stands for that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cedarpy

from creto_platform.authz.bundled import bundled_policies
from creto_platform.authz.cedar import Rule, compile_policies, entities_for, evaluate, request_for, to_json
from creto_platform.authz.port import ACTIONS, OversightProfile, PolicyError, PolicyProblem, Query, Value
from creto_platform.authz.reads import Reach, reach
from creto_platform.authz.zones import Zones, host_problem

SCHEMA_FILE = "schema.cedarschema"
OBLIGATIONS = ("quota", "rate")
ANNOTATIONS = ("description", "id", *OBLIGATIONS, "require_oversight")

_ID = re.compile(r"[A-Za-z0-9._:/-]{1,128}\Z")
_RATE = re.compile(r"[1-9][0-9]{0,8}/[smhd]\Z")
# One token of Cedar text as far as finding the ends of policies needs it (Cedar reference, "Lexical structure").
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|//[^\n]*|;|[^";/]+|.', re.DOTALL)
_FOR_ACTION = re.compile(r' for Creto::Action::"\w+"')
_PREFIX = re.compile(r"^for policy `policy0`,? ?")

# Every attribute the proxy supplies, with a value to try the schema with. An absent "required" one is filled with its
# value before evaluation when no policy reads it, which no policy can notice.
REQUIRED: Mapping[str, Value] = {
    "method": "GET",
    "path": "/",
    "scheme": "https",
    "way": "transparent",
    "fingerprint": "",
    "root": "nobody",
    "depth": 1,
    "port": 443,
    "now": 0,
}
OPTIONAL: Mapping[str, Value] = {
    "rpc_method": "m",
    "tool": "t",
    "prompt": "p",
    "uri": "u",
    "model": "m",
    "provider": "p",
    "operation": "o",
    "stream": False,
    "max_tokens": 1,
    "tools": 1,
    "currency": "USD",
    "ip": "192.0.2.1",
    "amount_minor": 1,
    "approval": {"id": "", "satisfied": False, "approvals": 0, "groups": ["g"], "fingerprint": ""},
}


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy: where it stands, what its annotations say, what it depends on, and itself in Cedar's JSON."""

    rule: Rule
    effect: str
    file: str
    line: int
    text: str
    reach: Reach
    document: Mapping[str, Any]

    @property
    def id(self) -> str:
        return self.rule.id


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Valid policies with their schema. digest: SHA-256 (hex) of everything that answers depend on."""

    policies: Mapping[str, Policy]
    schema: cedarpy.Schema
    zones: Zones
    profiles: Mapping[str, OversightProfile] | None
    digest: str


@dataclass(frozen=True, slots=True)
class Statement:
    """The text of one policy with the line it begins on, counted from 1."""

    text: str
    line: int


def load_policies(
    directory: Path,
    *,
    zones: Mapping[str, Iterable[str]] | None = None,
    profiles: Mapping[str, OversightProfile] | None = None,
    schema: Path | None = None,
) -> PolicySet:
    """The policies of ``directory``, every rule of this module checked.

    zones: the configured zones; None skips the check that policies name only these. profiles: the oversight profiles
    ``@require_oversight`` may name; None accepts any. schema: a schema file to use instead of the directory's own.
    Raises PolicyError with every problem found; nothing is half loaded.
    """
    problems: list[PolicyProblem] = []
    try:
        known_zones = Zones(zones or {})
    except ValueError as error:
        raise PolicyError([PolicyProblem("configuration", 0, "", str(error))]) from None
    directory, files = _policy_files(directory, problems)
    schema_path = schema or _schema_of(directory)
    schema_text = _read(schema_path, problems)
    compiled = None if schema_text is None else _compile_schema(schema_path.name, schema_text, problems)
    policies: dict[str, Policy] = {}
    for path in files:
        text = _read(path, problems)
        for policy in () if text is None else _policies(path.name, text, compiled, profiles, problems):
            earlier = policies.setdefault(policy.id, policy)
            if earlier is not policy:
                used = f"already used at {earlier.file}:{earlier.line}"
                problems.append(PolicyProblem(policy.file, policy.line, policy.id, f'@id "{policy.id}" is {used}'))
            problems += _name_problems(policy, None if zones is None else known_zones)
    if problems or compiled is None or schema_text is None:
        raise PolicyError(problems)
    digest = _digest(schema_text, policies.values(), known_zones, profiles)
    return PolicySet(policies, compiled, known_zones, profiles, digest)


def split_statements(text: str) -> Iterator[Statement]:
    """The policies of a file one by one: text up to and with each ";" outside strings and comments.

    What follows the last ";" is a statement too unless it is blank or comment, so nothing is dropped unseen.
    """
    start, line, blank = 0, 1, True
    first = 1
    for token in _TOKEN.finditer(text):
        piece = token.group()
        if blank and piece.strip() and not piece.startswith("//"):
            blank = False
            first = line + piece[: len(piece) - len(piece.lstrip())].count("\n")
        line += piece.count("\n")
        if piece == ";":
            yield Statement(text[start : token.end()], first)
            start, blank = token.end(), True
    if not blank:
        yield Statement(text[start:], first)


def _policy_files(directory: Path, problems: list[PolicyProblem]) -> tuple[Path, list[Path]]:
    if not directory.is_dir():
        raise PolicyError([PolicyProblem(str(directory), 0, "", "is not a directory")])
    files = sorted(directory.glob("*.cedar"))
    if not files and (directory / "default").is_dir():
        directory /= "default"
        files = sorted(directory.glob("*.cedar"))
    if not files:
        problems.append(PolicyProblem(str(directory), 0, "", "holds no *.cedar file, so everything would be denied"))
    elif directory.name != "default":
        # Hidden folders are how Kubernetes mounts a ConfigMap; its files show up at the top as links.
        for stray in sorted(directory.glob("[!.]*/**/*.cedar")):
            name = str(stray.relative_to(directory))
            problems.append(PolicyProblem(name, 0, "", "is in a sub-folder and would not be loaded"))
    return directory, files


def _schema_of(directory: Path) -> Path:
    for folder in (directory, directory.parent) if directory.name == "default" else (directory,):
        if (folder / SCHEMA_FILE).is_file():
            return folder / SCHEMA_FILE
    return bundled_policies() / SCHEMA_FILE


def _read(path: Path, problems: list[PolicyProblem]) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        problems.append(PolicyProblem(path.name, 0, "", f"is not UTF-8 (byte {error.start})"))
    except OSError as error:
        problems.append(PolicyProblem(path.name, 0, "", f"cannot be read: {error.strerror}"))
    return None


def _compile_schema(file: str, text: str, problems: list[PolicyProblem]) -> cedarpy.Schema | None:
    """The schema if it parses and covers what the proxy asks with; otherwise None and the problems."""
    try:
        schema = cedarpy.Schema.from_str(text)
    except ValueError as error:
        problems.append(PolicyProblem(file, 0, "", _one_line(str(error))))
        return None
    gaps = [PolicyProblem(file, 0, "", gap) for action in ACTIONS for gap in _schema_gaps(schema, text, action)]
    problems += gaps
    return None if gaps else schema


def _schema_gaps(schema: cedarpy.Schema, text: str, action: str) -> list[str]:
    """Why the proxy could not ask about ``action`` under ``schema``: each attribute is tried on its own."""
    scope = f'permit (principal is Creto::Agent, action == Creto::Action::"{action}", resource is Creto::Host)'
    if _validation_errors(f"{scope};", schema):
        return [f'action "{action}" is missing, or does not apply to principal Agent and resource Host']
    missing = [name for name in (*REQUIRED, *OPTIONAL) if not _declares(schema, scope, name)]
    if missing:
        return [f'context of action "{action}" has no attribute "{name}"' for name in missing]
    query = Query("agent", "org", "env", "owner", action, "host")
    context = {name: to_json(name, value) for name, value in {**REQUIRED, **OPTIONAL}.items()}
    group = 'permit (principal in Creto::Org::"org", action in Creto::Action::"egress", resource in Creto::Zone::"z");'
    try:
        entities = entities_for(query, ("z",), schema)
        probe = cedarpy.PolicySet.from_str(group)
    except ValueError as error:
        return [f"does not fit the entities of the proxy: {_one_line(str(error))}"]
    result = evaluate(probe, entities, request_for(query, context), schema)
    if result.errors:
        return [f'action "{action}" cannot be asked about: {_one_line(result.errors[0])}']
    return [] if result.allowed else [f'action "{action}" is not in [egress]']


def _declares(schema: cedarpy.Schema, scope: str, name: str) -> bool:
    """True when the context has the attribute: reading one that is not declared does not validate."""
    guard = f"context has {name} && " if name in OPTIONAL else ""
    return not _validation_errors(f"{scope} when {{ {guard}context.{name} == context.{name} }};", schema)


def _validation_errors(text: str, schema: cedarpy.Schema) -> list[str]:
    result = cedarpy.validate_policies(text, schema)
    if result.validation_passed:
        return []
    # Cedar validates once per action; a mistake that they all share is said once.
    shared: dict[str, list[str]] = {}
    for error in result.errors:
        reason = _PREFIX.sub("", _one_line(error.error))
        shared.setdefault(_FOR_ACTION.sub("", reason), []).append(reason)
    found = [reasons[0] if len(reasons) == 1 else general for general, reasons in shared.items()]
    return sorted(found) or ["does not validate"]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _policies(
    file: str,
    text: str,
    schema: cedarpy.Schema | None,
    profiles: Mapping[str, OversightProfile] | None,
    problems: list[PolicyProblem],
) -> Iterator[Policy]:
    """The policies of one file that can be told apart by a valid id; problems of all of them are added."""
    for number, statement in enumerate(split_statements(text), start=1):
        nameless = f"#{number}"
        try:
            parsed = json.loads(cedarpy.policies_to_json_str(statement.text))
        except ValueError as error:
            problems.append(PolicyProblem(file, statement.line, nameless, _one_line(str(error))))
            continue
        if parsed["templates"]:
            reason = "templates are not supported: write principal and resource out"
            problems.append(PolicyProblem(file, statement.line, nameless, reason))
            continue
        documents = list(parsed["staticPolicies"].values())
        if len(documents) != 1:
            problems.append(PolicyProblem(file, statement.line, nameless, "is not exactly one policy"))
            continue
        annotations = documents[0].get("annotations", {})
        found = [] if schema is None else _validation_errors(statement.text, schema)
        name = annotations.get("id") or ""
        reasons = [*_id_problems(annotations), *_annotation_problems(documents[0]["effect"], annotations, profiles)]
        usable = bool(_ID.match(name))
        for reason in reasons + found:
            problems.append(PolicyProblem(file, statement.line, name if usable else nameless, reason))
        if usable:
            yield Policy(
                rule=_rule(name, annotations),
                effect=documents[0]["effect"],
                file=file,
                line=statement.line,
                text=statement.text.strip(),
                reach=reach(statement.text),
                document=documents[0],
            )


def _rule(name: str, annotations: Mapping[str, str | None]) -> Rule:
    obligations = tuple(f"{key}:{annotations[key]}" for key in OBLIGATIONS if key in annotations)
    description = _one_line(annotations.get("description") or "")
    return Rule(name, annotations.get("require_oversight"), obligations, description)


def _id_problems(annotations: Mapping[str, str | None]) -> list[str]:
    if "id" not in annotations:
        return ["has no @id annotation"]
    if not annotations["id"]:
        return ["@id must not be empty"]
    if not _ID.match(annotations["id"]):
        return ["@id may hold at most 128 letters, digits and . _ - : /"]
    return []


def _annotation_problems(
    effect: str, annotations: Mapping[str, str | None], profiles: Mapping[str, OversightProfile] | None
) -> Iterator[str]:
    for name, value in annotations.items():
        if name not in ANNOTATIONS:
            yield f"unknown annotation @{name} (known: {', '.join(ANNOTATIONS)})"
        elif name in OBLIGATIONS and effect != "permit":
            yield f"@{name} belongs on permit, not on forbid"
        elif name in (*OBLIGATIONS, "require_oversight") and not value:
            yield f"@{name} must not be empty"
        elif name == "rate" and not _RATE.match(value or ""):
            yield f'@rate must be COUNT/s, COUNT/m, COUNT/h or COUNT/d, not "{value}"'
        elif name == "require_oversight" and effect != "forbid":
            yield "@require_oversight belongs on forbid, not on permit"
        elif name == "require_oversight" and profiles is not None and value not in profiles:
            known = ", ".join(sorted(profiles)) or "none"
            yield f'@require_oversight names the unknown profile "{value}" (known: {known})'


def _name_problems(policy: Policy, zones: Zones | None) -> Iterator[PolicyProblem]:
    """Hosts that no request can have and zones nobody configured: such a forbid would silently never match."""
    for kind, name in sorted(policy.reach.names):
        reason = None
        if kind == "Creto::Host":
            problem = host_problem(name)
            advice = "; put patterns in a zone" if "*" in name else ""
            reason = None if problem is None else f'Creto::Host::"{name}" {problem}{advice}'
        elif kind == "Creto::Zone" and zones is not None and name not in zones.names:
            known = ", ".join(sorted(zones.names)) or "none"
            reason = f'Creto::Zone::"{name}" is not configured (known: {known})'
        if reason is not None:
            yield PolicyProblem(policy.file, policy.line, policy.id, reason)


def _digest(
    schema: str, policies: Iterable[Policy], zones: Zones, profiles: Mapping[str, OversightProfile] | None
) -> str:
    parts = {
        "schema": schema,
        "policies": sorted((policy.id, policy.text) for policy in policies),
        "zones": [sorted(zones.names), zones.canonical()],
        "profiles": sorted(
            (name, profile.approvals, None if profile.groups is None else sorted(profile.groups))
            for name, profile in (profiles or {}).items()
        ),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def without(policies: PolicySet, *ids: str) -> PolicySet:
    """``policies`` without some of them: what would be answered if these were not there."""
    kept = {name: policy for name, policy in policies.policies.items() if name not in ids}
    return replace(policies, policies=kept)


def compile_some(policies: Iterable[Policy]) -> cedarpy.PolicySet:
    """The Cedar policy set of exactly these policies, reasons carrying their ids."""
    return compile_policies({policy.id: policy.document for policy in policies})
