"""Does creto hold for half an hour: no leak, no lost and no doubled outcome, under load, reloads, killed workers
and slow clients?

    make soak                  30 minutes; MINUTES=3 for a short one
    python benches/soak.py --minutes 30

First the capacity is measured: requests as fast as they are answered, over the time until ledger and audit log have
caught up with them. Then 70 % of that runs for the given time, with clients that send a head byte by byte, clients that
hardly read, and SIGKILL to the youngest worker every two minutes. In the first third every process is replaced once a
minute (SIGHUP with nothing changed); from then on policies change once a minute and are taken in place, so that what
leaks slowly has two thirds of the time to show.

At the end every answered request must have exactly one outcome in the journal, one row in the ledger and one entry in
the audit log; no request may have been lost but those on a killed worker; the journal must not have run ahead of what
is derived from it; and neither generations compared with each other nor processes that live on may have grown by more
than 3 % (``peers.memory`` says how that is judged). Written to .benchmarks/soak.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
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
from peers.account import Account, account, await_derived, behind, written
from peers.load import serving
from peers.machine import conditions
from peers.memory import Sample, Trend, sample, trends
from peers.slow import SlowClients

from creto_proxy.workers import channel
from creto_proxy.workers.rundir import controls

SHARE = 0.7
CONNECTIONS = 50
CAPACITY_S = 15.0
TELL_S = 30.0
# Of a long run; a short one goes through the same in less time.
RELOAD_S = 60.0
RELOADS = 9
NEAR_S = 5.0
# How long ledger and audit log may take to catch up after the load.
DERIVED_S = 600.0
GROWTH = 0.03
# How many seconds of load more may wait to be derived at the end than at the beginning.
BACKLOG_S = 5.0
# Less of the load than this, and it was not the load that is claimed.
SHARE_MET = 0.9
# So many answers may be 503 because the machine was late; none may be lost.
SHED = 0.001
# One that is asked for while another is made is part of that one, and is not counted.
RELOADS_MADE = 0.8
POLICY = Path(__file__).resolve().parents[1] / "policies/default/base.cedar"
CHANGED = '@id("soak-{number}")\nforbid (principal, action, resource == Creto::Host::"soak-{number}.invalid");\n'


@dataclass(slots=True)
class Reload:
    """at: seconds. full: every process is replaced. number: the how-manieth it was to be for the controller."""

    at: float
    full: bool
    number: int


@dataclass(slots=True)
class Course:
    """What happened, in seconds since ``begun`` (Unix time). backlog: bytes of journal not derived from yet. done: what
    the controller last said of its reloads."""

    samples: list[Sample] = field(default_factory=list)
    load: list[tuple[float, int, int]] = field(default_factory=list)
    backlog: list[tuple[float, int]] = field(default_factory=list)
    reloads: list[Reload] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    done: dict[str, Any] = field(default_factory=dict)
    begun: float = field(default_factory=time.time)

    def renewed_at(self, at: float) -> float:
        """When the controller had last become another program image, by then."""
        return max((each.at for each in self.reloads if each.full and each.at <= at), default=0.0)


@dataclass(frozen=True, slots=True)
class Plan:
    """When what happens in a run of so many seconds."""

    seconds: float

    @property
    def reload_s(self) -> float:
        return min(RELOAD_S, self.seconds / RELOADS)

    @property
    def sample_s(self) -> float:
        return self.reload_s / 12

    @property
    def kill_s(self) -> float:
        return 2 * self.reload_s

    @property
    def warm_s(self) -> float:
        """The age from which on processes of different generations are compared."""
        return self.reload_s / 2

    def full(self, at: float) -> bool:
        """Whether a reload at that time replaces every process."""
        return at < self.seconds / 3


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


def youngest(processes: set[int]) -> int | None:
    def begun(process: int) -> int:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19])
        return -1

    return max(processes, key=begun, default=None)


def soak(sidecar: creto.Sidecar, client: Client, plan: Plan, rate: float, policies: Path) -> Course:
    """Lets it run and disturbs it."""
    course = Course()
    sample_at, told_at, reload_at = 0.0, 0.0, plan.reload_s
    # Kills fall between two reloads, so that a lost connection can be told to come from one or the other.
    kill_at = 1.5 * plan.reload_s
    while (now := time.time() - course.begun) < plan.seconds:
        if client.process.poll() is not None:
            raise RuntimeError(f"the client ended with status {client.process.returncode}")
        if now >= sample_at:
            sample_at += plan.sample_s
            look(course, sidecar, client, now)
        if now >= told_at:
            told_at += TELL_S
            tell(course, client, now, plan.seconds, rate)
        if now >= reload_at:
            reload_at += plan.reload_s
            reload(course, sidecar, now, plan.full(now), policies)
        if now >= kill_at:
            kill_at += plan.kill_s
            victim = youngest(serving(sidecar.pid, sidecar.reverse) - {sidecar.pid})
            if victim is not None:
                os.kill(victim, signal.SIGKILL)
                course.kills.append(now)
        time.sleep(0.1)
    confirm(course, sidecar)
    return course


def look(course: Course, sidecar: creto.Sidecar, client: Client, now: float) -> None:
    """Takes one sample. Raises RuntimeError when creto is gone."""
    held = sample(sidecar.pid, now)
    if sidecar.pid not in held.held:
        raise RuntimeError(f"creto ended by itself:\n{programs.tail(sidecar.config.with_name('log'))}")
    course.samples.append(held)
    course.load.append((now, client.last["answered"], client.last["p99_us"]))
    course.backlog.append((now, behind(sidecar.state)))


def reload(course: Course, sidecar: creto.Sidecar, now: float, full: bool, policies: Path) -> None:
    confirm(course, sidecar)
    number = len(course.reloads) + 1
    if not full:
        (policies / "changed.cedar").write_text(CHANGED.format(number=number))
    os.kill(sidecar.pid, signal.SIGHUP)
    course.reloads.append(Reload(now, full, number))


def confirm(course: Course, sidecar: creto.Sidecar) -> None:
    """Notes what became of the reloads so far."""
    try:
        found = next(channel.call(path, "status") for path in controls(sidecar.state))
    except (OSError, StopIteration) as error:
        course.problems.append(
            f"the controller did not answer {time.time() - course.begun:.0f} s after the start: {error!r}"
        )
        return
    done = found["status"]["reload"]
    if done["failed"] and done["count"] != course.done.get("count"):
        course.problems.append(f"reload {done['count']} failed: {'; '.join(done['problems'])}")
    course.done = done


def tell(course: Course, client: Client, now: float, seconds: float, rate: float) -> None:
    last = course.samples[-1]
    past = next((entry for entry in course.load if last.at - entry[0] <= TELL_S), course.load[-1])
    speed = (course.load[-1][1] - past[1]) / max(1e-9, last.at - past[0])
    kept = ", ".join(f"{role} {size >> 20} MiB" for role, size in sorted(last.by_role().items()))
    say(
        f"{int(now) // 60:3}:{int(now) % 60:02} of {int(seconds) // 60}:{int(seconds) % 60:02}  "
        f"{speed:,.0f} of {rate:,.0f} requests/s, p99 {client.last['p99_us'] / 1000:.1f} ms, "
        f"{client.last['answered']:,} answered, {client.last['failed']} not by 200, {client.last['lost']} lost, "
        f"{len(course.reloads)} reloads, {len(course.kills)} kills; "
        f"{course.backlog[-1][1] >> 10:,} KiB to derive; {kept}"
    )


def growth(course: Course, plan: Plan, workers: int) -> dict[str, dict[str, Trend]]:
    """How memory went while all processes were replaced every minute, compared at the same age; and then, while they
    lived on. By role."""
    last = max((each.at for each in course.reloads if each.full), default=0.0)
    settled = [each for each in course.samples if each.settled(workers, course.renewed_at(each.at), plan.warm_s)]
    replaced = [each for each in settled if plan.reload_s <= each.at < last]
    living = [each for each in settled if each.at >= last + 2 * plan.reload_s]
    return {"replaced": trends(replaced), "living": trends(living)}


def unexplained(course: Course, found: Account) -> int:
    """Requests whose connection broke although no worker had been killed just before."""
    return sum(not any(-1 <= at - course.begun - kill <= NEAR_S for kill in course.kills) for at in found.broken_at)


def findings(
    course: Course,
    found: Account,
    grown: dict[str, dict[str, Trend]],
    slow: dict[str, Any],
    late_s: tuple[float, float],
    rate: float,
    seconds: float,
) -> list[str]:
    """What must not have happened, each as a sentence; empty when all is well."""
    problems = [*course.problems, *found.problems]
    if found.answered < SHARE_MET * rate * seconds:
        problems.append(f"only {found.answered:,} requests were answered, {rate * seconds:,.0f} were to be sent")
    if (shed := found.refused.get("503", 0)) > SHED * found.answered:
        problems.append(f"{shed:,} requests were turned away with 503")
    problems += [
        f"{role} ({phase}) grew by {trend.growth:.1%}, from {trend.first / 2**20:.1f} to {trend.last / 2**20:.1f} MiB"
        for phase, roles in grown.items()
        for role, trend in roles.items()
        if trend.growth > GROWTH
    ]
    problems += [f"too short to tell whether memory grows ({phase})" for phase, roles in grown.items() if not roles]
    if late_s[1] > late_s[0] + BACKLOG_S:
        problems.append(
            f"what is derived was {late_s[0]:.1f} s behind in the first third and {late_s[1]:.1f} s in the last"
        )
    if (made := course.done.get("count", 0)) < RELOADS_MADE * len(course.reloads):
        problems.append(f"{len(course.reloads)} reloads were asked for, {made} made")
    if broken := unexplained(course, found):
        problems.append(f"{broken} connections broke under a request although no worker had been killed")
    if slow["stuck"]:
        problems.append(f"{slow['stuck']} clients that sent a head byte by byte were not cut off in time")
    if slow["slow_bytes_read"] < 1 << 20:
        problems.append(f"slow readers got only {slow['slow_bytes_read']:,} bytes")
    return problems


def lateness(course: Course, bytes_per_s: float) -> tuple[float, float, float]:
    """Seconds of load that waited to be derived: median of the first third, of the last, and the most."""
    waited = [size / bytes_per_s for _, size in course.backlog]
    third = max(1, len(waited) // 3)
    return statistics.median(waited[:third]), statistics.median(waited[-third:]), max(waited)


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
    parser.add_argument(
        "--rate", type=float, default=0.0, help="requests/s; 0: 70 %% of the capacity, which is measured"
    )
    parser.add_argument("--draft", action="store_true", help="keep and write everything in .benchmarks/draft instead")
    options = parser.parse_args()
    places = report.DRAFT if options.draft else report.PUBLISHED
    places.kept.mkdir(parents=True, exist_ok=True)
    plan = Plan(options.minutes * 60)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    programs.most_files()
    with workspace() as folder:
        with programs.upstream(folder / "upstream", cpu=None) as to:
            (to.files / "large").write_bytes(bytes(4 << 20))
            full = options.rate / SHARE or capacity(folder / "capacity", to, options.workers, options.capacity_seconds)
            rate = full * SHARE
            policies = folder / "policies"
            policies.mkdir()
            shutil.copy(POLICY, policies)
            more = f'[policy]\ndir = "{policies}"\n'
            with creto.sidecar(folder / "creto", to, workers=options.workers, cpu=None, more=more) as sidecar:
                say(f"{options.minutes:g} minutes at {rate:,.0f} requests/s over {CONNECTIONS} connections")
                client = Client(sidecar, rate, folder / "steady.log")
                slow = SlowClients(sidecar.peer())
                slow.start()
                try:
                    course = soak(sidecar, client, plan, rate, policies)
                finally:
                    totals = client.stop()
                    slow.stop()
                say("stopped; waiting for ledger and audit log")
                await_derived(sidecar.state, DERIVED_S)
                left, state = behind(sidecar.state), sidecar.state
        journal = sum(written(path) for path in (state / "journal").glob("*.jnl"))
        found = account(state, folder / "steady.log", say)
        log = (folder / "creto" / "log").read_text(errors="replace")
    (places.kept / "soak.log").write_text(log)
    grown = growth(course, plan, options.workers)
    if left:
        found.problems.append(f"{left:,} bytes of the journal were not derived from {DERIVED_S:g} s after the load")
    late_s = lateness(course, journal / max(1, found.journal.count) * rate)
    problems = findings(course, found, grown, slow.result(), late_s[:2], rate, plan.seconds)
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
        "growth": {phase: {role: each.document() for role, each in roles.items()} for phase, roles in grown.items()},
        "mapped_journal": max(each.journal for sample in course.samples for each in sample.held.values()),
        "late_s": late_s,
        "slow_clients": slow.result(),
        "reloads_made": course.done.get("count", 0),
        "reloads": [{"at": each.at, "full": each.full} for each in course.reloads],
        "kills": course.kills,
        "unexplained_breaks": unexplained(course, found),
        "memory": [{"at": round(each.at, 1), "bytes": each.by_role()} for each in course.samples],
        "load": course.load,
        "backlog": course.backlog,
        "problems": problems,
    }
    places.soak.write_text(json.dumps(document, indent=1))
    report.write(places)
    for line in problems:
        say(line)
    if problems:
        print("\n".join(log.splitlines()[-20:]), file=sys.stderr)
    say("soak: " + ("FAILED" if problems else "held") + f"; {places.soak}, {places.page}")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
