"""How much later does an event of a stream arrive through creto than without it?

Runs the bench of event streams (``benches/bench_sse.py``) and takes its numbers; without that file there are none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.benchmark import BENCHES, run
from peers.load import middle
from peers.markdown import plural, spread
from peers.settings import Say, Settings


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    if not (BENCHES / "bench_sse.py").exists():
        say("there is no benches/bench_sse.py")
        return {"rows": []}
    rounds, seconds = str(settings.rounds), str(settings.seconds)
    rows = [
        {
            "name": f"{way}, {plural(bench['params']['streams'], 'stream')}",
            "ours": way.startswith("creto"),
            "p50_us": middle([values["p50_us"]]),
            "p99_us": middle([values["p99_us"]]),
            "added_p50_us": middle(values["added_p50_us"]),
            "added_p99_us": middle(values["added_p99_us"]),
        }
        for bench in run("bench_sse.py", folder, CRETO_BENCH_ROUNDS=rounds, CRETO_BENCH_SECONDS=seconds)
        for way, values in bench["extra_info"].items()
    ]
    for row in rows:
        say(f"{row['name']}: p99 {spread(row['p99_us'])} us, added {spread(row['added_p99_us'])}")
    return {"rows": rows}
