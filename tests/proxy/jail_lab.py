"""Runs agents in real jails for the tests: as root, and as a user without any privilege."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
NOBODY = 64321  # an id nobody has: what it owns, only the tests gave it

SOURCES = os.pathsep.join(
    [*(str(ROOT / name) for name in ("proxy", "plugins", "ext")), sysconfig.get_paths()["purelib"]]
)


@cache
def interpreter(uid: int) -> str:
    """A Python that ``uid`` may execute and that finds what the sidecar imports. Skips the test when there is none."""
    for candidate in dict.fromkeys((sys.executable, "/usr/bin/python3", shutil.which("python3") or "")):
        if not candidate:
            continue
        try:
            trial = subprocess.run(
                [candidate, "-c", "import pyroute2, creto_proxy.jail, creto_egress.ruleset"],
                env={"PYTHONPATH": SOURCES},
                capture_output=True,
                **_identity(uid),
            )
        except OSError:
            continue  # an interpreter in somebody's home directory
        if trial.returncode == 0:
            return candidate
    pytest.skip(f"no Python here that uid {uid} may run and that can import creto")


@cache
def require_namespaces(uid: int) -> None:
    trial = subprocess.run(["unshare", "-Urn", "true"], capture_output=True, **_identity(uid))
    if trial.returncode:
        pytest.skip(f"this machine makes no namespaces for uid {uid}: {trial.stderr.decode().strip()}")


def _identity(uid: int) -> dict[str, Any]:
    return {} if uid == os.geteuid() else {"user": uid, "group": uid, "extra_groups": []}


@dataclass
class Lab:
    """One user's place: ``home`` belongs to it. ``run`` starts a sidecar with one agent and gives its report."""

    uid: int
    home: Path

    @property
    def python(self) -> str:
        return interpreter(self.uid)

    def write(self, name: str, text: str) -> Path:
        path = self.home / name
        path.write_text(text)
        os.chown(path, self.uid, self.uid)
        return path

    def directory(self, name: str) -> Path:
        path = self.home / name
        path.mkdir()
        os.chown(path, self.uid, self.uid)
        return path

    def command(self, argv: Sequence[str], **order: Any) -> tuple[list[str], Path, dict[str, str]]:
        """The sidecar's command line, where its report will be, and its environment."""
        name = f"order-{len(list(self.home.glob('order-*')))}"
        path = self.write(
            name,
            json.dumps(
                {
                    "argv": list(argv),
                    "argv_cwd": str(self.home),
                    "env": {},
                    "hidden": [],
                    "readable": {},
                    "ca_bundle": None,
                    "grace_s": 10.0,
                    "rules": True,
                    "uvloop": False,
                }
                | order
            ),
        )
        report = self.home / f"{name}.report"
        environment = {"HOME": str(self.home), "PYTHONPATH": SOURCES, "PATH": os.defpath, "TMPDIR": str(self.home)}
        return [self.python, str(HERE / "jail_driver.py"), str(path), str(report)], report, environment

    def start(self, argv: Sequence[str], **order: Any) -> subprocess.Popen[bytes]:
        command, _, environment = self.command(argv, **order)
        return subprocess.Popen(
            command, env=environment, cwd=self.home, stdin=subprocess.DEVNULL, **_identity(self.uid)
        )

    def run(self, argv: Sequence[str], stdin: bytes = b"", **order: Any) -> tuple[dict[str, Any], str, str]:
        """(report, standard output, standard error) of the agent and its sidecar."""
        command, report, environment = self.command(argv, **order)
        done = subprocess.run(
            command, env=environment, cwd=self.home, input=stdin, capture_output=True, timeout=120, **_identity(self.uid)
        )
        assert report.exists(), done.stderr.decode()
        return json.loads(report.read_text()), done.stdout.decode(), done.stderr.decode()


def lab(uid: int, within: Path) -> Lab:
    """A lab below ``within``, opened so that the user can get there."""
    if uid != os.geteuid() and os.geteuid() != 0:
        pytest.skip("only root can run this as somebody else")
    require_namespaces(uid)
    interpreter(uid)
    home = Path(tempfile.mkdtemp(dir=within))
    os.chown(home, uid, uid)
    return Lab(uid, home)


def users() -> Mapping[str, int]:
    """Who the tests run as: the caller, and when that is root, also a user without privileges."""
    return {"root": 0, "user": NOBODY} if os.geteuid() == 0 else {"user": os.geteuid()}
