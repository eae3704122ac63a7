"""Worked cases of other systems, through one adapter per kind and without code for any single case.

``CRETO_CASES_DIR`` names another directory with a ``metering.json``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from creto_hotpath.usage import Dialect, UsageScanner
from creto_metering.ask import estimate_tokens
from creto_metering.meter import reconcile
from creto_metering.money import nano_usd, usd
from creto_metering.prices import MILLION, PriceBook, price_row
from creto_proxy.protocols import llm

DIRECTORY = Path(os.environ.get("CRETO_CASES_DIR") or Path(__file__).parents[2] / "cases")
DIALECTS: dict[str, Dialect] = {
    **dict.fromkeys((*llm.HOSTS.values(), "vllm"), "openai"),
    **dict.fromkeys(("google", "google-vertex", "gemini", "vertex"), "gemini"),
    **dict.fromkeys(("aws", "bedrock"), "bedrock"),
    "anthropic": "anthropic",
    "cohere": "cohere",
    "ollama": "ollama",
}
# Where the usage stands in an answer that is one document; at Ollama it is spread over the document.
ROOTS: dict[str, str] = {"gemini": "usageMetadata"}
NAMES = {
    "input_tokens": "input",
    "output_tokens": "output",
    "total_tokens": "total",
    "cache_read_tokens": "cache_read",
    "cache_write_tokens": "cache_write",
    "reasoning_tokens": "reasoning",
    "input_audio_tokens": "input_audio",
    "output_audio_tokens": "output_audio",
    "output_reasoning_tokens": "reasoning",
    "cache_audio_read_tokens": "cache_read_audio",
    "cache_write_1h_tokens": "cache_write_1h",
    "input_image_tokens": "input_image",
    "output_image_tokens": "output_image",
}
RATES = {
    "input": "input",
    "output": "output",
    "cache_read": "cache_read",
    "cache_write": "cache_write",
    "cache_write_5m": "cache_write",
    "cache_write_1h": "cache_write_1h",
    "input_audio": "input_audio",
    "output_audio": "output_audio",
    "web_search_per_k": "web_search",
    "cache_audio_read": "cache_read_audio",
    "input_image": "input_image",
    "output_image": "output_image",
}


class NotMetered(Exception):
    """The provider's dialect is not one that creto reads."""


def dialect_of(given: dict[str, Any], usage: dict[str, Any]) -> Dialect:
    try:
        dialect = DIALECTS[given["provider"]]
    except KeyError:
        raise NotMetered(given["provider"]) from None
    return "openai-responses" if dialect == "openai" and "input_tokens" in usage else dialect


def scanned(given: dict[str, Any]) -> dict[str, int]:
    dialect = dialect_of(given, given["usage"])
    usage = given["usage"] if dialect == "ollama" else {ROOTS.get(dialect, "usage"): given["usage"]}
    scanner = UsageScanner(dialect, "document")
    scanner.feed(json.dumps({"model": "m", **usage}).encode())
    scanner.finish()
    assert scanner.usage is not None
    return scanner.usage


def expected_tokens(expect: dict[str, Any]) -> dict[str, int]:
    return {NAMES[name]: count for name, count in expect.items()}


def dollars(millionths: int) -> Decimal:
    return Decimal(millionths) / MILLION / 10**9


def rate(price: Any) -> Any:
    if not isinstance(price, dict):
        return price
    return {"base": price["base"], "above": [[tier["start"], tier["price"]] for tier in price["tiers"]]}


def llm_usage(given: dict[str, Any], expect: Any) -> None:
    wanted = expected_tokens(expect)
    found = scanned(given)
    assert {name: found.get(name) for name in wanted} == wanted


def llm_cost(given: dict[str, Any], expect: Any) -> None:
    llm_usage(given, expect["usage"])
    rates = {RATES[name]: rate(price) for name, price in given["rates_usd_per_mtok"].items()}
    row = price_row({"provider": "p", "model": "m", "prices": [{"usd": rates}]})
    price = PriceBook([row]).price("p", "m", 0)
    assert price is not None
    tokens = scanned(given)
    cost_in, cost_out, cost_calls = price.cost_parts(tokens)
    found = {"input": dollars(cost_in), "output": dollars(cost_out), "total": dollars(cost_in + cost_out + cost_calls)}
    assert {name: found[name] for name in expect["price"]} == {k: Decimal(v) for k, v in expect["price"].items()}
    assert Decimal(usd(price.cost_nano(tokens))) == found["total"].quantize(Decimal("1e-9"), "ROUND_HALF_UP")


def sse_usage(given: dict[str, Any], expect: Any) -> None:
    chunks = [chunk.encode() for chunk in given["chunks"]]
    whole = b"".join(chunks)
    for parts in (chunks, [whole], [whole[i : i + 1] for i in range(len(whole))]):
        scanner = UsageScanner(dialect_of(given, {}), "lines" if dialect_of(given, {}) == "ollama" else "events")
        for part in parts:
            scanner.feed(part)
        scanner.finish()
        found = scanner.usage
        if expect is None or expect.get("usage", "") is None:
            assert found is None
        else:
            wanted = expected_tokens(expect)
            assert found is not None
            assert {name: found.get(name) for name in wanted} == wanted


def nano(given: dict[str, Any], expect: Any) -> None:
    assert nano_usd(given["usd"]) == expect["nano"]


def token_estimate(given: dict[str, Any], expect: Any) -> None:
    assert estimate_tokens(len(given["text"])) == expect["tokens"]


def reconciled(given: dict[str, Any], expect: Any) -> None:
    assert reconcile(given["reserved"], given["actual"], exact=given["actual_is_exact"]) == expect["delta"]


ADAPTERS: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "llm_usage": llm_usage,
    "llm_cost": llm_cost,
    "sse_usage": sse_usage,
    "nano_usd": nano,
    "token_estimate": token_estimate,
    "reconcile": reconciled,
}


def cases() -> list[Any]:
    document = json.loads((DIRECTORY / "metering.json").read_bytes())
    return [pytest.param(case, id=case["id"]) for case in document["cases"] if case["kind"] in ADAPTERS]


@pytest.mark.parametrize("case", cases())
def test_case(case: dict[str, Any]) -> None:
    try:
        ADAPTERS[case["kind"]](case["input"], case["expect"])
    except NotMetered as error:
        pytest.skip(f"usage of {error} is not read: only {', '.join(sorted(DIALECTS))} are")


def test_there_are_cases() -> None:
    assert cases()
