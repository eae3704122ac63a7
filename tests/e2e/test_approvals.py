"""A sensitive action waits for a person: approved it happens exactly once, denied or unanswered never."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import pytest

from .conftest import Creto, Result, wait_for

REFUND = """
import json, sys, urllib.error, urllib.request
request = urllib.request.Request("https://payments.example.com/v1/refunds", data=json.dumps({"amount": 800}).encode(),
                                 headers={"Content-Type": "application/json"})
try:
    with urllib.request.urlopen(request, timeout=60) as answer: print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error: print(error.code, error.read().decode())
"""


def finish(creto: Creto, process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=100)
    path = creto.directory / "report.json"
    return Result(process.returncode, out, err, json.loads(path.read_text()) if path.exists() else {})


def pending(creto: Creto, timeout: float = 60) -> str:
    """Id of the one request that waits."""
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        listing = creto.call("approvals", "list", "--json")
        rows = json.loads(listing.stdout or "[]")
        rows = rows if isinstance(rows, list) else rows["approvals"]
        if rows:
            return str(rows[0]["id"])
        time.sleep(0.1)
    raise AssertionError("nothing came to wait for approval: " + listing.stderr)


def test_an_approved_action_happens_exactly_once(creto: Creto) -> None:
    process = creto.start_python(REFUND)
    request = pending(creto)
    assert creto.world.seen.count("POST", "/v1/refunds") == 0, "nothing is sent before a person said yes"
    shown = creto.call("approvals", "show", request)
    assert "payments.example.com" in shown.stdout and "800" in shown.stdout
    approved = creto.call("approvals", "approve", request)
    assert approved.returncode == 0, approved.stderr
    result = finish(creto, process)
    assert result.out.startswith("200 "), result.out + result.err
    assert creto.world.seen.count("POST", "/v1/refunds") == 1
    [row] = result.to("payments.example.com")
    assert (row["decision"], row["approval_id"]) == ("approved", request)
    again = creto.call("approvals", "approve", request)
    assert again.returncode != 0


def test_a_denied_action_is_refused_with_the_reason_and_never_sent(creto: Creto) -> None:
    process = creto.start_python(REFUND)
    request = pending(creto)
    assert creto.call("approvals", "deny", request, "--reason", "too much money").returncode == 0
    result = finish(creto, process)
    assert result.out.startswith("403 ") and "too much money" in result.out, result.out + result.err
    assert creto.world.seen.count("POST", "/v1/refunds") == 0


def test_a_grant_is_bound_to_the_exact_action(creto: Creto) -> None:
    """A client that gives up leaves a grant behind, for the identical request only, and only once."""
    code = f"""
import pathlib, subprocess, time
def call(amount, seconds):
    command = ["curl", "-sS", "-m", str(seconds), "https://payments.example.com/v1/refunds", "-H",
               "Content-Type: application/json", "-w", " %{{http_code}}", "-d", '{{"amount": %d}}' % amount]
    return subprocess.run(command, capture_output=True, text=True).stdout
call(800, 4)
pathlib.Path({str(creto.directory / "left")!r}).write_text("x")
while not pathlib.Path({str(creto.directory / "approved")!r}).exists(): time.sleep(0.05)
print("OTHER", call(900, 2))
print("SAME", call(800, 30))
print("AGAIN", call(800, 2))
"""
    process = creto.start_python(code)
    request = pending(creto)
    wait_for(creto.directory / "left")
    assert creto.call("approvals", "approve", request).returncode == 0
    Path(creto.directory / "approved").write_text("x")
    result = finish(creto, process)
    lines = {line.split()[0]: line for line in result.out.splitlines()}
    assert lines["SAME"].endswith(" 200"), result.out + result.err
    assert not lines["OTHER"].endswith(" 200") and not lines["AGAIN"].endswith(" 200")
    bodies = [r["body"] for r in creto.world.seen.requests if r["path"] == "/v1/refunds"]
    assert bodies == [b'{"amount": 800}']


@pytest.mark.parametrize("client", ["openai", "requests", "curl"])
def test_each_client_survives_being_held(creto: Creto, client: str) -> None:
    """Longer than the heartbeat of each: a client that cannot stand its heartbeat would fail here."""
    creto.policies.joinpath("test.cedar").write_text(
        creto.policies.joinpath("test.cedar").read_text().replace("payments.example.com", "api.openai.com")
    )
    body = '{"model": "gpt-4o-mini", "max_tokens": 5, "messages": [{"role": "user", "content": "x"}]}'
    url = "https://api.openai.com/v1/chat/completions"
    code = {
        "openai": "import openai\nprint(openai.OpenAI(timeout=8).chat.completions.create(model='gpt-4o-mini',"
        " max_tokens=5, messages=[{'role': 'user', 'content': 'x'}]).choices[0].finish_reason)",
        "requests": f"import requests\nprint(requests.post({url!r}, data={body!r},"
        " headers={'Content-Type': 'application/json'}).json()['choices'][0]['finish_reason'])",
        "curl": f"import subprocess\nprint(subprocess.run(['curl', '-sS', {url!r}, '-H',"
        f" 'Content-Type: application/json', '-d', {body!r}], capture_output=True, text=True).stdout)",
    }[client]
    process = creto.start_python(code)
    request = pending(creto)
    time.sleep(9 if client == "openai" else 3)
    assert creto.call("approvals", "approve", request).returncode == 0
    result = finish(creto, process)
    assert "stop" in result.out, result.out + result.err
    assert creto.world.seen.count("POST", "/v1/chat/completions") == 1
