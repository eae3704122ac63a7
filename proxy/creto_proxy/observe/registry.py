"""Which metrics there are, and which cells of a counters file belong to them.

A metric's label values are few by construction: agents and hosts are named up to a number and are "other" beyond it,
so that nobody can fill a monitoring system by asking for names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from creto_hotpath.counters import HISTOGRAM_CELLS, Counters, CountersFull

Kind: TypeAlias = Literal["counter", "gauge", "histogram"]

# Label values beyond these are counted as OTHER.
BOUNDS = {"agent": 64, "host": 128, "reason": 96, "consumer": 32, "level": 16, "metric": 32}
OTHER = "other"
# Series of one family; what would be one more is counted under agent and host OTHER.
MAX_SERIES = 2048


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name after ``creto_``, label names in order, and how many counts make one of its units."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    per: int = 1

    @property
    def full_name(self) -> str:
        return f"creto_{self.name}"


COUNTER: Kind = "counter"
GAUGE: Kind = "gauge"
HISTOGRAM: Kind = "histogram"
_NS = 10**9
_PPM = 10**6
_LABELS = ("agent", "host", "method", "decision", "status_class")

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("requests_total", COUNTER, "Requests that ended, refused ones included.", _LABELS),
        Family("decisions_total", COUNTER, "Decisions by verdict and reason.", ("verdict", "reason", "cached")),
        Family("request_duration_seconds", HISTOGRAM, "From first byte in to last byte out.", ("agent",), _NS),
        Family("overhead_seconds", HISTOGRAM, "Added by creto itself: no upstream, no people.", ("agent",), _NS),
        Family("upstream_duration_seconds", HISTOGRAM, "From sending on to the answer's end.", ("host",), _NS),
        Family("bytes_total", COUNTER, "Bytes of requests sent on (up) and of answers (down).", ("direction",)),
        Family("quota_denied_total", COUNTER, "Requests that a budget refused.", ("level", "metric")),
        Family("holds_open", GAUGE, "Requests that wait for a person now."),
        Family("holds_total", COUNTER, "Requests that waited for a person, by how that ended.", ("result",)),
        Family("hold_seconds", HISTOGRAM, "How long requests waited for a person.", (), _NS),
        Family("held_body_bytes", GAUGE, "Request bodies that are kept whole for a decision."),
        Family("connections", GAUGE, "Connections of agents that are open, tunnels too.", ("worker",)),
        Family("upstream_connects_total", COUNTER, "Attempts to connect to upstreams.", ("result",)),
        Family("upstream_reuses_total", COUNTER, "Requests sent on a connection that was kept open."),
        Family("upstream_retries_total", COUNTER, "Further tries, within the retry budget."),
        Family("upstream_idle_connections", GAUGE, "Connections to upstreams that are kept open for later."),
        Family("upstream_breakers_open", GAUGE, "Addresses that are left alone because they failed."),
        Family("overload_shed_total", COUNTER, "Requests turned away to protect creto itself.", ("reason",)),
        Family("journal_healthy", GAUGE, "1 while outcomes can be recorded; 0 refuses everything.", ("worker",)),
        Family("journal_lag_bytes", GAUGE, "Journal that a consumer has not applied yet.", ("consumer",)),
        Family("journal_records_total", COUNTER, "Journal records that a consumer applied.", ("consumer",)),
        Family("journal_consumer_errors_total", COUNTER, "Attempts of a journal consumer that failed.", ("consumer",)),
        Family("access_log_lines_total", COUNTER, "Lines written to the access log."),
        Family("trace_spans_total", COUNTER, "Spans by what became of them.", ("result",)),
        Family("loop_lag_seconds", HISTOGRAM, "How late the event loop of a worker was.", ("worker",), _NS),
        Family("decision_table_occupancy", GAUGE, "Share of the decision table in use.", ("worker",), _PPM),
        Family("process_resident_memory_bytes", GAUGE, "Resident memory of a worker.", ("worker",)),
        Family("process_cpu_seconds_total", COUNTER, "CPU time of a worker.", ("worker",), _NS),
        Family("process_open_fds", GAUGE, "Open descriptors of a worker.", ("worker",)),
        # Of the node as a whole; told by the controller when it is asked, and in no file.
        Family("quota_table_occupancy", GAUGE, "Share of the quota table's slots in use."),
        Family("reservations", GAUGE, "Quota reservations that are neither settled nor given back."),
        Family("build_info", GAUGE, "Always 1; which creto this is.", ("version", "python")),
        Family("start_time_seconds", GAUGE, "When the controller was started, in unix time."),
        Family("ready", GAUGE, "1 while /readyz says so."),
        Family("workers", GAUGE, "Worker processes by state.", ("state",)),
        Family("worker_restarts_total", COUNTER, "Workers that ended without being told to."),
        Family("generation", GAUGE, "Generation of configuration and code in force."),
        Family("config_reloads_total", COUNTER, "Reloads of the configuration that were tried."),
        Family("config_last_reload_successful", GAUGE, "1 unless the last reload was refused."),
        Family("config_last_reload_timestamp_seconds", GAUGE, "Unix time of the last reload; 0: never."),
    )
}  # fmt: skip


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """``{name="value",...}`` as Prometheus writes it; empty without labels."""
    if not names:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True)) + "}"


def _escaped(value: str) -> str:
    # Agents choose some of these texts: they must neither end a line nor move a cursor where they are shown.
    plain = "".join(char if char.isprintable() else "?" for char in value[:256])
    return plain.replace("\\", "\\\\").replace('"', '\\"')


def label_values(text: str) -> tuple[str, ...]:
    """The values of what ``label_text`` wrote, in order."""
    return tuple(re.sub(r"\\(.)", r"\1", value) for value in re.findall(r'="((?:[^"\\]|\\.)*)"', text))


class Registry:
    """Cells by family and label values: found once, then counted on by number."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self._cells: dict[tuple[str, ...], int] = {}
        self._series: dict[str, int] = {}
        self._known: dict[str, set[str]] = {label: set() for label in BOUNDS}
        # Where counts go that there is no room for: no family, so nobody reads them.
        self.spill = counters.allocate("spill", HISTOGRAM_CELLS)
        for family in FAMILIES.values():
            if not family.labels and family.name not in CONTROLLER:
                self.cell(family.name)

    def cell(self, name: str, *values: str) -> int:
        """The cell of one series; its histogram's first when the family is one. Raises KeyError for an unknown family,
        ValueError for another number of label values than it has."""
        found = self._cells.get((name, *values))
        return self._found(name, values) if found is None else found

    def named(self, label: str, value: str) -> str:
        """``value``, or OTHER when that would be one name too many."""
        known = self._known[label]
        if value not in known:
            if len(known) >= BOUNDS[label]:
                return OTHER
            known.add(value)
        return value

    def knows(self, label: str, value: str) -> bool:
        return value in self._known[label]

    def _found(self, name: str, values: tuple[str, ...]) -> int:
        family = FAMILIES[name]
        bounded = tuple(self._bounded(family, values))
        if self._series.get(name, 0) >= MAX_SERIES and (name, *bounded) not in self._cells:
            pairs = zip(family.labels, bounded, strict=True)
            bounded = tuple(OTHER if label in ("agent", "host") else value for label, value in pairs)
        cell = self._cells.get((name, *bounded))
        if cell is None:
            cell = self._allocated(family, bounded)
            self._series[name] = self._series.get(name, 0) + 1
            self._cells[(name, *bounded)] = cell
        return cell

    def _bounded(self, family: Family, values: tuple[str, ...]) -> Iterator[str]:
        for label, value in zip(family.labels, values, strict=True):
            yield self.named(label, value) if label in BOUNDS else value

    def _allocated(self, family: Family, values: tuple[str, ...]) -> int:
        name = family.full_name + label_text(family.labels, values)
        try:
            return self.counters.allocate(name, HISTOGRAM_CELLS if family.kind == "histogram" else 1)
        except CountersFull:
            return self.spill


CONTROLLER = frozenset(
    {
        "quota_table_occupancy", "reservations", "build_info", "start_time_seconds", "ready", "workers",
        "worker_restarts_total", "generation", "config_reloads_total", "config_last_reload_successful",
        "config_last_reload_timestamp_seconds",
    }
)  # fmt: skip
