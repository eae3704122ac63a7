"""Runs a bench of ``make bench`` by itself and gives what it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

BENCHES = Path(__file__).resolve().parents[1]


def run(file: str, folder: Path, *options: str, **env: str) -> list[dict[str, Any]]:
    """The ``benchmarks`` of pytest-benchmark's JSON. Raises RuntimeError with the output of a bench that fails."""
    answer = folder / "benchmark.json"
    command = [sys.executable, "-m", "pytest", str(BENCHES / file), "-q", "-p", "no:cacheprovider", "--timeout=900"]
    done = subprocess.run(
        [*command, f"--benchmark-json={answer}", *options],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
    )
    if done.returncode != 0 or not answer.exists():
        raise RuntimeError(f"{file} failed:\n{done.stdout[-3000:]}{done.stderr[-2000:]}")
    found: list[dict[str, Any]] = json.loads(answer.read_text())["benchmarks"]
    return found
