"""What a serving process is asked about itself every second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from creto_hotpath.admit import DecisionTable
from creto_proxy.observe.observer import Gauges

if TYPE_CHECKING:
    from creto_proxy.service import Service


def gauges_of(service: Service) -> Gauges:
    """Numbers that its stages keep anyway, for ``Sampler``."""
    pipeline, gateway, recorder = service.pipeline, service.gateway, service.recorder
    upstreams, load, memory = pipeline.upstreams, pipeline.protection.load, pipeline.protection.memory
    table = getattr(service.platform.authz, "table", None)
    gauges: dict[tuple[str, ...], Callable[[], int]] = {
        ("connections",): lambda: gateway.connections,
        ("journal_healthy",): lambda: int(recorder.healthy),
        ("held_body_bytes",): lambda: memory.used,
        ("overload_shed_total", "overloaded"): lambda: load.refused,
        ("overload_shed_total", "memory_pressure"): lambda: memory.refused,
        ("upstream_idle_connections",): lambda: upstreams.kept,
        ("upstream_retries_total",): lambda: upstreams.retries.used,
        ("upstream_breakers_open",): lambda: sum(trouble.trips > 0 for trouble in upstreams.health.bad.values()),
    }
    if isinstance(table, DecisionTable):
        gauges["decision_table_occupancy",] = lambda: table.used * 1_000_000 // table.entries
    return gauges
