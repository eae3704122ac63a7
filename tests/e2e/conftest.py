"""Runs the real ``creto`` command against real stand-in servers: nothing here is mocked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
sys.path.insert(0, str(DEMO))

from standins import StandIns, standins  # noqa: E402

HOSTS = [
    "api.openai.com",
    "api.anthropic.com",
    "payments.example.com",
    "api.allowed.test",
    "other.allowed.test",
    "git.example.com",
    "pypi.example.com",
    "mcp.example.com",
]

POLICY = """
@id("use-allowed-hosts")
permit (principal is Creto::Agent, action in Creto::Action::"egress", resource is Creto::Host);
@id("refunds-need-a-person") @require_oversight("payments")
forbid (principal, action == Creto::Action::"httpWrite", resource == Creto::Host::"payments.example.com")
unless { context has approval && context.approval.satisfied && context.approval.fingerprint == context.fingerprint };
"""

# On a machine that is slow or busy nothing is refused for that, but where a test is about it.
PATIENT = {"CRETO_LIMITS__STAGE_DEADLINE_MS": "5000", "CRETO_PROTECT__SHED_LAG_MS": "0"}


@dataclass
class Result:
    """How ``creto run`` ended: the child's status, both streams, and the report it wrote."""

    status: int
    out: str
    err: str
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def requests(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = self.report["requests"]
        return rows

    def to(self, host: str) -> list[dict[str, Any]]:
        return [r for r in self.requests if f"//{host}:" in r["destination"]]


@dataclass
class Creto:
    """One configured creto: its files, and ways to run the command."""

    directory: Path
    world: StandIns
    config: Path
    policies: Path
    state: Path
    environment: dict[str, str]
    started: list[subprocess.Popen[str]] = field(default_factory=list, kw_only=True)

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "creto_proxy", "--config", str(self.config), *arguments]

    def call(self, *arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Any sub-command, from a process of its own, as an operator would type it."""
        return subprocess.run(
            self.command(*arguments), env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def run_command(self, argv: Sequence[str], *options: str) -> list[str]:
        report = ["--report", "json", "--report-file", str(self.directory / "report.json")]
        return self.command("run", "--policy", str(self.policies), "--name", "tester", *report, *options, "--", *argv)

    def run(self, argv: Sequence[str], *options: str, timeout: float = 120, **environment: str) -> Result:
        """``creto run -- argv`` to its end."""
        done = subprocess.run(
            self.run_command(argv, *options),
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
            cwd=self.directory,
        )
        path = self.directory / "report.json"
        report = json.loads(path.read_text()) if path.exists() else {}
        return Result(done.returncode, done.stdout, done.stderr, report)

    def start(self, argv: Sequence[str], *options: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """``creto run -- argv``, in a session of its own. It does not outlive the test, however that ends."""
        process = subprocess.Popen(
            self.run_command(argv, *options), env=self.environment, cwd=self.directory, text=True,
            stdout=stdout, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def start_python(self, code: str, *arguments: str, options: Sequence[str] = (), stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
        """``creto run -- python`` on a script with this text."""
        script = self.directory / "agent.py"
        script.write_text(code)
        return self.start([sys.executable, str(script), *arguments], *options, stdout=stdout)

    def kill(self, process: subprocess.Popen[str]) -> str:
        """Ends the sidecar at once. What was on standard output when its agent, which has the other end of the pipe, had
        ended too."""
        process.kill()
        out, _ = process.communicate(timeout=60)
        return out or ""

    def python(self, code: str, *options: str, timeout: float = 120, **environment: str) -> Result:
        """``creto run -- python`` on a script with this text."""
        script = self.directory / "agent.py"
        script.write_text(code)
        return self.run([sys.executable, str(script)], *options, timeout=timeout, **environment)

    def add(self, toml: str) -> None:
        self.config.write_text(self.config.read_text() + toml)


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StandIns]:
    with standins(tmp_path_factory.mktemp("world"), HOSTS) as running:
        yield running


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """What is begun in the background ignores SIGINT, and so would everything that it begins."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def creto(tmp_path: Path, world: StandIns) -> Iterator[Creto]:
    """A creto with every stand-in host allowed and pinned to loopback."""
    world.seen.requests.clear()
    configured = configure(tmp_path, world)
    yield configured
    for process in configured.started:
        configured.kill(process)


def configure(tmp_path: Path, world: StandIns) -> Creto:
    """A creto in that directory, with every stand-in host allowed and pinned to loopback."""
    policies = tmp_path / "policies"
    policies.mkdir()
    (policies / "test.cedar").write_text(POLICY)
    pins = "\n".join(f'"{host}" = "127.0.0.1:{world.https}"' for host in HOSTS if host != "other.allowed.test")
    allow = ", ".join(f'"{host}:443"' for host in HOSTS if host != "other.allowed.test")
    config = tmp_path / "creto.toml"
    state = tmp_path / "state"
    config.write_text(
        f"""
[common]
org = "acme"
state_dir = "{state}"
[egress]
allow = [{allow}, "plain.allowed.test:80"]
upstream_ca = "{world.ca}"
[egress.resolve]
{pins}
"plain.allowed.test" = "127.0.0.1:{world.http}"
[oversight.profiles.payments]
approvers = ["{_user()}"]
quorum = 1
timeout_s = 60
"""
    )
    environment = {
        **os.environ,
        "OPENAI_API_KEY": "sk-live-0123456789abcdefSECRET",
        "ANTHROPIC_API_KEY": "sk-ant-0123456789abcdefSECRET",
        "NO_COLOR": "1",
        **PATIENT,
    }
    return Creto(tmp_path, world, config, policies, state, environment)


def _user() -> str:
    import getpass

    return getpass.getuser()

def wait_for(path: Path, timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path.name} did not appear"
        time.sleep(0.02)
