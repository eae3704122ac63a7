"""What policies say about protocols inside HTTP: what has to be found out for them, and what answers hang on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_platform.authz import INSIDE, PROTOCOLS, EmbeddedAuthz, PolicyError, Query, Watch, bundled_policies
from creto_platform.authz.policyset import OPTIONAL, REQUIRED
from creto_platform.authz.reads import CONTENTS

PERMIT = '@id("all") permit (principal, action in Creto::Action::"egress", resource);'
NO_SHELL = '@id("f") forbid (principal, action == Creto::Action::"mcpCall", resource in Creto::Tool::"shell");'


def engine(directory: Path, *policies: str, **options: Any) -> EmbeddedAuthz:
    (directory / "a.cedar").write_text("\n".join(policies), encoding="utf-8")
    return EmbeddedAuthz(directory, **options)


def ask(action: str, host: str = "a.test", **context: Any) -> Query:
    return Query("a1", "acme", "dev", "h1", action, host, {**REQUIRED, **context})


def test_every_attribute_of_a_protocol_is_optional() -> None:
    assert CONTENTS <= set(OPTIONAL)


@pytest.mark.parametrize(
    ("policy", "actions", "permits", "protocols"),
    [
        (PERMIT, (), (), ()),
        ('@id("p") permit (principal, action == Creto::Action::"httpWrite", resource);', (), (), ()),
        (NO_SHELL, ("mcpCall",), (), ("mcp",)),
        (NO_SHELL.replace("forbid", "permit"), ("mcpCall",), ("mcpCall",), ("mcp",)),
        (NO_SHELL.replace('in Creto::Tool::"shell"', '== Creto::Host::"b.test"'), (), (), ()),
        (NO_SHELL.replace('in Creto::Tool::"shell"', 'in Creto::Zone::"z"'), ("mcpCall",), (), ("mcp",)),
        ('@id("g") forbid (principal, action in Creto::Action::"a2a", resource);', PROTOCOLS["a2a"], (), ("a2a",)),
        ('@id("m") forbid (principal, action == Creto::Action::"httpWrite", resource) when { context has model };', (), (), ("llm",)),
        ('@id("m") forbid (principal, action in Creto::Action::"egress", resource in Creto::Model::"m");', INSIDE, (), tuple(PROTOCOLS)),
        ('@id("o") forbid (principal, action, resource) when { context == context };', INSIDE, (), tuple(PROTOCOLS)),
        (
            '@id("n") permit (principal, action, resource) unless { action == Creto::Action::"llmCall" };',
            INSIDE, INSIDE, tuple(PROTOCOLS),
        ),
    ],
)  # fmt: skip
def test_what_is_watched_is_what_policies_can_tell(
    tmp_path: Path, policy: str, actions: Any, permits: Any, protocols: Any
) -> None:
    found = engine(tmp_path, PERMIT, policy.replace('"all"', '"other"'), zones={"z": ["a.test"]}).watch("a.test")
    assert (set(found.actions), set(found.permits)) == (set(actions), set(permits))
    assert found.protocols == set(protocols)


def test_the_default_policies_watch_nothing() -> None:
    authz = EmbeddedAuthz(bundled_policies() / "default")
    assert authz.watch("api.example.com") == Watch(reads=frozenset({"ip", "depth"}))


def test_a_tool_is_a_group_under_every_action(tmp_path: Path) -> None:
    rule = '@id("f") forbid (principal, action in Creto::Action::"egress", resource in Creto::Tool::"shell");'
    authz = engine(tmp_path, PERMIT, rule)
    for action in ("httpWrite", "mcpCall"):
        assert authz.decide(ask(action, tool="shell")).policies == ("f",)
        assert authz.decide(ask(action, tool="other")).verdict == "allow"
        assert authz.decide(ask(action, model="shell")).verdict == "allow"
        assert authz.decide(ask(action)).verdict == "allow"


def test_a_name_that_is_no_text_is_denied(tmp_path: Path) -> None:
    authz = engine(tmp_path, PERMIT, NO_SHELL)
    assert authz.decide(ask("mcpCall", tool=7)).reason == "policy_error"
    assert authz.decide(ask("mcpCall", tool="\ud800")).verdict == "deny"


NAMES = st.sampled_from(["shell", "Shell", "", "x", 'a"b', "é"])


@settings(max_examples=60, deadline=None)
@given(asked=st.lists(st.tuples(st.sampled_from(["mcpCall", "httpWrite", "llmCall"]), NAMES, st.none() | NAMES), max_size=8))
def test_remembered_answers_are_the_fresh_answers(tools: EmbeddedAuthz, asked: list[tuple[str, str, str | None]]) -> None:
    for action, tool, model in asked * 2:
        context = {"tool": tool} if model is None else {"tool": tool, "model": model}
        query = ask(action, **context)
        answer = tools.decide(query)
        assert answer == tools.explain(query).answer
        forbidden = (action == "mcpCall" and tool == "shell") or (action == "llmCall" and model in ("x", "é"))
        assert (answer.verdict == "deny") == forbidden


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> EmbeddedAuthz:
    models = '@id("m") forbid (principal, action == Creto::Action::"llmCall", resource) when { resource in [Creto::Model::"x", Creto::Model::"é"] };'
    return engine(tmp_path_factory.mktemp("tools"), PERMIT, NO_SHELL, models)


def test_a_schema_of_ones_own_must_know_the_protocols(tmp_path: Path) -> None:
    own = (bundled_policies() / "schema.cedarschema").read_text()
    (tmp_path / "schema.cedarschema").write_text(own.replace("llmCall", "talk"))
    with pytest.raises(PolicyError, match='action "llmCall" is missing'):
        engine(tmp_path, PERMIT)
    (tmp_path / "schema.cedarschema").write_text(own.replace("    tool?: String,", ""))
    with pytest.raises(PolicyError, match="attribute `tool` should not exist"):
        engine(tmp_path, PERMIT)
