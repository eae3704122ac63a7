"""What only a real agent in its own namespaces can try."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from .conftest import Creto

BLOCKED = """
@id("no-blocked-writes")
forbid (principal, action == Creto::Action::"httpWrite", resource) when { context.path like "/v1/blocked*" };
"""


def test_the_report_is_not_written_through_a_link_that_the_agent_left(creto: Creto) -> None:
    """creto can write where the agent cannot: into the state directory that is hidden from it."""
    report, victim = creto.directory / "report.json", creto.state / "victim"
    creto.state.mkdir(mode=0o700)
    victim.write_text("precious")
    code = f"import os; os.unlink({str(report)!r}); os.symlink({str(victim)!r}, {str(report)!r})"
    command = creto.run_command([sys.executable, "-c", code])
    done = subprocess.run(command, env=creto.environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert report.is_symlink() and victim.read_text() == "precious"


def test_a_report_that_cannot_be_written_is_said_before_anything_starts(creto: Creto) -> None:
    where = str(creto.directory / "no" / "such" / "report")
    done = creto.call("run", "--report-file", where, "--", "touch", str(creto.directory / "started"))
    assert done.returncode == 2 and where in done.stderr and "run.report_file" in done.stderr
    assert not (creto.directory / "started").exists()


@pytest.mark.parametrize(
    "path", ["/v1/blocked", "/v1//blocked", "/v1%2fblocked", "/v1/%62locked", "/V1/Blocked", "/v1;x/blocked"]
)
def test_a_forbidden_path_does_not_leave_the_machine_however_it_is_spelled(creto: Creto, path: str) -> None:
    (creto.policies / "blocked.cedar").write_text(BLOCKED)
    result = creto.run(["curl", "-sS", "--path-as-is", "-d", "x", f"https://api.allowed.test{path}"])
    assert json.loads(result.out)["policies"] == ["no-blocked-writes"], result.err
    assert creto.world.seen.requests == []


def test_dot_segments_are_refused(creto: Creto) -> None:
    urls = [
        f"https://api.allowed.test{path}" for path in ("/v1/x/../blocked", "/v1/%2e/blocked", "/v1/x%2f..%2fblocked")
    ]
    answers = [json.loads(creto.run(["curl", "-sS", "--path-as-is", url]).out) for url in urls]
    assert [(answer["status"], answer["reason"]) for answer in answers] == [(400, "ambiguous_path")] * 3
    assert creto.world.seen.requests == []


def test_an_agent_that_hoards_connections_does_not_keep_creto_from_its_records(creto: Creto) -> None:
    code = """
import select, socket, time, urllib.error, urllib.request
hoard = []
for _ in range(150):
    try:
        hoard.append(socket.create_connection(("plain.allowed.test", 80), timeout=30))
        hoard[-1].sendall(b"GET / HTTP/1.1\\r\\n")
    except OSError:
        pass
select.select(hoard, [], [], 60)  # until one too many has been closed
for sock in hoard:
    sock.close()
for _ in range(600):  # until those that were closed are no longer counted
    try:
        print(urllib.request.urlopen("http://plain.allowed.test/after").status)
        break
    except OSError:
        time.sleep(0.1)
"""
    script = creto.directory / "hoard.py"
    script.write_text(code)
    limited = ["bash", "-c", 'ulimit -n 300; exec "$@"', "limited", *creto.run_command([sys.executable, str(script)])]
    done = subprocess.run(limited, env=creto.environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.stdout.strip() == "200", done.stderr
    assert "connections at a time" in done.stderr and "Too many open files" not in done.stderr
    report = json.loads((creto.directory / "report.json").read_text())
    assert report["requests"][-1]["path"] == "/after" and report["audit"]["verified"]
