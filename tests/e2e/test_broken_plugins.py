"""A stranger's plugin that raises or hangs costs the requests it was asked about, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from .conftest import Creto, Result

SECRET = "sk-planted-0123456789SECRET"
PLUGIN = Path(__file__).with_name("unruly.py")
# Which host meets which misbehaviour; the other two hosts are never asked about.
HOSTS = {"api.openai.com": "raise", "payments.example.com": "hang", "mcp.example.com": "spin"}
REASONS = {"raise": "stage_failed", "hang": "stage_timeout", "spin": "stage_timeout"}

POLICY = """
@id("use-allowed-hosts")
permit (principal is Creto::Agent, action in Creto::Action::"egress", resource is Creto::Host);
@id("ask") @require_oversight("unruly")
forbid (principal, action == Creto::Action::"httpWrite", resource)
unless { context has approval && context.approval.satisfied && context.approval.fingerprint == context.fingerprint };
"""

# Asks all at once: one that hangs must not keep the others.
AGENT = """
import http.client, json, ssl, sys, threading
method, targets = sys.argv[1], json.loads(sys.argv[2])
answers, context = {}, ssl.create_default_context()
def ask(host, path):
    try:
        kind = http.client.HTTPConnection if host == "creto.internal" else http.client.HTTPSConnection
        options = {} if host == "creto.internal" else {"context": context}
        connection = kind(host, timeout=60, **options)
        connection.request(method, path, b"{}" if method == "POST" else None)
        answer = connection.getresponse()
        answers[host + path] = [answer.status, answer.read().decode()]
    except (OSError, http.client.HTTPException) as error: answers[host + path] = [0, type(error).__name__]
threads = [threading.Thread(target=ask, args=target) for target in targets]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(answers))
"""


def installed(creto: Creto, text: str | None = None) -> Path:
    """Puts the stranger's distribution where the interpreter looks, as pip would, and into the configuration."""
    site = creto.directory / "site"
    described = site / "stranger_unruly-0.1.dist-info"
    described.mkdir(parents=True)
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger-unruly\nVersion: 0.1\n")
    (described / "entry_points.txt").write_text("[creto]\nunruly = unruly:Unruly\n")
    (described / "RECORD").write_text("")
    if text is None:
        shutil.copy(PLUGIN, site / "unruly.py")
    else:
        (site / "unruly.py").write_text(text)
    path = os.pathsep.join([str(site), *filter(None, [creto.environment.get("PYTHONPATH")])])
    creto.environment["PYTHONPATH"] = path
    return site


def unruly(creto: Creto, stage: str, hosts: dict[str, str] | None = None) -> None:
    installed(creto)
    del creto.environment["CRETO_LIMITS__STAGE_DEADLINE_MS"]
    (creto.policies / "test.cedar").write_text(POLICY)
    text = creto.config.read_text()
    creto.config.write_text(text[: text.index("[oversight.profiles.payments]")])
    pairs = ", ".join(f'"{host}" = "{how}"' for host, how in (HOSTS if hosts is None else hosts).items())
    creto.add(
        f'[plugins]\ndisabled = ["oversight"]\norder = ["unruly", "egress", "metering"]\n'
        f'[limits]\nstage_deadline_ms = 500\n[unruly]\nstage = "{stage}"\nhosts = {{ {pairs} }}\n'
    )


def ask(creto: Creto, method: str = "GET", path: str = "/u") -> tuple[Result, dict[str, Any]]:
    """Every host, and what each answered: [status, body]."""
    targets = [[host, path] for host in (*HOSTS, "api.allowed.test", "pypi.example.com")]
    script = creto.directory / "agent.py"
    script.write_text(AGENT)
    result = creto.run([sys.executable, str(script), method, json.dumps(targets)])
    assert result.status == 0, result.err
    answers = {name.removesuffix(path): answer for name, answer in json.loads(result.out).items()}
    nothing_leaked(creto, result)
    for host in ("api.allowed.test", "pypi.example.com"):
        assert answers[host][0] in (200, 405), "the others go on"
        assert [row["decision"] for row in result.to(host)] == ["approved" if method == "POST" else "allow"]
    return result, answers


def nothing_leaked(creto: Creto, result: Result) -> None:
    """The operator's log may say what a plugin said; agent, report and state never."""
    assert SECRET not in result.out and "Traceback" not in result.out
    assert SECRET not in str(result.report)
    for path in creto.state.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("stage", "method"),
    [
        ("body_limit", "GET"),
        ("authorize", "GET"),
        ("reserve", "GET"),
        ("edits", "GET"),
        ("hold", "POST"),
        ("spend", "POST"),
    ],
)
def test_its_request_is_refused_and_never_sent(creto: Creto, stage: str, method: str) -> None:
    unruly(creto, stage)
    result, answers = ask(creto, method)
    for host, how in HOSTS.items():
        status, body = answers[host]
        assert (status, json.loads(body)["reason"]) == (503, REASONS[how]), (host, how, body)
        assert "unruly" in body, "the agent is told which plugin"
        assert [(row["status"], row["error"]) for row in result.to(host)] == [(503, REASONS[how])]
    assert {request["host"] for request in creto.world.seen.requests} == {"api.allowed.test", "pypi.example.com"}


@pytest.mark.parametrize("stage", ["name", "name_and_port", "tls_mode", "raw_tcp"])
def test_a_broken_egress_guard_lets_nothing_out(creto: Creto, stage: str) -> None:
    """DNS and TLS come before HTTP, so the refusal is a name or a connection that fails; the record says why."""
    unruly(creto, stage)
    result, answers = ask(creto)
    for host, how in HOSTS.items():
        assert answers[host][0] in (0, 503), answers[host]
        rows = [row for row in result.requests if host in row["destination"]]
        assert rows, "it is recorded"
        assert {row["error"] or row["reason"] for row in rows} == {REASONS[how]}
    assert {request["host"] for request in creto.world.seen.requests} == {"api.allowed.test", "pypi.example.com"}


@pytest.mark.parametrize("stage", ["tap", "feed", "finish", "settle"])
def test_what_fails_after_the_send_does_not_take_the_answer_away(creto: Creto, stage: str) -> None:
    unruly(creto, stage)
    result, answers = ask(creto)
    for host in HOSTS:
        assert answers[host][0] == 200, answers[host]
        assert json.loads(answers[host][1])["path"] == "/u"
        assert [(row["decision"], row["status"]) for row in result.to(host)] == [("allow", 200)]


def test_an_answer_that_has_to_be_rewritten_is_not_passed_on_unchanged(creto: Creto) -> None:
    unruly(creto, "rewrite")
    result, answers = ask(creto)
    for host in HOSTS:
        assert '"path"' not in answers[host][1]
        assert [row["decision"] for row in result.to(host)] == ["allow"]
        assert result.to(host)[0]["error"]


@pytest.mark.parametrize("stage", ["release", "settled"])
def test_what_fails_while_clearing_up_is_not_the_agents_business(creto: Creto, stage: str) -> None:
    unruly(creto, stage, {"api.openai.com": "raise"})
    _, answers = ask(creto, "POST")
    assert answers["api.openai.com"][0] in (200, 405)


def test_a_broken_route_answers_for_itself_only(creto: Creto) -> None:
    unruly(creto, "handle", {how: how for how in REASONS})
    script = creto.directory / "agent.py"
    script.write_text(AGENT)
    targets = [["creto.internal", f"/v1/unruly/{name}"] for name in (*REASONS, "fine")]
    targets.append(["creto.internal", "/v1/whoami"])
    result = creto.run([sys.executable, str(script), "GET", json.dumps(targets)])
    nothing_leaked(creto, result)
    answers = json.loads(result.out)
    for how, reason in REASONS.items():
        status, body = answers[f"creto.internal/v1/unruly/{how}"]
        assert (status, json.loads(body)["reason"]) == (503, reason)
    assert answers["creto.internal/v1/unruly/fine"][0] == answers["creto.internal/v1/whoami"][0] == 200


def test_a_consumer_that_fails_keeps_neither_ledger_nor_audit_log_from_the_outcomes(creto: Creto) -> None:
    unruly(creto, "apply", {"api.openai.com": "raise"})
    result, _ = ask(creto)
    assert "behind the journal" in result.err
    usage = json.loads(creto.call("usage", "--json").stdout)
    assert usage["total"]["requests"] == 5
    assert json.loads(creto.call("audit", "verify", "--json").stdout)["size"] == 5


def test_a_plugin_that_cannot_stop_does_not_change_how_the_run_ends(creto: Creto) -> None:
    unruly(creto, "stop")
    result, answers = ask(creto)
    assert {status for status, _ in answers.values()} == {200}
    assert len(result.requests) == 5


@pytest.mark.parametrize("stage", ["constructor", "hook", "start"])
def test_a_plugin_that_cannot_begin_is_one_clear_line_and_nothing_starts(creto: Creto, stage: str) -> None:
    unruly(creto, stage)
    refused_to_start(creto, "RuntimeError")


MODULES = {
    "import": ("raise ImportError('no module named nowhere')\n", "no module named nowhere"),
    "syntax": ("def broken(:\n", "SyntaxError"),
    "exit": ("raise SystemExit(0)\n", "SystemExit"),
    "no class": ("Unruly = 3\n", "not to a class"),
    "no contract": ("class Unruly: pass\n", "see creto_proxy.hookspecs.Plugin"),
}


@pytest.mark.parametrize("name", sorted(MODULES))
def test_a_distribution_that_is_no_plugin_is_one_clear_line_and_nothing_starts(creto: Creto, name: str) -> None:
    text, said = MODULES[name]
    installed(creto, text)
    refused_to_start(creto, said)


def refused_to_start(creto: Creto, said: str) -> None:
    done = creto.call("run", "--policy", str(creto.policies), "--", "touch", str(creto.directory / "started"))
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert "unruly" in line and said in line
    assert not (creto.directory / "started").exists()
