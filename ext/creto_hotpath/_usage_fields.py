"""What the fields of a provider's usage object mean, in one vocabulary. Used by both forms of the scanner.

Sources: OpenAI API reference, CompletionUsage and ResponseUsage; Anthropic API reference, Usage and "Prompt caching".
"""

from __future__ import annotations

import json
from typing import Any

# A larger count is a mistake or a lie: that field is treated as absent. Keeps every cost within 64 bits.
MAX_COUNT = 10**9

_DETAILS = (
    ("prompt_tokens_details", "completion_tokens_details"),
    ("input_tokens_details", "output_tokens_details"),
)


def usage_fields(raw: bytes) -> dict[str, Any]:
    """The members of a captured usage object; empty when it is not one."""
    try:
        value = json.loads(raw) if raw else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _take(into: dict[str, int], name: str, fields: Any, *keys: str) -> None:
    """Stores the first of ``keys`` that holds a count."""
    if not isinstance(fields, dict):
        return
    for key in keys:
        value = fields.get(key)
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if type(value) is int and 0 <= value <= MAX_COUNT:
            into[name] = value
            return


def openai_usage(fields: dict[str, Any]) -> dict[str, int]:
    """Chat completions and embeddings say prompt/completion, responses say input/output; details are parts of them."""
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
    total = usage.get("total")
    if total is None:
        if "input" in usage and "output" in usage:
            usage["total"] = usage["input"] + usage["output"]
    elif "input" in usage:
        usage.setdefault("output", max(0, total - usage["input"]))
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
