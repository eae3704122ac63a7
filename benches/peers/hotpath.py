"""What do policy and quota cost, cached, over 4 levels x 3 meters, called from Python and called in C?

Runs the bench of the compiled tables (``benches/bench_hotpath.py``) and takes its numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peers.benchmark import run
from peers.settings import Say, Settings

BATCH = 500


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    rows, loops = [], []
    for bench in run("bench_hotpath.py", folder, "-k", "compiled and (policy_and_quota or loop_in_c)"):
        info, stats = bench["extra_info"], bench["stats"]
        if "in_c_ns" in info:
            loops.append({"held": bench["params"]["held"], "rounds": stats["rounds"], **info})
            say(f"in C, {loops[-1]['held']} held at once: {info['in_c_ns'][0]:,.0f} ns each")
            continue
        row = {"name": bench["name"], **info, "mean_ns": stats["median"] * 1e9 / BATCH, "rounds": stats["rounds"]}
        rows.append(row)
        say(f"{row['name']}: p50 {row['p50_ns']:,} ns, p99 {row['p99_ns']:,} ns, mean {row['mean_ns']:,.0f} ns")
    return {"rows": rows, "loops": loops}
