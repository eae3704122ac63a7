"""What `creto top` shows: what has happened between two looks at the counters files of a state directory."""

from __future__ import annotations

import operator
import time
from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from creto_proxy.observe.aggregate import Aggregate, alive, family_of, readable
from creto_proxy.observe.registry import label_values
from creto_proxy.observe.scrape import quantile

# A worker's file says which it is by its gauges.
_WORKER_GAUGE = "creto_process_resident_memory_bytes"


@dataclass(frozen=True, slots=True)
class Look:
    """One reading. total: sums over all processes. workers: by label, the process' own numbers. at: monotonic."""

    at: float
    total: Aggregate
    workers: Mapping[str, WorkerLook]


@dataclass(frozen=True, slots=True)
class WorkerLook:
    pid: int
    started_ns: int
    values: Mapping[str, array[int]]


@dataclass(frozen=True, slots=True)
class Rate:
    """Of one agent or host, per second; latencies in milliseconds, None where nothing was measured."""

    name: str
    requests: float
    refused: float
    p50_ms: float | None
    p99_ms: float | None
    overhead_p99_ms: float | None = None


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """cpu: of one processor, 1.0 is all of it. lag_p99_ms: how late its event loop was."""

    worker: str
    pid: int
    up_s: float
    requests: float
    connections: int
    rss_bytes: int
    cpu: float
    lag_p99_ms: float | None


@dataclass(frozen=True, slots=True)
class View:
    """Rates are per second over ``seconds``; the busiest agents, hosts and reasons first."""

    seconds: float
    requests: float
    refused: float
    total_p50_ms: float | None
    total_p99_ms: float | None
    overhead_p50_ms: float | None
    overhead_p99_ms: float | None
    bytes_up: float
    bytes_down: float
    holds_open: int
    connections: int
    agents: tuple[Rate, ...]
    hosts: tuple[Rate, ...]
    decisions: tuple[tuple[str, str, float], ...]
    holds: Mapping[str, int]
    workers: tuple[WorkerRow, ...]
    budgets: tuple[Mapping[str, Any], ...] = field(default=())

    def document(self) -> dict[str, Any]:
        return asdict(self)


def look(state: Path) -> Look | None:
    """Everything that runs on a state directory; None when nothing does."""
    total = Aggregate()
    workers: dict[str, WorkerLook] = {}
    directories = [path for path in (state / "metrics").glob("*") if path.is_dir() and alive(path)]
    for directory in directories:
        for _, reading in readable(directory):
            total.add(reading.entries, gauges=reading.alive)
            label = next((e.name for e in reading.entries if e.name.startswith(_WORKER_GAUGE)), "")
            if reading.alive and label:
                name = label_values(label)[0]
                if len(directories) > 1 or name in workers:
                    name = f"{name}/{reading.pid}"
                values = {entry.name: entry.values for entry in reading.entries}
                workers[name] = WorkerLook(reading.pid, reading.started_ns, values)
    return Look(time.monotonic(), total, workers) if directories else None


def view(before: Look, now: Look) -> View:
    """What has happened in between."""
    seconds = max(1e-9, now.at - before.at)
    change = Change(before.total.values, now.total.values)
    requests, refused = change.requests("agent"), change.requests("agent", "deny")
    hosts, hosts_refused = change.requests("host"), change.requests("host", "deny")
    total, overhead = change.merged("request_duration_seconds"), change.merged("overhead_seconds")
    agents = [
        Rate(
            name,
            count / seconds,
            refused.get(name, 0) / seconds,
            _ms(change.histogram("request_duration_seconds", name), 0.5),
            _ms(change.histogram("request_duration_seconds", name), 0.99),
            _ms(change.histogram("overhead_seconds", name), 0.99),
        )
        for name, count in requests.items()
    ]
    upstreams = [
        Rate(
            name,
            count / seconds,
            hosts_refused.get(name, 0) / seconds,
            _ms(change.histogram("upstream_duration_seconds", name), 0.5),
            _ms(change.histogram("upstream_duration_seconds", name), 0.99),
        )
        for name, count in hosts.items()
    ]
    decisions = sorted(
        ((verdict, reason, count / seconds) for (verdict, reason), count in change.decisions().items() if count),
        key=lambda row: -row[2],
    )
    return View(
        seconds=seconds,
        requests=sum(requests.values()) / seconds,
        refused=sum(refused.values()) / seconds,
        total_p50_ms=_ms(total, 0.5),
        total_p99_ms=_ms(total, 0.99),
        overhead_p50_ms=_ms(overhead, 0.5),
        overhead_p99_ms=_ms(overhead, 0.99),
        bytes_up=change.one("bytes_total", "up") / seconds,
        bytes_down=change.one("bytes_total", "down") / seconds,
        holds_open=_gauge(now, "holds_open"),
        connections=_gauge(now, "connections"),
        agents=tuple(sorted(agents, key=lambda row: (-row.requests, row.name))),
        hosts=tuple(sorted(upstreams, key=lambda row: (-row.requests, row.name))),
        decisions=tuple(decisions),
        holds={key[0]: values[0] for key, values in _series(now.total.values, "holds_total")},
        workers=tuple(_worker(name, before, now, seconds) for name in sorted(now.workers)),
    )


class Change:
    """What each series has grown by. One that shrank belongs to a process that was replaced: that counts as nothing."""

    def __init__(self, before: Mapping[str, array[int]], now: Mapping[str, array[int]]) -> None:
        self.grown: dict[str, array[int]] = {}
        for name, values in now.items():
            old = before.get(name)
            if old is None or len(old) != len(values):
                self.grown[name] = values
            else:
                self.grown[name] = array("q", (max(0, n - o) for n, o in zip(values, old, strict=True)))

    def requests(self, label: str, decision: str = "") -> dict[str, int]:
        """Requests by agent or host; with ``decision``, those alone."""
        at = {"agent": 0, "host": 1}[label]
        sums: dict[str, int] = defaultdict(int)
        for values, cells in _series(self.grown, "requests_total"):
            if not decision or values[3] == decision:
                sums[values[at]] += cells[0]
        return sums

    def decisions(self) -> dict[tuple[str, str], int]:
        sums: dict[tuple[str, str], int] = defaultdict(int)
        for values, cells in _series(self.grown, "decisions_total"):
            sums[values[0], values[1]] += cells[0]
        return sums

    def histogram(self, family: str, *labels: str) -> array[int] | None:
        return next((cells for values, cells in _series(self.grown, family) if values == labels), None)

    def merged(self, family: str) -> array[int] | None:
        merged: array[int] | None = None
        for _, cells in _series(self.grown, family):
            merged = cells if merged is None else array("q", map(operator.add, merged, cells))
        return merged

    def one(self, family: str, *labels: str) -> int:
        cells = self.histogram(family, *labels)
        return cells[0] if cells is not None else 0


def _series(values: Mapping[str, array[int]], name: str) -> list[tuple[tuple[str, ...], array[int]]]:
    found = ((text, cells) for text, cells in values.items() if text.startswith(f"creto_{name}"))
    return [
        (label_values(text), cells)
        for text, cells in found
        if (family := family_of(text)) is not None and family.name == name
    ]


def _gauge(now: Look, name: str) -> int:
    return sum(cells[0] for _, cells in _series(now.total.values, name))


def _worker(name: str, before: Look, now: Look, seconds: float) -> WorkerRow:
    worker = now.workers[name]
    old = before.workers.get(name)
    grown = Change(old.values if old is not None and old.pid == worker.pid else {}, worker.values)
    cpu = sum(cells[0] for _, cells in _series(grown.grown, "process_cpu_seconds_total"))

    def gauge(family: str) -> int:
        return sum(cells[0] for _, cells in _series(worker.values, family))

    return WorkerRow(
        worker=name,
        pid=worker.pid,
        up_s=max(0.0, (time.time_ns() - worker.started_ns) / 1e9),
        requests=sum(grown.requests("agent").values()) / seconds,
        connections=gauge("connections"),
        rss_bytes=gauge("process_resident_memory_bytes"),
        cpu=cpu / 1e9 / seconds if old is not None else 0.0,
        lag_p99_ms=_ms(grown.merged("loop_lag_seconds"), 0.99),
    )


def _ms(cells: array[int] | None, share: float) -> float | None:
    value = quantile(cells, share) if cells is not None else None
    return None if value is None else value / 1e6
