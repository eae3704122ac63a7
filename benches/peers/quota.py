"""Do N workers that share one quota of 1,000,000 requests admit exactly 1,000,000 of them?

A check, not a measurement: h2load sends a tenth more requests than the quota allows over 64 connections, and three
witnesses have to agree: the client (answers with 200 and with 429), the upstream (requests it saw) and ``creto quota``.
"""

from __future__ import annotations

import re
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from peers import creto, programs
from peers.load import Say, settle
from peers.settings import Settings

WORKERS = (2, 4)
CONNECTIONS = 64


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    """Raises nothing when the numbers differ: the row says so, and the run ends with a failure."""
    known = creto.knows_workers()
    rows = []
    for workers in WORKERS if known else (0,):
        with ExitStack() as stack:
            here = folder / str(workers)
            to = stack.enter_context(programs.upstream(here / "upstream", cpu=None))
            running = creto.sidecar(here / "creto", to, workers=workers, limit=settings.quota, window="total", cpu=None)
            sidecar = stack.enter_context(running)
            say(f"{settings.quota:,} requests admitted, {settings.quota * 11 // 10:,} sent, {workers or 1} workers ...")
            row = {"workers": workers, **hammer(sidecar, to, settings.quota)}
            rows.append(row)
            say(
                f"... client: {row['ok']:,} x 200, {row['refused']:,} x 429; upstream: {row['upstream']:,}; "
                f"creto counts {row['used']}: {'exact' if row['exact'] else 'NOT EXACT'} ({row['seconds']:.0f} s)"
            )
    why = "" if known else "this creto has no workers: one process was hammered"
    return {"quota": settings.quota, "rows": rows, "skipped": why, "failed": not all(row["exact"] for row in rows)}


def hammer(sidecar: creto.Sidecar, to: programs.Upstream, quota: int) -> dict[str, Any]:
    before, begun = seen(to), time.monotonic()
    sent = quota + quota // 10
    command = [programs.program("h2load", "nghttp2-client"), "--h1", "-t1", f"-c{CONNECTIONS}", f"-n{sent}", "-N60s"]
    output = subprocess.run(
        [*command, sidecar.peer().url("/")], check=True, capture_output=True, text=True, timeout=60 + sent / 100
    ).stdout
    seconds = time.monotonic() - begun
    settle(sidecar.pid, 600)
    status = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", output)
    if status is None:
        raise RuntimeError(f"h2load said: {output}")
    # Reading the count is a request, too.
    upstream = seen(to) - before - 1
    used = sorted({int(budget["used"]) for budget in sidecar.command("quota")["budgets"]})
    ok, refused, broken = int(status[1]), int(status[3]), int(status[2]) + int(status[4])
    exact = ok == upstream == quota and refused == sent - quota and not broken and used == [quota]
    return {
        "ok": ok,
        "refused": refused,
        "broken": broken,
        "unanswered": sent - ok - refused - broken,
        "upstream": upstream,
        "used": ", ".join(f"{each:,}" for each in used),
        "exact": exact,
        "seconds": seconds,
    }


def seen(to: programs.Upstream) -> int:
    """Requests the upstream has answered so far, this one included."""
    with urlopen(f"http://127.0.0.1:{to.plain}/status", timeout=10) as answer:
        return int(answer.read().decode().split()[9])
