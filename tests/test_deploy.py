"""The systemd unit is one that systemd takes, and what it runs exists."""

from __future__ import annotations

import configparser
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from creto_proxy.settings import Limits
from creto_proxy.workers.crew import END_S

UNIT = Path(__file__).resolve().parents[1] / "deploy" / "creto.service"


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(UNIT)
    return unit["Service"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (systemd)")
def test_systemd_takes_the_unit_without_a_word() -> None:
    done = subprocess.run(["systemd-analyze", "verify", str(UNIT)], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize("what", ["ExecStart", "ExecReload"])
def test_what_it_runs_is_a_command_of_ours(service: configparser.SectionProxy, what: str) -> None:
    env, creto, *arguments = shlex.split(service[what])
    assert (env, creto) == ("/usr/bin/env", "creto")
    command = [sys.executable, "-m", "creto_proxy", *arguments, "--help"]
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0


def test_systemd_waits_for_as_long_as_draining_may_take(service: configparser.SectionProxy) -> None:
    assert int(service["TimeoutStopSec"]) > Limits().drain_s + 2 * END_S
