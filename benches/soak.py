"""Does creto hold for half an hour: no leak, no lost and no doubled outcome, under load, reloads, killed workers
and slow clients?

    make soak                  30 minutes; MINUTES=3 for a short one
    python benches/soak.py --minutes 30

First the capacity is measured: requests as fast as they are answered, over the time until ledger and audit log have
caught up with them. Then 70 % of that runs for the given time, with a reload (SIGHUP) every minute, SIGKILL to the
youngest worker every two, clients that send a head byte by byte and clients that hardly read. At the end every answered
request must have exactly one outcome in the journal, one row in the ledger and one entry in the audit log; no request
may have been lost but those on a killed worker; and neither all processes together nor one that lived through may have
grown by more than 3 % from the first third to the last. Written to .benchmarks/soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import creto, programs, report
from peers.account import Account, account, await_derived, behind
from peers.load import serving, tree
from peers.machine import conditions
from peers.slow import SlowClients

SHARE = 0.7
CONNECTIONS = 50
CAPACITY_S = 15.0
SAMPLE_S = 5.0
TELL_S = 30.0
RELOAD_S = 60.0
KILL_S = 120.0
# Kills fall between two reloads, so that a lost connection can be told to come from one or the other.
KILL_OFFSET_S = 30.0
NEAR_S = 5.0
# How long ledger and audit log may take to catch up after the load.
DERIVED_S = 600.0
GROWTH = 0.03
# Less of the load than this, and it was not the load that is claimed.
SHARE_MET = 0.9
RESULT = Path(".benchmarks/soak.json")


@dataclass(slots=True)
class Course:
    """What happened, in seconds since ``begun`` (Unix time). memory: (seconds, {process: resident bytes}).
    roles: process -> what it is. reloadable: it caught SIGHUP.
    """

    memory: list[tuple[float, dict[int, int]]] = field(default_factory=list)
    load: list[tuple[float, int, int]] = field(default_factory=list)
    roles: dict[int, str] = field(default_factory=dict)
    reloads: list[float] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    begun: float = field(default_factory=time.time)
    reloadable: bool = False


class Client:
    """``peers.steady`` in a process of its own; ``last`` is the last line it printed."""

    def __init__(self, sidecar: creto.Sidecar, rate: float, log: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "peers.steady",
            str(sidecar.reverse),
            str(CONNECTIONS),
            str(rate),
            str(log),
            "/up/s",
        ]
        path = os.pathsep.join([str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        self.last: dict[str, Any] = {"answered": 0, "failed": 0, "lost": 0, "closed": 0, "p99_us": 0}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.last = json.loads(line)

    def stop(self) -> dict[str, Any]:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)
        self._reader.join(10)
        return self.last


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def capacity(folder: Path, to: programs.Upstream, workers: int, seconds: float) -> float:
    """Requests per second that can be sustained: answered, and derived from. Raises RuntimeError for none."""
    with creto.sidecar(folder, to, workers=workers, cpu=None) as sidecar:
        begun = time.monotonic()
        client = Client(sidecar, 0, folder / "capacity.log")
        time.sleep(seconds)
        answered = client.stop()["answered"]
        if not answered:
            raise RuntimeError(f"nothing was answered:\n{programs.tail(folder / 'log')}")
        answering = time.monotonic() - begun
        if not await_derived(sidecar.state, DERIVED_S):
            raise RuntimeError(
                f"{behind(sidecar.state):,} bytes of the journal are not derived from after {DERIVED_S:g} s"
            )
        total = time.monotonic() - begun
    say(
        f"answered {answered / answering:,.0f} requests/s, "
        f"{answered / total:,.0f}/s with the time until ledger and audit log had caught up"
    )
    return float(answered / total)


def reloads_on_hup(pid: int) -> bool:
    """Whether the process catches SIGHUP; one that does not would end."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) & 1 << (signal.SIGHUP - 1))
    return False


def resident(pid: int) -> dict[int, int]:
    """Resident bytes of each process of the tree."""
    found = {}
    for process in tree(pid):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found[process] = int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return found


def youngest(processes: set[int]) -> int | None:
    def begun(process: int) -> int:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return -1

    return max(processes, key=begun, default=None)


def soak(sidecar: creto.Sidecar, client: Client, seconds: float, rate: float) -> Course:
    """Lets it run and disturbs it."""
    course = Course(reloadable=reloads_on_hup(sidecar.pid))
    killable = sidecar.workers > 1
    sample, told, reload_at, kill_at = 0.0, 0.0, RELOAD_S, KILL_S - KILL_OFFSET_S
    while (now := time.time() - course.begun) < seconds:
        if client.process.poll() is not None:
            raise RuntimeError(f"the client ended with status {client.process.returncode}")
        if not resident(sidecar.pid).get(sidecar.pid):
            raise RuntimeError(f"creto ended by itself:\n{programs.tail(sidecar.config.with_name('log'))}")
        if now >= sample:
            sample += SAMPLE_S
            memory = resident(sidecar.pid)
            course.memory.append((now, memory))
            course.load.append((now, client.last["answered"], client.last["p99_us"]))
            course.roles.update(dict.fromkeys(memory, "worker"))
            course.roles[sidecar.pid] = "controller" if sidecar.workers else "creto"
        if now >= told:
            told += TELL_S
            tell(course, client, now, seconds, rate)
        if course.reloadable and now >= reload_at:
            reload_at += RELOAD_S
            os.kill(sidecar.pid, signal.SIGHUP)
            course.reloads.append(now)
        if killable and now >= kill_at:
            kill_at += KILL_S
            victim = youngest(serving(sidecar.pid, sidecar.reverse) - {sidecar.pid})
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                course.kills.append(now)
        time.sleep(0.25)
    return course


def tell(course: Course, client: Client, now: float, seconds: float, rate: float) -> None:
    at, memory = course.memory[-1]
    past = next((entry for entry in course.load if at - entry[0] <= TELL_S), course.load[-1])
    speed = (course.load[-1][1] - past[1]) / max(1e-9, at - past[0])
    kept = ", ".join(f"{course.roles[process]} {size >> 20} MiB" for process, size in memory.items())
    say(
        f"{int(now) // 60:3}:{int(now) % 60:02} of {int(seconds) // 60}:{int(seconds) % 60:02}  "
        f"{speed:,.0f} of {rate:,.0f} requests/s, p99 {client.last['p99_us'] / 1000:.1f} ms, "
        f"{client.last['answered']:,} answered, {client.last['lost']} requests lost, "
        f"{len(course.reloads)} reloads, {len(course.kills)} kills; {kept}"
    )


def growth(course: Course, seconds: float) -> dict[str, dict[str, float]]:
    """Median resident bytes in the first third and in the last: of all processes together, since a reload begins new
    workers, and of each that lived on from the warm-up."""
    warm = seconds / 6
    kept = [(at, memory) for at, memory in course.memory if at >= warm]
    if len(kept) < 6:
        return {}
    third = len(kept) // 3
    names: dict[str, dict[str, float]] = {}
    series = {"all processes": [sum(memory.values()) for _, memory in kept]}
    for process in set.intersection(*(set(memory) for _, memory in kept)):
        series[f"{course.roles[process]} {process}"] = [memory[process] for _, memory in kept]
    for name, sizes in series.items():
        first, last = statistics.median(sizes[:third]), statistics.median(sizes[-third:])
        names[name] = {"first": first, "last": last, "growth": last / first - 1}
    return names


def unexplained(course: Course, found: Account) -> int:
    """Requests whose connection broke although no worker had been killed just before."""
    return sum(not any(-1 <= at - course.begun - kill <= NEAR_S for kill in course.kills) for at in found.broken_at)


def findings(
    course: Course,
    found: Account,
    grown: dict[str, dict[str, float]],
    slow: dict[str, Any],
    rate: float,
    seconds: float,
) -> list[str]:
    """What must not have happened, each as a sentence; empty when all is well."""
    problems = list(found.problems)
    if found.answered < SHARE_MET * rate * seconds:
        problems.append(f"only {found.answered:,} requests were answered, {rate * seconds:,.0f} were to be sent")
    problems += [
        f"{name} grew by {each['growth']:.1%}, from {each['first'] / 2**20:.1f} to {each['last'] / 2**20:.1f} MiB"
        for name, each in grown.items()
        if each["growth"] > GROWTH
    ]
    if not grown:
        problems.append("too short to tell whether memory grows")
    if broken := unexplained(course, found):
        problems.append(f"{broken} connections broke under a request although no worker had been killed")
    if slow["stuck"]:
        problems.append(f"{slow['stuck']} clients that sent a head byte by byte were not cut off in time")
    if slow["slow_bytes_read"] < 1 << 20:
        problems.append(f"slow readers got only {slow['slow_bytes_read']:,} bytes")
    return problems


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    base = Path(".benchmarks/peers").resolve()
    base.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="soak-", dir=base) as folder:
        yield Path(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="A long run under load, reloads, killed workers and slow clients.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--capacity-seconds", type=float, default=CAPACITY_S)
    options = parser.parse_args()
    seconds = options.minutes * 60
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    programs.most_files()
    with workspace() as folder:
        to_files = folder / "upstream"
        with programs.upstream(to_files, cpu=None) as to:
            (to.files / "large").write_bytes(bytes(4 << 20))
            full = capacity(folder / "capacity", to, options.workers, options.capacity_seconds)
            rate = full * SHARE
            with creto.sidecar(folder / "creto", to, workers=options.workers, cpu=None) as sidecar:
                say(f"{seconds / 60:g} minutes at {rate:,.0f} requests/s over {CONNECTIONS} connections")
                client = Client(sidecar, rate, folder / "steady.log")
                slow = SlowClients(sidecar.peer())
                slow.start()
                try:
                    course = soak(sidecar, client, seconds, rate)
                finally:
                    totals = client.stop()
                    slow.stop()
                say("stopped; waiting for ledger and audit log")
                await_derived(sidecar.state, DERIVED_S)
                left, state = behind(sidecar.state), sidecar.state
        found = account(state, folder / "steady.log", say)
        log = programs.tail(folder / "creto" / "log", 20)
    grown = growth(course, seconds)
    if left:
        found.problems.append(f"{left:,} bytes of the journal were not derived from {DERIVED_S:g} s after the load")
    problems = findings(course, found, grown, slow.result(), rate, seconds)
    skipped = []
    if not course.reloadable:
        skipped.append("no reloads: this creto does not catch SIGHUP")
    if not sidecar.workers:
        skipped.append("no worker was killed: this creto has no workers")
    document = {
        "conditions": conditions(f"make soak MINUTES={options.minutes:g}"),
        "minutes": options.minutes,
        "workers": sidecar.workers,
        "capacity_per_second": full,
        "rate_per_second": rate,
        "share": SHARE,
        "connections": CONNECTIONS,
        "client": totals,
        "account": found.document(),
        "growth": grown,
        "slow_clients": slow.result(),
        "reloads": course.reloads,
        "kills": course.kills,
        "unexplained_breaks": unexplained(course, found),
        "memory": [
            {"at": round(at, 1), "bytes": {f"{course.roles[pid]} {pid}": size for pid, size in memory.items()}}
            for at, memory in course.memory
        ],
        "load": course.load,
        "skipped": skipped,
        "problems": problems,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1))
    report.write()
    for line in (*skipped, *problems):
        say(line)
    if problems and log:
        print(log, file=sys.stderr)
    say("soak: " + ("FAILED" if problems else "held") + f"; {RESULT}, {report.PAGE}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
