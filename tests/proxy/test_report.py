"""The report adds up, says what happened, and cannot be made to lie by what an agent sends."""

from __future__ import annotations

import io
import json

from rich.console import Console

from creto_proxy.model import Usage
from creto_proxy.report import AuditState, build, render, usd
from creto_proxy.testing import make_outcome, make_request


def outcomes() -> list[object]:
    usage = Usage("exact", "openai", "gpt-4o-mini", {"input": 10, "output": 5, "cache_read": 4}, 4_500)
    return [
        make_outcome(make_request(), usage=usage),
        make_outcome(make_request("POST"), decision="deny", status=403),
    ]


def test_totals_are_sums_over_agents_and_chains() -> None:
    report = build(outcomes(), run="r", exit_status=3, audit=AuditState(2, "ab", True))  # type: ignore[arg-type]
    document = report.document()
    [agent] = document["totals"]["by_agent"]
    [chain] = document["totals"]["by_chain"]
    assert (agent["requests"], agent["refused"], agent["tokens"]) == (2, 1, 15)
    assert agent["cost_usd"] == "0.0000045" and chain["cost_nano_usd"] == 4_500
    assert chain["chain"].startswith("spiffe://local/human/alice > ")
    assert (document["exit_status"], document["audit"]["verified"]) == (3, True)
    json.dumps(document)


def test_money_is_exact_and_never_in_scientific_notation() -> None:
    assert [usd(n) for n in (0, 1, 1_000, 4_500, 10**9, 12_345_678_901)] == [
        "0.000000", "0.000000001", "0.000001", "0.0000045", "1.000000", "12.345678901",
    ]  # fmt: skip


def rendered(report: object) -> str:
    text = io.StringIO()
    render(report, Console(file=text, width=200, force_terminal=False))  # type: ignore[arg-type]
    return text.getvalue()


def test_table_shows_decision_destination_tokens_cost_and_audit() -> None:
    text = rendered(build(outcomes(), run="r", exit_status=0, audit=AuditState(2, "abcd", True)))  # type: ignore[arg-type]
    for word in ("allowed", "refused", "api.example.com", "10+5", "0.0000045", "2 records", "abcd", "verified"):
        assert word in text, word


def test_an_audit_log_that_does_not_verify_is_said_loudly() -> None:
    text = rendered(build([], run="r", exit_status=0, audit=AuditState(2, "ab", False, "root differs")))
    assert "NOT VERIFIED root differs" in text


def test_control_characters_from_the_agent_do_not_reach_the_terminal() -> None:
    row = make_outcome(make_request(path="/\x1b[2Jgone\x07"))
    assert "\x1b" not in rendered(build([row], run="r", exit_status=0, audit=None))
