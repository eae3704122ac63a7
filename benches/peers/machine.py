"""Where and with what was measured: without it a number says nothing."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import harness

from peers.programs import INSTALLED


def conditions(command: str) -> dict[str, Any]:
    """The machine, the moment and the command."""
    return {
        "command": command,
        "at": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cores": len(os.sched_getaffinity(0)),
        "processor": _processor(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "kernel": f"{platform.system()} {platform.release()}",
        "system": _system(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """The version of every program and peer that is here."""
    found = {"creto": version("creto-enablement"), "uvloop": version("uvloop")}
    commands = (
        ("nginx", ["nginx", "-v"]),
        ("haproxy", ["haproxy", "-v"]),
        ("wrk", ["wrk", "-v"]),
        ("h2load", ["h2load", "--version"]),
        ("OpenSSL", ["openssl", "version"]),
    )
    for name, (program, *arguments) in commands:
        if path := harness.find(program):
            found[name] = _number([path, *arguments])
    for peer in ("mitmproxy", "aiohttp", "litellm"):
        python = INSTALLED / f"venv-{peer}" / "bin" / "python"
        if python.exists():
            found[peer] = _number([str(python), "-c", f"import importlib.metadata as m; print(m.version('{peer}'))"])
    return found


def _number(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    match = re.search(r"\d+\.\d+(\.\d+)*[a-z]?", done.stdout + done.stderr)
    return match[0] if match else "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return " ".join(line.partition(":")[2].split())
    return platform.machine()


def _system() -> str:
    path = Path("/etc/os-release")
    match = re.search(r'^PRETTY_NAME="?([^"\n]*)', path.read_text(), re.M) if path.exists() else None
    return match[1] if match else platform.platform()
