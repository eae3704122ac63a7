"""Puts Autobahn's WebSocket test suite into FOLDER and a program ``FOLDER/wstest`` that runs it.

    python tests/e2e/install_autobahn.py FOLDER

The suite is written in Python 2.7, so it needs that interpreter with pip: PYTHON27, ``python2.7``, or one that pyenv
has. Without one, or without an index to install from, it says so and the tests that need it are skipped.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

REQUIREMENT = "autobahntestsuite==25.10.1"
RUN = "import site, sys; site.addsitedir({site!r}); sys.argv[0] = 'wstest'; from autobahntestsuite.wstest import run; run()"


def candidates() -> Iterator[str]:
    """Interpreters that may be Python 2.7, the most explicitly chosen first."""
    if os.environ.get("PYTHON27"):
        yield os.environ["PYTHON27"]
    yield "python2.7"
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    yield from sorted(map(str, pyenv.glob("versions/2.7*/bin/python2.7")))


def works(python: str) -> bool:
    """Whether it runs and has pip; a pyenv shim may stand for nothing."""
    try:
        return subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def install(folder: Path) -> str:
    """Why it could not be installed, "" when it was."""
    python = next(filter(works, candidates()), None)
    if python is None:
        return "there is no Python 2.7 with pip here (set PYTHON27)"
    packages = folder / "packages"
    command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-cache-dir"]
    done = subprocess.run(
        [*command, "--target", str(packages), REQUIREMENT], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        return f"pip of Python 2.7 failed: {done.stderr.strip().splitlines()[-1:]}"
    program = folder / "wstest"
    code = RUN.format(site=str(packages.absolute()))
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(python)} -W ignore -c {shlex.quote(code)} "$@"\n')
    program.chmod(0o755)
    return ""


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    problem = install(target)
    if problem:
        print(f"Autobahn's test suite was not installed, its tests will be skipped: {problem}", file=sys.stderr)
