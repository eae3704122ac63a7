"""The ``creto sidecar`` under test: default policy, default plugins, a budget of requests on each of four levels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import harness

from peers import programs
from peers.agent import get, open_connection
from peers.load import settle

CONFIG = """
[common]
state_dir = "{state}"
team = "bench"
[egress]
allow = ["up.test:80", "up.test:443", "llm.test:80"]
upstream_ca = "{certificate}"
[egress.resolve]
"up.test" = "127.0.0.1:{upstream}"
"llm.test" = "127.0.0.1:{plain}"
[limits]
idle_timeout_s = 3600
[metering.providers]
"llm.test" = "openai"
{budgets}
[listen]
explicit = "127.0.0.1:{explicit}"
reverse = "127.0.0.1:{reverse}"
[[reverse]]
name = "up"
upstream = "{scheme}://up.test"
[[reverse]]
name = "llm"
upstream = "http://llm.test"
"""
BUDGET = """
[[metering.budgets]]
level = "{level}"
metric = "requests"
limit = "{limit}"
window = "{window}"
"""
LEVELS = ("platform", "org", "team", "agent")
PLENTY = 10**14


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A running sidecar. workers: data processes it was asked for, 0 when this creto knows only one process."""

    pid: int
    explicit: int
    reverse: int
    state: Path
    config: Path
    workers: int

    def peer(self, name: str = "creto", *, prefix: str = "/up") -> programs.Peer:
        """Plain HTTP over a reverse route."""
        return programs.Peer(name, self.reverse, self.pid, prefix, split=True)

    def tls_peer(self, name: str = "creto") -> programs.Peer:
        """A tunnel that creto intercepts: TLS to the client, TLS to the upstream."""
        tunnel = f"{programs.NAME}:443"
        return programs.Peer(name, self.explicit, self.pid, secure=True, connect=tunnel, split=True)

    def command(self, *arguments: str) -> Any:
        """What ``creto --json ARGUMENTS`` prints about this sidecar's state."""
        command = [*creto(), "--config", str(self.config), "--json", *arguments]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def creto() -> list[str]:
    return [sys.executable, "-m", "creto_proxy"]


@cache
def knows_workers() -> bool:
    """Whether this creto can run data processes beside a controller."""
    shown = subprocess.run([*creto(), "sidecar", "--help"], check=True, capture_output=True, text=True, timeout=60)
    return "--workers" in shown.stdout


@contextmanager
def sidecar(
    folder: Path,
    to: programs.Upstream,
    *,
    tls: bool = False,
    workers: int = 1,
    limit: int = PLENTY,
    window: str = "day",
    cpu: int | None = harness.PROXY_CPU,
    together: bool = False,
    more: str = "",
) -> Iterator[Sidecar]:
    """limit, window: of the budgets of requests, one on each level. tls: the upstream is reached by TLS.

    cpu: the core of the workers. Their controller, which derives ledger and audit log, runs on that of client and
    upstream, or with them when ``together``. more: further sections of the configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    explicit, reverse, config = harness.free_port(), harness.free_port(), folder / "creto.toml"
    config.write_text(
        CONFIG.format(
            state=folder / "state",
            certificate=to.certificate,
            upstream=to.secure if tls else to.plain,
            plain=to.plain,
            explicit=explicit,
            reverse=reverse,
            scheme="https" if tls else "http",
            budgets="".join(BUDGET.format(level=level, limit=limit, window=window) for level in LEVELS),
        )
        + more
    )
    several = ["--workers", str(workers)] if knows_workers() else []
    command = [*creto(), "--config", str(config), "sidecar", *several]
    env = {"HOME": str(folder), "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with programs.running(command, reverse, folder, cpu=cpu, env=env, stop_s=120) as pid:
        running = Sidecar(pid, explicit, reverse, folder / "state", config, workers if several else 0)
        if limit == PLENTY:
            # The listener is there before the workers are; what they do to begin is not what is measured.
            with open_connection(running.peer()) as sock:
                get(sock, running.peer())
        if several and cpu is not None and not together:
            move(pid, harness.CLIENT_CPU)
        settle(pid)
        yield running


def move(process: int, cpu: int) -> None:
    """Has every thread of the process run on that core alone, and so those that they begin; not its children."""
    for task in Path(f"/proc/{process}/task").iterdir():
        os.sched_setaffinity(int(task.name), {cpu})
