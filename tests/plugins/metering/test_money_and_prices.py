"""Integer prices against a decimal reference; price files; the importer."""

from __future__ import annotations

import json
import time
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from creto_metering.importer import import_prices, rendered
from creto_metering.money import MAX_NANO, nano_usd, usd
from creto_metering.prices import PriceBook, PricesInvalid, bundled_prices, load_prices, price_directories, price_row

DAY = 86_400 * 10**9

amounts = st.decimals(min_value=0, max_value=1000, places=6)
counts = st.integers(0, 2_000_000)


def book(*prices: dict[str, Any], **more: Any) -> PriceBook:
    return PriceBook([price_row({"provider": "p", "model": "m", "prices": list(prices), **more})])


@settings(max_examples=100)
@given(amounts, amounts, amounts, amounts, amounts, counts, counts, counts, counts, counts)
def test_integer_cost_equals_the_decimal_calculation(
    p_in: Decimal, p_out: Decimal, p_read: Decimal, p_write: Decimal, p_long: Decimal,
    plain: int, out: int, read: int, write: int, long: int,
) -> None:  # fmt: skip
    rates = {"input": p_in, "output": p_out, "cache_read": p_read, "cache_write": p_write, "cache_write_1h": p_long}
    price = book({"usd": {kind: str(rate) for kind, rate in rates.items()}}).price("p", "m", 0)
    assert price is not None
    tokens = {
        "input": plain + read + write + long,
        "output": out,
        "cache_read": read,
        "cache_write": write + long,
        "cache_write_1h": long,
    }
    exact = (plain * p_in + out * p_out + read * p_read + write * p_write + long * p_long) * 1000
    assert price.cost_nano(tokens) == int(exact.quantize(Decimal(1), ROUND_HALF_UP))


@settings(max_examples=100)
@given(st.integers(0, 400_000), st.integers(0, 400_000))
def test_reserved_ceiling_is_never_below_the_cost(tokens_in: int, tokens_out: int) -> None:
    price = bundled_prices(price_directories([])).price("anthropic", "claude-sonnet-4-5", time.time_ns())
    assert price is not None
    ceiling = price.ceiling_nano(tokens_in, tokens_out, caches=True, audio=False)
    for split in ({}, {"cache_write": tokens_in}, {"cache_write": tokens_in, "cache_write_1h": tokens_in}):
        assert price.cost_nano({"input": tokens_in, "output": tokens_out, **split}) <= ceiling


def test_above_a_threshold_all_tokens_cost_the_tier_and_output_follows_input() -> None:
    usd_rates = {"input": {"base": "3", "above": [[200, "6"]]}, "output": {"base": "15", "above": [[200, "22.5"]]}}
    price = book({"usd": usd_rates}).price("p", "m", 0)
    assert price is not None
    assert price.cost_nano({"input": 200, "output": 10}) == 200 * 3000 + 10 * 15000
    assert price.cost_nano({"input": 201, "output": 10}) == 201 * 6000 + 10 * 22500


def test_cost_is_rounded_half_up_once() -> None:
    price = book({"usd": {"input": "0.0005", "output": "0.0005"}}).price("p", "m", 0)  # half a nano-dollar each
    assert price is not None
    assert price.cost_nano({"input": 1}) == 1
    assert price.cost_nano({"input": 1, "output": 1}) == 1
    assert price.cost_nano({"input": 2, "output": 1}) == 2


def test_price_in_force_is_the_latest_that_has_begun() -> None:
    prices = book({"usd": {"input": "10"}}, {"from": "1970-01-03", "usd": {"input": "2"}})
    found = [prices.price("p", "m", day * DAY) for day in (0, 1, 2, 3)]
    assert [(p.base.input // 10**9, p.effective_from) for p in found if p] == [
        (10, ""), (10, ""), (2, "1970-01-03"), (2, "1970-01-03"),
    ]  # fmt: skip


def test_variant_changes_only_the_kinds_it_names() -> None:
    variant = {"when": {"service_tier": "priority"}, "usd": {"output": "20"}}
    prices = book({"usd": {"input": "1", "output": "10"}}, variant)
    plain, dear = prices.price("p", "m", 0), prices.price("p", "m", 0, {"service_tier": "priority"})
    assert plain is not None
    assert dear is not None
    assert (plain.base.output, dear.base.input, dear.base.output) == (10 * 10**9, 10**9, 20 * 10**9)


def test_unknown_names_have_no_price_and_are_not_remembered_without_bound() -> None:
    prices = book({"usd": {"input": "1"}})
    assert prices.price("p", "x" * 10_000, 0) is None
    for n in range(5000):
        assert prices.price("p", f"m{n}", 0) is None
    assert prices.price("p", "M", 0) is not None
    assert len(prices._in_force) <= 4096


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"provider": "p", "model": "m", "prices": []}, "row 1 \\(m\\): has no list price"),
        ({"provider": "p", "model": "m", "prices": [{"usd": {"soul": "1"}}]}, "'soul' is none of"),
        ({"provider": "p", "model": "m", "prices": [{"usd": {"input": "x"}}]}, "'x' is not an amount"),
        ({"provider": "p", "model": "m", "prices": [{"usd": {"input": "1e-10"}}]}, "finer than a nano-dollar"),
        ({"provider": "p", "model": "m", "match": ["rhymes", "m"], "prices": [{"usd": {"input": "1"}}]}, "rhymes"),
        ({"model": "m"}, "row 1 \\(m\\): 'prices'"),
        ("row", "row 1"),
    ],
)
def test_bad_price_row_is_named(tmp_path: Path, row: Any, complaint: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"format": 1, "models": [row]}))
    with pytest.raises(PricesInvalid, match=complaint):
        load_prices(path)


def test_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.json"
    path.write_text('{"format": 2, "models": []}')
    with pytest.raises(PricesInvalid, match="not a price file of format 1"):
        load_prices(path)


def test_dollars_are_written_and_read_exactly() -> None:
    for nano in (0, 1, 999_999_999, 10**9, 1_230_000_000, MAX_NANO):
        assert nano_usd(usd(nano)) == nano
    assert usd(1_230_000_000) == "1.23"
    assert usd(-5) == "-0.000000005"


@pytest.mark.parametrize("text", ["-1", "x", "", "NaN", "Infinity", "1e30", "1,5"])
def test_what_is_no_amount_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        nano_usd(text)


def test_imported_rows_are_those_of_the_bundled_file_and_agree_with_their_source() -> None:
    genai = pytest.importorskip("genai_prices", reason="genai-prices is an optional dependency")
    document, _ = import_prices(["openai", "anthropic"])
    prices = PriceBook([price_row(row) for row in json.loads(rendered(document))["models"]])
    usage = genai.Usage(input_tokens=300_000, output_tokens=12_345, cache_read_tokens=70_001)
    tokens = {"input": 300_000, "output": 12_345, "cache_read": 70_001}
    now_ns = time.time_ns()
    for provider, model in [
        ("openai", "gpt-4o"), ("openai", "gpt-4o-mini-2024-07-18"), ("openai", "gpt-5"), ("openai", "o3"),
        ("anthropic", "claude-sonnet-4-5-20250929"), ("anthropic", "claude-opus-4-8"),
    ]:  # fmt: skip
        found = prices.price(provider, model, now_ns)
        assert found is not None
        reference = genai.calc_price(usage, model_ref=model, provider_id=provider).total_price
        assert found.cost_nano(tokens) == int((reference * 10**9).quantize(Decimal(1), ROUND_HALF_UP)), model


def test_bundled_prices_know_the_models_of_the_sdks_examples() -> None:
    prices = bundled_prices(price_directories([]))
    for provider, model in [("openai", "gpt-4o-mini"), ("openai", "text-embedding-3-small"), ("azure", "gpt-4o")]:
        assert prices.price(provider, model, time.time_ns()) is not None
