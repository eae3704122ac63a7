"""``creto run`` governs unmodified programs: what they reach, what they cannot, and what is written down."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from standins import StandIns

from .conftest import Creto, configure, wait_for


def test_curl_reaches_an_allowed_host_through_interception_without_setup(creto: Creto) -> None:
    result = creto.run(["curl", "-sS", "https://api.allowed.test/hello?token=abc"])
    assert result.status == 0, result.err
    assert '"path": "/hello"' in result.out
    [row] = result.to("api.allowed.test")
    assert (row["decision"], row["method"], row["path"], row["status"]) == ("allow", "GET", "/hello", 200)
    assert "token=abc" not in str(result.report)


def test_plain_http_is_governed_the_same_way(creto: Creto) -> None:
    result = creto.run(["curl", "-sS", "http://plain.allowed.test/x"])
    assert '"path": "/x"' in result.out, result.err
    assert result.to("plain.allowed.test")[0]["decision"] == "allow"


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_fetch_trusts_the_interception_without_setup(creto: Creto) -> None:
    code = "fetch('https://api.allowed.test/n').then(r => r.json()).then(j => console.log(j.path))"
    result = creto.run(["node", "-e", code])
    assert result.out.strip() == "/n", result.err


@pytest.mark.parametrize("library", ["requests", "httpx", "urllib"])
def test_python_http_libraries_work_without_setup(creto: Creto, library: str) -> None:
    calls = {
        "requests": "import requests; print(requests.get('https://api.allowed.test/p').status_code)",
        "httpx": "import httpx; print(httpx.get('https://api.allowed.test/p').status_code)",
        "urllib": "import urllib.request as u; print(u.urlopen('https://api.allowed.test/p').status)",
    }
    result = creto.python(calls[library])
    assert result.out.strip() == "200", result.err


def test_git_clones_over_https(creto: Creto, tmp_path: Path) -> None:
    source = tmp_path / "source"
    quiet = {"check": True, "capture_output": True}
    subprocess.run(["git", "init", "-q", "-b", "main", str(source)], **quiet)  # type: ignore[call-overload]
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.com"]
    (source / "README").write_text("hello\n")
    subprocess.run(["git", "-C", str(source), "add", "."], **quiet)  # type: ignore[call-overload]
    subprocess.run(["git", "-C", str(source), *identity, "commit", "-qm", "x"], **quiet)  # type: ignore[call-overload]
    subprocess.run(["git", "clone", "-q", "--bare", str(source), str(tmp_path / "r.git")], **quiet)  # type: ignore[call-overload]
    subprocess.run(["git", "-C", str(tmp_path / "r.git"), "update-server-info"], **quiet)  # type: ignore[call-overload]
    from .servers import serving_files

    with serving_files(tmp_path, "git.example.com") as (port, ca):
        creto.config.write_text(
            creto.config.read_text()
            .replace(f'"git.example.com" = "127.0.0.1:{creto.world.https}"', f'"git.example.com" = "127.0.0.1:{port}"')
            .replace(str(creto.world.ca), str(ca))
        )
        result = creto.run(["git", "clone", "-q", "https://git.example.com/r.git", str(tmp_path / "clone")])
    assert result.status == 0, result.err
    assert (tmp_path / "clone" / "README").read_text() == "hello\n"
    assert {row["decision"] for row in result.to("git.example.com")} == {"allow"}


def test_exit_status_and_streams_are_the_childs(creto: Creto) -> None:
    result = creto.python("import sys; print('out'); print('err', file=sys.stderr); sys.exit(7)")
    assert (result.status, result.out) == (7, "out\n")
    assert "err\n" in result.err


def test_a_missing_command_ends_with_127(creto: Creto) -> None:
    result = creto.run(["no-such-command-here"])
    assert result.status == 127
    assert "no-such-command-here" in result.err


def test_files_the_agent_writes_belong_to_the_user(creto: Creto) -> None:
    target = creto.directory / "made"
    creto.python(f"open({str(target)!r}, 'w').write('x')")
    assert target.stat().st_uid == os.getuid()


def test_a_host_that_is_not_allowed_does_not_resolve_and_is_recorded(creto: Creto) -> None:
    result = creto.run(["curl", "-sS", "-m", "10", "https://evil.test/"])
    assert result.status != 0
    [row] = result.to("evil.test")
    assert (row["decision"], row["reason"]) == ("deny", "host_not_allowed")
    assert "evil.test" in result.err and "--allow" in result.err, "the person is told what to do"


def test_allow_on_the_command_line_adds_a_host(creto: Creto) -> None:
    creto.config.write_text(creto.config.read_text().replace('"api.allowed.test:443", ', ""))
    refused = creto.run(["curl", "-sS", "-m", "10", "https://api.allowed.test/"])
    assert refused.status != 0
    allowed = creto.run(["curl", "-sS", "https://api.allowed.test/"], "--allow", "api.allowed.test:443")
    assert allowed.status == 0, allowed.err


# Expressions that raise, or are the answer of somebody who should not have been reached.
BYPASSES = {
    "address literal": "said(socket.create_connection(('93.184.216.34', 443), timeout=3))",
    "metadata": "urllib.request.urlopen('http://169.254.169.254/latest/meta-data', timeout=3)",
    "mapped metadata": "said(socket.create_connection(('::ffff:169.254.169.254', 80), timeout=3))",
    "private": "urllib.request.urlopen('http://10.0.0.1/', timeout=3)",
    "udp": "udp('203.0.113.1', 443)",
    "raw socket": "socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)",
    "packet socket": "socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 3)",
    "vsock": "socket.socket(40, socket.SOCK_STREAM)",
    "host loopback": "socket.create_connection(('127.0.0.1', PORT), timeout=3)",
}
# All of them, then again after it has tried to remove the rules.
ATTEMPTS = """
import json, shutil, socket, subprocess, sys, urllib.request
from concurrent.futures import ThreadPoolExecutor
class Nothing(Exception): pass
def udp(host, port):
    s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.settimeout(2); s.connect((host, port)); s.send(b"x"); s.recv(1)
def said(sock):
    sock.sendall(b"GET / HTTP/1.1\\r\\nHost: 93.184.216.34\\r\\n\\r\\n")
    answer = sock.recv(4096)
    if not answer.startswith(b"HTTP/1.1 2"): raise Nothing(answer)  # closed, or refused by creto
    return answer
def attempt(code):
    try: return f"got through: {eval(code)}"
    except Exception as error: return f"stopped: {error!r}"
def every(attempts):
    with ThreadPoolExecutor(len(attempts)) as pool: return dict(zip(attempts, pool.map(attempt, attempts.values())))
attempts = json.loads(sys.argv[1])
before = every(attempts)
if shutil.which("nft"): subprocess.run(["nft", "flush", "ruleset"], capture_output=True)
print(json.dumps([before, every(attempts)]))
"""


@pytest.fixture(scope="module")
def attempted(tmp_path_factory: pytest.TempPathFactory, world: StandIns) -> list[dict[str, str]]:
    """How each attempt ended: at first, and after an attempt at the rules."""
    creto = configure(tmp_path_factory.mktemp("bypasses"), world)
    script = creto.directory / "agent.py"
    script.write_text(ATTEMPTS)
    before = len(world.seen.requests)
    attempts = {name: code.replace("PORT", str(world.http)) for name, code in BYPASSES.items()}
    result = creto.run([sys.executable, str(script), json.dumps(attempts)])
    assert result.status == 0, result.err
    assert len(world.seen.requests) == before
    ended: list[dict[str, str]] = json.loads(result.out)
    return ended


@pytest.mark.parametrize("name", sorted(BYPASSES))
@pytest.mark.parametrize("rules", [0, 1], ids=["as they are", "flushed from inside"])
def test_there_is_no_way_around_the_sidecar(attempted: list[dict[str, str]], name: str, rules: int) -> None:
    assert attempted[rules][name].startswith("stopped: ")


def test_a_host_field_that_differs_from_the_server_name_is_refused(creto: Creto) -> None:
    result = creto.run(["curl", "-sS", "-H", "Host: api.openai.com", "https://api.allowed.test/x"])
    assert "sni_host_mismatch" in result.out
    assert creto.world.seen.requests == []


def test_a_name_answered_elsewhere_does_not_open_an_address(creto: Creto) -> None:
    """An allowed name sent to an address creto never answered for it (curl --resolve skips our DNS)."""
    result = creto.run(
        ["curl", "-sS", "-m", "5", "--resolve", "api.allowed.test:443:203.0.113.20", "https://api.allowed.test/"]
    )
    assert result.status != 0
    assert creto.world.seen.requests == []
    assert any(row["reason"] == "ip_not_resolved_for_name" for row in result.requests)


def test_the_agent_cannot_see_the_sidecar_or_its_state(creto: Creto) -> None:
    code = f"""
import os, pathlib
names = []
for p in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
    try: names.append(p.read_bytes())
    except OSError: pass
print('sidecar visible', any(b'--report-file' in n for n in names))
state = pathlib.Path({str(creto.state)!r})
print('state', list(state.rglob('*')) if state.exists() else [])
for path in ('/proc/1/root', '/proc/1/environ', '/proc/1/mem'):
    try:
        os.listdir(path) if path.endswith('root') else open(path, 'rb').read(1)
        print(path, 'readable')
    except OSError as e: print(path, 'denied')
"""
    result = creto.python(code)
    assert "sidecar visible False" in result.out, result.out + result.err
    assert "state []" in result.out
    assert "readable" not in result.out


def test_secrets_are_nowhere_in_state_report_or_log(creto: Creto) -> None:
    code = """
import openai
openai.OpenAI().chat.completions.create(model="gpt-4o-mini", max_tokens=9,
    messages=[{"role": "user", "content": "PROMPT-TEXT-SECRET"}])
"""
    result = creto.python(code)
    assert result.status == 0, result.err
    everything = str(result.report) + result.err
    for path in creto.state.rglob("*"):
        if path.is_file():
            everything += path.read_bytes().decode("latin-1")
    assert "0123456789abcdefSECRET" not in everything
    assert "PROMPT-TEXT-SECRET" not in everything


def test_whoami_and_usage_answer_inside(creto: Creto) -> None:
    result = creto.run(["curl", "-sS", "http://creto.internal/v1/whoami"])
    assert '"name":"tester"' in result.out, result.err
    assert "/human/" in result.out
    assert creto.run(["curl", "-sSf", "http://creto.internal/v1/usage"]).status == 0


def test_sidecar_killed_mid_run_leaves_the_agent_without_a_way_out_and_loses_nothing(creto: Creto) -> None:
    ready, go = creto.directory / "ready", creto.directory / "go"
    process = creto.start_python(
        f"""
import pathlib, socket, time, urllib.request
for _ in range(5): urllib.request.urlopen('https://api.allowed.test/k').read()
pathlib.Path({str(ready)!r}).write_text('x')
while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.05)
try:
    urllib.request.urlopen('https://api.allowed.test/k', timeout=30); verdict = 'reached'
except Exception as e: verdict = f'failed: {{e!r}}'
pathlib.Path({str(creto.directory / "verdict")!r}).write_text(verdict)
"""
    )
    wait_for(ready)
    process.kill()
    process.wait()
    seen = len(creto.world.seen.requests)
    go.write_text("x")
    creto.kill(process)  # returns when the agent has ended
    verdict = creto.directory / "verdict"
    # Either the agent was ended with its sidecar, or its next connection failed at once; it never got out.
    assert len(creto.world.seen.requests) == seen == 5
    if verdict.exists():
        assert verdict.read_text().startswith("failed: ") and "timed out" not in verdict.read_text()
    again = creto.run(["true"])
    assert again.status == 0, again.err
    usage = creto.call("usage", "--json")
    assert '"requests": 5' in usage.stdout or '"requests":5' in usage.stdout, usage.stdout + usage.stderr
    verify = creto.call("audit", "verify", "--json")
    assert verify.returncode == 0, verify.stdout + verify.stderr
    tail = creto.call("audit", "tail", "--json", "-n", "100")
    assert tail.stdout.count("api.allowed.test") == 5


def test_pip_downloads_from_an_allowed_index(creto: Creto, tmp_path: Path) -> None:
    import zipfile

    from .servers import serving_files

    index = tmp_path / "index"
    (index / "simple" / "demo-pkg").mkdir(parents=True)
    name = "demo_pkg-1.0-py3-none-any.whl"
    with zipfile.ZipFile(index / name, "w") as wheel:
        wheel.writestr("demo_pkg.py", "")
        wheel.writestr("demo_pkg-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: demo-pkg\nVersion: 1.0\n")
        wheel.writestr("demo_pkg-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("demo_pkg-1.0.dist-info/RECORD", "")
    (index / "simple" / "demo-pkg" / "index.html").write_text(f'<a href="/{name}">{name}</a>')
    with serving_files(index, "pypi.example.com") as (port, ca):
        creto.config.write_text(
            creto.config.read_text()
            .replace(f'"pypi.example.com" = "127.0.0.1:{creto.world.https}"', f'"pypi.example.com" = "127.0.0.1:{port}"')
            .replace(str(creto.world.ca), str(ca))
        )
        result = creto.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--disable-pip-version-check", "-d",
             str(tmp_path / "got"), "--index-url", "https://pypi.example.com/simple/", "demo-pkg"],
            PIP_CONFIG_FILE=os.devnull, PIP_EXTRA_INDEX_URL="", PIP_TRUSTED_HOST="", PIP_INDEX_URL="",
        )  # fmt: skip
    assert result.status == 0, result.err
    assert (tmp_path / "got" / name).exists()
    assert {row["decision"] for row in result.to("pypi.example.com")} == {"allow"}
