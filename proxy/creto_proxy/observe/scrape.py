"""What Prometheus gets when it asks: text format 0.0.4, or OpenMetrics 1.0 for those who accept it."""

from __future__ import annotations

import platform
from array import array
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from creto_hotpath.counters import bucket_end, bucket_of
from creto_proxy.observe.aggregate import Aggregate, Base, aggregate, family_of
from creto_proxy.observe.registry import FAMILIES, Family, label_text
from creto_proxy.observe.tables import occupancy
from creto_proxy.workers.status import NodeStatus

TEXT: Final = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS: Final = "application/openmetrics-text; version=1.0.0; charset=utf-8"

# 1, 2 and 5 in each decade from 1 us to 1000 s; each is the end of a bucket, so these counts are exact.
BOUNDS_NS: Final = tuple(m * 10**power for power in range(3, 12) for m in (1, 2, 5)) + (10**12,)
_EDGES: Final = tuple((bound / 1e9, 1 + bucket_of(bound)) for bound in BOUNDS_NS)
_STATES: Final = ("starting", "ready", "draining", "dead")

Samples = Mapping[str, Mapping[str, "float | array[int]"]]


class Scrape:
    """Everything a node can tell about itself, summed up anew each time it is asked."""

    def __init__(self, directory: Path, state: Path, base: Base | None = None) -> None:
        """directory: of the run's counters. base: takes over from the dead, where there are processes that may die."""
        self._directory = directory
        self._state = state
        self._base = base

    def __call__(self, status: NodeStatus, *, openmetrics: bool) -> bytes:
        """The metrics as text. Blocks for some milliseconds: to be called off the loop."""
        if self._base is not None:
            self._base.fold()
        samples = samples_of(aggregate(self._directory))
        for name, labels, value in (*node_samples(status), *_tables(self._state)):
            samples.setdefault(name, {})[labels] = value
        return render(samples, openmetrics=openmetrics).encode()


def samples_of(total: Aggregate) -> dict[str, dict[str, float | array[int]]]:
    """Family name -> label text -> number in the family's unit, or the cells of a histogram."""
    samples: dict[str, dict[str, float | array[int]]] = {}
    for name, values in total.values.items():
        family = family_of(name)
        if family is not None:
            labels = name.removeprefix(family.full_name)
            value = values if family.kind == "histogram" else values[0] / family.per
            samples.setdefault(family.name, {})[labels] = value
    return samples


def node_samples(status: NodeStatus) -> Iterator[tuple[str, str, float]]:
    """(family, label text, value) of what the controller knows."""

    def labels(name: str, *values: str) -> str:
        return label_text(FAMILIES[name].labels, values)

    yield "build_info", labels("build_info", status.version, platform.python_version()), 1
    yield "start_time_seconds", "", status.started_at
    yield "ready", "", int(status.ready)
    for state in _STATES:
        yield "workers", labels("workers", state), sum(worker.state == state for worker in status.workers)
    yield "worker_restarts_total", "", status.restarts
    yield "generation", "", status.generation
    yield "config_reloads_total", "", status.reload.count
    yield "config_last_reload_successful", "", int(not status.reload.failed)
    yield "config_last_reload_timestamp_seconds", "", status.reload.at


def _tables(state: Path) -> Iterator[tuple[str, str, float]]:
    found = occupancy(state / "quota.tab")
    if found is not None:
        yield "quota_table_occupancy", "", found.share
        yield "reservations", "", found.reservations


def render(samples: Samples, *, openmetrics: bool) -> str:
    """The text of every family, those without samples too: a name that is there before its first event can be used."""
    lines: list[str] = []
    for family in FAMILIES.values():
        lines.extend(_family(family, samples.get(family.name, {}), openmetrics))
    if openmetrics:
        lines.append("# EOF")
    return "\n".join(lines) + "\n"


def _family(family: Family, samples: Mapping[str, float | array[int]], openmetrics: bool) -> Iterable[str]:
    name = family.full_name
    # OpenMetrics names a family of counters without what their samples end in.
    title = name.removesuffix("_total") if openmetrics and family.kind == "counter" else name
    yield f"# HELP {title} {family.help}"
    yield f"# TYPE {title} {family.kind}"
    for labels in sorted(samples):
        value = samples[labels]
        if isinstance(value, array):
            yield from _histogram(name, labels, value, family.per)
        else:
            yield f"{name}{labels} {_number(value)}"


def _histogram(name: str, labels: str, cells: array[int], per: int) -> Iterator[str]:
    inner = labels[1:-1] + "," if labels else ""
    count, start = 0, 1
    for bound, edge in _EDGES:
        count += sum(cells[start : edge + 1])
        start = edge + 1
        yield f'{name}_bucket{{{inner}le="{bound!r}"}} {count}'
    count += sum(cells[start:])
    yield f'{name}_bucket{{{inner}le="+Inf"}} {count}'
    yield f"{name}_sum{labels} {_number(cells[0] / per)}"
    yield f"{name}_count{labels} {count}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(value)


def quantile(cells: array[int], share: float) -> float | None:
    """The value in nanoseconds that ``share`` of a histogram's values do not exceed, within 10 %; None when empty."""
    total = sum(cells[1:])
    if total <= 0:
        return None
    wanted, seen = share * total, 0
    for index, count in enumerate(cells[1:]):
        seen += count
        if seen >= wanted and count:
            return float(bucket_end(index))
    return None
