"""What tests of every part share."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from creto_proxy.testing import FakeClock

ROOT = Path(__file__).resolve().parents[1]

# How long an example takes says something of the machine only.
settings.register_profile("creto", settings.default, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
settings.load_profile("creto")


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture(scope="session")
def stranger_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with somebody else's distribution, installed by pip; put it on ``sys.path`` to have it found."""
    source = tmp_path_factory.mktemp("stranger") / "source"  # a copy: building leaves files behind
    shutil.copytree(ROOT / "tests" / "thirdparty", source, ignore=shutil.ignore_patterns("__pycache__"))
    site = source.parent / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", str(site), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    return site
