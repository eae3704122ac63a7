"""``creto policy``: one line per mistake, the decision with its reasons, and tables of expected decisions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from creto_proxy.cli import Operator, run_command

PERMIT = '@id("ok") @description("all may") permit (principal, action, resource);'
NO_POST = '@id("no") forbid (principal, action == Creto::Action::"httpWrite", resource == Creto::Host::"a.example");'


@pytest.fixture
def policies(tmp_path: Path) -> Path:
    directory = tmp_path / "policies"
    directory.mkdir()
    (directory / "a.cedar").write_text(f"{PERMIT}\n{NO_POST}\n", encoding="utf-8")
    return directory


def creto(tmp_path: Path, *arguments: object) -> int:
    operator = Operator(state_dir=tmp_path / "state", environ={"HOME": str(tmp_path)})
    return run_command(["policy", *map(str, arguments)], operator)


def document(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


def test_check_lists_valid_policies(policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert creto(tmp_path, "check", policies) == 0
    said = capsys.readouterr().out
    assert "a.cedar:1" in said and "all may" in said and "a.cedar:2" in said


def test_check_gives_json(policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert creto(tmp_path, "check", policies, "--json") == 0
    found = document(capsys)
    assert found["valid"] is True
    assert [(each["id"], each["effect"], each["file"]) for each in found["policies"]] == [
        ("ok", "permit", "a.cedar:1"),
        ("no", "forbid", "a.cedar:2"),
    ]


def test_check_without_a_directory_takes_the_installed_policies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert creto(tmp_path, "check", "--json") == 0
    assert "default-egress" in {each["id"] for each in document(capsys)["policies"]}


def test_check_says_every_mistake_on_a_line_and_exits_2(
    policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (policies / "b.cedar").write_text(f"{PERMIT}\npermit (principal, action, resource);", encoding="utf-8")
    assert creto(tmp_path, "check", policies) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [
        'creto: b.cedar:1: policy ok: @id "ok" is already used at a.cedar:1',
        "creto: b.cedar:2: policy #2: has no @id annotation",
    ]


def test_check_of_a_missing_directory_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert creto(tmp_path, "check", tmp_path / "no") == 2
    assert capsys.readouterr().err == f"creto: {tmp_path / 'no'}: is not a directory\n"


def test_check_knows_the_configured_zones(policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (policies / "b.cedar").write_text(
        '@id("z") permit (principal, action, resource in Creto::Zone::"llm");', encoding="utf-8"
    )
    assert creto(tmp_path, "check", policies) == 2
    assert 'Creto::Zone::"llm" is not configured (known: none)' in capsys.readouterr().err
    config = tmp_path / "creto.toml"
    config.write_text('[zones]\nllm = ["api.openai.com"]\n', encoding="utf-8")
    assert creto(tmp_path, "check", policies, "--config", config) == 0


EXPLAIN = ("explain", "--agent", "bob", "--url", "https://a.example/x", "--policy")


def test_explain_shows_decision_policies_and_why(
    policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert creto(tmp_path, *EXPLAIN, policies, "--method", "POST") == 0
    said = capsys.readouterr().out
    assert "deny" in said and 'forbidden by policy "no"' in said and "no (forbid, a.cedar:2)" in said


def test_explain_gives_json(policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert creto(tmp_path, *EXPLAIN, policies, "--json") == 0
    found = document(capsys)
    assert (found["decision"], found["reason"], found["cacheable"]) == ("allow", "policy_permit", True)
    assert [each["id"] for each in found["policies"]] == ["ok"]
    assert (found["considered"], found["reads"]) == (["ok"], [])


def test_explain_takes_context(policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cap = (
        '@id("cap") forbid (principal, action, resource) when { context has amount_minor && context.amount_minor > 9 };'
    )
    (policies / "b.cedar").write_text(cap, encoding="utf-8")
    found = {}
    for amount in ("9", "10", "ten"):
        assert creto(tmp_path, *EXPLAIN, policies, "--context", f"amount_minor={amount}", "--json") == 0
        found[amount] = document(capsys)
    assert {amount: each["decision"] for amount, each in found.items()} == {"9": "allow", "10": "deny", "ten": "deny"}
    assert found["10"]["policies"][0]["text"] == cap
    assert found["ten"]["reason"] == "policy_error"
    assert found["ten"]["errors"]


@pytest.mark.parametrize("url", ["ftp://a.example/", "https:///x", "a.example", "https://a.example:99999/"])
def test_explain_refuses_what_is_no_url(
    policies: Path, tmp_path: Path, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert creto(tmp_path, "explain", "--agent", "a", "--url", url, "--policy", policies) == 2
    assert url in capsys.readouterr().err


def test_explain_refuses_context_without_a_value(
    policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert creto(tmp_path, *EXPLAIN, policies, "--context", "depth") == 2
    assert "is not KEY=VALUE" in capsys.readouterr().err


TABLE = """
[[case]]
name = "reading is fine"
agent = "bob"
url = "https://a.example/"
expect = "allow"
policies = ["ok"]

[[case]]
name = "writing is not"
agent = "bob"
method = "POST"
url = "https://a.example/"
expect = "{expect}"
profiles = []
"""


def test_table_that_holds_passes(policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.toml"
    table.write_text(TABLE.format(expect="deny"), encoding="utf-8")
    assert creto(tmp_path, "test", table, "--policy", policies, "--json") == 0
    assert (lambda found: (found["passed"], found["failed"]))(document(capsys)) == (2, 0)


def test_table_that_does_not_hold_fails_with_the_difference(
    policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.toml"
    table.write_text(TABLE.format(expect="oversight"), encoding="utf-8")
    assert creto(tmp_path, "test", table, "--policy", policies) == 1
    said = capsys.readouterr().out
    assert "FAILED" in said and "expected oversight, got deny" in said and "reading is fine" in said


def test_table_may_be_json_and_tell_the_time(policies: Path, tmp_path: Path) -> None:
    (policies / "b.cedar").write_text(
        '@id("old") forbid (principal, action, resource) when { context.now < datetime("2020-01-01") };',
        encoding="utf-8",
    )
    cases = [
        {"agent": "b", "url": "tcp://db.example:5432", "expect": "deny", "context": {"now": "2019-12-31T23:59:59Z"}},
        {"agent": "b", "url": "tcp://db.example:5432", "expect": "allow", "context": {"now": "2020-01-01T00:00:00Z"}},
    ]
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"case": cases}), encoding="utf-8")
    assert creto(tmp_path, "test", table, "--policy", policies) == 0


def test_mistakes_in_a_table_are_all_named(policies: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = tmp_path / "table.toml"
    table.write_text('[[case]]\nagent = 1\nurl = "https://a/"\nexpect = "yes"\nhuh = 2\n[[case]]\n', encoding="utf-8")
    assert creto(tmp_path, "test", table, "--policy", policies) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"creto: {table}: case[0].agent: should be text",
        f"creto: {table}: case[0].huh: no such key",
        f"creto: {table}: case[0].expect: should be one of allow, deny, oversight",
        f"creto: {table}: case[1].agent: is required",
        f"creto: {table}: case[1].url: is required",
        f"creto: {table}: case[1].expect: is required",
    ]


@pytest.mark.parametrize("content", ["", "case = 3", "[[case", None])
def test_unusable_table_exits_2(
    policies: Path, tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "table.toml"
    if content is not None:
        table.write_text(content, encoding="utf-8")
    assert creto(tmp_path, "test", table, "--policy", policies) == 2
    assert str(table) in capsys.readouterr().err
