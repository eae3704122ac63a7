"""Runs the questions, writes .benchmarks/peers.json and, from it, docs/performance.md and its plots.

    python -m peers [--rounds 5] [--seconds 4] [--only cpu,tls,...] [--draft]

A question that is not run keeps the answer it had. Ends with 1 when a check failed: an inexact quota, an answer that is
not a 200.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import cpu, hotpath, idle, latency, profile, programs, quota, report, sse, tls
from peers.machine import conditions, versions
from peers.settings import Say, Settings

QUESTIONS: dict[str, Callable[[Path, Settings, Say], dict[str, Any]]] = {
    "cpu": cpu.measure,
    "tls": tls.measure,
    "latency": latency.measure,
    "hotpath": hotpath.measure,
    "sse": sse.measure,
    "idle": idle.measure,
    "quota": quota.measure,
    "profile": profile.measure,
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m peers", description="Creto beside its peers.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--only", default="", help=f"some of {','.join(QUESTIONS)}; report: only write the page again")
    parser.add_argument("--connections", type=int, default=10_000, help="idle connections")
    parser.add_argument("--draft", action="store_true", help="keep and write everything in .benchmarks/draft instead")
    parser.add_argument("--quota", type=int, default=1_000_000, help="requests that the contended budget admits")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    chosen = [name for name in options.only.split(",") if name] or list(QUESTIONS)
    if unknown := set(chosen) - {*QUESTIONS, "report"}:
        print(f"no such question: {', '.join(sorted(unknown))}; there are {', '.join(QUESTIONS)}", file=sys.stderr)
        return 2
    settings = Settings(options.rounds, options.seconds, options.connections, options.quota)
    places = report.DRAFT if options.draft else report.PUBLISHED
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    command = f"make bench-peers ROUNDS={options.rounds} SECONDS={options.seconds:g}"
    command += f" ONLY={options.only}" if options.only else ""
    others = {"connections": settings.connections, "quota": settings.quota}
    more = [f"--{name} {value}" for name, value in others.items() if value != getattr(Settings(), name)]
    command += f" ARGS='{' '.join(more)}'" if more else ""
    failed = []
    programs.INSTALLED.mkdir(parents=True, exist_ok=True)
    for name in chosen:
        if name not in QUESTIONS:
            continue
        say(f"{name}: {question(QUESTIONS[name])}")
        where = {**conditions(command), "rounds": options.rounds, "seconds": options.seconds}
        try:
            with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=programs.INSTALLED) as folder:
                result = QUESTIONS[name](Path(folder), settings, say)
        except (RuntimeError, OSError, programs.NotInstalled, subprocess.SubprocessError) as error:
            failed.append(f"{name}: {error}")
            say(f"{failed[-1]}; what it answered before is kept")
            continue
        if problem := wrong(name, result):
            failed.append(problem)
            say(problem)
        for reason in result.get("missing", ()):
            say(f"left out: {reason}")
        keep(places, name, {"conditions": where, "versions": versions(), **result})
    for line in report.write(places):
        print(line)
    say(f"{places.page}, {places.peers}")
    for problem in failed:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if failed else 0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def question(measure: Callable[..., Any]) -> str:
    """The first sentence of the file that answers it."""
    return (sys.modules[measure.__module__].__doc__ or "").split("\n\n")[0].replace("\n", " ")


def wrong(name: str, result: dict[str, Any]) -> str:
    """What makes the run fail: a check that did not hold, or a peer that answered anything but 200."""
    if result.get("failed"):
        return f"{name}: the check did not hold"
    rows = [row for load in result.get("loads", ()) for row in load["rows"] if row["errors"]]
    return f"{name}: errors from {', '.join(sorted({row['name'] for row in rows}))}" if rows else ""


def keep(places: report.Places, name: str, answer: dict[str, Any]) -> None:
    known = json.loads(places.peers.read_text()) if places.peers.exists() else {}
    known[name] = answer
    places.kept.mkdir(parents=True, exist_ok=True)
    beside = places.peers.with_suffix(".new")
    beside.write_text(json.dumps(known, indent=1))
    os.replace(beside, places.peers)


if __name__ == "__main__":
    sys.exit(main())
