"""Drives a peer and accounts for what it cost: wrk as fast as it goes, h2load at a constant rate.

CPU is the run time of every thread of the peer's process tree (``/proc/PID/task/TID/schedstat``) over the requests it
answered, which holds on a busy machine better than throughput does. What others used meanwhile is reported beside it.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import harness
from harness import CLIENT_CPU, CPUS

from peers.programs import NAME, Peer, program

# A peer that works on after its last answer is waited for until each of its processes uses less than this of a core.
IDLE_SHARE = 0.03
SETTLE_S = 120.0
# Ledger and audit log gather for a moment before they work, so one quiet look is not the end.
LOOK_S, QUIET_LOOKS = 0.2, 6

Threads = dict[tuple[int, int], int]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of request over so many kept-alive connections. headers, body: for what is not a plain GET."""

    title: str
    connections: int
    path: str = "/"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = ""

    def script(self) -> str:
        lines = [f'wrk.headers["{name}"] = "{value}"' for name, value in self.headers.items()]
        if self.body:
            lines += ['wrk.method = "POST"', f"wrk.body = [==[{self.body}]==]"]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Round:
    """One measurement. ``served_us`` is CPU per request on the path of the request, ``derived_us`` what the same peer's
    other processes and threads used for it, until they were idle again. kernel: share of CPU spent in the kernel.
    foreign: share of the machine's CPU that neither peer, upstream nor client used while the load ran.
    """

    requests: int
    errors: int
    per_second: float
    p50_us: float
    p99_us: float
    served_us: float
    derived_us: float
    kernel: float
    foreign: float

    @property
    def total_us(self) -> float:
        return self.served_us + self.derived_us


def threads(pid: int) -> Threads:
    """Nanoseconds every thread of the tree has run, by (process, thread). One that ends meanwhile is left out."""
    found: Threads = {}
    for process in tree(pid):
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                found[process, int(task.name)] = int((task / "schedstat").read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def tree(pid: int) -> list[int]:
    """``pid`` and its descendants that are still there."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += tree(int(child))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return found


def spent(before: Threads, after: Threads) -> Threads:
    return {thread: ran - before.get(thread, 0) for thread, ran in after.items()}


def ticks(pid: int) -> tuple[int, int]:
    """(user, kernel) clock ticks of the tree."""
    user = kernel = 0
    for process in tree(pid):
        try:
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        user, kernel = user + int(fields[11]), kernel + int(fields[12])
    return user, kernel


def serving(pid: int, port: int) -> set[int]:
    """The processes of the tree that hold connections to ``port``: those requests pass through."""
    inodes = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "01" and int(fields[1].rpartition(":")[2], 16) == port:
            inodes.add(f"socket:[{fields[9]}]")
    return {process for process in tree(pid) if inodes & _descriptors(process)}


def _descriptors(process: int) -> set[str]:
    found = set()
    try:
        for link in Path(f"/proc/{process}/fd").iterdir():
            try:
                found.add(os.readlink(link))
            except FileNotFoundError:
                continue  # closed while we looked
    except (FileNotFoundError, PermissionError):
        pass
    return found


def settle(pid: int, patience_s: float = SETTLE_S) -> bool:
    """Waits until the tree has nothing left to do; False when the time is up first."""
    end, quiet = time.monotonic() + patience_s, 0
    before, at = sum(threads(pid).values()), time.monotonic()
    while time.monotonic() < end:
        time.sleep(LOOK_S)
        now, found = time.monotonic(), threads(pid)
        ran, idle = sum(found.values()), IDLE_SHARE * len({process for process, _ in found})
        quiet = quiet + 1 if ran - before < idle * (now - at) * 1e9 else 0
        before, at = ran, now
        if quiet >= QUIET_LOOKS:
            return True
    return False


def split(peer: Peer, used: Threads, servers: set[int]) -> tuple[int, int]:
    """(nanoseconds on the path of requests, all others). Where one process does it all, the main thread is the path."""
    if not peer.split:
        return sum(used.values()), 0
    processes = {process for process, _ in used}
    if len(processes) > len(servers):
        path = sum(ran for (process, _), ran in used.items() if process in servers)
    else:
        path = sum(ran for (process, thread), ran in used.items() if process == thread)
    return path, sum(used.values()) - path


class Client:
    """wrk and h2load, pinned to the first core, with ``connect.c`` in front where TLS is spoken."""

    def __init__(self, folder: Path, upstream_pid: int, library: Path | None = None) -> None:
        self._folder = folder
        self._upstream = upstream_pid
        self._library = library

    def wrk(self, peer: Peer, load: Load, seconds: float) -> Round:
        """One round of ``load`` as fast as it goes."""
        whole = max(1, round(seconds))
        command = [
            program("wrk", "wrk"),
            "-t1",
            f"-c{load.connections}",
            f"-d{whole}s",
            "--latency",
            "--timeout",
            "10s",
        ]
        if script := load.script():
            path = self._folder / "load.lua"
            path.write_text(script)
            command += ["-s", str(path)]
        if peer.secure:
            command += ["-H", f"Host: {NAME}"]
        return self._measured(peer, [*command, peer.url(load.path)], whole, _read_wrk)

    def h2load(self, peer: Peer, connections: int, rate: float | None, seconds: float) -> tuple[Round, list[int]]:
        """One round of GET at ``rate`` requests per second in all, None: as fast as it goes, and the microseconds each
        of them took."""
        log = self._folder / "requests.tsv"
        log.unlink(missing_ok=True)
        # fmt: off
        command = [
            program("h2load", "nghttp2-client"), "--h1", "-t1", f"-c{connections}",
            *([] if rate is None else [f"--rps={rate / connections:.3f}"]),
            f"-D{max(1, round(seconds))}", "--warm-up-time=1", f"--log-file={log}", peer.url("/"),
        ]
        # fmt: on
        done = self._measured(peer, command, seconds + 1, _read_h2load)
        rows = [line.split("\t") for line in log.read_text().splitlines()]
        return done, sorted(int(row[2]) for row in rows if row[1] == "200")

    def _measured(
        self, peer: Peer, command: Sequence[str], seconds: float, read: Callable[[str], dict[str, float]]
    ) -> Round:
        env = dict(os.environ)
        if peer.secure and self._library is not None:
            env["LD_PRELOAD"] = str(self._library)
        if peer.connect:
            env["CONNECT_TO"] = peer.connect
        before = threads(peer.pid) if peer.pid is not None else {}
        clock = ticks(peer.pid) if peer.pid is not None else (0, 0)
        busy, upstream, own = harness.machine_busy_ns(), sum(threads(self._upstream).values()), os.times()
        begun = time.monotonic()
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.sched_setaffinity(0, {CLIENT_CPU}),
        )
        time.sleep(seconds / 2)
        servers = serving(peer.pid, peer.port) if peer.split and peer.pid is not None else set()
        output = process.communicate(timeout=seconds + 60)[0].decode(errors="replace")
        busy, spent_here, took = harness.machine_busy_ns() - busy, os.times(), time.monotonic() - begun
        upstream = sum(threads(self._upstream).values()) - upstream
        meanwhile = sum(spent(before, threads(peer.pid)).values()) if peer.pid is not None else 0
        client = spent_here.children_user + spent_here.children_system - own.children_user - own.children_system
        foreign = max(0.0, (busy - meanwhile - upstream - client * 1e9) / (took * 1e9 * len(CPUS)))
        if peer.split and peer.pid is not None:
            settle(peer.pid)
        answer = read(output)
        path, others, kernel = 0, 0, float("nan")
        if peer.pid is not None:
            path, others = split(peer, spent(before, threads(peer.pid)), servers)
            user, system = (after - earlier for after, earlier in zip(ticks(peer.pid), clock, strict=True))
            kernel = system / max(1, user + system)
        count = max(1, int(answer["requests"]))
        return Round(
            requests=int(answer["requests"]),
            errors=int(answer["errors"]) or int(not answer["requests"]),  # nothing answered is an error, too
            per_second=answer["per_second"],
            p50_us=answer["p50_us"],
            p99_us=answer["p99_us"],
            served_us=path / 1e3 / count if peer.pid is not None else float("nan"),
            derived_us=others / 1e3 / count if peer.pid is not None else float("nan"),
            kernel=kernel,
            foreign=foreign,
        )


def _read_wrk(output: str) -> dict[str, float]:
    count, rate = re.search(r"(\d+) requests in", output), re.search(r"Requests/sec:\s*([\d.]+)", output)
    if count is None or rate is None:
        raise RuntimeError(f"wrk said: {output}")
    errors = sum(int(number) for line in re.findall(r"Socket errors:.*", output) for number in re.findall(r"\d+", line))
    errors += sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", output))
    return {
        "requests": float(count[1]),
        "errors": errors,
        "per_second": float(rate[1]),
        "p50_us": harness.percentile(output, "50%"),
        "p99_us": harness.percentile(output, "99%"),
    }


def _read_h2load(output: str) -> dict[str, float]:
    counts = re.search(r"requests: (\d+) total.*?(\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", output)
    rate = re.search(r"finished in [\d.]+\w+, ([\d.]+) req/s", output)
    status = re.search(r"status codes: (\d+) 2xx, (\d+) 3xx, (\d+) 4xx, (\d+) 5xx", output)
    if counts is None or rate is None or status is None:
        raise RuntimeError(f"h2load said: {output}")
    wrong = int(counts[3]) + int(status[3]) + int(status[4])
    nan = float("nan")
    return {
        "requests": float(counts[2]),
        "errors": wrong,
        "per_second": float(rate[1]),
        "p50_us": nan,
        "p99_us": nan,
    }


def compare(
    client: Client, peers: Sequence[Peer], load: Load, seconds: float, rounds: int, say: Say
) -> list[dict[str, Any]]:
    """Alternating rounds of every peer after one short one that warms up, as rows of ``summary``."""
    results: dict[str, list[Round]] = {peer.name: [] for peer in peers}
    for peer in peers:
        client.wrk(peer, load, 1)
    for turn in range(rounds):
        # Whoever comes first in one round comes last in the next.
        for peer in peers if turn % 2 == 0 else reversed(peers):
            done = client.wrk(peer, load, seconds)
            results[peer.name].append(done)
            say(
                f"{load.title}, round {turn + 1}/{rounds}: {peer.name:18} {done.per_second:9,.0f} req/s "
                f"{done.total_us:9.1f} us CPU/request{f', {done.derived_us:.1f} of it derived' if peer.split else ''}"
                f"{f', {done.errors} ERRORS' if done.errors else ''}, foreign {done.foreign:.0%}"
            )
    return [{"name": name, **summary(found)} for name, found in results.items()]


def summary(rounds: Sequence[Round]) -> dict[str, Any]:
    """Of every value [median, least, most] over the rounds, and the rounds themselves."""
    values = ("per_second", "p50_us", "p99_us", "served_us", "derived_us", "total_us", "kernel", "foreign")
    spread = {name: middle([getattr(each, name) for each in rounds]) for name in values}
    return {**spread, "errors": sum(each.errors for each in rounds), "rounds": [asdict(each) for each in rounds]}


def middle(values: Sequence[float]) -> list[float] | None:
    """[median, least, most]; None for values that were not measured."""
    known = [value for value in values if value == value]
    return [statistics.median(known), min(known), max(known)] if known else None
