"""Spans over OTLP/HTTP, in the background: nothing waits for a collector, and what it cannot take is counted.

Needs the extra ``otel`` (OpenTelemetry SDK and its OTLP/HTTP exporter). Headers, timeout, certificate and compression
are those of the ``OTEL_EXPORTER_OTLP_*`` variables, resource attributes of ``OTEL_RESOURCE_ATTRIBUTES``.
"""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags

from creto_proxy import __version__
from creto_proxy.model import Outcome
from creto_proxy.observe.spans import SCHEMA_DEFAULT, SCHEMA_LATEST, SpanData, latest_genai, span_of, wanted

log = logging.getLogger("creto.traces")

QUEUE: Final = 8192
BATCH: Final = 512
# A batch that is not full waits this long.
LINGER_S: Final = 1.0
# Time for what is left when creto ends.
FLUSH_S: Final = 5.0

# (result, how many): "exported", "dropped" when the queue was full, "failed" when the collector did not take them
Count = Callable[[str, int], None]


class Traces:
    """A sink that makes spans of records and has them sent by a thread of its own."""

    def __init__(self, endpoint: str, *, ratio: float, count: Count) -> None:
        """endpoint: base URL, without ``/v1/traces``. ratio: of the requests without a trace of their own."""
        self._ratio = ratio
        self._count = count
        self._latest = latest_genai(os.environ)
        self._resource = Resource.create({"service.name": "creto", "service.version": __version__})
        schema = SCHEMA_LATEST if self._latest else SCHEMA_DEFAULT
        self._scope = InstrumentationScope("creto", __version__, schema)
        self._exporter = OTLPSpanExporter(endpoint=f"{endpoint}/v1/traces")
        self._queue: deque[SpanData] = deque()
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._failing = False
        # The SDK says every failed batch; that a collector is away is said here, once.
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
        self._thread = threading.Thread(target=self._run, name="creto-traces", daemon=True)
        self._thread.start()

    def write(self, records: Sequence[Outcome]) -> None:
        queue, dropped = self._queue, 0
        for outcome in records:
            if wanted(outcome, self._ratio):
                if len(queue) >= QUEUE:
                    dropped += 1
                else:
                    queue.append(span_of(outcome, latest=self._latest))
        if dropped:
            self._count("dropped", dropped)
        if len(queue) >= BATCH:
            self._wake.set()

    def close(self) -> None:
        """Sends what is left, for as long as ``FLUSH_S``; the rest is counted as dropped."""
        self._stop.set()
        self._wake.set()
        self._thread.join(FLUSH_S)
        if self._thread.is_alive():
            self._exporter.shutdown()  # type: ignore[no-untyped-call]
            self._thread.join(1.0)
        if self._queue:
            self._count("dropped", len(self._queue))

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(LINGER_S)
            self._wake.clear()
            self._drain()
        self._drain()
        self._exporter.shutdown()  # type: ignore[no-untyped-call]

    def _drain(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            self._send([self._readable(span) for span in batch])

    def _send(self, spans: Sequence[ReadableSpan]) -> None:
        failed = self._exporter.export(spans) is not SpanExportResult.SUCCESS
        self._count("failed" if failed else "exported", len(spans))
        if failed != self._failing:
            self._failing = failed
            log.warning("traces are %s", "lost: the collector does not take them" if failed else "taken again")

    def _readable(self, span: SpanData) -> ReadableSpan:
        flags = TraceFlags(span.flags)
        parent = SpanContext(span.trace, span.parent, is_remote=True, trace_flags=flags) if span.parent else None
        return ReadableSpan(
            name=span.name,
            context=SpanContext(span.trace, span.span, is_remote=False, trace_flags=flags),
            parent=parent,
            resource=self._resource,
            attributes=span.attributes,
            kind=SpanKind.CLIENT,
            status=Status(StatusCode.ERROR, span.error) if span.error else Status(StatusCode.UNSET),
            start_time=span.start_ns,
            end_time=span.end_ns,
            instrumentation_scope=self._scope,
        )
