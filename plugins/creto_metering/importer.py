"""Price rows from the genai-prices package (MIT), offline: what is installed is what is imported.

genai-prices is an optional dependency, needed by ``creto usage import-prices`` only. It is never called inline: one
calculation takes it tens of microseconds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from importlib.metadata import version
from typing import Any

from creto_metering.prices import FORMAT

PROVIDERS = (
    "openai", "anthropic", "azure", "mistral", "groq", "deepseek", "x-ai", "cerebras", "google", "aws", "cohere",
)  # fmt: skip
# Those that have another name here.
_NAMES = {"aws": "bedrock"}

_KINDS = {
    "input_mtok": "input",
    "output_mtok": "output",
    "cache_read_mtok": "cache_read",
    "cache_write_mtok": "cache_write",
    "cache_write_1h_mtok": "cache_write_1h",
    "input_audio_mtok": "input_audio",
    "output_audio_mtok": "output_audio",
    "web_searches_kcount": "web_search",
    "cache_audio_read_mtok": "cache_read_audio",
    "input_image_mtok": "input_image",
    "input_video_mtok": "input_video",
    "output_image_mtok": "output_image",
    "output_video_mtok": "output_video",
}
# What a request can ask for that changes its price. Batch prices are left out: batches are not metered inline.
_FACTS = frozenset({"service_tier", "speed"})

# Most output tokens of models whose API does not require a limit; genai-prices does not have them. First match
# wins. From published tables of limits, the higher value where those disagree (gpt-5-pro); later gpt-5 models are
# assumed to be like gpt-5. Models not listed reserve their context window. A limit that is too low here lets a request
# use more than it reserved, which is then carried as a debt.
_MAX_OUTPUT = (
    (r"^gpt-5-chat|^gpt-5\.\d-chat|^gpt-4o|^chatgpt-4o", 16_384),
    (r"^gpt-5-pro", 272_000),
    (r"^gpt-5", 128_000),
    (r"^gpt-4\.1", 32_768),
    (r"^gpt-4-turbo|^gpt-4-\d+-preview|^gpt-3\.5", 4_096),
    (r"^gpt-4$|^gpt-4-0", 8_192),
    (r"^o1-mini", 65_536),
    (r"^o1-preview", 32_768),
    (r"^o[134]", 100_000),
)
# The same for other providers. Claude needs a limit everywhere but in Bedrock's Converse, where it may be left out;
# Gemini's thoughts are within its limit.
_MAX_OUTPUT_AT: Mapping[str, tuple[tuple[str, int], ...]] = {
    "google": (
        (r"^gemini-2\.5-flash-image", 32_768),
        (r"^gemini-(?:2\.5|[3-9]|nano|omni|robotics)", 65_536),
        (r"^gemini|^gemma-", 8_192),
    ),
    "bedrock": (
        (r"claude-3-(?:opus|sonnet|haiku)", 4_096),
        (r"claude-3-5", 8_192),
        (r"claude-opus-4-(?:1-)?2025", 32_000),
        (r"claude-(?:sonnet-4-2025|sonnet-4-5|haiku-4-5|opus-4-5)", 64_000),
        (r"claude-", 128_000),
        (r"nova-2", 65_536),
        (r"nova-(?:micro|lite|pro|premier)", 10_000),
        (r"^meta\.llama|^amazon\.titan-text", 8_192),
    ),
}
# What models of Gemini read at once whose window genai-prices does not have.
_GEMINI_WINDOW = 1_048_576


class ImporterMissing(Exception):
    """The optional genai-prices package is not installed."""


def import_prices(providers: Iterable[str] = PROVIDERS) -> tuple[dict[str, Any], list[str]]:
    """``(price document, what was left out and why)`` for those providers.

    Raises ImporterMissing without the package, ValueError for a provider it does not know.
    """
    try:
        from genai_prices import data
    except ModuleNotFoundError:
        raise ImporterMissing("genai-prices is not installed; pip install 'creto-enablement[prices]'") from None
    known = {p.id: p for p in data.providers}
    if unknown := sorted(set(providers) - known.keys()):
        raise ValueError(f"genai-prices knows no provider {', '.join(unknown)}")
    skipped: list[str] = []
    rows = []
    for name in providers:
        lenders = [known[p] for p in known[name].fallback_model_providers or () if p in ("openai", "anthropic")]
        for source in (known[name], *lenders):
            as_named = _NAMES.get(name, name)
            rows += [row for model in source.models if (row := _row(as_named, model, skipped)) is not None]
    return {"format": FORMAT, "source": f"genai-prices {version('genai-prices')}", "models": rows}, skipped


def rendered(document: Mapping[str, Any]) -> str:
    """The document as JSON with one row per line, so that a price change is one changed line."""
    head = {k: v for k, v in document.items() if k != "models"}
    rows = ",\n".join(json.dumps(row, separators=(",", ":")) for row in document["models"])
    return f'{json.dumps(head)[:-1]}, "models": [\n{rows}\n]}}\n'


def _row(provider: str, model: Any, skipped: list[str]) -> dict[str, Any] | None:
    versions = list(_versions(model, f"{provider} {model.id}", skipped))
    if not any("when" not in v for v in versions):
        skipped.append(f"{provider} {model.id}: no price per token")
        return None
    row: dict[str, Any] = {"provider": provider, "model": model.id, "match": _clause(model.match)}
    if model.context_window:
        row["context_window"] = model.context_window
    elif provider == "google" and model.id.startswith("gemini"):
        row["context_window"] = _GEMINI_WINDOW
    limits = _MAX_OUTPUT_AT.get(provider, _MAX_OUTPUT)
    limit = next((limit for pattern, limit in limits if re.search(pattern, model.id)), 0)
    if limit:
        row["max_output"] = limit
    row["prices"] = versions
    return row


def _versions(model: Any, name: str, skipped: list[str]) -> Iterator[dict[str, Any]]:
    listed = model.prices if isinstance(model.prices, list) else [None]
    for entry in listed:
        prices = model.prices if entry is None else entry.prices
        constraint = None if entry is None else entry.constraint
        usd = _usd(prices)
        if "input" not in usd:
            continue
        if constraint is not None and not hasattr(constraint, "start_date"):
            skipped.append(f"{name}: a price by time of day")
            continue
        yield {**_from(constraint), "usd": usd}
    for variant in model.price_variants or ():
        usd = _usd(variant.prices)
        if usd and variant.when.keys() <= _FACTS:
            yield {**_from(variant.constraint), "when": dict(variant.when), "usd": usd}


def _from(constraint: Any) -> dict[str, str]:
    return {} if constraint is None else {"from": constraint.start_date.isoformat()}


def _usd(prices: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, kind in _KINDS.items():
        price = getattr(prices, key)
        if price is None:
            continue
        found[kind] = _plain(price) if isinstance(price, Decimal) else {
            "base": _plain(price.base),
            "above": [[tier.start, _plain(tier.price)] for tier in price.tiers],
        }  # fmt: skip
    return found


def _plain(price: Decimal) -> str:
    return f"{price.normalize():f}"


def _clause(clause: Any) -> list[Any]:
    for how in ("equals", "starts_with", "ends_with", "contains", "regex"):
        if hasattr(clause, how):
            return [how, getattr(clause, how)]
    for how in ("or", "and"):
        if hasattr(clause, f"{how}_"):
            return [how, *(_clause(c) for c in getattr(clause, f"{how}_"))]
    raise ValueError(f"unknown match rule {type(clause).__name__}")
