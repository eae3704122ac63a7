"""Where does creto spend the CPU of a governed request?

py-spy samples the process that carries the requests, compiled and system code included, while wrk loads it; the share
of a function is that of the samples in which it was the one running. Time in a system call counts for the call.
"""

from __future__ import annotations

import collections
import re
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import creto, programs
from peers.cpu import GETS
from peers.load import Client, Say, serving
from peers.settings import Settings

RATE = 500
TOP = 15


def measure(folder: Path, settings: Settings, say: Say) -> dict[str, Any]:
    try:
        sampler = programs.in_environment("py-spy", "py-spy")
    except programs.NotInstalled as error:
        return {"missing": [str(error)]}
    seconds = max(2, round(settings.seconds))
    with ExitStack() as stack:
        to = stack.enter_context(programs.upstream(folder / "upstream"))
        sidecar = stack.enter_context(creto.sidecar(folder / "creto", to))
        client, load = Client(folder, to.pid), GETS[0]
        loading = threading.Thread(target=client.wrk, args=(sidecar.peer(), load, seconds + 4))
        loading.start()
        time.sleep(1.5)
        servers = serving(sidecar.pid, sidecar.reverse)
        samples = awake(sampled(sampler, max(servers), seconds, folder / "stacks"))
        loading.join()
    path, total = on_the_path(samples), sum(samples.values()) or 1
    result: dict[str, Any] = {"title": load.title, "seconds": seconds, "samples": total}
    result["threads"] = shares(by_thread(samples), total)
    result["running"] = shares(innermost(path), sum(path.values()))
    result["within"] = shares(within(path), sum(path.values()), below=0.95)
    for row in (*result["running"][:6], *result["within"][:6]):
        say(f"{row['share']:6.1%}  {row['name']}")
    return result


def sampled(sampler: str, pid: int, seconds: int, path: Path) -> collections.Counter[str]:
    """How often each stack was seen, as ``frame;frame;...`` from the outermost on. Raises RuntimeError."""
    command = [sampler, "record", "--native", "--threads", "--format", "raw", "--rate", str(RATE)]
    command += ["--duration", str(seconds), "--output", str(path), "--pid", str(pid)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=seconds + 60)
    if done.returncode != 0:
        raise RuntimeError(f"py-spy: {done.stderr or done.stdout}")
    found: collections.Counter[str] = collections.Counter()
    for line in path.read_text().splitlines():
        stack, _, count = line.rpartition(" ")
        found[stack] += int(count)
    return found


def frames_of(stack: str) -> tuple[str, list[str]]:
    """(name of the thread, frames without line numbers)."""
    thread, *frames = stack.split(";")
    return thread.partition(": ")[2] or "MainThread", [re.sub(r":\d+\)$", ")", frame) for frame in frames]


def awake(samples: collections.Counter[str]) -> collections.Counter[str]:
    """Without threads that wait: what has no name in the C library is its waiting for a lock."""
    kept = {stack: count for stack, count in samples.items() if not re.match(r"0x\w+ \(libc", stack.split(";")[-1])}
    return collections.Counter(kept)


def by_thread(samples: collections.Counter[str]) -> collections.Counter[str]:
    found: collections.Counter[str] = collections.Counter()
    for stack, count in samples.items():
        found[frames_of(stack)[0]] += count
    return found


def on_the_path(samples: collections.Counter[str]) -> collections.Counter[str]:
    """Those of the thread that carries requests."""
    return collections.Counter({k: count for k, count in samples.items() if frames_of(k)[0] == "MainThread"})


def innermost(samples: collections.Counter[str]) -> collections.Counter[str]:
    """Samples in which each function was the one running."""
    found: collections.Counter[str] = collections.Counter()
    for stack, count in samples.items():
        found[frames_of(stack)[1][-1]] += count
    return found


def within(samples: collections.Counter[str]) -> collections.Counter[str]:
    """Samples in which each of creto's own functions was running or waited for what it called."""
    found: collections.Counter[str] = collections.Counter()
    for stack, count in samples.items():
        for frame in {each for each in frames_of(stack)[1] if re.search(r"\(creto_", each)}:
            found[frame] += count
    return found


def shares(counts: collections.Counter[str], total: int, below: float = 1.01) -> list[dict[str, Any]]:
    """The largest shares, without those that hold nearly everything and so say nothing."""
    found = [{"name": name, "share": count / max(1, total)} for name, count in counts.most_common()]
    return [row for row in found if float(str(row["share"])) < below][:TOP]
