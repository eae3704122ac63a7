"""What the fields of a provider's usage mean, in one vocabulary. Used by both forms of the scanner.

Sources: OpenAI API reference, CompletionUsage and ResponseUsage; Anthropic API reference, Usage and "Prompt caching";
Gemini API reference, UsageMetadata; Amazon Bedrock API reference, TokenUsage and CacheDetail, and "Prompt caching";
Cohere API reference, ApiMeta and Usage; Ollama API reference, "Generate a chat message".
"""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

Dialect: TypeAlias = Literal["openai", "openai-responses", "anthropic", "gemini", "bedrock", "cohere", "ollama"]
Framing: TypeAlias = Literal["document", "events", "lines", "frames"]

# A larger count is a mistake or a lie: that field is treated as absent. Keeps every cost within 64 bits.
MAX_COUNT = 10**9
# Longest frame of an event stream of AWS that is read: its payload may have 24 MiB, its headers 128 KiB.
MAX_FRAME = 25 << 20
MAX_FRAME_HEADERS = 128 << 10
# Begins every frame: its length and that of its headers, and their checksum. Another checksum ends it.
PRELUDE = 12
CHECKSUM = 4


class Grammar(NamedTuple):
    """Names of the members that count in a dialect.

    usage: objects of counts. model: the name of the model that answered. wrappers: objects in which a stream has these
    one level deeper. loose: outermost members that count by themselves. payload: base64 text of another document.
    """

    usage: tuple[bytes, ...] = (b"usage",)
    model: bytes = b"model"
    wrappers: tuple[bytes, ...] = ()
    loose: tuple[bytes, ...] = ()
    payload: bytes = b""


METRICS = "amazon-bedrock-invocationMetrics"
GRAMMARS: Mapping[str, Grammar] = {
    "openai": Grammar(),
    "openai-responses": Grammar(wrappers=(b"response",)),
    "anthropic": Grammar(wrappers=(b"message",)),
    "gemini": Grammar(usage=(b"usageMetadata",), model=b"modelVersion"),
    # Its models have names of their own in their answers, which are not those that have a price at Bedrock.
    "bedrock": Grammar(
        model=b"",
        wrappers=(b"message", b"metadata"),
        loose=(METRICS.encode(), b"prompt_token_count", b"generation_token_count", b"inputTextTokenCount"),
        payload=b"bytes",
    ),
    "cohere": Grammar(usage=(b"usage", b"meta"), wrappers=(b"delta", b"response")),
    "ollama": Grammar(usage=(), loose=(b"prompt_eval_count", b"eval_count", b"done")),
}
FRAMINGS: tuple[Framing, ...] = ("document", "events", "lines", "frames")
# Their streams tell the usage in parts.
MERGED = frozenset({"anthropic", "bedrock"})

_DETAILS = (
    ("prompt_tokens_details", "completion_tokens_details"),
    ("input_tokens_details", "output_tokens_details"),
)
# As prices have it, a document counts as the pictures of its pages.
_MODALITIES = {"AUDIO": "audio", "IMAGE": "image", "DOCUMENT": "image", "VIDEO": "video"}


def usage_fields(raw: bytes) -> dict[str, Any]:
    """The members of a captured usage object; empty when it is not one."""
    try:
        value = json.loads(raw) if raw else {}
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def loose_fields(raw: Mapping[bytes, bytes]) -> dict[str, Any]:
    """The captured outermost members, those left out that are no JSON."""
    fields: dict[str, Any] = {}
    for name, value in raw.items():
        try:
            fields[name.decode("ascii")] = json.loads(value)
        except (ValueError, RecursionError):
            continue
    return fields


def decoded_payload(raw: bytes) -> bytes:
    """The document behind a captured string of base64, empty when it is none."""
    try:
        text = json.loads(raw) if raw else ""
        return b64decode(text, validate=True) if isinstance(text, str) else b""
    except ValueError:
        return b""


def counts_of(dialect: str, usage: bytes, loose: Mapping[bytes, bytes]) -> dict[str, int]:
    """What one document counts, by the meaning of its dialect; see ``usage_of``."""
    if dialect == "ollama":
        return ollama_usage(loose_fields(loose))
    fields = usage_fields(usage)
    if dialect == "anthropic":
        return anthropic_counts(fields)
    if dialect == "bedrock":
        return bedrock_counts(fields, loose_fields(loose))
    if dialect == "gemini":
        return gemini_usage(fields)
    return cohere_usage(fields) if dialect == "cohere" else openai_usage(fields)


def usage_of(dialect: str, counts: dict[str, int]) -> dict[str, int]:
    """The usage that merged ``counts`` are."""
    return anthropic_usage(counts) if dialect in MERGED else dict(counts)


def is_last_word(dialect: str, loose: Mapping[bytes, bytes], *, level: int, choices_empty: bool, inner: bool) -> bool:
    """Whether a document of a stream, in which usage was found, is the one after which no more is used.

    level: how deep the usage stood. inner: the document was inside another.
    """
    if dialect in ("openai-responses", "cohere"):
        return True
    if dialect == "anthropic":
        return level == 1
    if dialect == "bedrock":
        return not inner or METRICS.encode() in loose
    if dialect == "ollama":
        return loose.get(b"done") == b"true"
    return dialect == "openai" and choices_empty


def _count(value: Any) -> int | None:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value <= MAX_COUNT else None


def _take(into: dict[str, int], name: str, fields: Any, *keys: str) -> None:
    """Stores the first of ``keys`` that holds a count."""
    if not isinstance(fields, dict):
        return
    for key in keys:
        count = _count(fields.get(key))
        if count is not None:
            into[name] = count
            return


def openai_usage(fields: dict[str, Any]) -> dict[str, int]:
    """Chat completions and embeddings say prompt/completion, responses say input/output; details are parts of them.

    Compatible servers that leave reasoning out of the completion (xAI, Gemini) have it in the total: what a total has
    beyond input and output is output.
    """
    usage: dict[str, int] = {}
    _take(usage, "input", fields, "prompt_tokens", "input_tokens")
    _take(usage, "output", fields, "completion_tokens", "output_tokens")
    _take(usage, "total", fields, "total_tokens")
    for parts_in, parts_out in _DETAILS:
        inside, outside = fields.get(parts_in), fields.get(parts_out)
        _take(usage, "cache_read", inside, "cached_tokens")
        _take(usage, "cache_write", inside, "cache_write_tokens")
        _take(usage, "input_audio", inside, "audio_tokens")
        _take(usage, "reasoning", outside, "reasoning_tokens")
        _take(usage, "output_audio", outside, "audio_tokens")
    return _completed(usage)


def _completed(usage: dict[str, int]) -> dict[str, int]:
    """With whichever of input, output and total follows from the other two."""
    total = usage.get("total")
    if total is None:
        if "input" in usage and "output" in usage:
            usage["total"] = usage["input"] + usage["output"]
    elif "input" in usage:
        usage["output"] = max(usage.get("output", 0), total - usage["input"])
    elif "output" in usage:
        usage["input"] = max(0, total - usage["output"])
    return usage


def anthropic_counts(fields: dict[str, Any]) -> dict[str, int]:
    """Counts by Anthropic's own meaning (``input`` without caches), so that events can be merged field by field."""
    counts: dict[str, int] = {}
    _take(counts, "input", fields, "input_tokens")
    _take(counts, "output", fields, "output_tokens")
    _take(counts, "cache_read", fields, "cache_read_input_tokens")
    _take(counts, "cache_write", fields, "cache_creation_input_tokens")
    by_age = fields.get("cache_creation")
    _take(counts, "cache_write_1h", by_age, "ephemeral_1h_input_tokens")
    if "cache_write" not in counts and isinstance(by_age, dict):
        _take(counts, "cache_write_5m", by_age, "ephemeral_5m_input_tokens")
    _take(counts, "web_search", fields.get("server_tool_use"), "web_search_requests")
    return counts


def anthropic_usage(counts: dict[str, int]) -> dict[str, int]:
    """Source: Anthropic "Prompt caching": total input = input_tokens + cache_read + cache_creation."""
    usage = dict(counts)
    five_minutes = usage.pop("cache_write_5m", None)
    if "cache_write" not in usage and (five_minutes is not None or "cache_write_1h" in usage):
        usage["cache_write"] = (five_minutes or 0) + usage.get("cache_write_1h", 0)
    if "input" in usage:
        usage["input"] += usage.get("cache_read", 0) + usage.get("cache_write", 0)
        if "output" in usage:
            usage["total"] = usage["input"] + usage["output"]
    return usage


def bedrock_counts(fields: dict[str, Any], loose: dict[str, Any]) -> dict[str, int]:
    """Counts with ``input`` without caches: those of Converse, of what Bedrock adds to the last chunk of a stream, and
    of the models' own answers, which are Anthropic's, OpenAI's, Nova's, Llama's and Titan's.
    """
    counts = anthropic_counts(fields)
    if "prompt_tokens" in fields or "completion_tokens" in fields:
        said = openai_usage(fields)
        counts.update({name: said[name] for name in ("output", "cache_read", "cache_write") if name in said})
        if "input" in said:
            counts["input"] = max(0, said["input"] - said.get("cache_read", 0) - said.get("cache_write", 0))
    for source in (fields, loose.get(METRICS)):
        _take(counts, "input", source, "inputTokens", "inputTokenCount")
        _take(counts, "output", source, "outputTokens", "outputTokenCount")
        _take(counts, "cache_read", source, "cacheReadInputTokens", "cacheReadInputTokenCount")
        _take(counts, "cache_write", source, "cacheWriteInputTokens", "cacheWriteInputTokenCount")
    by_age = _by(fields.get("cacheDetails"), "ttl", "inputTokens")
    if "1h" in by_age:
        counts["cache_write_1h"] = by_age["1h"]
    if "input" not in counts:
        _take(counts, "input", loose, "prompt_token_count", "inputTextTokenCount")
    if "output" not in counts:
        _take(counts, "output", loose, "generation_token_count")
    return counts


def gemini_usage(fields: dict[str, Any]) -> dict[str, int]:
    """``promptTokenCount`` has what was cached in it; the prompts of tools and the thoughts stand beside prompt and
    candidates, and are paid for as input and output. A count of nothing is left out, so a total tells the rest."""
    usage: dict[str, int] = {}
    _sum(usage, "input", fields, "promptTokenCount", "toolUsePromptTokenCount")
    _sum(usage, "output", fields, "candidatesTokenCount", "thoughtsTokenCount")
    _take(usage, "total", fields, "totalTokenCount")
    _take(usage, "cache_read", fields, "cachedContentTokenCount")
    _take(usage, "reasoning", fields, "thoughtsTokenCount")
    for prefix, *details in (
        ("input_", "promptTokensDetails", "toolUsePromptTokensDetails"),
        ("cache_read_", "cacheTokensDetails"),
        ("output_", "candidatesTokensDetails"),
    ):
        for detail in details:
            for modality, count in _by(fields.get(detail), "modality", "tokenCount").items():
                if count and modality in _MODALITIES:
                    name = prefix + _MODALITIES[modality]
                    usage[name] = min(MAX_COUNT, usage.get(name, 0) + count)
    return _completed(usage)


def cohere_usage(fields: dict[str, Any]) -> dict[str, int]:
    """What is billed, which leaves out what Cohere itself adds to a prompt; else what was counted."""
    usage: dict[str, int] = {}
    for name in ("billed_units", "tokens"):
        if not usage:
            _take(usage, "input", fields.get(name), "input_tokens")
            _take(usage, "output", fields.get(name), "output_tokens")
    if "input" in usage:
        _take(usage, "cache_read", fields, "cached_tokens")
        if "cache_read" in usage:
            usage["cache_read"] = min(usage["cache_read"], usage["input"])
    return _completed(usage)


def ollama_usage(fields: dict[str, Any]) -> dict[str, int]:
    """What was read from a cache is not counted, and costs nothing."""
    usage: dict[str, int] = {}
    _take(usage, "input", fields, "prompt_eval_count")
    _take(usage, "output", fields, "eval_count")
    return _completed(usage)


def _sum(into: dict[str, int], name: str, fields: dict[str, Any], *keys: str) -> None:
    counts = [count for key in keys if (count := _count(fields.get(key))) is not None]
    if counts:
        into[name] = min(MAX_COUNT, sum(counts))


def _by(rows: Any, label: str, value: str) -> dict[str, int]:
    """label -> sum of the counts of the rows with it."""
    found: dict[str, int] = {}
    for row in rows if isinstance(rows, list) else ():
        name = row.get(label) if isinstance(row, dict) else None
        count = _count(row.get(value)) if isinstance(name, str) else None
        if isinstance(name, str) and count is not None:
            found[name] = min(MAX_COUNT, found.get(name, 0) + count)
    return found
