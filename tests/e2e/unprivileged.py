"""Runs ``creto run`` as a user without any privilege, although the tests run as root."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from .conftest import Creto

NOBODY = 65534
ROOTS = [str(Path(__file__).resolve().parents[2] / root) for root in ("proxy", "plugins", "ext")]


def interpreter() -> str:
    """A Python of this minor version that another user may execute; the one of a root-only pyenv is not."""
    name = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (f"/usr/bin/{name}", f"/usr/local/bin/{name}", sys.executable):
        done = subprocess.run([candidate, "-c", ""], user=NOBODY, group=NOBODY, extra_groups=[], check=False, cwd="/") if (
            shutil.which(candidate)
        ) else None  # fmt: skip
        if done is not None and done.returncode == 0:
            return candidate
    pytest.skip(f"no {name} on this machine can be executed by an unprivileged user")


def as_nobody(creto: Creto, argv: Sequence[str], *options: str) -> subprocess.CompletedProcess[str]:
    """``creto run -- argv`` under uid 65534 in a directory of its own."""
    home = Path("/var/tmp") / f"creto-nobody-{os.getpid()}"
    home.mkdir(mode=0o755, exist_ok=True)
    try:
        config = home / "creto.toml"
        ca = home / "upstream.pem"
        ca.write_bytes(creto.world.ca.read_bytes())
        text = creto.config.read_text().replace(str(creto.world.ca), str(ca))
        config.write_text(text.replace(str(creto.state), str(home / "state")))
        policies = home / "policies"
        shutil.copytree(creto.policies, policies, dirs_exist_ok=True)
        for path in (home, config, ca, policies, *policies.iterdir()):
            os.chown(path, NOBODY, NOBODY)
        packages = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *ROOTS]
        environment = {
            "HOME": str(home),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PYTHONPATH": os.pathsep.join(dict.fromkeys(packages)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "NO_COLOR": "1",
        }
        command = [interpreter(), "-m", "creto_proxy", "--config", str(config), "run", "--policy", str(policies),
                   "--name", "tester", *options, "--", *argv]  # fmt: skip
        return subprocess.run(
            command, env=environment, cwd=home, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True,
            text=True, timeout=100, check=False,
        )  # fmt: skip
    finally:
        shutil.rmtree(home, ignore_errors=True)
