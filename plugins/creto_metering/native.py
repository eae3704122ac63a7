"""What the requests of Gemini, Bedrock, Cohere and Ollama say in words of their own, and what Bedrock says beside the
bodies: usage in the head of answers, signatures in that of requests.

Names may be written as Google's JSON takes them, in camel case or with underscores.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from creto_hotpath.usage import Dialect

Names = Mapping[str, tuple[str, ...]]
Members = Callable[[bytes, str], Mapping[str, tuple[int, int]]]

_CONFIGURED = ("generationConfig", "generation_config")
# Object ("": the outermost) -> names in it. Models at Bedrock have one of these names each; the largest limit counts.
_LIMITS: Mapping[Dialect, Names] = {
    "gemini": dict.fromkeys(_CONFIGURED, ("maxOutputTokens", "max_output_tokens")),
    "bedrock": {
        "": ("max_tokens", "max_completion_tokens", "max_tokens_to_sample", "max_gen_len", "max_new_tokens"),
        "inferenceConfig": ("maxTokens", "max_new_tokens"),
        "textGenerationConfig": ("maxTokenCount",),
    },
    "cohere": {"": ("max_tokens",)},
    "ollama": {"options": ("num_predict",)},
}
_CHOICES: Mapping[Dialect, Names] = {
    "gemini": dict.fromkeys(_CONFIGURED, ("candidateCount", "candidate_count")),
    "bedrock": {"": ("num_generations", "n")},
    "cohere": {"": ("num_generations",)},
    "ollama": {},
}
NATIVE = frozenset(_LIMITS)

# What brings in input that is not in the body: files and caches by name, and tools that the provider runs itself.
_REFERENCES: Mapping[Dialect, tuple[re.Pattern[bytes], ...]] = {
    "gemini": (
        re.compile(rb'"file_?[uU]ri"\s*:'),
        re.compile(rb'"cached_?[cC]ontent"\s*:'),
        re.compile(rb'"(?:google_?[sS]earch|google_?[mM]aps|url_?[cC]ontext|code_?[eE]xecution|file_?[sS]earch)'),
        re.compile(rb'"(?:computer_?[uU]se|retrieval|mcp_?[sS]ervers|enterprise_?[wW]eb_?[sS]earch)'),
    ),
    "bedrock": (
        re.compile(rb'"s3Location"\s*:'),
        re.compile(rb'"(?:promptVariables|systemTool)"\s*:'),
        re.compile(rb'url"\s*:\s*"(?:https?|s3):'),
        re.compile(rb'"type"\s*:\s*"(?:web_search|web_fetch|code_|mcp|computer|bash|text_editor|memory)'),
    ),
    "cohere": (
        re.compile(rb'url"\s*:\s*"https?:'),
        re.compile(rb'"connectors"\s*:'),
        re.compile(rb'"conversation_id"\s*:'),
    ),
    "ollama": (),
}
# A model may hear or speak when its request says so, or has input from elsewhere.
_SOUND = re.compile(rb'"audio|"AUDIO|"speech_?[cC]onfig|"video/')
_HEADER = "x-amzn-bedrock-"
_COUNTS = {
    "input": "input-token-count",
    "output": "output-token-count",
    "cache_read": "cache-read-input-token-count",
    "cache_write": "cache-write-input-token-count",
}


def limits(dialect: Dialect, body: bytes, members: Members) -> tuple[list[int], list[int]]:
    """What ``body`` says of the tokens and the number of its answers.

    A limit that is no whole number above zero means none: several servers take it for "no limit". members: of an
    object, as ``ask`` reads them; it may raise. Raises ValueError for a number of answers that is no number.
    """
    tokens = [value for value in _said(body, _LIMITS[dialect], members) if type(value) is int]
    answers = [value for value in _said(body, _CHOICES[dialect], members) if value is not None]
    if any(type(value) is not int for value in answers):
        raise ValueError("a number of answers that is no whole number")
    return ([] if any(value < 1 for value in tokens) else tokens), answers


def _said(body: bytes, names: Names, members: Members) -> Iterable[Any]:
    outer = members(body, "$")
    for parent, wanted in names.items():
        inside, text = outer, body
        if parent:
            start, end = outer.get(parent, (0, 0))
            text = body[start:end]
            if text[:1] != b"{":
                continue
            inside = members(text, f"$.{parent}")
        for name in wanted:
            if name in inside:
                start, end = inside[name]
                yield _value(text[start:end])


def _value(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return raw


def refers(dialect: Dialect, body: bytes) -> bool:
    """Whether part of the input is not in the body."""
    return any(reference.search(body) for reference in _REFERENCES[dialect])


def caches(dialect: Dialect, body: bytes) -> bool:
    """Whether it may write to a prompt cache."""
    return dialect != "bedrock" or b'"cachePoint"' in body or b'"cache_control"' in body


def sounds(dialect: Dialect, body: bytes) -> bool:
    """Whether it may take or give sound."""
    return _SOUND.search(body) is not None or (dialect == "gemini" and refers(dialect, body))


def counted_in_head(get: Callable[[str], str | None]) -> dict[str, int]:
    """Usage in the head of an answer of InvokeModel, whose models may say nothing of it in the body; empty if none.

    get: a field's value by its name. Source: Amazon Bedrock, "InvokeModel", and "Prompt caching": input is without
    what caches read and were written.
    """
    counts: dict[str, int] = {}
    for name, field in _COUNTS.items():
        text = get(_HEADER + field) or ""
        if re.fullmatch(r"[0-9]{1,9}", text):
            counts[name] = int(text)
    if "input" in counts:
        counts["input"] += counts.get("cache_read", 0) + counts.get("cache_write", 0)
        if "output" in counts:
            counts["total"] = counts["input"] + counts["output"]
    return counts


def signed_fields(authorization: str | None) -> frozenset[str] | None:
    """The header fields that a signature of AWS (version 4) covers beside the body: all of that must reach the server
    as it is. None without one."""
    text = authorization or ""
    if not text.startswith("AWS4-"):
        return None
    _, _, rest = text.partition("SignedHeaders=")
    return frozenset(rest.partition(",")[0].strip().lower().split(";"))
