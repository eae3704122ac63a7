"""``creto policy``: are the policies right, what do they say about a request, do they still say what they should."""

from __future__ import annotations

import json
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from creto_platform.authz import INSIDE, EmbeddedAuthz, Explanation, Query
from creto_proxy.authorize import action_of
from creto_proxy.errors import ConfigError
from creto_proxy.policies import load_authz

if TYPE_CHECKING:
    from creto_proxy.cli import Operator
    from creto_proxy.config import Config

INTEGERS = frozenset(("depth", "port", "amount_minor", "max_tokens", "tools"))
VERDICTS = ("allow", "deny", "oversight")

_DIRECTORY = click.Path(path_type=Path)
_policy_option = click.option(
    "--policy", "directory", type=_DIRECTORY, metavar="DIR", help="Directory of policies; else the configured one."
)


@click.group()
def policy() -> None:
    """Validate and try policies."""


@policy.command()
@click.argument("directory", type=_DIRECTORY, required=False)
@click.pass_obj
def check(operator: Operator, directory: Path | None) -> None:
    """Validate the policies in DIRECTORY, or the configured ones.

    Every mistake is one line; exit status 2 when there is one. Zones and oversight profiles are those of the
    configuration.
    """
    authz = _load(operator, directory)
    loaded = authz.policies
    rows = [
        {"policy": each.id, "effect": each.effect, "file": f"{each.file}:{each.line}", "about": each.rule.description}
        for each in loaded.policies.values()
    ]
    document = {"valid": True, "epoch": authz.policy_epoch, "policies": [{**row, "id": row["policy"]} for row in rows]}
    operator.emit(rows, document)


@policy.command()
@click.option("--agent", required=True, help="Name or SPIFFE id of the agent.")
@click.option("--method", default="GET", show_default=True, help="HTTP method; CONNECT asks for a tunnel.")
@click.option("--url", required=True, metavar="URL", help="https://HOST[:PORT]/PATH, or tcp://HOST:PORT.")
@click.option("--context", "extra", multiple=True, metavar="KEY=VALUE", help="A context attribute; repeatable.")
@click.option("--action", type=click.Choice(INSIDE), help="Ask about what is said inside, not about the request.")
@click.option("--org", help="Organisation of the agent.")
@click.option("--env", help="Environment of the agent.")
@click.option("--owner", help="Name or SPIFFE id of the human the agent answers to.")
@_policy_option
@click.pass_obj
def explain(
    operator: Operator,
    agent: str,
    method: str,
    url: str,
    extra: tuple[str, ...],
    action: str | None,
    org: str | None,
    env: str | None,
    owner: str | None,
    directory: Path | None,
) -> None:
    """Show what policy says about one request, which policies decide it, and why.

    VALUE of --context is JSON where it parses as such (true, 800, {"id": ...}), else text.
    """
    context = {}
    for pair in extra:
        name, equals, value = pair.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{pair!r} is not KEY=VALUE", param_hint="--context")
        context[name] = _from_text(name, value)
    case = Case("", agent, method, url, action=action, org=org, env=env, owner=owner, context=context)
    authz = _load(operator, directory)
    found = authz.explain(_query(case, operator.config))
    operator.emit(_explained(found), _document(found))


@policy.command()
@click.argument("file", type=click.Path(path_type=Path))
@_policy_option
@click.pass_obj
def test(operator: Operator, file: Path, directory: Path | None) -> None:
    """Check the policies against a table of expected decisions, TOML or JSON.

    \b
    [[case]]
    name = "small refunds pass"
    agent = "support"
    method = "POST"
    url = "https://api.stripe.com/v1/refunds"
    context = { amount_minor = 400 }
    expect = "allow"                      # or "deny", "oversight"
    policies = ["payments-write"]         # optional: exactly these decide
    profiles = []                         # optional: exactly these are asked

    action asks about what is said inside a request ("mcpCall", "llmCall"...); the context then says what that is.
    org, env and owner may be set per case. Exit status 1 when a case fails, 2 when the table is wrong.
    """
    cases = _cases(file)
    authz = _load(operator, directory)
    rows, document, failed = [], [], 0
    for case in cases:
        answer = authz.decide(_query(case, operator.config))
        wrong = _differences(case, answer.verdict, answer.policies, answer.profiles)
        failed += bool(wrong)
        rows.append(
            {"case": case.name, "result": "FAILED" if wrong else "ok", "why": "; ".join(wrong) or answer.detail}
        )
        document.append(
            {"name": case.name, "passed": not wrong, "decision": answer.verdict, "differences": wrong}
            | {"policies": list(answer.policies), "profiles": list(answer.profiles)}
        )
    operator.emit(rows, {"passed": len(cases) - failed, "failed": failed, "cases": document})
    if failed:
        click.get_current_context().exit(1)


@dataclass(frozen=True, slots=True)
class Case:
    """One request to ask about, and what is expected of the answer (None: anything)."""

    name: str
    agent: str
    method: str
    url: str
    action: str | None = None
    org: str | None = None
    env: str | None = None
    owner: str | None = None
    context: Mapping[str, Any] = field(default_factory=dict)
    expect: str | None = None
    policies: tuple[str, ...] | None = None
    profiles: tuple[str, ...] | None = None


def _load(operator: Operator, directory: Path | None) -> EmbeddedAuthz:
    return load_authz(operator.config, directory)


def _query(case: Case, config: Config) -> Query:
    """The query the proxy would make of such a request. Raises ConfigError for what is not a URL of a host."""
    common = config.common
    try:
        parts = urlsplit(case.url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError([f"{case.name or 'url'}: {case.url!r}: {error}"]) from None
    if not host or parts.scheme not in ("http", "https", "tcp"):
        raise ConfigError([f"{case.name or 'url'}: {case.url!r} is not an http://, https:// or tcp:// URL with a host"])
    method = case.method.upper()
    action = _action(parts.scheme, method)
    opaque = action in ("tunnel", "tcp")
    owner = _spiffe(case.owner or config.owner, "human", common.trust_domain)
    context: dict[str, Any] = {
        "method": "" if action == "tcp" else method,
        "path": "" if opaque else parts.path or "/",
        "scheme": parts.scheme,
        "way": "transparent",
        "fingerprint": "",
        "root": owner,
        "depth": 1,
        "port": port or {"http": 80, "https": 443}.get(parts.scheme, 0),
        "now": time.time_ns(),
    }
    return Query(
        principal=_spiffe(case.agent, "agent", common.trust_domain),
        org=case.org or common.org,
        env=case.env or common.env,
        owner=owner,
        action=case.action or action,
        host=host.removesuffix("."),
        context=context | {name: _checked(case, name, value) for name, value in case.context.items()},
    )


def _action(scheme: str, method: str) -> str:
    if scheme == "tcp":
        return "tcp"
    if method == "CONNECT":
        return "tunnel"
    return action_of(method)


def _spiffe(name: str, kind: str, trust_domain: str) -> str:
    return name if "://" in name else f"spiffe://{trust_domain}/{kind}/{name}"


def _from_text(name: str, text: str) -> Any:
    if name in INTEGERS or text in ("true", "false") or text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


def _checked(case: Case, name: str, value: Any) -> Any:
    """``now`` may be written as a time (RFC 3339); everything else stays as it is, for policy to judge."""
    if name != "now" or not isinstance(value, (str, datetime)):
        return value
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else value
    except ValueError:
        where = case.name or "context"
        raise ConfigError([f"{where}: now: {value!r} is not a time such as 2026-01-31T08:00:00Z"]) from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _explained(found: Explanation) -> list[dict[str, object]]:
    answer = found.answer
    facts: list[tuple[str, object]] = [("decision", answer.verdict), ("reason", answer.reason), ("why", answer.detail)]
    facts += [("policy", f"{each.id} ({each.effect}, {each.file}:{each.line})") for each in found.determining]
    facts += [("profile", name) for name in answer.profiles]
    facts += [("obligation", duty) for duty in answer.obligations]
    facts += [("considered", ", ".join(found.considered) or "no policy")]
    facts += [("reads", "cannot be told" if found.reads is None else ", ".join(sorted(found.reads)) or "no context")]
    facts += [("remembered", "up to 60 s" if found.cacheable else "no")]
    facts += [("error", error) for error in found.errors]
    return [{"": name, "value": value} for name, value in facts]


def _document(found: Explanation) -> dict[str, Any]:
    answer = found.answer
    return {
        "decision": answer.verdict,
        "reason": answer.reason,
        "detail": answer.detail,
        "policies": [
            {"id": each.id, "effect": each.effect, "file": each.file, "line": each.line, "text": each.text}
            for each in found.determining
        ],
        "profiles": list(answer.profiles),
        "obligations": list(answer.obligations),
        "considered": list(found.considered),
        "reads": None if found.reads is None else sorted(found.reads),
        "cacheable": found.cacheable,
        "errors": list(found.errors),
    }


def _differences(case: Case, verdict: str, policies: tuple[str, ...], profiles: tuple[str, ...]) -> list[str]:
    wrong = []
    if case.expect is not None and verdict != case.expect:
        wrong.append(f"expected {case.expect}, got {verdict}")
    for name, wanted, got in (("policies", case.policies, policies), ("profiles", case.profiles, profiles)):
        if wanted is not None and tuple(sorted(wanted)) != got:
            wrong.append(f"expected {name} {', '.join(sorted(wanted)) or 'none'}, got {', '.join(got) or 'none'}")
    return wrong


def _cases(file: Path) -> list[Case]:
    """The cases of a table. Raises ConfigError with every mistake in it."""
    try:
        data = file.read_bytes().decode()
        document = json.loads(data) if file.suffix == ".json" else tomllib.loads(data)
    except OSError as error:
        raise ConfigError([f"{file}: cannot be read: {error.strerror}"]) from None
    except ValueError as error:
        raise ConfigError([f"{file}: {error}"]) from None
    entries = document.get("case") if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        raise ConfigError([f'{file}: holds no cases: write [[case]] tables, or {{"case": [...]}} in JSON'])
    problems: list[str] = []
    cases = [_case(f"{file}: case[{index}]", index, entry, problems) for index, entry in enumerate(entries)]
    if problems:
        raise ConfigError(problems)
    return [case for case in cases if case is not None]


_TEXT = ("name", "agent", "method", "url", "action", "org", "env", "owner", "expect")
_LISTS = ("policies", "profiles")


def _case(where: str, index: int, entry: Any, problems: list[str]) -> Case | None:
    before = len(problems)
    if not isinstance(entry, dict):
        problems.append(f"{where}: should be a table")
        return None
    for key, value in entry.items():
        if key in _TEXT:
            fits, wanted = isinstance(value, str) and bool(value), "text"
        elif key in _LISTS:
            fits, wanted = isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of text"
        elif key == "context":
            fits, wanted = isinstance(value, dict), "a table"
        else:
            problems.append(f"{where}.{key}: no such key")
            continue
        if not fits:
            problems.append(f"{where}.{key}: should be {wanted}")
    problems += [f"{where}.{key}: is required" for key in ("agent", "url", "expect") if key not in entry]
    if isinstance(entry.get("expect"), str) and entry["expect"] not in VERDICTS:
        problems.append(f"{where}.expect: should be one of {', '.join(VERDICTS)}")
    if isinstance(entry.get("action"), str) and entry["action"] not in INSIDE:
        problems.append(f"{where}.action: should be one of {', '.join(INSIDE)}")
    if len(problems) > before:
        return None
    lists = {key: tuple(entry[key]) for key in _LISTS if key in entry}
    named = {"name": f"case {index + 1}", "method": "GET", **entry, **lists}
    return Case(**named)
