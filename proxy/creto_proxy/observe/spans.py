"""A journal record as a span: what the agent asked of an upstream, as creto saw it.

Kind CLIENT, child of the span that the agent sent along, and parent of what the upstream reports. Names follow the
OpenTelemetry semantic conventions: HTTP as declared stable (1.23.0). For generative AI, ``gen_ai.system`` of 1.36.0 by
default; with ``gen_ai_latest_experimental`` in ``OTEL_SEMCONV_STABILITY_OPT_IN`` (a comma-separated list)
``gen_ai.provider.name`` and the cache counts of 1.40.0. There is no query, field or body in a record, hence in no span.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from creto_proxy.model import Outcome
from creto_proxy.observe.tracecontext import parent_id, sampled, span_id, trace_id, uuid_text

SCHEMA_DEFAULT: Final = "https://opentelemetry.io/schemas/1.36.0"
SCHEMA_LATEST: Final = "https://opentelemetry.io/schemas/1.40.0"
OPT_IN: Final = "OTEL_SEMCONV_STABILITY_OPT_IN"

Value = str | int | tuple[str, ...]

# creto's provider names -> gen_ai.provider.name (1.37.0 and later), and what gen_ai.system called them before.
_PROVIDERS: Final[Mapping[str, tuple[str, str]]] = {
    "azure": ("azure.ai.openai", "az.ai.openai"),
    "bedrock": ("aws.bedrock", "aws.bedrock"),
    "gemini": ("gcp.gemini", "gcp.gemini"),
    "google": ("gcp.gemini", "gcp.gemini"),
    "mistral": ("mistral_ai", "mistral_ai"),
    "vertex": ("gcp.vertex_ai", "gcp.vertex_ai"),
}
# End of a path -> gen_ai.operation.name. The first that fits.
_OPERATIONS: Final = (
    ("/chat/completions", "chat"),
    ("/messages", "chat"),
    ("/responses", "chat"),
    ("/converse", "chat"),
    ("/converse-stream", "chat"),
    ("/api/chat", "chat"),
    ("/embeddings", "embeddings"),
    ("/api/embed", "embeddings"),
    (":embedContent", "embeddings"),
    (":generateContent", "generate_content"),
    (":streamGenerateContent", "generate_content"),
    ("/completions", "text_completion"),
    ("/api/generate", "text_completion"),
)
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"})


def latest_genai(environ: Mapping[str, str]) -> bool:
    """Whether the operator asked for the newer names."""
    return "gen_ai_latest_experimental" in (item.strip() for item in environ.get(OPT_IN, "").split(","))


@dataclass(frozen=True, slots=True)
class SpanData:
    """A span in numbers, before any SDK. parent: 0 for none. error: what failed, "" for nothing."""

    name: str
    trace: int
    span: int
    parent: int
    flags: int
    start_ns: int
    end_ns: int
    attributes: dict[str, Value]
    error: str


def wanted(outcome: Outcome, ratio: float) -> bool:
    """Whether it becomes a span: as its caller decided, else by chance, the same for every retelling of the record."""
    if outcome.trace:
        return sampled(outcome.trace)
    return int.from_bytes(outcome.id[9:], "big") < ratio * 2**56


def span_of(outcome: Outcome, *, latest: bool) -> SpanData:
    attributes: dict[str, Value] = {
        "server.address": outcome.host,
        "url.scheme": outcome.scheme,
        "creto.request_id": uuid_text(outcome.id),
        "creto.agent": outcome.agent,
        "creto.chain": outcome.chain,
        "creto.action": outcome.action,
        "creto.decision": outcome.decision,
        "creto.way": outcome.way,
        "creto.link": outcome.link,
        "creto.overhead_ns": outcome.creto_ns,
    }
    if outcome.port:
        attributes["server.port"] = outcome.port
    for name, value in (
        ("creto.reason", outcome.reason),
        ("creto.policies", outcome.policies),
        ("creto.resource", outcome.resource),
        ("creto.approval_id", outcome.approval_id),
        ("creto.held_ns", outcome.held_ns),
        ("creto.upstream_ns", outcome.upstream_ns),
        ("creto.cost_nano_usd", outcome.usage.cost_nano_usd),
        ("http.request.size", outcome.bytes_up),
        ("http.response.size", outcome.bytes_down),
    ):
        if value:
            attributes[name] = value
    name = _http(outcome, attributes) if outcome.method else outcome.kind
    name = _genai(outcome, attributes, latest) or name
    error = outcome.error or (outcome.reason if outcome.decision == "deny" else "")
    if not error and outcome.status >= 400:
        error = str(outcome.status)
    if error:
        attributes["error.type"] = error
    return SpanData(
        name=name,
        trace=trace_id(outcome.trace, outcome.id),
        span=span_id(outcome.id),
        parent=parent_id(outcome.trace),
        flags=int(outcome.trace[-2:], 16) if outcome.trace else 1,
        start_ns=outcome.at_unix_ns - outcome.total_ns,
        end_ns=outcome.at_unix_ns,
        attributes=attributes,
        error=error,
    )


def _http(outcome: Outcome, attributes: dict[str, Value]) -> str:
    known = outcome.method in _METHODS
    attributes["http.request.method"] = outcome.method if known else "_OTHER"
    if not known:
        attributes["http.request.method_original"] = outcome.method
    host = f"[{outcome.host}]" if ":" in outcome.host else outcome.host
    port = f":{outcome.port}" if outcome.port else ""
    attributes["url.full"] = f"{outcome.scheme}://{host}{port}{outcome.target}"
    if outcome.status:
        attributes["http.response.status_code"] = outcome.status
    return outcome.method if known else "HTTP"


def _genai(outcome: Outcome, attributes: dict[str, Value], latest: bool) -> str:
    """Adds what a request to a model is about; its span's name, "" for other requests."""
    usage = outcome.usage
    if not usage.provider:
        return ""
    newer, older = _PROVIDERS.get(usage.provider, (usage.provider, usage.provider))
    attributes["gen_ai.provider.name" if latest else "gen_ai.system"] = newer if latest else older
    asked = outcome.resource.removeprefix("model:") if outcome.resource.startswith("model:") else usage.model
    operation = next((name for end, name in _OPERATIONS if outcome.target.endswith(end)), "")
    tokens = usage.tokens
    for name, value in (
        ("gen_ai.operation.name", operation),
        ("gen_ai.request.model", asked),
        ("gen_ai.response.model", usage.model if outcome.status and outcome.status < 400 else ""),
    ):
        if value:
            attributes[name] = value
    counts = [("gen_ai.usage.input_tokens", "input"), ("gen_ai.usage.output_tokens", "output")]
    if latest:
        counts.append(("gen_ai.usage.cache_read.input_tokens", "cache_read"))
        counts.append(("gen_ai.usage.cache_creation.input_tokens", "cache_write"))
    for name, key in counts:
        if key in tokens:
            attributes[name] = tokens[key]
    return f"{operation} {asked}".strip()
