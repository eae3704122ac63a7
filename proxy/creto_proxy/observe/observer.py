"""What a worker counts while it works. Each method is a few stores; cells are looked up once per set of labels."""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from creto_hotpath.counters import Counters
from creto_proxy.model import Decision, Outcome, Verdict
from creto_proxy.observe.registry import FAMILIES, OTHER, Registry

# Methods that are named; any other token is as good as no name (RFC 9110 section 9.1, RFC 5789).
_METHODS = frozenset({"", "GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})
# Sets of labels that are remembered with their cells; agents choose methods and hosts, so they are not kept for ever.
_REMEMBERED = 8192
SAMPLE_S = 1.0
_DESCRIPTORS_EVERY = 30
_PAGE = resource.getpagesize()


class Cells(NamedTuple):
    """Where one kind of request is counted: plain counters, then histograms (nanoseconds)."""

    requests: int
    decisions: int
    bytes_up: int
    bytes_down: int
    total: int
    overhead: int
    upstream: int


class Watcher(Protocol):
    """What the request path tells of itself."""

    def request(self, outcome: Outcome, decision: Decision | None) -> None: ...
    def connected(self, result: str) -> None: ...
    def reused(self) -> None: ...
    def holding(self, change: int) -> None: ...
    def held(self, waited_ns: int, decision: Decision) -> None: ...


class Nobody:
    """Watches nothing."""

    def request(self, outcome: Outcome, decision: Decision | None) -> None:
        return None

    def connected(self, result: str) -> None:
        return None

    def reused(self) -> None:
        return None

    def holding(self, change: int) -> None:
        return None

    def held(self, waited_ns: int, decision: Decision) -> None:
        return None


class Observer:
    """Counts into this process' counters file. worker: the label of what is told per worker."""

    def __init__(self, counters: Counters, worker: str) -> None:
        self.counters = counters
        self.registry = Registry(counters)
        self.worker = worker
        self._cells: dict[tuple[str, str, str, str, str, int], Cells] = {}
        cell = self.registry.cell
        self._up, self._down = cell("bytes_total", "up"), cell("bytes_total", "down")
        self._holds = cell("holds_open")
        self._hold_seconds = cell("hold_seconds")
        self.reuses = cell("upstream_reuses_total")

    def cells(
        self, agent: str, host: str, method: str, decision: str, reason: str, status_class: int, *, cached: bool = False
    ) -> Cells:
        """The cells for such a request. status_class: first digit of the status, 0 when none was sent."""
        registry = self.registry
        method = method if method in _METHODS else OTHER
        # Agents may ask for any name; only those that were let through once get a place of their own.
        if decision == "deny" and not registry.knows("host", host):
            host = OTHER
        agent, host = registry.named("agent", agent), registry.named("host", host) if host != OTHER else host
        verdict = "escalate" if reason == "approval_pending" else decision
        status = f"{status_class}xx" if status_class else "none"
        return Cells(
            registry.cell("requests_total", agent, host, method, decision, status),
            registry.cell("decisions_total", verdict, reason, "yes" if cached else "no"),
            self._up,
            self._down,
            registry.cell("request_duration_seconds", agent),
            registry.cell("overhead_seconds", agent),
            # What never gets as far has no place there.
            registry.cell("upstream_duration_seconds", host) if decision != "deny" else registry.spill,
        )

    def request(self, outcome: Outcome, decision: Decision | None) -> None:
        """One request or tunnel has ended. ``decision`` is what decided it, None when it did not come to that."""
        reason = outcome.error if outcome.error and outcome.decision == "deny" else outcome.reason
        key = (outcome.agent, outcome.host, outcome.method, outcome.decision, reason, outcome.status // 100)
        cells = self._cells.get(key)
        if cells is None:
            if len(self._cells) >= _REMEMBERED:
                self._cells.clear()
            cells = self._cells[key] = self.cells(*key)
        counters = self.counters
        counters.add(cells.requests)
        counters.add(cells.decisions)
        counters.add(cells.bytes_up, outcome.bytes_up)
        counters.add(cells.bytes_down, outcome.bytes_down)
        counters.observe(cells.total, outcome.total_ns)
        counters.observe(cells.overhead, outcome.creto_ns)
        if outcome.upstream_ns:
            counters.observe(cells.upstream, outcome.upstream_ns)
        if decision is not None and decision.status == 429 and decision.verdict is Verdict.DENY:
            self._quota_denied(decision)

    def _quota_denied(self, decision: Decision) -> None:
        level, metric = decision.facts.get("level"), decision.facts.get("metric")
        if isinstance(level, str) and isinstance(metric, str):
            # "agent:researcher" is one of many; which kind of level is in the way is what can be watched.
            self.counters.add(self.registry.cell("quota_denied_total", level.partition(":")[0], metric))

    def connected(self, result: str) -> None:
        """A connection to an upstream was opened ("ok"), or was not, for a reason."""
        self.counters.add(self.registry.cell("upstream_connects_total", result))

    def reused(self) -> None:
        """A request goes out on a connection that was kept open."""
        self.counters.add(self.reuses)

    def holding(self, change: int) -> None:
        """One more (1) or one less (-1) waits for a person."""
        self.counters.add(self._holds, change)

    def held(self, waited_ns: int, decision: Decision) -> None:
        """A request waited that long for a person; ``decision`` is what came of it."""
        result = {Verdict.ALLOW: "approved", Verdict.ESCALATE: "pending"}.get(decision.verdict, "denied")
        self.counters.observe(self._hold_seconds, waited_ns)
        self.counters.add(self.registry.cell("holds_total", result))

    def close(self) -> None:
        self.counters.close()


# Asked for its value every second: (family, label values but the worker's) -> a number in the family's cell units.
Gauges = Mapping[tuple[str, ...], Callable[[], int]]


class Sampler:
    """Measures what nobody counts: how late the loop is, what the process uses, and what it is given to ask."""

    def __init__(self, observer: Observer, gauges: Gauges) -> None:
        """Raises KeyError for a gauge that is no family."""
        self._counters = observer.counters
        cell, worker = observer.registry.cell, observer.worker
        self._gauges = tuple((_cell_of(observer, series), read) for series, read in gauges.items())
        self._samples = self._listed = 0
        self._lag = cell("loop_lag_seconds", worker)
        self._rss = cell("process_resident_memory_bytes", worker)
        self._cpu = cell("process_cpu_seconds_total", worker)
        self._fds = cell("process_open_fds", worker)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            self.sample()
            due = time.monotonic_ns() + int(SAMPLE_S * 1e9)
            await asyncio.sleep(SAMPLE_S)
            self._counters.observe(self._lag, max(0, time.monotonic_ns() - due))

    def sample(self) -> None:
        self._samples += 1
        for cell, read in self._gauges:
            self._counters.set(cell, read())
        self._counters.set(self._rss, int(Path("/proc/self/statm").read_bytes().split()[1]) * _PAGE)
        self._counters.set(self._cpu, time.process_time_ns())
        self._counters.set(self._fds, self._descriptors())

    def _descriptors(self) -> int:
        """The kernel counts them since 6.2. Before, a directory of thousands is read, so not every second."""
        counted = os.stat("/proc/self/fd").st_size
        if counted:
            return counted
        if self._samples % _DESCRIPTORS_EVERY == 1:
            self._listed = len(os.listdir("/proc/self/fd"))
        return self._listed


def _cell_of(observer: Observer, series: tuple[str, ...]) -> int:
    name, *values = series
    if "worker" in FAMILIES[name].labels:
        values.append(observer.worker)
    return observer.registry.cell(name, *values)
