"""What proxy benches share: an nginx upstream, nginx as a proxy, wrk as the client, and CPU per request.

Contenders stand side by side in one run: every proxy is started first, then rounds alternate between them, so that a
busy machine is busy for all. CPU is the run time of a proxy's whole process tree (``/proc/<pid>/task/*/schedstat``)
divided by the requests it answered, which holds on a shared machine better than throughput does. With two CPUs or
more, client and upstream are pinned to the first and the proxies to the second.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CPUS = sorted(os.sched_getaffinity(0))
CLIENT_CPU, PROXY_CPU = (CPUS[0], CPUS[1]) if len(CPUS) > 1 else (CPUS[0], CPUS[0])

NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    keepalive_requests 100000000;
    keepalive_timeout 300s;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    {http}
}}
"""
UPSTREAM = """
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        default_type application/json;
        location / {{ return 200 "{body}"; }}
    }}
"""
PROXY = """
    upstream origin {{ server 127.0.0.1:{upstream}; keepalive 256; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://origin;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
"""


def missing_tools() -> str:
    """What cannot be measured here and why, "" when everything is there."""
    missing = [tool for tool in ("nginx", "wrk") if not find(tool)]
    return f"not installed: {', '.join(missing)} (Debian: apt-get install nginx-light wrk)" if missing else ""


def find(tool: str) -> str | None:
    return shutil.which(tool, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")


def free_port() -> int:
    """A port that was free a moment ago, for programs that cannot bind port 0 and say what they got."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def wait_for_port(port: int, process: subprocess.Popen[bytes], patience_s: float = 10.0) -> None:
    """Returns when something listens. Raises RuntimeError when ``process`` ends or the time is up."""
    end = time.monotonic() + patience_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with status {process.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), 0.2).close()
            return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError(f"nothing listens on port {port} after {patience_s} s")


@contextmanager
def running(command: Sequence[str], port: int, cpu: int, env: Mapping[str, str] | None = None) -> Iterator[int]:
    """Runs a server pinned to ``cpu`` until the block ends; gives its process id once ``port`` answers."""
    process = subprocess.Popen(command, env=None if env is None else {**os.environ, **env}, stdin=subprocess.DEVNULL)
    try:
        os.sched_setaffinity(process.pid, {cpu})
        wait_for_port(port, process)
        for pid in process_tree(process.pid):
            os.sched_setaffinity(pid, {cpu})
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while True: pass
"""


@contextmanager
def awake(cpus: Sequence[int]) -> Iterator[None]:
    """Keeps those cores from halting, by something that runs only when nothing else does.

    A virtual machine takes longer to wake a halted core than any proxy takes for a message, and not always as long.
    """
    spinning = [subprocess.Popen([sys.executable, "-c", SPIN, str(cpu)]) for cpu in cpus]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


@contextmanager
def nginx(folder: Path, http: str, port: int, cpu: int) -> Iterator[int]:
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, http=http))
    program = find("nginx") or "nginx"
    with running([program, "-e", str(folder / "error.log"), "-p", str(folder), "-c", str(config)], port, cpu) as pid:
        yield pid


@contextmanager
def nginx_upstream(folder: Path, body_bytes: int = 1024) -> Iterator[tuple[int, int]]:
    """(port, pid) of an upstream that answers everything with ``body_bytes`` of JSON-ish text."""
    port = free_port()
    with nginx(folder, UPSTREAM.format(port=port, body="x" * body_bytes), port, CLIENT_CPU) as pid:
        yield port, pid


@contextmanager
def nginx_proxy(folder: Path, upstream: int) -> Iterator[Contender]:
    """nginx with proxy_pass and pooled upstream connections: the proxy to stand beside."""
    port = free_port()
    with nginx(folder, PROXY.format(port=port, upstream=upstream), port, PROXY_CPU) as pid:
        yield Contender("nginx proxy_pass", port, pid)


def process_tree(pid: int) -> list[int]:
    """``pid`` and its descendants."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            found += process_tree(int(child))
    return found


def cpu_ns(pid: int) -> int:
    """Nanoseconds that the process tree of ``pid`` has run so far, user and kernel."""
    total = 0
    for process in process_tree(pid):
        for task in Path(f"/proc/{process}/task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    return total


def machine_busy_ns() -> int:
    """Nanoseconds that all CPUs together have been busy."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8]]
    user, nice, system, _, _, irq, softirq = fields
    return (user + nice + system + irq + softirq) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


@dataclass(frozen=True, slots=True)
class Contender:
    """A proxy under test. pid None: no proxy at all, the client talks to the upstream."""

    name: str
    port: int
    pid: int | None
    path: str = "/"


@dataclass(frozen=True, slots=True)
class Load:
    """What wrk does. script: Lua source, for methods, bodies and headers."""

    connections: int = 64
    seconds: float = 2.0
    script: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One round. foreign: share of the machine's CPU time used by anything that is not part of the bench."""

    requests: int
    errors: int
    per_second: float
    p50_us: float
    p99_us: float
    cpu_us: float
    foreign: float


_UNITS = {"us": 1.0, "ms": 1e3, "s": 1e6, "m": 6e7}


def wrk(port: int, load: Load, path: str, folder: Path) -> tuple[int, int, float, float, float, int]:
    """(requests, errors, requests/s, p50 us, p99 us, CPU ns of wrk)."""
    seconds = max(1, round(load.seconds))
    command = [find("wrk") or "wrk", "-t1", f"-c{load.connections}", f"-d{seconds}s", "--latency"]
    if load.script:
        script = folder / "load.lua"
        script.write_text(load.script)
        command += ["-s", str(script)]
    process = subprocess.Popen([*command, f"http://127.0.0.1:{port}{path}"], stdout=subprocess.PIPE)
    os.sched_setaffinity(process.pid, {CLIENT_CPU})
    before = os.times()
    output = process.communicate(timeout=seconds + 30)[0].decode()
    after = os.times()
    own = int((after.children_user - before.children_user + after.children_system - before.children_system) * 1e9)
    count = re.search(r"(\d+) requests in", output)
    rate = re.search(r"Requests/sec:\s*([\d.]+)", output)
    if count is None or rate is None:
        raise RuntimeError(f"wrk said: {output}")
    errors = sum(int(number) for line in re.findall(r"Socket errors:.*", output) for number in re.findall(r"\d+", line))
    errors += sum(int(number) for number in re.findall(r"Non-2xx or 3xx responses: (\d+)", output))
    p50, p99 = (percentile(output, name) for name in ("50%", "99%"))
    return int(count[1]), errors, float(rate[1]), p50, p99, own


def percentile(output: str, name: str) -> float:
    found = re.search(rf"^\s*{name}\s+([\d.]+)(us|ms|s|m)\s*$", output, re.M)
    return float(found[1]) * _UNITS[found[2]] if found else float("nan")


def measure(contender: Contender, load: Load, upstream_pid: int, folder: Path) -> Sample:
    """One round of ``load`` against ``contender``."""
    watched = [pid for pid in (contender.pid, upstream_pid) if pid is not None]
    busy, used = machine_busy_ns(), [cpu_ns(pid) for pid in watched]
    requests, errors, rate, p50, p99, client = wrk(contender.port, load, contender.path, folder)
    used = [cpu_ns(pid) - earlier for pid, earlier in zip(watched, used, strict=True)]
    busy = machine_busy_ns() - busy
    capacity = round(load.seconds) * 1e9 * len(CPUS)
    foreign = max(0.0, (busy - sum(used) - client) / capacity)
    cpu = used[0] / 1e3 / max(1, requests) if contender.pid is not None else float("nan")
    return Sample(requests, errors, rate, p50, p99, cpu, foreign)


def compare(
    contenders: Sequence[Contender], load: Load, upstream_pid: int, folder: Path, rounds: int = 3
) -> dict[str, list[Sample]]:
    """``rounds`` alternating rounds of every contender, after one short one that warms up."""
    samples: dict[str, list[Sample]] = {contender.name: [] for contender in contenders}
    for contender in contenders:
        measure(contender, Load(load.connections, 1.0, load.script), upstream_pid, folder)
    for turn in range(rounds):
        # Whoever comes first in one round comes last in the next.
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            samples[contender.name].append(measure(contender, load, upstream_pid, folder))
    return samples


def median(samples: Sequence[Sample], value: Callable[[Sample], float]) -> float:
    return statistics.median(value(sample) for sample in samples)


def table(title: str, results: Mapping[str, Sequence[Sample]], baseline: str) -> str:
    """Medians over the rounds with the spread of CPU per request, and each contender's ratio to ``baseline``."""
    base = median(results[baseline], lambda sample: sample.cpu_us)
    lines = [
        title,
        f"{'':34}{'req/s':>9}{'p50 us':>9}{'p99 us':>9}{'CPU us/req':>12}{'min..max':>14}{'ratio':>7}{'foreign':>9}",
    ]
    for name, samples in results.items():
        cpu = [sample.cpu_us for sample in samples]
        middle = statistics.median(cpu)
        lines.append(
            f"{name:34}{median(samples, lambda s: s.per_second):9,.0f}{median(samples, lambda s: s.p50_us):9,.0f}"
            f"{median(samples, lambda s: s.p99_us):9,.0f}{middle:12.1f}{f'{min(cpu):.1f}..{max(cpu):.1f}':>14}"
            f"{middle / base:7.2f}{median(samples, lambda s: s.foreign):9.0%}"
        )
    return "\n".join(lines)
